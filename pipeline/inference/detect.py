"""Detection of any named classes in images: `ezsd detect` and `ezsd.load`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ezsd.detector.model import Detections
from ezsd.errors import TeacherError, VocabularyError, inflected, quantity
from ezsd.pipeline.data.images import ImageLike, to_image
from ezsd.pipeline.data.sources import Camera, Source, Video
from ezsd.pipeline.data.video import FrameReader, VideoFile
from ezsd.pipeline.devices import resolve_device
from ezsd.pipeline.errors import ArgumentError, ImageError
from ezsd.pipeline.inference.detection_files import Output, Writers
from ezsd.pipeline.inference.detections import Detection, ImageDetections
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
from ezsd.pipeline.interrupts import Stopped, finishing
from ezsd.pipeline.progress import Progress
from ezsd.pipeline.read_ahead import read_ahead
from ezsd.pipeline.runs.run import Run
from ezsd.teacher.open_clip import OpenClipTeacher, require_told_apart
from ezsd.vocabulary import canonical, require_characters, require_different, spelt_as, suggest

log = logging.getLogger("ezsd")
BATCH_IMAGES = 8


def resolve_names(run: Run, names: Sequence[str] | None) -> tuple[str, ...]:
    """Spell names as the run does, in whatever Unicode form they were typed; None gives all names of the run."""
    run_names = run.spec["names"]
    assert isinstance(run_names, list)
    return tuple(run_names) if names is None else spelt_as(names, run_names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image to detect in, or why there is none."""

    image: ImageLike | ImageError
    source: str = ""
    """Path, URL or name of where it comes from; empty for an image in memory."""
    frame: int | None = None
    """Number of a frame, from 0; None of an image."""
    place: int = 0
    """Position of the source in a list of sources."""
    rate: float | None = None
    """Frames a second; None of an image."""
    live: bool = False
    """True for a camera's, whose detections are wanted at once."""


def detect_images(
    images: Sequence[Source],
    run: Run,
    classes: Sequence[str],
    *,
    threshold: float,
    device: str,
    drawn: Sequence[Path] | None,
    overrides: Sequence[str] = (),
    weights: Path | None = None,
    alone: bool = False,
    class_thresholds: Mapping[str, float] | None = None,
    template: str | None = None,
    batch_size: int = BATCH_IMAGES,
    frame_step: int = 1,
    max_frames: int | None = None,
    outputs: Sequence[Output] = (),
    progress: bool = False,
) -> Iterator[ImageDetections]:
    """Detect named classes in images, a few at a time: the memory it takes does not grow with their number.

    Other names of the run compete with them and are not reported, see `ezsd.competitors`. An image that cannot be read
    is named and left out. A first SIGINT or SIGTERM ends the detection after the images at hand, with all outputs
    whole.

    Args:
        images: image files, URLs, videos and cameras.
        run: a finished run.
        classes: names to detect; those unknown to the run are embedded by its teacher.
        threshold: least score, in [0, 1].
        device: where to run.
        drawn: where each source with boxes is written, green for names trained with boxes and pink for others; None for
            nowhere. Missing folders are made.
        overrides: settings used instead of the run's, see `ezsd.pipeline.config.schema.TEST_TIME`.
        weights: the teacher's weights, if they have moved; see `Model`.
        alone: True to let no other name compete: objects of other classes then get the asked names as well.
        class_thresholds: least score of some of the names.
        template: prompt for all names, see `Model`.
        batch_size: images that the network sees at once, >= 1.
        frame_step: each `frame_step`-th frame of a video or camera is looked at.
        max_frames: most frames of each video and camera; None for all.
        outputs: formats and places to write the detections to as well.
        progress: True to show the progress.

    Raises:
        ImageError: at the end, one or more images could not be read.
        ValueError: (of many kinds) an unfinished run, a class that nobody can embed, two classes that the teacher
            cannot tell apart.
        Stopped: after SIGINT or SIGTERM.
    """
    if drawn is not None:
        require_named_font()
    model = Model(run, device=device, overrides=overrides, weights=weights, template=template)
    thresholds = _thresholds(classes, threshold, class_thresholds)
    model.search(classes, alone=alone)
    unreadable = _Unreadable(len(images))
    with ExitStack() as stack:
        bar = stack.enter_context(_progress(images, frame_step, max_frames)) if progress else None
        writers = stack.enter_context(Writers(outputs, classes))
        pictures = stack.enter_context(_Drawing(drawn, frozenset(model.base_names)))
        stop = stack.enter_context(finishing("these images"))
        stream = model.each(
            _read_sources(images, frame_step, max_frames),
            classes,
            thresholds=thresholds,
            alone=alone,
            batch_size=batch_size,
        )
        done = 0
        for picture, found in stack.enter_context(closing(stream)):
            if isinstance(found, ImageError):
                unreadable.note(found)
            else:
                pixels, detections = found
                writers.write(detections)
                pictures.draw(detections, pixels, picture)
                done += 1
                yield detections
            if bar is not None:
                bar.advance()
            if stop.signal:
                break
        if not done and not stop.signal:
            unreadable.require_none()
        pictures.finish()
        writers.finish()
        if stop.signal:
            stopped = Stopped(stop.signal)
            stopped.kept = (
                f"the detections of {quantity(done, 'image')} are kept; run the same command to detect in all"
            )
            raise stopped
    if model.ensemble is not None and done:
        model.ensemble.log_cost(done)
    unreadable.require_none()


