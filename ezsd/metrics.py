"""Average precision of base, novel and all classes, and how many objects proposals cover.

pycocotools does the matching and the counting; this module only hands it boxes and averages its
per-class curves over groups of classes. At most 100 detections per image and class count, in
every figure: the ordinary rule of COCO. (Published zero-shot results sometimes count 300.)

Two label spaces are in use. *Generalised*: detections scored against all names at once; evaluate
them with `names=None`. *Novel only*: the caller runs the detector with the novel names alone and
evaluates with `names=split.novel`. Restricting `names` for generalised detections does not make
them novel-only ones: the classes would still have competed for every box.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from ezsd.boxes import iou as box_iou
from ezsd.data.annotations import RawAnnotations, read_raw
from ezsd.vocabulary import Split, resolve

MAX_DETECTIONS = 100
"""Detections per image and class that count, highest scores first."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Detections:
    """Detections of any number of images as flat arrays, N in all, in any order.

    Raises:
        ValueError: shapes disagree, a number is not finite, or corners are swapped.
    """

    image_id: npt.NDArray[np.int64]
    """The dataset's own number of the image, (N,)."""
    box: npt.NDArray[np.float32]
    """xyxy, (N, 4), see `ezsd.boxes`; one without area is allowed and matches nothing."""
    score: npt.NDArray[np.float32]
    """Larger is surer, (N,)."""
    class_index: npt.NDArray[np.int64]
    """Position in `Split.names`, (N,)."""

    def __post_init__(self) -> None:
        count = len(self.image_id)
        expected = {"image_id": (count,), "box": (count, 4), "score": (count,), "class_index": (count,)}
        for name, shape in expected.items():
            found = np.shape(getattr(self, name))
            if found != shape:
                raise ValueError(f"detections: {name} must have shape {shape}, got {found}")
        if not (np.isfinite(self.box).all() and np.isfinite(self.score).all()):
            raise ValueError("detections: boxes and scores must be finite")
        if (self.box[:, 2:] < self.box[:, :2]).any():
            raise ValueError("detections: boxes must be x1, y1, x2, y2 with x1 <= x2 and y1 <= y2")


class GroupScores(TypedDict):
    """Means over the classes of a group which have ground truth; None if none has."""

    AP: float | None
    """Average precision in [0, 1], mean over IoU 0.50, 0.55 .. 0.95."""
    AP50: float | None
    """The same at IoU 0.50."""
    AP75: float | None
    """The same at IoU 0.75."""
    AR100: float | None
    """Recall in [0, 1] with 100 detections, mean over the ten IoU thresholds."""
    classes: int
    """Evaluated classes of the group which have ground truth."""
    boxes: int
    """Their ground-truth boxes, crowd boxes not counted."""


class Evaluation(TypedDict):
    """What `evaluate` returns; made of texts, numbers, lists and None, so it goes into JSON."""

    iou_type: str
    max_detections: int
    """Detections per image and class that counted, in all figures."""
    images: int
    """Images of the file, all evaluated."""
    names: list[str]
    """Evaluated classes, in the order of the split."""
    base: GroupScores
    novel: GroupScores
    all: GroupScores
    AP50_per_class: dict[str, float | None]
    """For all names of the split; None without ground truth or when not evaluated."""


