"""`ezsd detect`: objects of any named classes in images."""

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
from ezsd.pipeline.data.images import ImageSource, to_image
from ezsd.pipeline.devices import resolve_device
from ezsd.pipeline.errors import ArgumentError
from ezsd.pipeline.inference.fonts import require_named_font
from ezsd.pipeline.inference.predictor import Search, encode_masks, load_trained, run_teacher
from ezsd.pipeline.inference.visualize import BASE_COLOUR, NOVEL_COLOUR, draw_boxes
from ezsd.pipeline.runs.run import Run
from ezsd.teacher.open_clip import require_told_apart
from ezsd.vocabulary import require_characters, require_different, spelt_as

log = logging.getLogger("ezsd")
BATCH_IMAGES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """One detected object."""

    name: str
    score: float
    """In [0, 1]."""
    box: tuple[float, float, float, float]
    """xyxy, pixels of the image as it is shown."""
    mask: bytes | None
    """Run lengths of its mask over the image as it is shown; None without masks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDetections:
    """What was found in one image: a sequence of `Detection`, best first."""

    source: str
    """The image's path or URL; empty for one that is no file."""
    width: int
    """Pixels, as it is shown."""
    height: int
    """Pixels, as it is shown."""
    objects: tuple[Detection, ...]
    """Best first."""
    has_masks: bool = False
    """Whether each object has a mask."""

    def __len__(self) -> int:
        return len(self.objects)

    def __iter__(self) -> Iterator[Detection]:
        return iter(self.objects)

    def __getitem__(self, position: int) -> Detection:
        return self.objects[position]

    @property
    def names(self) -> tuple[str, ...]:
        """Class names, (N,)."""
        return tuple(one.name for one in self.objects)

    @property
    def scores(self) -> NDArray[np.float32]:
        """In [0, 1], (N,)."""
        return np.array([one.score for one in self.objects], np.float32)

    @property
    def boxes(self) -> NDArray[np.float32]:
        """xyxy, pixels of the image as it is shown, (N, 4)."""
        return np.array([one.box for one in self.objects], np.float32).reshape(-1, 4)

    @property
    def masks(self) -> NDArray[np.bool_] | None:
        """Over the image as it is shown, (N, H, W); None without masks."""
        if not self.has_masks:
            return None
        found = np.zeros((len(self.objects), self.height, self.width), np.bool_)
        for place, one in enumerate(self.objects):
            assert one.mask is not None
            found[place] = decode(one.mask, self.height, self.width)
        return found

    def _repr_html_(self) -> str:
        """A table, in a notebook."""
        rows = "".join(
            f"<tr><td>{html.escape(one.name)}</td><td>{one.score:.3f}</td>"
            + "".join(f"<td>{value:.1f}</td>" for value in one.box)
            + "</tr>"
            for one in self.objects
        )
        head = "".join(f"<th>{title}</th>" for title in ("name", "score", "x1", "y1", "x2", "y2"))
        caption = html.escape(f"{self.source or 'image'}, {self.width} x {self.height}: {len(self)} objects")
        return f"<table><caption>{caption}</caption><tr>{head}</tr>{rows}</table>"