class _Unreadable:
    """Images that could not be read.

    Args:
        images: number of sources.
    """

    def __init__(self, images: int) -> None:
        self._images, self._count = images, 0
        self._first: ImageError | None = None

    def note(self, error: ImageError) -> None:
        """Count one, and name it at once where there are others."""
        self._count += 1
        self._first = self._first or error
        if self._images > 1:
            log.warning("%s; left out", error)

    def require_none(self) -> None:
        """ImageError if there was one."""
        if self._first is not None and self._images == 1:
            raise self._first
        if self._first is not None:
            raise ImageError(
                f"{self._count} of {self._images} could not be read and {inflected(self._count, 'is', 'are')} left "
                f"out, the first: {self._first}"
            )


def _progress(images: Sequence[Source], frame_step: int, max_frames: int | None) -> Progress:
    """Progress over all images and frames, as far as their number is known."""
    total: int | None = 0
    for source in images:
        frames: int | None = 1
        if isinstance(source, Video | Camera):
            frames = max_frames
            # What cannot be opened is named when its turn comes.
            with contextlib.suppress(ImageError):
                if isinstance(source, Video):
                    with FrameReader(source, step=frame_step, most=max_frames) as reader:
                        frames = reader.frames
        total = None if total is None or frames is None else total + frames
    videos = all(isinstance(source, Video | Camera) for source in images)
    return Progress("detect", total, unit="frame" if videos else "image")


def _read_sources(sources: Sequence[Source], step: int, most: int | None) -> Iterator[Picture]:
    """Images and frames of all sources, in order; frames are read as they are asked for."""
    for place, source in enumerate(sources):
        name = os.fsdecode(source) if isinstance(source, Path | str) else str(source)
        if not isinstance(source, Video | Camera):
            yield Picture(image=source, source=name, place=place)
            continue
        try:
            with FrameReader(source, step=step, most=most) as reader:
                for number, pixels in reader:
                    yield Picture(
                        image=pixels,
                        source=name,
                        frame=number,
                        place=place,
                        rate=reader.rate,
                        live=isinstance(source, Camera),
                    )
        except ImageError as error:
            yield Picture(image=error, source=name, place=place)


class _Drawing:
    """Images and videos with the boxes drawn over them.

    Args:
        places: one per source; None for nowhere.
        base: names that were trained with boxes.
    """

    def __init__(self, places: Sequence[Path] | None, base: frozenset[str]) -> None:
        self._places, self._base = places, base
        self._video: VideoFile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._video is not None:
            self._video.discard()

    def draw(self, detections: ImageDetections, pixels: Tensor, picture: Picture) -> None:
        """Draw the detections of one image, or append them to the video of their source."""
        if self._places is None:
            return
        path = self._places[picture.place]
        if picture.rate is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _drawn(detections, pixels, self._base).save(path)
            return
        if self._video is not None and self._video.path != path:
            self.finish()
        if self._video is None:
            self._video = VideoFile(path, picture.rate)
        self._video.write(np.asarray(_drawn(detections, pixels, self._base, scale=1)))

    def finish(self) -> None:
        """Put the video that is being written in its place."""
        if self._video is not None:
            self._video.finish()
            self._video = None


