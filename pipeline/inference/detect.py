"""Detection of any named classes in images: `ezsd detect` and `ezsd.load`."""

from __future__ import annotations

import html
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ezsd.data.masks import decode, decompress, json_run_lengths
from ezsd.detector.model import Detections
from ezsd.errors import VocabularyError
from ezsd.pipeline.data.images import ImageLike, to_image
from ezsd.pipeline.devices import resolve_device
from ezsd.pipeline.errors import ArgumentError
from ezsd.pipeline.inference.ensemble import TeacherEnsemble
from ezsd.pipeline.inference.fonts import require_named_font
from ezsd.pipeline.inference.predictor import (
    ResizedImage,
    Search,
    TrainedDetector,
    encode_masks,
    load_trained,
    run_teacher,
)
from ezsd.pipeline.inference.visualize import BASE_COLOUR, NOVEL_COLOUR, draw_boxes
from ezsd.pipeline.read_ahead import read_ahead
from ezsd.pipeline.runs.run import Run
from ezsd.teacher.open_clip import require_told_apart
from ezsd.vocabulary import require_characters, require_different, spelt_as

log = logging.getLogger("ezsd")
BATCH_IMAGES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """A detected object."""

    name: str
    score: float
    """Confidence in [0, 1]."""
    box: tuple[float, float, float, float]
    """Corners x1, y1, x2, y2 in pixels of the image as it is shown."""
    mask: bytes | None
    """Run lengths of the mask over the image as it is shown; None without masks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDetections:
    """Named detections of one image: a sequence of `Detection`, best first."""

    source: str
    """Path or URL of the image; empty for an image in memory."""
    width: int
    """Width of the image as it is shown, pixels."""
    height: int
    """Height of the image as it is shown, pixels."""
    objects: tuple[Detection, ...]
    """Detected objects, best first."""
    has_masks: bool = False
    """True if each object has a mask."""

    def __len__(self) -> int:
        return len(self.objects)

    def __iter__(self) -> Iterator[Detection]:
        return iter(self.objects)

    def __getitem__(self, position: int) -> Detection:
        return self.objects[position]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes, (N,)."""
        return tuple(one.name for one in self.objects)

    @property
    def scores(self) -> NDArray[np.float32]:
        """Confidences in [0, 1], (N,)."""
        return np.array([one.score for one in self.objects], np.float32)

    @property
    def boxes(self) -> NDArray[np.float32]:
        """Boxes x1, y1, x2, y2 in pixels of the image as it is shown, (N, 4)."""
        return np.array([one.box for one in self.objects], np.float32).reshape(-1, 4)

    @property
    def masks(self) -> NDArray[np.bool_] | None:
        """Masks over the image as it is shown, (N, H, W); None without masks."""
        if not self.has_masks:
            return None
        masks = np.zeros((len(self.objects), self.height, self.width), np.bool_)
        for position, one in enumerate(self.objects):
            assert one.mask is not None
            masks[position] = decode(one.mask, self.height, self.width)
        return masks

    def _repr_html_(self) -> str:
        """Table of the detections, for notebooks."""
        rows = "".join(
            f"<tr><td>{html.escape(one.name)}</td><td>{one.score:.3f}</td>"
            + "".join(f"<td>{value:.1f}</td>" for value in one.box)
            + "</tr>"
            for one in self.objects
        )
        head = "".join(f"<th>{title}</th>" for title in ("name", "score", "x1", "y1", "x2", "y2"))
        caption = html.escape(f"{self.source or 'image'}, {self.width} x {self.height}: {len(self)} objects")
        return f"<table><caption>{caption}</caption><tr>{head}</tr>{rows}</table>"


def resolve_names(run: Run, names: Sequence[str] | None) -> tuple[str, ...]:
    """Spell names as the run does, in whatever Unicode form they were typed; None gives all names of the run."""
    run_names = run.spec["names"]
    assert isinstance(run_names, list)
    return tuple(run_names) if names is None else spelt_as(names, run_names)


def detect_images(
    images: Sequence[Path],
    run: Run,
    classes: Sequence[str],
    *,
    threshold: float,
    device: str,
    drawn: Sequence[Path] | None,
    overrides: Sequence[str] = (),
    weights: Path | None = None,
    alone: bool = False,
) -> Iterator[ImageDetections]:
    """Detect named classes in images, a few at a time.

    Other names of the run compete with them and are not reported, see `ezsd.competitors`.

    Args:
        images: files that Pillow reads.
        run: a finished run.
        classes: names to detect; those unknown to the run are embedded by its teacher.
        threshold: least score, in [0, 1].
        device: where to run.
        drawn: where each image with boxes is written, green for names trained with boxes and pink for others; None for
            nowhere. Missing folders are made.
        overrides: settings used instead of the run's, see `ezsd.pipeline.config.schema.TEST_TIME`.
        weights: the teacher's weights, if they have moved; see `Model`.
        alone: True to let no other name compete: objects of other classes then get the asked names as well.

    Raises:
        ValueError: (of many kinds) a damaged image, an unfinished run, a class that nobody can embed, two classes that
            the teacher cannot tell apart.
    """
    if drawn is not None:
        require_named_font()
    model = Model(run, device=device, overrides=overrides, weights=weights)
    base = frozenset(model.base_names)
    for number, (pixels, detections) in enumerate(model.each(images, classes, threshold=threshold, alone=alone)):
        if drawn is not None:
            _draw(detections, pixels, drawn[number], base)
        yield detections
    if model.ensemble is not None and images:
        model.ensemble.log_cost(len(images))