def names_to_find(run: Run, asked: Sequence[str] | None) -> tuple[str, ...]:
    """Names as the run spells them, in whatever Unicode form they were typed; all of the run's own for None."""
    own = run.spec["names"]
    assert isinstance(own, list)
    return tuple(own) if asked is None else spelt_as(asked, own)


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

    The run's other names compete with them unseen, see `ezsd.competitors`.

    Args:
        images: files that Pillow reads.
        run: a finished run.
        classes: names to look for; those unknown to the run are embedded by its teacher.
        threshold: least score.
        device: where to run.
        drawn: where each image with boxes is written, green for names trained with boxes and pink for others; None for
            nowhere. Missing folders are made.
        overrides: settings to look with instead of the run's, see `ezsd.pipeline.config.schema.TEST_TIME`.
        weights: the teacher's weights, if they have moved; read for names that the run does not know.
        alone: whether no other name competes: objects of other classes are then called by the asked names as well.

    Raises:
        ValueError: (of many kinds) a damaged image, an unfinished run, a class that nobody can embed, two classes that
            the teacher cannot tell apart.
    """
    if drawn is not None:
        require_named_font()
    model = Model(run, device=device, overrides=overrides, weights=weights)
    known = frozenset(model.base_names)
    for number, (pixels, seen) in enumerate(model.each(images, classes, threshold=threshold, alone=alone)):
        if drawn is not None:
            _draw(seen, pixels, drawn[number], known)
        yield seen


class Model:
    """A trained detector that finds objects of any names; `ezsd.load` makes it.

    Args:
        run: a finished run.
        device: "auto", "cpu", "cuda" or "cuda:N".
        overrides: settings as `section.key=value` to look with instead of the run's, see
            `ezsd.pipeline.config.schema.TEST_TIME`.
        weights: the teacher's weights, if they have moved; read for names that the run does not know.
    """

    def __init__(
        self, run: Run, *, device: str = "auto", overrides: Sequence[str] = (), weights: Path | None = None
    ) -> None:
        self._run, self._device, self._weights = run, resolve_device(str(device)), weights
        self._trained = load_trained(run, self._device, [overrides] if isinstance(overrides, str) else overrides)
        self._search: tuple[tuple[str, ...], bool, Search] | None = None
        # Text rows by name: a teacher is not loaded twice for one.
        self._rows = dict(zip(self._trained.names, self._trained.text, strict=True))

    def __repr__(self) -> str:
        return f"<ezsd model {self._run.folder}: {len(self.base_names)} base names, {len(self.names)} in all>"

    @property
    def names(self) -> tuple[str, ...]:
        """The names that it was trained for, base names first."""
        return self._trained.names

    @property
    def base_names(self) -> tuple[str, ...]:
        """Those of them that had boxes."""
        return self._trained.names[: self._trained.base_count]

    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource],
        names: Sequence[str] | str | None = None,
        *,
        threshold: float = 0.3,
        alone: bool = False,
    ) -> ImageDetections | list[ImageDetections]:
        """Detect objects in one image, or in each of a list.

        Args:
            images: a path, URL, PIL image, array (H, W, 3) uint8 or tensor (3, H, W), or a list of these.
            names: names to look for, one or several; None for all of `names`.
            threshold: least score, in [0, 1]. The run's own `eval.score_threshold` and `eval.max_detections` hold
                besides; `overrides` of `ezsd.load` change them.
            alone: whether no other name competes: objects of other classes are then called by the asked names too.

        Returns:
            For one image its detections; for a list a list of them.

        Raises:
            EzsdError: an image that cannot be read, or names that are none, alike, or unknown to the teacher.
        """
        if not 0 <= threshold <= 1:
            raise ArgumentError(f"threshold must lie in [0, 1], got {threshold}")
        wanted = names_to_find(self._run, _asked(names))
        single = not isinstance(images, list | tuple)
        # A text is a sequence too, which a type checker cannot rule out.
        sources: list[ImageSource] = [images] if single else list(images)  # type: ignore[list-item, arg-type]
        results = [seen for _, seen in self.each(sources, wanted, threshold=threshold, alone=alone)]
        return results[0] if single else results

    def each(
        self, images: Sequence[ImageSource], names: Sequence[str], *, threshold: float, alone: bool
    ) -> Iterator[tuple[Tensor, ImageDetections]]:
        """Pixels (3, H, W) uint8 of each image and what was found in it, a few images at a time; see `__call__`.

        Names are as `names_to_find` gives them.
        """
        search = self.search(names, alone=alone)
        for start in range(0, len(images), BATCH_IMAGES):
            sources = images[start : start + BATCH_IMAGES]
            pixels = [to_image(source) for source in sources]
            for source, image, found in zip(sources, pixels, self._trained.find(pixels, search), strict=True):
                where = os.fsdecode(source) if isinstance(source, str | os.PathLike) else ""
                yield image, _named_detections(where, image, found, names, threshold)

    def search(self, names: Sequence[str], *, alone: bool = False) -> Search:
        """What to look for, see `TrainedDetector.search`; the last one is kept.

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
            if search.aside:
                told = ", ".join(search.aside)
                log.info("these names of the run mean nearly what is asked for and do not compete: %s", told)
            self._search = (*key, search)
        return self._search[2]

    def _embed(self, names: Sequence[str]) -> None:
        if not names:
            return
        teacher = run_teacher(self._run, self._device, adapted=True, weights=self._weights)
        try:
            with torch.no_grad():
                rows = teacher.encode_text(names).float().cpu()
        except KeyError as error:
            raise VocabularyError(f"`classes`: the teacher {teacher.name} has no embedding for {error}") from None
        self._rows |= dict(zip(names, rows, strict=True))