def _thresholds(
    names: Sequence[str], threshold: float, class_thresholds: Mapping[str, float] | None
) -> tuple[float, ...]:
    """Least score of each name, (C,).

    Raises:
        ArgumentError: a threshold is not in [0, 1].
        VocabularyError: one is of a class that is not searched.
    """
    own = {canonical(name): least for name, least in (class_thresholds or {}).items()}
    for where, least in (("threshold", threshold), *((f"threshold of {name!r}", own[name]) for name in own)):
        if not 0 <= least <= 1:
            raise ArgumentError(f"{where} must lie in [0, 1], got {least}")
    known = {canonical(name) for name in names}
    for name in own:
        if name not in known:
            raise VocabularyError(
                f"`class_threshold`: {name!r} is not among the classes to detect; {suggest(name, names)}"
            )
    return tuple(own.get(canonical(name), threshold) for name in names)


class Model:
    """Trained detector for objects of any names; `ezsd.load` makes it.

    Args:
        run: a finished run.
        device: "auto", "cpu", "cuda" or "cuda:N".
        overrides: settings as `section.key=value` used instead of the run's, see
            `ezsd.pipeline.config.schema.TEST_TIME`.
        weights: the teacher's weights, if they have moved; read for names that the run does not know, where the
            settings let the teacher take part in scores, and for a template.
        template: prompt with one "{}", or "imagenet" for CLIP's 80, in place of the prompts and descriptions of the
            run; all names are then embedded anew by the teacher.

    Raises:
        TeacherError: the teacher makes prompts of its own, or cannot be had.
    """

    def __init__(
        self,
        run: Run,
        *,
        device: str = "auto",
        overrides: Sequence[str] = (),
        weights: Path | None = None,
        template: str | None = None,
    ) -> None:
        self._run, self._device, self._weights = run, resolve_device(str(device)), weights
        overrides = [overrides] if isinstance(overrides, str) else overrides
        self._template = template
        self._trained = load_trained(run, self._device, overrides, weights=weights)
        if template is not None:
            rows = self._encoded(self._trained.names)
            self._trained = dataclasses.replace(self._trained, text=rows)
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
        class_thresholds: Mapping[str, float] | None = None,
        alone: bool = False,
        batch_size: int = BATCH_IMAGES,
    ) -> ImageDetections | list[ImageDetections]:
        """Detect objects in one image, or in each of a list.

        Args:
            images: a path, URL, PIL image, array (H, W, 3) uint8 or tensor (3, H, W), or a list of these.
            names: names to detect, one or several; None for all of `names`.
            threshold: least score, in [0, 1]. The run's own `eval.score_threshold` and `eval.max_detections` hold
                besides; `overrides` of `ezsd.load` change them.
            class_thresholds: least score of some of the names.
            alone: True to let no other name compete: objects of other classes then get the asked names too.
            batch_size: images that the network sees at once, >= 1.

        Returns:
            The detections of one image; for a list of images a list of them.

        Raises:
            EzsdError: an image that cannot be read, or names that are none, alike, or unknown to the teacher.
        """
        wanted = resolve_names(self._run, checked_names(names))
        single = not isinstance(images, list | tuple)
        # A text is a sequence too, which a type checker cannot rule out.
        sources: list[ImageLike] = [images] if single else list(images)  # type: ignore[list-item, arg-type]
        if batch_size < 1:
            raise ArgumentError(f"batch_size must be >= 1, got {batch_size}")
        pictures = (
            Picture(image=source, source=os.fsdecode(source) if isinstance(source, str | os.PathLike) else "")
            for source in sources
        )
        thresholds = _thresholds(wanted, threshold, class_thresholds)
        results = []
        for _, found in self.each(pictures, wanted, thresholds=thresholds, alone=alone, batch_size=batch_size):
            if isinstance(found, ImageError):
                raise found
            results.append(found[1])
        return results[0] if single else results

    def each(
        self,
        pictures: Iterable[Picture],
        names: Sequence[str],
        *,
        thresholds: Sequence[float],
        alone: bool = False,
        batch_size: int = BATCH_IMAGES,
        competitors: int = 0,
    ) -> Generator[tuple[Picture, tuple[Tensor, ImageDetections] | ImageError], None, None]:
        """Iterate over images: pixels (3, H, W) uint8 and detections of each, or why it cannot be read.

        They are computed `batch_size` at a time while the next ones are read.

        Args:
            pictures: may be endless.
            names: as `resolve_names` gives them, (C,).
            thresholds: least score of each name, (C,).
            alone: see `__call__`.
            batch_size: see `__call__`.
            competitors: number of the likeliest other names to give with each detection.
        """
        likeliest = competitors + 1 if competitors else 0
        search = self.search(names, alone=alone)

        def read(batch: Sequence[Picture]) -> list[ResizedImage | ImageError]:
            return [self._read(picture) for picture in batch]

        for batch, reading in read_ahead(_batches(pictures, batch_size), read):
            images = reading()
            resized = [image for image in images if not isinstance(image, ImageError)]
            (found,) = self._trained.detect_each(resized, [search], least=min(thresholds), likeliest=likeliest)
            rest = iter(found)
            for picture, image in zip(batch, images, strict=True):
                if isinstance(image, ImageError):
                    yield picture, image
                    continue
                named = _named_detections(picture, image.original, next(rest), names, thresholds, search.competitors)
                yield picture, (image.original, named)

    def _read(self, picture: Picture) -> ResizedImage | ImageError:
        if isinstance(picture.image, ImageError):
            return picture.image
        try:
            (image,) = self._trained.resized([to_image(picture.image)])
        except ImageError as error:
            return error
        return image

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
        self._rows |= dict(zip(names, self._encoded(names), strict=True))

    @torch.no_grad()
    def _encoded(self, names: Sequence[str]) -> Tensor:
        """Unit rows (C, D) of names, by the teacher, on the CPU."""
        teacher = (
            run_teacher(self._run, self._device, adapted=True, weights=self._weights)
            if self.ensemble is None
            else self.ensemble.encoder.teacher
        )
        if self._template is not None:
            if not isinstance(teacher, OpenClipTeacher):
                raise TeacherError(f"`template`: the teacher {teacher.name} makes its own prompts; leave it out")
            teacher.use_template(self._template)
        try:
            return teacher.encode_text(names).float().cpu()
        except KeyError as error:
            raise VocabularyError(f"`classes`: the teacher {teacher.name} has no embedding for {error}") from None


