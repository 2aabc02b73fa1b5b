"""`ezsd data split`: one annotation file divided into training and validation images, base and novel classes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ezsd.data.coco_json import Fault, annotation_faults, category_faults, image_faults, read_table
from ezsd.pipeline.data.coco_folder import Conversion, PartCount
from ezsd.pipeline.data.dataset_toml import Places, dataset_toml
from ezsd.pipeline.data.datasets import dataset_name, find_dataset
from ezsd.pipeline.data.split import named_split
from ezsd.pipeline.errors import ArgumentError
from ezsd.pipeline.files import new_folder, read_object, require_new_folder, write_text

IMAGES = "images"
"""Link to the image folder."""


def split_images(
    path: Path,
    out: Path,
    *,
    data_root: Path | None = None,
    val: float | None = None,
    seed: int = 0,
    base: Sequence[str] | None = None,
    novel: Sequence[str] | None = None,
) -> Conversion:
    """Write a dataset of one annotation file: train.json, val.json, a link to the images, and its TOML file.

    Entries are written as they are, those of novel objects too: loaders drop what training may not see.

    Args:
        path: a COCO-format JSON file.
        out: the folder to make; it appears when it is whole. The dataset has its name.
        data_root: where the images are, see `find_images`.
        val: images for validation: their number from 1 on, or their fraction below 1; None for none.
        seed: of the choice of these, see `validation_ids`.
        base: base classes; alone, all others are novel.
        novel: novel classes; alone, all others are base. Without both, all are base.

    Raises:
        ArgumentError: `path` is no JSON file, `out` holds something, or `val` leaves no image to train on.
        AnnotationError: the file is not in order.
        DatasetError: the images are not found.
        VocabularyError: the names do not make a split.
    """
    require_new_folder(out)
    if not path.is_file() or path.suffix.lower() != ".json":
        wrong = "is a folder" if path.is_dir() else "does not end in .json" if path.is_file() else "no such file"
        raise ArgumentError(f"{path}: {wrong}; give a COCO-format JSON file")
    found = find_dataset(str(path), data_root)
    split = named_split(found.split.base, where=path, base=base, novel=novel)
    for fault in _faults(path):
        raise fault.error(path)
    document = read_object(path)
    ids = [image["id"] for image in document["images"]]
    chosen = validation_ids(ids, _count(len(ids), val), seed)
    parts = {"train": set(ids) - chosen} | ({} if val is None else {"val": chosen})
    name = dataset_name(out.absolute().name)
    with new_folder(out) as draft:
        counts = [_write(draft, part, document, kept) for part, kept in parts.items()]
        (draft / IMAGES).symlink_to((found.root / found.train_images).resolve(), target_is_directory=True)
        places = {part: Places(IMAGES, f"{part}.json") for part in parts}
        write_text(draft / f"{name}.toml", dataset_toml(name, places, split))
    return Conversion(out=out, parts=counts, splits={name: split}, sources=[], oddities=[])


def validation_ids(ids: Sequence[int], count: int, seed: int) -> set[int]:
    """Choose images for validation: those with the least sha256 of the text "SEED:ID".

    The choice depends on no order, library or machine, and hardly changes where a few images come or go.
    """
    return set(sorted(ids, key=lambda number: hashlib.sha256(f"{seed}:{number}".encode()).digest())[:count])


def _count(images: int, val: float | None) -> int:
    if val is None:
        return 0
    count = round(val * images) if val < 1 else int(val)
    if not 1 <= count < images:
        raise ArgumentError(
            f"`val={val:g}`: is {count} of {images} images; expected at least 1, and at least 1 left to train on"
        )
    return count


def _faults(path: Path) -> Iterator[Fault]:
    """Faults that leave an entry without a place: of images, of categories, and of the references to them."""
    table = read_table(path)
    yield from image_faults(table)
    yield from category_faults(table)
    yield from (one for one in annotation_faults(table, None) if one.key in ("", "id", "image_id", "category_id"))


def _write(folder: Path, part: str, document: Mapping[str, Any], kept: set[int]) -> PartCount:
    images = [image for image in document["images"] if image["id"] in kept]
    annotations = [one for one in document["annotations"] if one["image_id"] in kept]
    text = json.dumps({**document, "images": images, "annotations": annotations})
    write_text(folder / f"{part}.json", text)
    crowd = sum(bool(one.get("iscrowd")) for one in annotations)
    return PartCount(part, len(images), len(annotations) - crowd, crowd)
