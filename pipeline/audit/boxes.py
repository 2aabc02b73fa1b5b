"""Boxes of a store beside the annotations of a file: which are no base annotation, and which are novel ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ezsd.boxes import iou
from ezsd.cache import Store
from ezsd.pipeline.audit.annotation_file import BASE, NOVEL, AnnotationFile
from ezsd.pipeline.audit.findings import NAMED, NamedBox
from ezsd.pipeline.runs.training_boxes import StoredBoxes

Source: TypeAlias = Literal["windows", "network", "file"]
"""Origin of proposals."""
_NEAR = 0.5
"""Least IoU with a novel annotation of a box that is said to lie on it."""
_IMAGES_AT_ONCE = 2000
_SIDES = 2
"""Most sides on the image's border of a box whose equality with another one says anything."""
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)


def wrong_boxes(
    stored: StoredBoxes, names: Sequence[str], file: AnnotationFile
) -> tuple[NDArray[np.int64], list[NamedBox]]:
    """Find stored base objects that are no base annotation of a file, with the same image, class and box.

    The id decides between annotations; an object with another id is one of the same image, class and box.

    Args:
        stored: of a store.
        names: class names of the store.
        file: annotations to compare with.

    Returns:
        Their rows, and the first `NAMED` of them.
    """
    known = np.flatnonzero((file.kind == BASE) & ~file.left_out)
    ids = file.annotation_id[known]
    order = np.argsort(ids, kind="stable")
    place = np.minimum(np.searchsorted(ids[order], stored.annotation_id), max(len(ids) - 1, 0))
    if not len(ids):
        wrong = np.arange(len(stored.box))
        return wrong, [_named(int(row), None, stored, names, file) for row in wrong[:NAMED]]
    match = known[order[place]]
    found = file.annotation_id[match] == stored.annotation_id
    file_names = np.array([*file.names, ""], object)
    right = (
        found
        & (file.image_id[match] == stored.image_id)
        & (file_names[file.name_index[match]] == np.array(names, object)[stored.class_index])
        & (file.box[match] == stored.box).all(1)
    )
    # A published file may have numbered the same objects otherwise.
    others = np.flatnonzero(~right)
    near = known[np.isin(file.image_id[known], stored.image_id[others])]
    there = {
        (int(image), file.names[name], box.tobytes())
        for image, name, box in zip(file.image_id[near], file.name_index[near], file.box[near], strict=True)
    }
    for row in others.tolist():
        key = (int(stored.image_id[row]), names[stored.class_index[row]], stored.box[row].tobytes())
        right[row] = key in there
    wrong = np.flatnonzero(~right)
    described = [
        _named(row, int(match[row]) if found[row] else None, stored, names, file) for row in wrong[:NAMED].tolist()
    ]
    return wrong, described


def is_on_novel_one(stored: StoredBoxes, rows: NDArray[np.int64], file: AnnotationFile) -> bool:
    """Test whether any of some stored objects is a novel annotation by image and id, or lies on one."""
    novel = np.flatnonzero(file.kind == NOVEL)
    image = file.image_id[novel]
    for image_id in np.unique(stored.image_id[rows]).tolist():
        own = rows[stored.image_id[rows] == image_id]
        there = novel[np.searchsorted(image, image_id) : np.searchsorted(image, image_id, side="right")]
        if not len(there):
            continue
        overlap = iou(torch.from_numpy(stored.box[own].copy()), torch.from_numpy(file.box[there].copy()))
        if np.isin(stored.annotation_id[own], file.annotation_id[there]).any() or bool((overlap >= _NEAR).any()):
            return True
    return False


def _named(row: int, match: int | None, stored: StoredBoxes, names: Sequence[str], file: AnnotationFile) -> NamedBox:
    """Name a stored object; `match` is the base annotation of its id, None where there is none."""
    image_id, annotation_id = int(stored.image_id[row]), int(stored.annotation_id[row])
    stored_class = names[stored.class_index[row]]
    novel = _novel_below(file, image_id, stored.box[row])
    if match is not None:
        differs = {
            "image": int(file.image_id[match]) != image_id,
            "class": file.names[file.name_index[match]] != stored_class,
            "box": bool((file.box[match] != stored.box[row]).any()),
        }
        said = " and ".join(key for key, value in differs.items() if value)
        reason = f"the annotation file has another {said} for it"
    else:
        own = np.flatnonzero(file.annotation_id == annotation_id)
        # Ids of novel annotations need not be unique: the image decides.
        own = own[np.argsort(file.image_id[own] != image_id, kind="stable")]
        reason = "the annotation file has no such annotation"
        if len(own):
            name, kind = file.names[file.name_index[own[0]]], file.kind[own[0]]
            reason = f"the annotation file has {name!r}, which is no base class"
            if kind == NOVEL:
                reason = f"the annotation file has novel class {name!r}"
                overlap = _overlap(stored.box[row], file.box[own[:1]])
                novel = {"annotation_id": annotation_id, "class": name, "iou": float(overlap[0])}
            elif kind == BASE:
                reason = "the annotation file has a crowd, or a box without area, which no training takes"
    return NamedBox(
        annotation_id=annotation_id,
        image_id=image_id,
        image=file.file_name(image_id),
        stored_class=stored_class,
        reason=reason,
        novel=novel,
    )


