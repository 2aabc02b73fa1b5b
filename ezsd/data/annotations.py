"""COCO-format annotation files -> typed records; the door where novel boxes stay outside.

Three conventions, stated here for every reader of the records:

* A class index is a position in the record's own `names`. The file's category ids are looked up
  by name, so gaps, order and other classes in its table change nothing.
* Images are sorted by id, boxes by image and then annotation id, whatever the file's order.
* Boxes follow `ezsd.boxes`: the file's left, top, width, height become corners, clipped to the
  image. Boxes of which nothing is left are dropped and counted.

Of annotations whose class is not asked for, only `category_id` is read. `load_training` asks for
base classes alone, so no property of a novel box, not even a malformed one, can reach training.
"""

import hashlib
import json
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
import numpy.typing as npt

from ezsd.vocabulary import Split, suggest

_INT64_MAX = 2**63 - 1
# Larger whole numbers are not exact in float32, and a box could then reach outside its image.
_EXTENT_MAX = 2**24


class AnnotationError(ValueError):
    """An annotation file, or a path it names, is not what it must be.

    The message names the file, the place inside it, what was expected, what was found and what
    to do.
    """


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of the file."""

    id: int
    """The dataset's own number; unique."""
    file_name: str
    """Path below the image folder; not trusted, see `resolve_image_path`."""
    width: int
    """Pixels, >= 1."""
    height: int
    """Pixels, >= 1."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RawAnnotations:
    """Boxes of some classes as the file states them: checked, neither clipped nor dropped.

    N boxes in the order of the file. For evaluation tools which must see the file's own numbers;
    everything else wants `Annotations`.
    """

    images: tuple[ImageRecord, ...]
    """All images of the file, by id."""
    names: tuple[str, ...]
    """The class table."""
    image_id: npt.NDArray[np.int64]
    """(N,), each one the id of an image in `images`."""
    xywh: npt.NDArray[np.float64]
    """Left, top, width, height in pixels, (N, 4), finite."""
    class_index: npt.NDArray[np.int32]
    """Position in `names`, (N,)."""
    annotation_id: npt.NDArray[np.int64]
    """(N,), unique."""
    crowd: npt.NDArray[np.bool_]
    """Whether the box is drawn around a group, (N,)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Annotations:
    """Boxes of some classes as flat arrays, N boxes sorted by image and then annotation id."""

    images: tuple[ImageRecord, ...]
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
    """Whether the box is drawn around a group, (N,); never true in training."""
    dropped: Mapping[str, int]
    """Boxes of the asked-for classes left out, by reason: crowd, degenerate, outside."""

    def rows(self, image_position: int) -> slice:
        """The boxes of one image, as a slice of every array.

        Args:
            image_position: position in `images`.

        Raises:
            IndexError: there is no such image.
        """
        if not 0 <= image_position < len(self.images):
            raise IndexError(f"image position {image_position} is outside 0 .. {len(self.images) - 1}")
        start, stop = np.searchsorted(self.image_index, [image_position, image_position + 1])
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
        images = [[image.id, image.width, image.height, image.file_name] for image in self.images]
        return {"images": hashlib.sha256(_canonical(images)).hexdigest(), "boxes": self._boxes_digest()}

    def _boxes_digest(self) -> str:
        """Hash the used names in alphabetical order, then the arrays, little-endian, row by row."""
        used = sorted({self.names[index] for index in np.unique(self.class_index)})
        alphabetical = {name: position for position, name in enumerate(used)}
        rank = np.array([alphabetical.get(name, -1) for name in self.names], dtype="<i4")
        image_id = np.array([image.id for image in self.images], dtype="<i8")
        digest = hashlib.sha256(_canonical(used))
        digest.update(image_id[self.image_index].tobytes())
        digest.update(self.annotation_id.astype("<i8").tobytes())
        digest.update(rank[self.class_index].tobytes())
        digest.update(self.box.astype("<f4").tobytes())
        digest.update(self.crowd.astype("u1").tobytes())
        return digest.hexdigest()


def load_training(path: Path, split: Split) -> Annotations:
    """Read the base boxes of a file; all that training and the store may ever see.

    Novel boxes and boxes of classes outside the split are skipped unread. Crowd boxes are dropped:
    they outline groups, not objects. All images stay, also those without a base box.

    Args:
        path: a COCO-format JSON file.
        split: which classes are base; its novel names need not be in the file.

    Returns:
        The record, with class indices into `split.base`.

    Raises:
        AnnotationError: see `read_raw`.
    """
    return _refine(read_raw(path, split.base), keep_crowd=False)


def load_evaluation(path: Path, split: Split) -> Annotations:
    """Read base and novel boxes, for evaluation and pictures only: never for training or a store.

    Args:
        path: a COCO-format JSON file.
        split: the classes; all its names must be in the file's table.

    Returns:
        The record, with class indices into `split.names`; crowd boxes are kept and flagged.

    Raises:
        AnnotationError: see `read_raw`.
    """
    return _refine(read_raw(path, split.names), keep_crowd=True)


