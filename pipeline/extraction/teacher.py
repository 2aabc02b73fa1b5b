"""The teacher of a configuration, and whether its rounded weights still say the same."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ezsd.adapt import restore
from ezsd.cache import JSON, differences
from ezsd.crops import crop_boxes
from ezsd.data.annotations import Annotations
from ezsd.errors import TeacherError
from ezsd.pipeline.config.schema import Config, TeacherConfig
from ezsd.pipeline.data.datasets import Dataset
from ezsd.pipeline.errors import ImageError
from ezsd.pipeline.files import as_json
from ezsd.teacher.open_clip import NORMALISATIONS, OpenClipTeacher, Teacher, load_teacher
from ezsd.teacher.requirements import TINY_SHAPES, names_file

log = logging.getLogger("ezsd")

LEAST_COSINE = 0.999
"""Between a crop's embedding from rounded weights and from float32."""
_CHECKED_CROPS = 64


def configured_teacher(config: TeacherConfig, device: str) -> Teacher:
    """The teacher of a configuration, as published."""
    return load_teacher(
        config.name,
        config.weights,
        template=config.template,
        descriptions=config.descriptions,
        names=config.names,
        activation=config.activation,
        normalisation=config.normalisation,
        precision=config.precision,
        device=device,
    )


def with_recorded_normalisation(config: TeacherConfig, model: Mapping[str, JSON]) -> TeacherConfig:
    """A store's teacher with the normalisation of its fingerprint, which a local file may have to be told.

    Args:
        config: of the store's teacher; a record of an earlier version says no normalisation, nor does a tag's.
        model: the teacher's fingerprint, as the store's manifest has it.
    """
    local = config.weights is not None and config.name != TINY_SHAPES and Path(config.weights).is_file()
    if config.normalisation is not None or not local:
        return config
    for name, (mean, std) in NORMALISATIONS.items():
        if (model.get("mean"), model.get("std")) == (list(mean), list(std)):
            return dataclasses.replace(config, normalisation=name)
    return config


def recorded_teacher(
    config: TeacherConfig, model: Mapping[str, JSON], *, where: str, weights: Path | None, device: str
) -> Teacher:
    """Load a teacher that a store or a run recorded, as published.

    Args:
        config: as recorded.
        model: its fingerprint, as the store's manifest has it.
        where: name of the store or the run in messages.
        weights: the file with its weights, if it has moved.
        device: where it runs.

    Raises:
        TeacherError: its weights are gone, or it is another one now.
    """
    if weights is not None:
        config = dataclasses.replace(config, weights=str(weights))
    elif config.weights is not None and names_file(config.weights) and not Path(config.weights).is_file():
        raise TeacherError(
            f"{where}: the weights of its teacher were {config.weights}, which is gone; give `weights=FILE`"
        )
    teacher = configured_teacher(with_recorded_normalisation(config, model), device)
    changed = differences(model, as_json(teacher.fingerprint()))
    if changed:
        raise TeacherError(f"{where}: the teacher is another now: {'; '.join(map(str, changed))}")
    return teacher


@torch.no_grad()
def require_words(teacher: Teacher, names: Sequence[str], backgrounds: Sequence[str]) -> None:
    """Refuse names and background words that a teacher cannot embed: later it would be after re-normalisation.

    Raises:
        TeacherError: it has no embedding of one.
        VocabularyError: no prompts can be made of them, or two would have the same one.
    """
    for words in (list(names), list(backgrounds)):
        if not words:
            continue
        try:
            # Prompts cut into tokens are what may be refused; what a plug-in refuses it alone knows.
            (teacher.tokens if isinstance(teacher, OpenClipTeacher) else teacher.encode_text)(words)
        except KeyError as error:
            raise TeacherError(f"teacher {teacher.name}: has no embedding for {error}; rename the class") from error


@torch.no_grad()
def check_precision(
    teacher: Teacher,
    config: Config,
    dataset: Dataset,
    annotations: Annotations,
    restored: tuple[NDArray[np.float32], list[dict[str, object]]],
    device: str,
) -> None:
    """Compare a bf16 teacher with its float32 self on crops of the first block; one in float32 is left alone.

    Args:
        teacher: re-normalised.
        config: what made it, and how boxes are cropped.
        dataset: source of the images.
        annotations: BASE boxes of the training split.
        restored: the teacher's tuned values and their table, see `restore`.
        device: where it runs.

    Raises:
        TeacherError: an embedding has a cosine below `LEAST_COSINE`.
    """
    if teacher.fingerprint().get("precision") != "bf16":
        return
    reference = configured_teacher(dataclasses.replace(config.teacher, precision="fp32"), device)
    restore(reference.layer_norms(), *restored)
    pixels = _first_crops(config, dataset, annotations, teacher.input_size)
    cosine = float((teacher.encode_image(pixels) * reference.encode_image(pixels)).sum(1).min())
    log.info("bf16 against fp32 on %d crops of the first block: least cosine %.5f", len(pixels), cosine)
    if not cosine >= LEAST_COSINE:
        raise TeacherError(
            f"teacher {teacher.name}: in bf16 a crop's embedding has cosine {cosine:.5f} with float32, expected "
            f"at least {LEAST_COSINE}; use `teacher.precision=fp32`"
        )


def _first_crops(config: Config, dataset: Dataset, annotations: Annotations, size: int) -> Tensor:
    """Crops (B, 3, S, S), float in [0, 1]: base boxes, quarters and whole of the block's first images."""
    crops: list[Tensor] = []
    bad: ImageError | None = None
    settings, source = config.proposals, dataset.images("train")
    for position, record in enumerate(annotations.images[: config.build.block_images]):
        try:
            pixels = source.read(record)
        except ImageError as error:
            # Whether it may be left out is decided where its rows would be made.
            bad = error
            continue
        x, y = record.width, record.height
        halves = [(0, 0, x, y), (0, 0, x / 2, y / 2), (x / 2, 0, x, y / 2), (0, y / 2, x / 2, y), (x / 2, y / 2, x, y)]
        boxes = torch.cat([torch.tensor(halves), torch.from_numpy(annotations.box[annotations.rows(position)])])
        crops.append(
            crop_boxes(pixels, boxes, size=size, ratio=settings.crop_ratio, surround=settings.padding).float() / 255
        )
        if sum(map(len, crops)) >= _CHECKED_CROPS:
            break
    if bad is not None and not crops:
        raise bad
    return torch.cat(crops)[:_CHECKED_CROPS]