def _asked(names: Sequence[str] | str | None) -> tuple[str, ...] | None:
    """Names as they were asked for; one of them may stand by itself."""
    if names is None:
        return None
    found = (names,) if isinstance(names, str) else tuple(names)
    if not found or not all(isinstance(name, str) for name in found):
        raise ArgumentError(f"names: expected at least one class name, found {names!r}")
    for name in found:
        require_characters(name)
    require_different(found)
    return found


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
        overrides: settings as `section.key=value` to look with instead of the run's.

    Raises:
        EzsdError: no finished run, or a device that is not there.
    """
    return Model(Run.open(Path(run)), device=device, overrides=overrides)


def found_lines(seen: ImageDetections, *, with_path: bool) -> Iterator[str]:
    """One line per object: score, name and corners, after the image's path if asked for."""
    for one in seen.objects:
        box = " ".join(f"{v:.1f}" for v in one.box)
        path = f"{seen.source}  " if with_path else ""
        yield f"{path}{one.score:.3f}  {one.name}  {box}"


def coco_document(seen: Sequence[ImageDetections], classes: Sequence[str]) -> str:
    """A COCO-format document with a score in each of its `annotations`; `ezsd eval --detections` reads it.

    Its ids are its own: images are known by `file_name`, classes by name. Numbers are as exact as an evaluation of the
    run takes them. Where an object has a mask, `area` is that of the mask.
    """
    number = {name: position for position, name in enumerate(classes, start=1)}
    images = [
        {"id": i, "file_name": one.source, "width": one.width, "height": one.height}
        for i, one in enumerate(seen, start=1)
    ]
    annotations: list[dict[str, object]] = []
    for i, one in enumerate(seen, start=1):
        for found in one.objects:
            x1, y1, x2, y2 = found.box
            entry: dict[str, object] = {"id": len(annotations) + 1, "image_id": i}
            entry["category_id"] = number[found.name]
            bbox = [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)]
            area = round((x2 - x1) * (y2 - y1), 3)
            # Nine digits tell all float32 apart.
            entry |= {"bbox": bbox, "area": area, "iscrowd": 0, "score": float(f"{found.score:.9g}")}
            if found.mask is not None:
                entry["segmentation"] = json_run_lengths(found.mask, (one.height, one.width))
                entry["area"] = int(decompress(found.mask)[1::2].sum())
            annotations.append(entry)
    categories = [{"id": position, "name": name} for name, position in number.items()]
    return json.dumps({"images": images, "categories": categories, "annotations": annotations}, indent=1)


def _named_detections(
    source: str, pixels: Tensor, detections: Detections, names: Sequence[str], threshold: float
) -> ImageDetections:
    """Detections of an image with the names of their classes, those of at least a score."""
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


def _draw(seen: ImageDetections, pixels: Tensor, place: Path, base: frozenset[str]) -> None:
    """Draw what was found: names trained with boxes in one colour, all others in the other."""
    corners = torch.tensor([one.box for one in seen.objects]).reshape(-1, 4)
    captions = [f"{one.name} {one.score:.2f}" for one in seen.objects]
    place.parent.mkdir(parents=True, exist_ok=True)
    colours = [BASE_COLOUR if one.name in base else NOVEL_COLOUR for one in seen.objects]
    masks = [decode(one.mask, seen.height, seen.width) for one in seen.objects if one.mask is not None]
    draw_boxes(pixels, corners, captions, colours, masks=masks or None).save(place)