def read_raw(path: Path, names: Sequence[str]) -> RawAnnotations:
    """Read and check the boxes of the given classes, and the table of all images.

    Args:
        path: a COCO-format JSON file.
        names: the classes, which become the record's table.

    Returns:
        The record, in the file's order and numbers.

    Raises:
        AnnotationError: the file cannot be read, is not UTF-8 JSON without a byte order mark, lacks
            a key, holds a value of the wrong kind, an id twice, a name twice or a reference to
            nothing, or does not know one of `names`.
    """
    document = _parse(path)
    images = _read_images(document, path)
    index_of = _class_indices(_read_categories(document, path), names, path)
    known_images = {image.id for image in images}
    image_id, xywh, class_index, crowd = [], [], [], []
    annotation_id: dict[int, int] = {}
    for entry in _entries(document, path, "annotations"):
        index = entry.lookup("category_id", index_of, "categories")
        if index is None:
            continue
        entry.register("id", annotation_id)
        image_id.append(entry.integer("image_id"))
        if image_id[-1] not in known_images:
            raise entry.error("image_id", "the id of an entry of images", "Add the image or remove the annotation.")
        xywh.append(entry.box("bbox"))
        class_index.append(index)
        crowd.append(entry.flag("iscrowd"))
    return RawAnnotations(
        images=images,
        names=tuple(names),
        image_id=np.array(image_id, dtype=np.int64),
        xywh=np.array(xywh, dtype=np.float64).reshape(-1, 4),
        class_index=np.array(class_index, dtype=np.int32),
        annotation_id=np.array(list(annotation_id), dtype=np.int64),
        crowd=np.array(crowd, dtype=np.bool_),
    )


def resolve_image_path(root: Path, file_name: str) -> Path:
    """Find an image named by a file below the image folder, and nowhere else.

    Args:
        root: the image folder; may itself be reached through links.
        file_name: a relative path with forward slashes, from an annotation file.

    Returns:
        The absolute path without links. Whether the file exists is for the reader to find out.

    Raises:
        AnnotationError: the name is empty, absolute, holds "..", a backslash or a NUL, or leads
            out of `root` through a symbolic link.
    """
    reason = _refusal(file_name)
    if reason is None:
        try:
            base, found = root.resolve(), (root / file_name).resolve()
        except (OSError, RuntimeError, ValueError) as error:
            # Link loops, names too long for the system, characters it cannot encode.
            reason = f"cannot be followed ({error})"
        else:
            if found != base and found.is_relative_to(base):
                return found
            reason = "leads out of the folder or to the folder itself"
    raise AnnotationError(
        f"image file name {reprlib.repr(file_name)} {reason}: expected a path below {root}. "
        "Correct file_name in the annotation file."
    )


def _refusal(file_name: str) -> str | None:
    """Say why a name is refused before the disk is asked; None if it is not."""
    if not file_name or "\0" in file_name:
        return "is empty or holds a NUL"
    if "\\" in file_name:
        return "holds a backslash"
    # A drive or a leading slash would make the joined path forget the root.
    if file_name.startswith("/") or PureWindowsPath(file_name).drive:
        return "is absolute"
    return "holds '..'" if ".." in file_name.split("/") else None


@dataclass(frozen=True, slots=True)
class _Entry:
    """One object of one of the file's lists, and where it stands, so that errors can say so."""

    file: Path
    section: str
    position: int
    values: Mapping[str, object]

    def error(self, key: str, expected: str, cure: str) -> AnnotationError:
        """Make the error about one value of this object."""
        found = reprlib.repr(self.values[key]) if key in self.values else "nothing"
        return _error(self.file, f"{self.section}[{self.position}].{key}", expected, found, cure)

    def integer(self, key: str, low: int = -_INT64_MAX, high: int = _INT64_MAX) -> int:
        """A whole number; texts, fractions and truth values are errors, not converted."""
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            limits = f" from {low} to {high}" if high < _INT64_MAX else " of at most 64 bits"
            raise self.error(key, f"a whole number{limits}", "Write it as a plain number, without quotes.")
        return value

    def text(self, key: str) -> str:
        """A text that is not blank."""
        value = self.values.get(key)
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, "a text that is not empty", "Write the name in quotes.")
        return value

    def flag(self, key: str) -> bool:
        """A 0 or 1; a missing one is 0, since many tools leave it out."""
        value = self.values.get(key, 0)
        if not isinstance(value, int) or value not in (0, 1):
            raise self.error(key, "0 or 1", "Write 1 for a box around a group, else 0.")
        return bool(value)

    def box(self, key: str) -> tuple[float, float, float, float]:
        """Four finite numbers."""
        value = self.values.get(key)
        if isinstance(value, list) and len(value) == 4 and all(_is_finite(number) for number in value):
            left, top, width, height = value
            return float(left), float(top), float(width), float(height)
        raise self.error(key, "four finite numbers: left, top, width, height", "Correct or remove the annotation.")

    def register(self, key: str, seen: dict[int, int]) -> int:
        """A whole number that no earlier object of the list has; remembers it with the position."""
        value = self.integer(key)
        if value in seen:
            where = f"{self.section}[{seen[value]}].{key}"
            raise self.error(key, f"an id different from {where}", "Give every entry an id of its own.")
        seen[value] = self.position
        return value

    def lookup(self, key: str, table: Mapping[int, int | None], section: str) -> int | None:
        """What another list of the file, here as a table, holds under this id."""
        value = self.integer(key)
        if value not in table:
            raise self.error(key, f"the id of an entry of {section}", f"Add the entry to {section} or correct the id.")
        return table[value]


