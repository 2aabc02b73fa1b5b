"""Proposals that somebody else made: boxes of a results file stand in for scored anchors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from ezsd.boxes import clip
from ezsd.cache import file_digest
from ezsd.data.annotations import ImageRecord
from ezsd.metrics import Named, read_results
from ezsd.metrics.results import corners
from ezsd.pipeline.config.schema import ProposalConfig
from ezsd.pipeline.errors import ConfigError
from ezsd.pipeline.extraction.reuse import Columns


def boxes_digest(boxes: str) -> str:
    """Sha256 of the file that `proposals.boxes` names. ConfigError when it is not there."""
    return file_digest(_file(boxes)).sha256


def given_proposals(config: ProposalConfig, images: Iterable[ImageRecord]) -> dict[int, Columns]:
    """The proposals of each image: the file's best `max_proposals` boxes, best first, cut to the image.

    No NMS is applied. Boxes with less than a pixel left in width or height are dropped.

    Args:
        config: `boxes` names a JSON list of image_id, bbox (left, top, width, height) and score, or a document that
            `ezsd detect --json` printed.
        images: the images of the training file; one without a box has no proposals.

    Raises:
        ConfigError: there is no such file, or its scores cannot be weighted.
        ResultsError: the file is not in order, or has a box in another image.
    """
    images = list(images)
    sizes = {image.id: (image.width, image.height) for image in images}
    named = Named(file_names={image.id: image.file_name for image in images}, categories={})
    shapes = {image_id: (height, width) for image_id, (width, height) in sizes.items()}
    found = read_results(_file(config.boxes), images=shapes, categories=None, named=named)
    if 0 < config.objectness_weight < 1 and found.score.min(initial=0) < 0:
        raise ConfigError(
            f"proposals.boxes {config.boxes}: a score is {found.score.min():g}, and scores below 0 cannot be weighted; "
            "take `proposals.objectness_weight=1`, or give objectness from 0 to 1"
        )
    xyxy = corners(found.xywh)
    order = np.lexsort((-found.score, found.image_id))
    edges = np.searchsorted(found.image_id[order], [[i, i + 1] for i in sizes])
    proposals = {}
    for (image_id, (width, height)), (start, stop) in zip(sizes.items(), edges.tolist(), strict=True):
        rows = order[start:stop]
        box = clip(torch.from_numpy(xyxy[rows].astype(np.float32)), width, height).numpy()
        kept = np.flatnonzero((box[:, 2:] - box[:, :2] >= 1).all(1))[: config.max_proposals]
        proposals[image_id] = {"box": box[kept], "score": found.score[rows][kept].astype(np.float32)}
    return proposals


def _file(boxes: str) -> Path:
    path = Path(boxes)
    if not path.is_file():
        raise ConfigError(f"proposals.boxes {boxes}: no such file; expected a results file in COCO's format")
    return path