class Model:
    """Trained detector for objects of any names; `ezsd.load` makes it.

    Args:
        run: a finished run.
        device: "auto", "cpu", "cuda" or "cuda:N".
        overrides: settings as `section.key=value` used instead of the run's, see
            `ezsd.pipeline.config.schema.TEST_TIME`.
        weights: the teacher's weights, if they have moved; read for names that the run does not know, and where the
            settings let the teacher take part in scores.
    """

    def __init__(
        self, run: Run, *, device: str = "auto", overrides: Sequence[str] = (), weights: Path | None = None
    ) -> None:
        self._run, self._device, self._weights = run, resolve_device(str(device)), weights
        overrides = [overrides] if isinstance(overrides, str) else overrides
        self._trained = load_trained(run, self._device, overrides, weights=weights)
        self._search: tuple[tuple[str, ...], bool, Search] | None = None
        # Text rows by name: a teacher is not loaded twice for one.
        self._rows = dict(zip(self._trained.names, self._trained.text, strict=True))

    def __repr__(self) -> str:
        return f"<ezsd model {self._run.folder}: {len(self.base_names)} base names, {len(self.names)} in all>"

    @property
    def trained(self) -> TrainedDetector:
        """The detector itself, with the settings that it is used with."""
        return self._trained

    @property
    def names(self) -> tuple[str, ...]:
        """Names that the detector was trained for, base classes first."""
        return self._trained.names

    @property
    def base_names(self) -> tuple[str, ...]:
        """Names that had boxes in training."""
        return self._trained.names[: self._trained.base_count]

    @property
    def ensemble(self) -> TeacherEnsemble | None:
        """The teacher, where it takes part in scores, with what it has cost."""
        return self._trained.ensemble

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike],
        names: Sequence[str] | str | None = None,
        *,
        threshold: float = 0.3,
        alone: bool = False,
    ) -> ImageDetections | list[ImageDetections]:
        """Detect objects in one image, or in each of a list.

        Args:
            images: a path, URL, PIL image, array (H, W, 3) uint8 or tensor (3, H, W), or a list of these.
            names: names to detect, one or several; None for all of `names`.
            threshold: least score, in [0, 1]. The run's own `eval.score_threshold` and `eval.max_detections` hold
                besides; `overrides` of `ezsd.load` change them.
            alone: True to let no other name compete: objects of other classes then get the asked names too.

        Returns:
            The detections of one image; for a list of images a list of them.

        Raises:
            EzsdError: an image that cannot be read, or names that are none, alike, or unknown to the teacher.
        """
        if not 0 <= threshold <= 1:
            raise ArgumentError(f"threshold must lie in [0, 1], got {threshold}")
        wanted = resolve_names(self._run, checked_names(names))
        single = not isinstance(images, list | tuple)
        # A text is a sequence too, which a type checker cannot rule out.
        sources: list[ImageLike] = [images] if single else list(images)  # type: ignore[list-item, arg-type]
        results = [detections for _, detections in self.each(sources, wanted, threshold=threshold, alone=alone)]
        return results[0] if single else results

    def each(
        self, images: Sequence[ImageLike], names: Sequence[str], *, threshold: float, alone: bool
    ) -> Iterator[tuple[Tensor, ImageDetections]]:
        """Iterate over images: pixels (3, H, W) uint8 and detections of each, computed a few images at a time.

        Arguments are those of `__call__`, with names as `resolve_names` gives them.
        """
        search = self.search(names, alone=alone)
        chunks = [images[start : start + BATCH_IMAGES] for start in range(0, len(images), BATCH_IMAGES)]

        def read(sources: Sequence[ImageLike]) -> list[ResizedImage]:
            return self._trained.resized([to_image(source) for source in sources])

        for sources, read_images in read_ahead(chunks, read):
            resized = read_images()
            (found,) = self._trained.detect_each(resized, [search], least=threshold)
            for source, image, detections in zip(sources, resized, found, strict=True):
                where = os.fsdecode(source) if isinstance(source, str | os.PathLike) else ""
                yield image.original, _named_detections(where, image.original, detections, names, threshold)

    def search(self, names: Sequence[str], *, alone: bool = False) -> Search:
        """Prepare a search for names, see `TrainedDetector.search`; the last search is kept.

        Raises:
            TeacherError: the teacher of an unknown name cannot be had, or cannot tell two names apart.
            VocabularyError: the teacher cannot embed a name.
        """
        key = (tuple(names), alone)
        if self._search is None or self._search[:2] != key:
            self._embed([name for name in names if name not in self._rows])
            text = torch.stack([self._rows[name] for name in names])
            require_told_apart(names, text)
            search = self._trained.search(text, alone=alone)
            if search.excluded:
                excluded = ", ".join(search.excluded)
                log.info("these names of the run mean nearly what is asked for and do not compete: %s", excluded)
            self._search = (*key, search)
        return self._search[2]

    def _embed(self, names: Sequence[str]) -> None:
        if not names:
            return
        teacher = (
            run_teacher(self._run, self._device, adapted=True, weights=self._weights)
            if self.ensemble is None
            else self.ensemble.encoder.teacher
        )
        try:
            with torch.no_grad():
                rows = teacher.encode_text(names).float().cpu()
        except KeyError as error:
            raise VocabularyError(f"`classes`: the teacher {teacher.name} has no embedding for {error}") from None
        self._rows |= dict(zip(names, rows, strict=True))


