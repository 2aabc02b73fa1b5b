"""Datasets by name: which files, which names are base and which novel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ezsd.data.annotations import AnnotationError, resolve_image_path
from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.vocabulary import COCO_SPLIT, Split


class DatasetError(ValueError):
    """A dataset's files are not where they should be, or cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Where a dataset lies and how its classes are split."""

    name: str
    """"shapes" or "coco"."""
    root: Path
    """Folder that holds images and annotations."""
    split: Split
    """Base and novel names."""
    train_images: str
    """Folder below root."""
    train_annotations: str
    """COCO-format JSON below root."""
    val_images: str
    """Folder below root."""
    val_annotations: str
    """COCO-format JSON below root."""

    def require(self) -> Dataset:
        """Self, once all four places exist; DatasetError names the first that does not."""
        for part in (self.train_annotations, self.train_images, self.val_annotations, self.val_images):
            if not (self.root / part).exists():
                raise DatasetError(
                    f"--data-root {self.root}: no {part} in it; expected the {self.name} layout: {self.train_images}/, "
                    f"{self.val_images}/, {self.train_annotations}, {self.val_annotations}"
                )
        return self


DATASETS = ("shapes", "coco")
"""Names that `find_dataset` knows."""


def find_dataset(name: str, root: Path) -> Dataset:
    """A dataset by name, without looking at the disk; see `Dataset.require`."""
    if name == "coco":
        train, val, split = "train2017", "val2017", COCO_SPLIT
    elif name == "shapes":
        train, val, split = "train", "val", SHAPES_SPLIT
    else:
        raise DatasetError(f"--dataset {name}: unknown; choose one of {', '.join(DATASETS)}")
    return Dataset(
        name=name,
        root=root,
        split=split,
        train_images=train,
        train_annotations=f"annotations/instances_{train}.json",
        val_images=val,
        val_annotations=f"annotations/instances_{val}.json",
    )


def read_image(path: Path) -> Tensor:
    """(3, H, W) uint8 RGB. DatasetError when it is missing, truncated or no image."""
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such image") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        reason = "is no image" if isinstance(error, UnidentifiedImageError) else f"cannot be read: {error}"
        raise DatasetError(f"{path}: {reason}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_dataset_image(root: Path, file_name: str, width: int, height: int) -> Tensor:
    """Like `read_image`, for a file that annotations name: it must lie below root and have the stated size."""
    path = resolve_image_path(root, file_name)
    pixels = read_image(path)
    if tuple(pixels.shape[1:]) != (height, width):
        found = f"{pixels.shape[2]} x {pixels.shape[1]}"
        raise AnnotationError(f"{path}: the annotations say {width} x {height} pixels, the file has {found}")
    return pixels
