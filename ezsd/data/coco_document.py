"""Images with boxes as a COCO-format document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledBox:
    """A box with a class name."""

    name: str
    xywh: tuple[float, float, float, float]
    """Left, top, width, height, pixels."""
    crowd: bool = False
    """True for what is neither trained on nor counted: a group, or an object that VOC calls difficult."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledImage:
    """An image and its boxes."""

    id: int
    file_name: str
    """Path below the image folder, with forward slashes."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    boxes: Sequence[LabelledBox]


def coco_document(images: Iterable[LabelledImage], categories: Mapping[str, int]) -> dict[str, object]:
    """Lay out images and boxes as COCO does; boxes are numbered from 1 in their order.

    Args:
        images: with ids that differ.
        categories: id of each class name; a box of another name is a KeyError.
    """
    entries: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for image in images:
        size = {"width": image.width, "height": image.height}
        entries.append({"id": image.id, "file_name": image.file_name, **size})
        for box in image.boxes:
            number, area = len(annotations) + 1, round(box.xywh[2] * box.xywh[3], 2)
            entry = {"id": number, "image_id": image.id, "category_id": categories[box.name], "bbox": list(box.xywh)}
            annotations.append({**entry, "area": area, "iscrowd": int(box.crowd)})
    return {
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in categories.items()],
    }
