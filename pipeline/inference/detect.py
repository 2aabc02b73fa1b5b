"""`ezsd detect`: objects of any named classes in images."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor

from ezsd.data.masks import decode, decompress, json_run_lengths
from ezsd.errors import VocabularyError
from ezsd.pipeline.data.images import read_image
from ezsd.pipeline.inference.fonts import require_named_font
from ezsd.pipeline.inference.predictor import Located, TrainedDetector, load_trained, run_teacher
from ezsd.pipeline.inference.visualize import BASE_COLOUR, NOVEL_COLOUR, draw_boxes
from ezsd.pipeline.runs.run import Run
from ezsd.teacher.open_clip import require_told_apart
from ezsd.vocabulary import spelt_as

log = logging.getLogger("ezsd")
BATCH_IMAGES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One detected object."""

    name: str
    score: float
    """In [0, 1]."""
    box: tuple[float, float, float, float]
    """xyxy, pixels of the image as it is shown."""
    mask: bytes | None
    """Run lengths of its mask over the image as it is shown; None without masks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One image and what was found in it."""

    path: Path
    width: int
    """Pixels, as it is shown."""
    height: int
    """Pixels, as it is shown."""
    objects: tuple[Found, ...]
    """Best first."""


def names_to_find(run: Run, asked: Sequence[str] | None) -> tuple[str, ...]:
    """Names as the run spells them, in whatever Unicode form they were typed; all of the run's own for None."""
    own = run.card["names"]
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
) -> Iterator[Seen]:
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
        overrides: settings to look with instead of the run's, see `ezsd.pipeline.config.inference_overrides`.
        weights: the teacher's weights, if they have moved; read for names that the run does not know.
        alone: whether no other name competes: objects of other classes are then called by the asked names as well.

    Raises:
        ValueError: (of many kinds) a damaged image, an unfinished run, a class that nobody can embed, two classes that
            the teacher cannot tell apart.
    """
    if drawn is not None:
        require_named_font()
    trained = load_trained(run, device, overrides)
    text = class_text(trained, run, classes, device, weights)
    require_told_apart(classes, text)
    search = trained.search(text, alone=alone)
    if search.aside:
        log.info("these names of the run mean nearly what is asked for and do not compete: %s", ", ".join(search.aside))
    known = frozenset(trained.names[: trained.base_count])
    for start in range(0, len(images), BATCH_IMAGES):
        paths = images[start : start + BATCH_IMAGES]
        pixels = [read_image(path) for path in paths]
        for number, found in enumerate(trained.find(pixels, search)):
            seen = _seen(paths[number], pixels[number], found, classes, threshold)
            if drawn is not None:
                _draw(seen, pixels[number], drawn[start + number], known)
            yield seen


def found_lines(seen: Seen, *, with_path: bool) -> Iterator[str]:
    """One line per object: score, name and corners, after the image's path if asked for."""
    for one in seen.objects:
        box = " ".join(f"{v:.1f}" for v in one.box)
        path = f"{seen.path}  " if with_path else ""
        yield f"{path}{one.score:.3f}  {one.name}  {box}"


def coco_document(seen: Sequence[Seen], classes: Sequence[str]) -> str:
    """A COCO-format document with a score in each of its `annotations`; `ezsd eval --detections` reads it.

    Its ids are its own: images are known by `file_name`, classes by name. Numbers are as exact as an evaluation of the
    run takes them. Where an object has a mask, `area` is that of the mask.
    """
    number = {name: position for position, name in enumerate(classes, start=1)}
    images = [
        {"id": i, "file_name": str(one.path), "width": one.width, "height": one.height}
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


def class_text(
    trained: TrainedDetector, run: Run, classes: Sequence[str], device: str, weights: Path | None = None
) -> Tensor:
    """Unit text rows (C, D) of names: from the run's table, else from its re-normalised teacher.

    Raises:
        TeacherError: see `run_teacher`.
        VocabularyError: the teacher cannot embed a name.
    """
    known = {name: row for name, row in zip(trained.names, trained.text, strict=True)}
    unknown = [name for name in classes if name not in known]
    if unknown:
        teacher = run_teacher(run, device, adapted=True, weights=weights)
        try:
            with torch.no_grad():
                rows = teacher.encode_text(unknown).float().cpu()
        except KeyError as error:
            raise VocabularyError(f"--classes: the teacher {teacher.name} has no embedding for {error}") from None
        known |= dict(zip(unknown, rows, strict=True))
    return torch.stack([known[name] for name in classes])


def _seen(
    path: Path,
    pixels: Tensor,
    found: Located,
    classes: Sequence[str],
    threshold: float,
) -> Seen:
    objects = [
        Found(name=classes[label], score=score, box=(box[0], box[1], box[2], box[3]), mask=mask)
        for box, score, label, mask in zip(
            found.boxes.tolist(),
            found.scores.tolist(),
            found.labels.tolist(),
            found.masks or repeat(None, len(found.boxes)),
            strict=True,
        )
        if score >= threshold
    ]
    return Seen(path=path, width=pixels.shape[2], height=pixels.shape[1], objects=tuple(objects))


def _draw(seen: Seen, pixels: Tensor, place: Path, base: frozenset[str]) -> None:
    """Draw what was found: names trained with boxes in one colour, all others in the other."""
    corners = torch.tensor([one.box for one in seen.objects]).reshape(-1, 4)
    captions = [f"{one.name} {one.score:.2f}" for one in seen.objects]
    place.parent.mkdir(parents=True, exist_ok=True)
    colours = [BASE_COLOUR if one.name in base else NOVEL_COLOUR for one in seen.objects]
    masks = [decode(one.mask, seen.height, seen.width) for one in seen.objects if one.mask is not None]
    draw_boxes(pixels, corners, captions, colours, masks=masks or None).save(place)
