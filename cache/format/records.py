"""The rows of images as a reader hands them out."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalRows:
    """Proposals: box (n, 4) float32 pixels, score (n,) float32."""

    box: NDArray[np.float32]
    score: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionRows:
    """Kept regions.

    box (n, 4) float32 pixels; score, confidence (n,) float32; class_index (n,) int32; embedding (n, D) float16, unit,
    also where the store keeps int8.
    """

    box: NDArray[np.float32]
    score: NDArray[np.float32]
    confidence: NDArray[np.float32]
    class_index: NDArray[np.int32]
    embedding: NDArray[np.float16]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroundTruthRows:
    """Annotated boxes.

    box (n, 4) float32 pixels; class_index (n,) int32; annotation_id (n,) int64; embedding (n, D) float16, unit, also
    where the store keeps int8.
    """

    box: NDArray[np.float32]
    class_index: NDArray[np.int32]
    annotation_id: NDArray[np.int64]
    embedding: NDArray[np.float16]


Rows = TypeVar("Rows", bound=ProposalRows | RegionRows | GroundTruthRows | dict[str, NDArray[Any]])


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBatch(Generic[Rows]):
    """Rows of several images, one after another in the order they were asked for.

    counts: rows of each image, (n,) int64. rows: the record of one image, with sum(counts) rows.
    """

    counts: NDArray[np.int64]
    rows: Rows
