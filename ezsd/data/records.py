"""Records of a dataset's images and boxes, as flat arrays.

Three conventions, stated here for every reader of the records:

* A class index is a position in the record's own `names`. The file's category ids are looked up
  by name, so gaps, order and other classes in its table change nothing.
* Images are sorted by id, boxes by image and then annotation id, whatever the file's order.
* Boxes follow `ezsd.boxes`: the file's left, top, width, height become corners, clipped to the
  image. Boxes without any area left are dropped and counted.

Arrays may be memory-mapped; nothing here is an object per image or box.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from ezsd.errors import AnnotationError


def unfit(path: Path, where: str, expected: str, found: str, cure: str) -> AnnotationError:
    """The error of a file that is not what it must be at one place."""
    return AnnotationError(f"{path}: {where}: expected {expected}, found {found}. {cure}")


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image of an annotation file."""

    id: int
    """The dataset's own number, >= 0; unique."""
    file_name: str
    """Path below the image folder; not trusted, see `resolve_image_path`."""
    width: int
    """Pixels, >= 1."""
    height: int
    """Pixels, >= 1."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageTable(Sequence[ImageRecord]):
    """N images as flat arrays; a record is made when one is asked for."""

    id: npt.NDArray[np.int64]
    """(N,), ascending."""
    width: npt.NDArray[np.int32]
    """(N,), pixels."""
    height: npt.NDArray[np.int32]
    """(N,), pixels."""
    name_bytes: npt.NDArray[np.uint8]
    """All file names one after the other, UTF-8."""
    name_offset: npt.NDArray[np.int64]
    """Start of each name in `name_bytes`, and the end of the last, (N + 1,)."""

    @classmethod
    def build(
        cls, ids: Iterable[int], names: Sequence[str], widths: Iterable[int], heights: Iterable[int]
    ) -> ImageTable:
        """Sort images by id and lay them out."""
        id_ = np.array(list(ids), dtype=np.int64)
        order = np.argsort(id_, kind="stable")
        encoded = [names[position].encode("utf-8", "surrogatepass") for position in order]
        return cls(
            id=id_[order],
            width=np.array(list(widths), dtype=np.int32)[order],
            height=np.array(list(heights), dtype=np.int32)[order],
            name_bytes=np.frombuffer(b"".join(encoded), dtype=np.uint8),
            name_offset=np.concatenate([[0], np.cumsum([len(name) for name in encoded], dtype=np.int64)]).astype(
                np.int64
            ),
        )

    def __len__(self) -> int:
        return len(self.id)

    @overload
    def __getitem__(self, key: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, key: slice) -> ImageTable: ...
    def __getitem__(self, key: int | slice) -> ImageRecord | ImageTable:
        if isinstance(key, slice):
            return self._slice(key)
        position = range(len(self))[key]
        start, stop = self.name_offset[position : position + 2]
        return ImageRecord(
            id=int(self.id[position]),
            file_name=self.name_bytes[start:stop].tobytes().decode("utf-8", "surrogatepass"),
            width=int(self.width[position]),
            height=int(self.height[position]),
        )

    def _slice(self, key: slice) -> ImageTable:
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise IndexError(f"images are sliced with step 1, got {step}")
        stop = max(start, stop)
        return ImageTable(
            id=self.id[start:stop],
            width=self.width[start:stop],
            height=self.height[start:stop],
            name_bytes=self.name_bytes,
            name_offset=self.name_offset[start : stop + 1],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RawAnnotations:
    """Boxes of some classes as the file states them: checked, neither clipped nor dropped.

    N boxes in the order of the file. For evaluation tools which must see the file's own numbers;
    everything else wants `Annotations`.
    """

    images: ImageTable
    """All images of the file, by id."""
    names: tuple[str, ...]
    """The class table."""
    image_id: npt.NDArray[np.int64]
    """(N,), each one the id of an image in `images`."""
    xywh: npt.NDArray[np.float64]
    """Left, top, width, height in pixels, (N, 4), finite."""
    area: npt.NDArray[np.float64]
    """Area of the object's outline as the file states it, else of its box, pixels, (N,)."""
    class_index: npt.NDArray[np.int32]
    """Position in `names`, (N,)."""
    annotation_id: npt.NDArray[np.int64]
    """(N,), unique."""
    crowd: npt.NDArray[np.bool_]
    """True where the box is drawn around a group, (N,)."""
    absent: tuple[str, ...] = ()
    """Names that the file's class table lacks."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Annotations:
    """Boxes of some classes as flat arrays, N boxes sorted by image and then annotation id."""

    images: ImageTable
    """All images of the file, by id, those without boxes too."""
    names: tuple[str, ...]
    """The class table: `Split.base` in training, `Split.names` in evaluation."""
    image_index: npt.NDArray[np.int32]
    """Position in `images`, (N,), ascending."""
    box: npt.NDArray[np.float32]
    """xyxy, (N, 4), see `ezsd.boxes`."""
    class_index: npt.NDArray[np.int32]
    """Position in `names`, (N,)."""
    annotation_id: npt.NDArray[np.int64]
    """(N,), unique."""
    crowd: npt.NDArray[np.bool_]
    """True where the box is drawn around a group, (N,); never true in training."""
    dropped: Mapping[str, int]
    """Boxes of the asked-for classes left out, by reason: crowd, degenerate, outside."""
    absent: tuple[str, ...] = ()
    """Novel classes that the file's class table lacks, in evaluation; nothing is known about them."""

    def rows(self, image_position: int) -> slice:
        """The boxes of one image, as a slice of every array.

        Args:
            image_position: position in `images`.

        Raises:
            IndexError: there is no such image.
        """
        if not 0 <= image_position < len(self.images):
            raise IndexError(f"image position {image_position} is outside 0 .. {len(self.images) - 1}")
        # Needles of another type would have numpy convert the whole column at each call.
        ends = np.array([image_position, image_position + 1], dtype=self.image_index.dtype)
        start, stop = np.searchsorted(self.image_index, ends)
        return slice(int(start), int(stop))

    def digest(self) -> dict[str, str]:
        """Fingerprints of what the record holds, for provenance.

        Returns:
            "images" and "boxes", each a sha256 in hexadecimal. The first covers id, width, height
            and file name of all images; the second covers image id, annotation id, class name,
            corners and crowd flag of the record's boxes, so of base boxes alone after
            `load_training`. Formatting, order and other contents of the file leave both unchanged,
            as do the file's path and the order of `names`.
        """
        boxes = boxes_digest(
            self.names,
            image_id=self.images.id[self.image_index],
            annotation_id=self.annotation_id,
            class_index=self.class_index,
            box=self.box,
            crowd=self.crowd,
        )
        return {"images": image_list_digest(self.images), "boxes": boxes}