def checked_names(names: Sequence[str] | str | None) -> tuple[str, ...] | None:
    """Check names of classes; a single text is one name."""
    if names is None:
        return None
    checked = (names,) if isinstance(names, str) else tuple(names)
    if not checked or not all(isinstance(name, str) for name in checked):
        raise ArgumentError(f"names: expected at least one class name, found {names!r}")
    for name in checked:
        require_characters(name)
    require_different(checked)
    return checked


def load(run: str | os.PathLike[str], *, device: str = "auto", overrides: Sequence[str] = ()) -> Model:
    """Load a trained detector.

    ```python
    model = ezsd.load("runs/a")
    for found in model("photo.jpg", ["cat", "red ball"]):
        print(found.name, found.score, found.box)
    ```

    Args:
        run: a run folder that `ezsd train` made.
        device: "auto", "cpu", "cuda" or "cuda:N".
        overrides: settings as `section.key=value` used instead of the run's.

    Raises:
        EzsdError: no finished run, or a device that is not there.
    """
    return Model(Run.open(Path(run)), device=device, overrides=overrides)


def detection_lines(detections: ImageDetections, *, with_path: bool) -> Iterator[str]:
    """Lines of text, one per object: score, name and corners, after the image's path if asked for."""
    for one in detections:
        box = " ".join(f"{v:.1f}" for v in one.box)
        path = f"{detections.source}  " if with_path else ""
        yield f"{path}{one.score:.3f}  {one.name}  {box}"


def coco_document(detections: Sequence[ImageDetections], classes: Sequence[str]) -> str:
    """Write detections as a COCO-format document with scores, which `ezsd eval --detections` reads.

    Images are identified by `file_name` and classes by name; ids are numbers from 1. Numbers are as exact as an
    evaluation of the run takes them. Where an object has a mask, `area` is that of the mask.
    """
    number = {name: position for position, name in enumerate(classes, start=1)}
    images = [
        {"id": i, "file_name": one.source, "width": one.width, "height": one.height}
        for i, one in enumerate(detections, start=1)
    ]
    annotations: list[dict[str, object]] = []
    for i, one in enumerate(detections, start=1):
        for detection in one:
            x1, y1, x2, y2 = detection.box
            entry: dict[str, object] = {"id": len(annotations) + 1, "image_id": i}
            entry["category_id"] = number[detection.name]
            bbox = [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)]
            area = round((x2 - x1) * (y2 - y1), 3)
            # Nine digits tell all float32 apart.
            entry |= {"bbox": bbox, "area": area, "iscrowd": 0, "score": float(f"{detection.score:.9g}")}
            if detection.mask is not None:
                entry["segmentation"] = json_run_lengths(detection.mask, (one.height, one.width))
                entry["area"] = int(decompress(detection.mask)[1::2].sum())
            annotations.append(entry)
    categories = [{"id": position, "name": name} for name, position in number.items()]
    return json.dumps({"images": images, "categories": categories, "annotations": annotations}, indent=1)


def _named_detections(
    source: str, pixels: Tensor, detections: Detections, names: Sequence[str], threshold: float
) -> ImageDetections:
    """Name the detections of an image whose score reaches a threshold."""
    height, width = pixels.shape[1:]
    masks = encode_masks(detections, height, width)
    objects = [
        Detection(name=names[label], score=score, box=(box[0], box[1], box[2], box[3]), mask=mask)
        for box, score, label, mask in zip(
            detections.boxes.tolist(),
            detections.scores.tolist(),
            detections.labels.tolist(),
            repeat(None, len(detections.boxes)) if masks is None else masks,
            strict=True,
        )
        if score >= threshold
    ]
    return ImageDetections(
        source=source, width=width, height=height, objects=tuple(objects), has_masks=masks is not None
    )


def _draw(detections: ImageDetections, pixels: Tensor, path: Path, base: frozenset[str]) -> None:
    """Draw detections: names trained with boxes in one colour, all others in another."""
    boxes = torch.from_numpy(detections.boxes)
    captions = [f"{one.name} {one.score:.2f}" for one in detections]
    colours = [BASE_COLOUR if one.name in base else NOVEL_COLOUR for one in detections]
    masks = detections.masks
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_boxes(pixels, boxes, captions, colours, masks=None if masks is None else list(masks)).save(path)