def _overlap(box: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = iou(torch.from_numpy(box[None].copy()), torch.from_numpy(others.copy()))[0].numpy()
    return found


def _novel_below(file: AnnotationFile, image_id: int, box: NDArray[np.float32]) -> dict[str, Any] | None:
    """The novel annotation of an image that a box lies on."""
    rows = file.rows(NOVEL, np.array([image_id]))
    if not len(rows):
        return None
    overlap = _overlap(box, file.box[rows])
    best = int(overlap.argmax())
    if overlap[best] < _NEAR:
        return None
    return _as_novel(file, int(rows[best]), float(overlap[best]))


def _as_novel(file: AnnotationFile, row: int, overlap: float) -> dict[str, Any]:
    name = file.names[file.name_index[row]]
    return {"annotation_id": int(file.annotation_id[row]), "class": name, "iou": overlap}


def objects_on_novel_ones(
    stored: StoredBoxes, names: Sequence[str], file: AnnotationFile, *, but: NDArray[np.int64]
) -> tuple[int, list[NamedBox]]:
    """Find stored objects with exactly the box of a novel annotation, whatever else they are.

    Args:
        stored: of a store.
        names: class names of the store.
        file: annotations to compare with.
        but: rows to pass over.

    Returns:
        Their number, and the first `NAMED` of them.
    """
    left_out, hits = set(but.tolist()), Hits()
    for row, at in _NovelBoxes(file).equal(stored.image_id, stored.box):
        if row in left_out:
            continue
        hits.count += 1
        if len(hits.named) < NAMED:
            one = NamedBox(
                annotation_id=int(stored.annotation_id[row]),
                image_id=int(stored.image_id[row]),
                image=file.file_name(int(stored.image_id[row])),
                stored_class=names[stored.class_index[row]],
                reason="a novel annotation has the very same box",
                novel=_as_novel(file, at, 1.0),
            )
            hits.named.append(one)
    return hits.count, hits.named


@dataclass(slots=True)
class Hits:
    """Boxes of one kind that were found."""

    count: int = 0
    named: list[NamedBox] = field(default_factory=list)
    """The first `NAMED`."""


def regions_on_novel_ones(store: Store, file: AnnotationFile, source: Source) -> tuple[int, Hits, Hits]:
    """Find regions and proposals of a store with exactly the box of a novel annotation.

    A network's boxes have fractions of pixels: equal ones come from the annotations. Windows, and a file's whole
    numbers, may be equal by chance. Boxes that end at the border of the image on most sides are passed over.

    Args:
        store: of regions.
        file: annotations to compare with.
        source: origin of the proposals.

    Returns:
        Number of boxes that were compared, those that come from the annotations, and those that may by chance.
    """
    novel, certain, chance, compared = _NovelBoxes(file), Hits(), Hits(), 0
    windows = set[int]()
    # Regions that no vote has moved are proposals.
    for product in ("proposals", "regions"):
        for image_id, box in _boxes(store, product):
            compared += len(box)
            for row, at in novel.equal(image_id, box):
                if source == "windows":
                    by_chance = product == "proposals" or at in windows
                    if by_chance:
                        windows.add(at)
                else:
                    by_chance = source == "file" and bool((box[row] == np.rint(box[row])).all())
                hits = chance if by_chance else certain
                hits.count += 1
                if len(hits.named) < NAMED:
                    one = NamedBox(
                        annotation_id=None,
                        image_id=int(image_id[row]),
                        image=file.file_name(int(image_id[row])),
                        stored_class=None,
                        reason=f"a row of {product} has the very box of a novel annotation",
                        novel=_as_novel(file, at, 1.0),
                    )
                    hits.named.append(one)
    return compared, certain, chance


def _boxes(store: Store, product: str) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    ids = store.image_ids.tolist()
    for start in range(0, len(ids), _IMAGES_AT_ONCE):
        some = ids[start : start + _IMAGES_AT_ONCE]
        box, counts = (store.regions if product == "regions" else store.proposals).column("box", some)
        yield np.repeat(np.array(some, np.int64), counts), box


class _NovelBoxes:
    """Novel boxes of a file, to be found by image and corners."""

    def __init__(self, file: AnnotationFile) -> None:
        # Crowds too, and what has no id.
        rows = np.flatnonzero((file.kind == NOVEL) & (file.box[:, 2:] > file.box[:, :2]).all(1))
        width, height = (size[file.image_index[rows]] for size in (file.images.width, file.images.height))
        corner = file.box[rows]
        on_border = (corner[:, :2] <= 0).sum(1) + (corner[:, 2] >= width) + (corner[:, 3] >= height)
        rows = rows[on_border <= _SIDES]
        self._rows = {
            (int(image), box.tobytes()): int(row)
            for image, box, row in zip(file.image_id[rows], file.box[rows] + np.float32(0), rows, strict=True)
        }
        self._keys = np.unique(_keys(file.image_id[rows], file.box[rows]))

    def equal(self, image_id: NDArray[np.int64], box: NDArray[np.float32]) -> Iterator[tuple[int, int]]:
        """Positions of the boxes that are a novel one, and of that annotation."""
        # Numbers first: there are millions of boxes.
        for row in np.flatnonzero(np.isin(_keys(image_id, box), self._keys)).tolist():
            at = self._rows.get((int(image_id[row]), (box[row] + np.float32(0)).tobytes()))
            if at is not None:
                yield row, at


def _keys(image_id: NDArray[np.int64], box: NDArray[np.float32]) -> NDArray[np.uint64]:
    """Numbers that are equal for equal boxes, and seldom for others."""
    # Adding zero makes one zero of two.
    words = np.ascontiguousarray(box + np.float32(0)).view(np.uint64).reshape(-1, 2)
    mixed: NDArray[np.uint64] = image_id.astype(np.uint64) * _MIX[0]
    for word, factor in zip(words.T, _MIX[1:], strict=True):
        mixed = (mixed ^ (mixed >> np.uint64(29)) ^ word) * factor
    return mixed
