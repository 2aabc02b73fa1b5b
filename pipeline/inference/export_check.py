"""Comparison of an exported graph with the detector that it was made of."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ezsd.data.dataset import pad_images
from ezsd.detector.model import Detections, Vocabulary
from ezsd.pipeline.errors import RunError
from ezsd.pipeline.inference.predictor import TrainedDetector

BOX_TOLERANCE = 0.1
"""Largest difference of a coordinate, pixels."""
SCORE_TOLERANCE = 1e-3
"""Largest difference of a score, and of a mask's probabilities."""
RELATIVE_TOLERANCE = 0.01
"""Largest difference of a score below 0.1, as a fraction of it: there, `SCORE_TOLERANCE` would let any other pass."""
LEAST_COUNTED = 0.5
"""Least fraction of all detections of both sides that are compared: the agreement of a few says nothing."""
LEAST_AGREEING = 0.95
"""Least fraction of detections that agree: a rounding may tip the choice between two boxes that overlap just so much,
or between two scores that are nearly equal."""
SIZES = ((1, 122, 171), (2, 203, 148))
"""Images, height and width of the batches compared: no multiples of a stride."""
_FLOOR = 1e-3
"""Highest score threshold of the comparison: with a higher one there may be nothing to compare."""
_FLOOR_NAME = "score_floor"
"""End of the name of the tensor with the score threshold in a graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Result of a comparison."""

    detections: int
    """Detections compared."""
    found: int
    """Detections of both sides, compared or not."""
    agreeing: int
    """Detections with a counterpart within the tolerances."""
    box: float
    """Largest difference of a coordinate among them, pixels."""
    score: float
    """Largest difference of a score among them."""


class Graph(ABC):
    """Exported graph, loaded from the bytes of its file."""

    @abstractmethod
    def with_floor(self, floor: float) -> Graph:
        """Return this graph with another score threshold."""

    @abstractmethod
    def __call__(self, image: Tensor, text: Tensor) -> list[NDArray[np.generic]]:
        """Outputs for images (B, 3, H, W) uint8 and unit rows (C, D)."""


class OnnxGraph(Graph):
    """Graph in onnxruntime, on the CPU."""

    def __init__(self, data: bytes) -> None:
        # For this format alone: it may be missing.
        import onnxruntime

        self._data = data
        self._session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def with_floor(self, floor: float) -> OnnxGraph:
        """See `Graph.with_floor`."""
        import onnx

        model = onnx.ModelProto.FromString(self._data)
        (tensor,) = (one for one in model.graph.initializer if one.name.endswith(_FLOOR_NAME))
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(floor, np.float32), tensor.name))
        return OnnxGraph(model.SerializeToString())

    def __call__(self, image: Tensor, text: Tensor) -> list[NDArray[np.generic]]:
        """See `Graph.__call__`."""
        found: list[NDArray[np.generic]] = self._session.run(None, {"image": image.numpy(), "text": text.numpy()})
        return found