def _batches(pictures: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    """Batches of up to `size`; a camera's image waits for no other."""
    batch: list[Picture] = []
    for picture in pictures:
        batch.append(picture)
        if len(batch) == size or picture.live:
            yield batch
            batch = []
    if batch:
        yield batch


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


def load(
    run: str | os.PathLike[str], *, device: str = "auto", overrides: Sequence[str] = (), template: str | None = None
) -> Model:
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
        template: prompt for all names in place of the run's, see `Model`.

    Raises:
        EzsdError: no finished run, or a device that is not there.
    """
    return Model(Run.open(Path(run)), device=device, overrides=overrides, template=template)


def _named_detections(
    picture: Picture,
    pixels: Tensor,
    detections: Detections,
    names: Sequence[str],
    thresholds: Sequence[float],
    competitors: Sequence[str],
) -> ImageDetections:
    """Name the detections of an image whose score reaches the threshold of their class."""
    known = (*names, *competitors)
    height, width = pixels.shape[1:]
    masks = encode_masks(detections, height, width)
    objects = [
        Detection(
            name=names[label],
            score=score,
            box=(box[0], box[1], box[2], box[3]),
            mask=mask,
            competitors=tuple((known[other], other_score) for other, other_score in others if other != label),
        )
        for box, score, label, mask, others in zip(
            detections.boxes.tolist(),
            detections.scores.tolist(),
            detections.labels.tolist(),
            repeat(None, len(detections.boxes)) if masks is None else masks,
            _others(detections),
            strict=True,
        )
        if score >= thresholds[label]
    ]
    return ImageDetections(
        source=picture.source,
        width=width,
        height=height,
        objects=tuple(objects),
        classes=tuple(names),
        has_masks=masks is not None,
        frame=picture.frame,
    )


def _others(detections: Detections) -> list[list[tuple[int, float]]]:
    """Positions and scores of the likeliest names of each detection; nothing where they were not asked for."""
    found = detections.likeliest
    if found is None:
        return [[] for _ in detections.boxes]
    return [list(zip(*one, strict=True)) for one in zip(found.labels.tolist(), found.scores.tolist(), strict=True)]


def _drawn(
    detections: ImageDetections, pixels: Tensor, base: frozenset[str], scale: float | None = None
) -> Image.Image:
    """Draw detections: names trained with boxes in one colour, all others in another."""
    boxes = torch.from_numpy(detections.boxes)
    captions = [f"{one.name} {one.score:.2f}" for one in detections]
    colours = [BASE_COLOUR if one.name in base else NOVEL_COLOUR for one in detections]
    masks = detections.masks
    return draw_boxes(pixels, boxes, captions, colours, scale=scale, masks=None if masks is None else list(masks))
