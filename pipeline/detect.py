"""`ezsd detect`: objects of any named classes in one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ezsd.vocabulary import VocabularyError
from pipeline.config import ConfigError
from pipeline.datasets import read_image
from pipeline.draw import draw_boxes
from pipeline.evaluate import TrainedDetector, load_trained, run_teacher
from pipeline.runs import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One detected object."""

    name: str
    score: float
    """In [0, 1]."""
    box: tuple[float, float, float, float]
    """xyxy, pixels of the image."""


def detect_image(
    image: Path, run: Run, classes: Sequence[str], *, threshold: float, device: str, drawn: Path | None
) -> list[Found]:
    """Detect named classes in an image; best first.

    Args:
        image: any file Pillow reads.
        run: a finished run.
        classes: names to look for; those unknown to the run are embedded by its teacher.
        threshold: least score.
        device: where to run.
        drawn: write the image with boxes there, if given.

    Raises:
        ValueError: (of many kinds) no image, an unfinished run, a class that nobody can embed.
    """
    if drawn is not None and drawn.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"--out {drawn}: its ending says no picture format; give it one such as .png")
    pixels = read_image(image)
    trained = load_trained(run, device)
    text = class_text(trained, run, classes, device)
    boxes, scores, labels = trained.find([pixels], text)[0]
    found = [
        Found(name=classes[int(label)], score=float(score), box=(float(b[0]), float(b[1]), float(b[2]), float(b[3])))
        for b, score, label in zip(boxes, scores, labels, strict=True)
        if score >= threshold
    ]
    if drawn is not None:
        corners = torch.tensor([f.box for f in found]).reshape(-1, 4)
        captions = [f"{f.name} {f.score:.2f}" for f in found]
        draw_boxes(pixels, corners, captions).save(drawn)
    return found


def class_text(trained: TrainedDetector, run: Run, classes: Sequence[str], device: str) -> Tensor:
    """Unit text rows (C, D) of names: from the run's table, else from its re-normalised teacher."""
    known = {name: row for name, row in zip(trained.names, trained.text, strict=True)}
    unknown = [name for name in classes if name not in known]
    if unknown:
        teacher = run_teacher(run, device, adapted=True)
        try:
            with torch.no_grad():
                rows = teacher.encode_text(unknown).float().cpu()
        except KeyError as error:
            raise VocabularyError(f"--classes: the teacher {teacher.name} has no embedding for {error}") from None
        known |= dict(zip(unknown, rows, strict=True))
    return torch.stack([known[name] for name in classes])