def evaluate(
    annotations_path: Path,
    detections: Detections,
    split: Split,
    *,
    names: Sequence[str] | None = None,
    iou_type: Literal["bbox"] = "bbox",
) -> Evaluation:
    """Score detections against all images of an annotation file, by COCO's rules.

    Ground truth is the file's own boxes, unclipped; crowd boxes are neither found nor missed. The
    result does not depend on the order of the detections: equal scores are ordered by class and
    box.

    Args:
        annotations_path: a COCO-format file that knows all names of the split.
        detections: of images of that file; may be empty, which gives 0 and not None.
        split: the class table the detections index, and the groups.
        names: evaluate these classes only and ignore detections of others; None for all. See the
            module for what that does and does not mean.
        iou_type: boxes are all there is.

    Returns:
        The figures of base, novel and all, and AP50 of every class.

    Raises:
        AnnotationError: the file is not in order.
        VocabularyError: `names` has one that is not in the split.
        ValueError: detections of an unknown image or class index, or another `iou_type`.
    """
    if iou_type != "bbox":
        raise ValueError(f"iou_type must be 'bbox', got {iou_type!r}")
    truth = read_raw(annotations_path, split.names)
    _check_references(detections, truth)
    chosen = sorted(resolve(split.names if names is None else names, split.names))
    precision, recall = _run_coco(truth, detections, chosen)
    boxes = np.bincount(truth.class_index[~truth.crowd], minlength=len(split.names))[chosen]
    is_base = np.array(chosen, dtype=np.int64) < len(split.base)
    ap50 = {split.names[index]: _mean(precision[0, :, k]) for k, index in enumerate(chosen)}
    return Evaluation(
        iou_type=iou_type,
        max_detections=MAX_DETECTIONS,
        images=len(truth.images),
        names=[split.names[index] for index in chosen],
        base=_group(precision, recall, boxes, is_base),
        novel=_group(precision, recall, boxes, ~is_base),
        all=_group(precision, recall, boxes, np.ones_like(is_base)),
        AP50_per_class={name: ap50.get(name) for name in split.names},
    )


def recall_at(
    boxes_per_image: Sequence[Tensor | npt.NDArray[np.float32]],
    gt_boxes_per_image: Sequence[Tensor | npt.NDArray[np.float32]],
    iou: float = 0.5,
    top: Sequence[int] = (100, 300),
) -> dict[int, float | None]:
    """Share of ground-truth boxes covered by the first k proposals of their image.

    A ground-truth box is covered if at least one of those k boxes has IoU >= `iou` with it. One
    proposal may cover several: it is a ceiling for a detector, not a one-to-one matching.

    Args:
        boxes_per_image: for each image its proposals, best first, xyxy, (R_i, 4).
        gt_boxes_per_image: for the same images, xyxy in the same pixels, (G_i, 4).
        iou: least overlap that counts, in (0, 1].
        top: the values of k, each >= 1.

    Returns:
        For each k the share in [0, 1] over all images together; None without any ground truth.

    Raises:
        ValueError: the numbers of images differ, or `iou` or a k is out of range.
    """
    if len(boxes_per_image) != len(gt_boxes_per_image):
        raise ValueError(f"proposals of {len(boxes_per_image)} images, ground truth of {len(gt_boxes_per_image)}")
    if not 0 < iou <= 1 or any(k < 1 for k in top):
        raise ValueError(f"iou must be in (0, 1] and every k >= 1, got {iou} and {list(top)}")
    covered = dict.fromkeys(top, 0)
    total = 0
    for boxes, gt_boxes in zip(boxes_per_image, gt_boxes_per_image, strict=True):
        overlap = box_iou(_host(gt_boxes), _host(boxes)) >= iou  # (G, R)
        total += overlap.shape[0]
        for k in covered:
            covered[k] += int(overlap[:, :k].any(dim=1).sum())
    return {k: count / total if total else None for k, count in covered.items()}


def _host(boxes: Tensor | npt.NDArray[np.float32]) -> Tensor:
    """Boxes as a float32 tensor on the CPU, (N, 4); a copy, since a store's arrays are read-only."""
    if isinstance(boxes, Tensor):
        return boxes.detach().to("cpu", torch.float32).reshape(-1, 4)
    return torch.from_numpy(np.array(boxes, dtype=np.float32)).reshape(-1, 4)


def _check_references(detections: Detections, truth: RawAnnotations) -> None:
    """Refuse detections which point at nothing."""
    known = np.array([image.id for image in truth.images], dtype=np.int64)
    strange = detections.image_id[~np.isin(detections.image_id, known)]
    if len(strange):
        raise ValueError(f"detections of image {int(strange[0])}, which the annotation file does not have")
    outside = (detections.class_index < 0) | (detections.class_index >= len(truth.names))
    if outside.any():
        index = int(detections.class_index[outside][0])
        raise ValueError(f"detections with class index {index}; the split has 0 .. {len(truth.names) - 1}")