class TorchGraph(Graph):
    """Graph in torch."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._module = torch.export.load(io.BytesIO(data)).module()

    def with_floor(self, floor: float) -> TorchGraph:
        """See `Graph.with_floor`."""
        changed = TorchGraph(self._data)
        (tensor,) = (one for name, one in changed._module.named_buffers() if name.endswith(_FLOOR_NAME))
        tensor.fill_(floor)
        return changed

    @torch.no_grad()
    def __call__(self, image: Tensor, text: Tensor) -> list[NDArray[np.generic]]:
        """See `Graph.__call__`."""
        return [one.numpy() for one in self._module(image, text)]


def check_export(graph: Graph, trained: TrainedDetector) -> Agreement:
    """Compare a graph with its detector on two batches of different sizes, each with two vocabularies.

    Raises:
        RunError: the detections differ by more than the tolerances, or too few can be compared.
    """
    floor, keep = min(trained.config.eval.score_threshold, _FLOOR), trained.config.eval.max_detections
    tried = graph if floor == trained.config.eval.score_threshold else graph.with_floor(floor)
    text = trained.text
    # As many and as few as no run has, and embeddings that it does not know.
    others = F.normalize(text + text.roll(1, 0), dim=1)[: max(1, len(text) // 2)]
    parts = []
    for number, (images, height, width) in enumerate(SIZES):
        batch = scenes(images, height, width, seed=number)
        for vocabulary in (text, others):
            outputs = tried(batch, vocabulary)
            of_run = detected(trained, batch, vocabulary, floor)
            for place, one in enumerate(of_run):
                mine = outputs[3] == place
                parts.append(compare([output[mine] for output in outputs], one, floor=floor, keep=keep))
    total = Agreement(
        detections=sum(one.detections for one in parts),
        found=sum(one.found for one in parts),
        agreeing=sum(one.agreeing for one in parts),
        box=max(one.box for one in parts),
        score=max(one.score for one in parts),
    )
    require_counted(total)
    if total.agreeing < LEAST_AGREEING * total.detections:
        raise RunError(
            f"the exported graph detects otherwise than the run: {total.agreeing} of {total.detections} detections "
            f"agree within {BOX_TOLERANCE} px and {SCORE_TOLERANCE} of score "
            f"(below 0.1: {RELATIVE_TOLERANCE:.0%} of it), expected at least {LEAST_AGREEING:.0%}; nothing was written"
        )
    return total


def require_counted(total: Agreement) -> None:
    """Raise RunError for a comparison of too few detections."""
    if not total.found:
        raise RunError("the exported graph cannot be checked: the run detects nothing on any of the images for it")
    if total.detections < LEAST_COUNTED * total.found:
        raise RunError(
            f"the exported graph cannot be checked: {total.detections} of {total.found} detections can be compared, "
            f"expected at least {LEAST_COUNTED:.0%}; the others have no counterpart and score too "
            "little to need one; nothing was written"
        )


def scenes(images: int, height: int, width: int, *, seed: int) -> Tensor:
    """Images (B, 3, H, W) uint8 of coloured patches, no two pixels alike: of equal ones, any might be chosen."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.zeros(images, 3, height, width)
    for cells, share in ((4, 0.6), (12, 0.3), (48, 0.1)):
        coarse = torch.rand(images, 3, cells, cells, generator=generator)
        made += share * F.interpolate(coarse, (height, width), mode="bilinear" if cells < 48 else "nearest")
    made = made - made.amin((2, 3), keepdim=True)
    return (made / made.amax((2, 3), keepdim=True) * 255).to(torch.uint8)


def detected(trained: TrainedDetector, batch: Tensor, text: Tensor, floor: float) -> list[Detections]:
    """Detections of a run's own detector in images of one size, in their pixels."""
    settings = trained.config.eval
    padded, sizes = pad_images(list(batch))
    return trained.detector.detect_each(
        padded,
        sizes,
        [Vocabulary(text=text)],
        score_floor=floor,
        nms_iou=settings.nms_iou,
        keep=settings.max_detections,
        class_agnostic_nms=settings.class_agnostic_nms,
        objectness=settings.objectness,
        masks=trained.config.model.masks,
    )[0]


def compare(outputs: Sequence[NDArray[np.generic]], expected: Detections, *, floor: float, keep: int) -> Agreement:
    """Count the detections of an image that have a counterpart, among those that both sides must have found.

    Args:
        outputs: boxes, scores, classes, images and maybe masks of the graph.
        expected: detections of the detector.
        floor: score threshold of both.
        keep: most detections of both.
    """
    boxes, scores, classes = (torch.from_numpy(np.asarray(one)) for one in outputs[:3])
    box = (boxes[:, None] - expected.boxes).abs().amax(2)
    score = (scores[:, None] - expected.scores).abs()
    fits = (box <= BOX_TOLERANCE) & (score <= _score_tolerance(expected.scores)) & (classes[:, None] == expected.labels)
    if expected.masks is not None:
        cells = torch.from_numpy(np.asarray(outputs[4]))
        fits &= (cells[:, None] - expected.masks).abs().amax((2, 3)) <= SCORE_TOLERANCE
    # Beside the threshold, or the other side's last score where it had no room for more, it may lack what is here.
    least = [_least_counted(other, floor, keep) for other in (expected.scores, scores)]
    counted = [fits.any(1) | (scores >= least[0]), fits.any(0) | (expected.scores >= least[1])]
    return Agreement(
        detections=sum(int(one.sum()) for one in counted),
        found=len(scores) + len(expected.scores),
        agreeing=int(fits.any(1).sum() + fits.any(0).sum()),
        box=float(box[fits].max()) if fits.any() else 0.0,
        score=float(score[fits].max()) if fits.any() else 0.0,
    )


def _least_counted(other: Tensor, floor: float, keep: int) -> Tensor:
    """Score from which on the other side, with these scores, must have found the same."""
    last = torch.tensor(max(floor, float(other.min())) if len(other) == keep else floor)
    return last + _score_tolerance(last)


def _score_tolerance(scores: Tensor) -> Tensor:
    # Not below what float32 rounds of a probability.
    return (scores * RELATIVE_TOLERANCE).clamp(1e-6, SCORE_TOLERANCE)