def _parse(path: Path) -> Mapping[str, object]:
    """Read the file into its outermost JSON object."""
    cure = "Give the path of a COCO-format annotation file."
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _error(path, "the file", "a readable file", error.strerror or str(error), cure) from error
    if content.startswith(b"\xef\xbb\xbf"):
        raise _error(path, "byte 0", "JSON", "a UTF-8 byte order mark", "Save the file as UTF-8 without one.")
    try:
        # Not json.loads(content): it would guess UTF-16 and 32. Deep nesting ends as RecursionError.
        document = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _error(path, "the file", "JSON in UTF-8", f"something else ({error})", cure) from error
    if not isinstance(document, dict):
        raise _error(path, "$", "an object", reprlib.repr(document), cure)
    return document


def _entries(document: Mapping[str, object], file: Path, section: str) -> Iterator[_Entry]:
    """Go through one of the file's lists."""
    cure = f"A COCO-format file has lists images, annotations and categories; correct {section}."
    entries = document.get(section)
    if not isinstance(entries, list):
        found = reprlib.repr(entries) if section in document else "nothing"
        raise _error(file, section, "a list of objects", found, cure)
    for position, values in enumerate(entries):
        if not isinstance(values, dict):
            raise _error(file, f"{section}[{position}]", "an object", reprlib.repr(values), cure)
        yield _Entry(file, section, position, values)


def _read_images(document: Mapping[str, object], file: Path) -> tuple[ImageRecord, ...]:
    """All images, sorted by id."""
    seen: dict[int, int] = {}
    images = [
        ImageRecord(
            id=entry.register("id", seen),
            file_name=entry.text("file_name"),
            width=entry.integer("width", low=1, high=_EXTENT_MAX),
            height=entry.integer("height", low=1, high=_EXTENT_MAX),
        )
        for entry in _entries(document, file, "images")
    ]
    return tuple(sorted(images, key=lambda image: image.id))


def _read_categories(document: Mapping[str, object], file: Path) -> dict[int, str]:
    """Class names by category id; neither occurs twice."""
    ids: dict[int, int] = {}
    names: dict[str, int] = {}
    for entry in _entries(document, file, "categories"):
        entry.register("id", ids)
        name = entry.text("name")
        if name in names:
            expected = f"a name different from categories[{names[name]}].name"
            raise entry.error("name", expected, "Join the two categories or rename one.")
        names[name] = entry.position
    return dict(zip(ids, names, strict=True))


def _class_indices(categories: Mapping[int, str], names: Sequence[str], file: Path) -> dict[int, int | None]:
    """For every category id the position of its name in `names`; None for classes not asked for."""
    offered = list(categories.values())
    for name in names:
        if name not in offered:
            found = f"no such name; {suggest(name, offered)}" if offered else "an empty list"
            cure = "Correct the name in the file or in the split."
            raise _error(file, "categories", f"an entry named {name!r}", found, cure)
    position = {name: index for index, name in enumerate(names)}
    return {category: position.get(name) for category, name in categories.items()}


def _refine(raw: RawAnnotations, *, keep_crowd: bool) -> Annotations:
    """Clip, drop what has no area left, sort, and count what was dropped."""
    ids = np.array([image.id for image in raw.images], dtype=np.int64)
    image_index = np.searchsorted(ids, raw.image_id).astype(np.int32)
    extent = np.array([[image.width, image.height] for image in raw.images], dtype=np.float64).reshape(-1, 2)
    limit = extent[image_index]
    corner, size = raw.xywh[:, :2], raw.xywh[:, 2:]
    # Two finite numbers may add up to infinity, which the clipping then takes care of.
    with np.errstate(over="ignore"):
        low, high = np.clip(corner, 0, limit), np.clip(corner + size, 0, limit)
    box = np.concatenate([low, high], axis=1).astype(np.float32)
    crowd = raw.crowd & (not keep_crowd)
    # Extents below the resolution of float32 collapse in the cast, so emptiness is asked after it.
    empty = (box[:, 2:] <= box[:, :2]).any(axis=1) & ~crowd
    outside = empty & (size > 0).all(axis=1) & (high <= low).any(axis=1)
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
    )


def _is_finite(value: object) -> bool:
    """Whether a JSON value is a number that a float64 can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond 1e308
        return False


def _error(file: Path, where: str, expected: str, found: str, cure: str) -> AnnotationError:
    """Put the message together; the exception itself stays a plain one, which pickles."""
    return AnnotationError(f"{file}: {where}: expected {expected}, found {found}. {cure}")


def _canonical(value: object) -> bytes:
    """JSON without blanks and without characters beyond ASCII: the same bytes everywhere."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True).encode("ascii")