def _run_coco(
    truth: RawAnnotations, detections: Detections, chosen: Sequence[int]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Let pycocotools match and count.

    Returns:
        Precision (T thresholds, 101 recalls, K chosen classes) and recall (T, K); -1 throughout a
        class without ground truth.
    """
    # pycocotools reports its progress with print, which belongs to whoever runs a command.
    with contextlib.redirect_stdout(io.StringIO()):
        run = COCOeval(_truth_table(truth), _detection_table(truth, detections), "bbox")
        run.params.catIds = list(chosen)
        run.params.maxDets = [MAX_DETECTIONS]
        # Sizes small, medium and large are not reported, and would cost three times as much again.
        run.params.areaRng, run.params.areaRngLbl = run.params.areaRng[:1], run.params.areaRngLbl[:1]
        run.evaluate()
        run.accumulate()
    return run.eval["precision"][:, :, :, 0, 0], run.eval["recall"][:, :, 0, 0]


def _truth_table(truth: RawAnnotations) -> COCO:
    """Ground truth for pycocotools, with our class indices for category ids."""
    columns = zip(truth.image_id, truth.class_index, truth.xywh, truth.crowd, strict=True)
    entries = [_entry(image, index, xywh, crowd=int(crowd)) for image, index, xywh, crowd in columns]
    return _table(truth, entries)


def _detection_table(truth: RawAnnotations, detections: Detections) -> COCO:
    """Detections for pycocotools.

    Not through its loadRes, which cannot take an empty list.
    """
    box = detections.box.astype(np.float64)
    xywh = np.concatenate([box[:, :2], box[:, 2:] - box[:, :2]], axis=1)
    # pycocotools sorts stably by score alone, so the order given here decides between equals.
    order = np.lexsort((*xywh.T, detections.class_index, -detections.score, detections.image_id))
    entries = [
        _entry(detections.image_id[i], detections.class_index[i], xywh[i]) | {"score": float(detections.score[i])}
        for i in order
    ]
    return _table(truth, entries)


def _entry(image_id: np.int64, index: np.integer[Any], xywh: npt.NDArray[np.float64], crowd: int = 0) -> dict[str, Any]:
    """One object in COCO's form, still without an id."""
    return {
        "image_id": int(image_id),
        "category_id": int(index),
        "bbox": xywh.tolist(),
        "area": float(xywh[2] * xywh[3]),
        "iscrowd": crowd,
    }


def _table(truth: RawAnnotations, entries: list[dict[str, Any]]) -> COCO:
    """An index of pycocotools over the given objects, without a file."""
    # Ids are given anew from 1: pycocotools takes a match with the id 0 for no match.
    annotations = [entry | {"id": number} for number, entry in enumerate(entries, start=1)]
    table = COCO()
    table.dataset = {
        "images": [{"id": image.id} for image in truth.images],
        "categories": [{"id": index, "name": name} for index, name in enumerate(truth.names)],
        "annotations": annotations,
    }
    table.createIndex()
    return table


def _group(
    precision: npt.NDArray[np.float64],
    recall: npt.NDArray[np.float64],
    boxes: npt.NDArray[np.int64],
    member: npt.NDArray[np.bool_],
) -> GroupScores:
    """Average the curves of the classes in `member`, (K,)."""
    curves = precision[:, :, member]
    # The thresholds of pycocotools are 0.50, 0.55 .. 0.95: rows 0 and 5 are 0.50 and 0.75.
    return GroupScores(
        AP=_mean(curves),
        AP50=_mean(curves[0]),
        AP75=_mean(curves[5]),
        AR100=_mean(recall[:, member]),
        classes=int((boxes[member] > 0).sum()),
        boxes=int(boxes[member].sum()),
    )


def _mean(values: npt.NDArray[np.float64]) -> float | None:
    """Mean of the entries that exist; pycocotools marks the others with -1."""
    present = values[values > -1]
    return float(present.mean()) if present.size else None
