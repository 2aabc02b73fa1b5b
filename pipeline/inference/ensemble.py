"""Detections scored again by the teacher, which is shown a crop of each one."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ezsd.detector.ensemble import geometric_ensemble
from ezsd.detector.model import Detections
from ezsd.errors import quantity
from ezsd.pipeline.extraction.encoder import CropEncoder
from ezsd.proposals.select import guesses

log = logging.getLogger("ezsd")


@dataclass(slots=True, kw_only=True)
class TeacherEnsemble:
    """Ensemble of a detector and its re-normalised teacher; it counts what it costs."""

    encoder: CropEncoder
    """Crops boxes as the store did and shows them to the teacher."""
    background: Tensor | None
    """Unit rows of the store's background prompts, (B, D), on the CPU; None without one."""
    weight_base: float
    """Weight of the teacher in scores of base classes, in [0, 1]."""
    weight_novel: float
    """Weight of the teacher in scores of all other classes, in [0, 1]."""
    device: torch.device
    """Place of the teacher."""
    crops: int = 0
    """Crops that the teacher was shown since the last `log_cost`."""
    seconds: float = 0.0
    """Time that this took."""

    def rescore(
        self, image: Tensor, found: Detections, text: Tensor, *, asked_base: Tensor, least: float
    ) -> Detections:
        """Score the detections of an image again, best first.

        Args:
            image: (3, H, W) uint8 RGB.
            found: boxes in pixels of the image, on the CPU.
            text: unit rows of the names to detect and, behind them, of those that compete, (C + K, D), on the CPU.
            asked_base: marks base classes among the names to detect, (C,) bool.
            least: detections that cannot reach this score are dropped unseen.
        """
        weight = torch.where(asked_base, self.weight_base, self.weight_novel)[found.labels]
        # No probability of the teacher's makes a score larger than this.
        reachable = found.scores ** (1 - weight) >= least
        found, weight = found.take(reachable), weight[reachable]
        shown, probability = weight > 0, torch.ones_like(found.scores)
        probability[shown] = self._probability(image, found.boxes[shown], text)[
            torch.arange(int(shown.sum())), found.labels[shown]
        ]
        return geometric_ensemble(found, probability, weight)

    def _probability(self, image: Tensor, boxes: Tensor, text: Tensor) -> Tensor:
        """Probabilities of the names for the crops of boxes, (N, C + K), as the build scores anchors."""
        began = time.perf_counter()
        embedding, passes = self.encoder.encode(image.to(self.device), boxes)
        names, foreground = guesses(
            embedding.cpu(), text, self.background, logit_scale=self.encoder.teacher.logit_scale
        )
        self.crops += passes
        self.seconds += time.perf_counter() - began
        return names * foreground[:, None]

    def log_cost(self, images: int) -> None:
        """Log what the teacher has cost in the last images, one or more, and count anew."""
        log.info(
            "the teacher was shown %s of detections in %s: %.1f crops and %.2f s an image",
            quantity(self.crops, "crop"),
            quantity(images, "image"),
            self.crops / images,
            self.seconds / images,
        )
        self.crops, self.seconds = 0, 0.0