def image_list_digest(images: ImageTable) -> str:
    """Sha256 of id, width, height and file name of images, see `Annotations.digest`."""
    listed = [[image.id, image.width, image.height, image.file_name] for image in images]
    return hashlib.sha256(_canonical(listed)).hexdigest()


def boxes_digest(
    names: Sequence[str],
    *,
    image_id: npt.NDArray[np.int64],
    annotation_id: npt.NDArray[np.int64],
    class_index: npt.NDArray[np.int32],
    box: npt.NDArray[np.float32],
    crowd: npt.NDArray[np.bool_],
) -> str:
    """Sha256 of N boxes sorted by image and then annotation id, see `Annotations.digest`.

    Args:
        names: the class table.
        image_id: (N,).
        annotation_id: (N,).
        class_index: positions in `names`, (N,).
        box: xyxy, (N, 4), see `ezsd.boxes`.
        crowd: (N,).
    """
    # The used names in alphabetical order, then the arrays, little-endian, row by row.
    used = sorted({names[index] for index in np.unique(class_index)})
    alphabetical = {name: position for position, name in enumerate(used)}
    rank = np.array([alphabetical.get(name, -1) for name in names], dtype="<i4")
    digest = hashlib.sha256(_canonical(used))
    digest.update(image_id.astype("<i8").tobytes())
    digest.update(annotation_id.astype("<i8").tobytes())
    digest.update(rank[class_index].tobytes())
    digest.update(box.astype("<f4").tobytes())
    digest.update(crowd.astype("u1").tobytes())
    return digest.hexdigest()


def refine(raw: RawAnnotations, *, keep_crowd: bool) -> Annotations:
    """Clip, drop what has no area left, sort, and count what was dropped."""
    image_index = np.searchsorted(raw.images.id, raw.image_id).astype(np.int32)
    box, empty, outside = clip_boxes(raw.xywh, raw.images.width[image_index], raw.images.height[image_index])
    crowd = raw.crowd & (not keep_crowd)
    empty &= ~crowd
    outside &= ~crowd
    kept = np.flatnonzero(~(crowd | empty))
    kept = kept[np.lexsort((raw.annotation_id[kept], image_index[kept]))]
    return Annotations(
        images=raw.images,
        names=raw.names,
        image_index=image_index[kept],
        box=box[kept],
        class_index=raw.class_index[kept],
        annotation_id=raw.annotation_id[kept],
        crowd=raw.crowd[kept],
        dropped={
            "crowd": int(crowd.sum()),
            "degenerate": int((empty & ~outside).sum()),
            "outside": int(outside.sum()),
        },
        absent=raw.absent,
    )


def clip_boxes(
    xywh: npt.NDArray[np.float64], width: npt.NDArray[np.int32], height: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Corners within the image, (N, 4), what is empty then, (N,), and what of that lay outside, (N,)."""
    limit = np.stack([width, height], axis=1).astype(np.float64)
    corner, size = xywh[:, :2], xywh[:, 2:]
    # Two finite numbers may add up to infinity, which the clipping then takes care of.
    with np.errstate(over="ignore"):
        low, high = np.clip(corner, 0, limit), np.clip(corner + size, 0, limit)
    box = np.concatenate([low, high], axis=1).astype(np.float32)
    # Extents below the resolution of float32 collapse in the cast, so emptiness is asked after it.
    empty: npt.NDArray[np.bool_] = np.any(box[:, 2:] <= box[:, :2], axis=1)
    outside: npt.NDArray[np.bool_] = empty & np.all(size > 0, axis=1) & np.any(high <= low, axis=1)
    return box, empty, outside


def _canonical(value: object) -> bytes:
    """JSON without blanks and without characters beyond ASCII: the same bytes everywhere."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True).encode("ascii")
