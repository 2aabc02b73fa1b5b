"""Look at a store: choose images, measure, draw, write the page."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ezsd.cache import Store
from ezsd.data.annotations import Annotations
from ezsd.pipeline.config.schema import Config
from ezsd.pipeline.data.annotation_cache import evaluation_annotations
from ezsd.pipeline.data.datasets import Dataset
from ezsd.pipeline.errors import ArgumentError
from ezsd.pipeline.extraction.annotation_check import checked_annotations
from ezsd.pipeline.extraction.held_out import HeldOutFilters, folds, unseen_images
from ezsd.pipeline.extraction.provenance import dataset_inputs, model_inputs, proposal_settings, recorded_config
from ezsd.pipeline.extraction.teacher import recorded_teacher
from ezsd.pipeline.extraction.worker import refined
from ezsd.pipeline.files import write_json, write_text
from ezsd.pipeline.look.page import file_name, page
from ezsd.pipeline.look.pictures import Box, Picture, guess_colours, region_boxes, thumbnail, truth_boxes
from ezsd.pipeline.look.recall import Case, measure
from ezsd.pipeline.look.survey import named_objects, survey
from ezsd.pipeline.progress import Progress
from ezsd.pipeline.training.train import store_dataset

log = logging.getLogger("ezsd")

DRAWN = 40
"""Most images on the page."""
EVALUATED = 2000
"""Most images whose novel objects are measured: enough for a figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LookRequest:
    """Request to look at a store, as the command line makes it."""

    store: Path
    out: Path
    """Folder of the page."""
    images: int = 40
    """Number of images to measure on; the first `DRAWN` are drawn."""
    top: int = 10
    """Best regions drawn per image."""
    seed: int = 0
    """Seed of the choice of images and held-out names, and of random boxes."""
    teacher: bool = True
    """False to leave the teacher alone: nothing is measured after the filters."""
    evaluate: bool = False
    """True to read the novel boxes of the training images, draw them and measure their recall."""
    weights: Path | None = None
    """The teacher's weights, if they have moved."""
    data_root: Path | None = None
    """Folder of the images; None takes the one that the store was built from."""
    device: str = "cpu"


def look_at_store(request: LookRequest) -> tuple[dict[str, Any], Path]:
    """Measure and draw a store's regions; write look.html and look.json.

    With novel boxes the names are look-evaluated.html and look-evaluated.json: a page to choose by stays what it is.

    Returns:
        The document, as the JSON file has it, and the path of the page.

    Raises:
        ValueError: (of many kinds) no complete store, other annotations than it was made from, an image that cannot be
            read, or a teacher that cannot be had.
    """
    for folder in (request.out, *request.out.parents):
        if folder.exists() and not folder.is_dir():
            raise ArgumentError(f"`out={request.out}`: {folder} is a file; give the name of a folder")
    looked = _Looked(request)
    document = looked.document()
    name = file_name(document)
    target = request.out / f"{name}.html"
    text = page(document, looked.pictures(), request.top)
    request.out.mkdir(parents=True, exist_ok=True)
    write_json(request.out / f"{name}.json", document)
    # Pure ASCII, so that no locale can change it on the way to the disk.
    write_text(target, text.encode("ascii", "xmlcharrefreplace").decode())
    return document, target


class _Looked:
    """A store, its images and base boxes, and the images chosen to look at."""

    def __init__(self, request: LookRequest) -> None:
        self.request = request
        self.store = Store(request.store)
        self.store.require_regions()
        self.dataset: Dataset = store_dataset(self.store, request.data_root)
        self.annotations: Annotations = checked_annotations(self.store, self.dataset)
        self.settings = proposal_settings(self.store.manifest)
        self.base_iou = float(str(self.settings["base_iou"]))
        self.unseen = unseen_images(self.annotations, self.store, by="all")
        order = self._choose()
        self.drawn = order[:DRAWN]
        self.chosen = np.sort(order)

    @cached_property
    def config(self) -> Config:
        """Configuration that the store was built with."""
        return recorded_config(self.store.path, self.store.environment)

    def _choose(self) -> NDArray[np.int64]:
        """Positions of readable images with base boxes, at random: those first that no training has used."""
        rng = np.random.default_rng([self.request.seed, 1])
        ids, bad = self.annotations.images.id, list(self.store.bad_images)
        readable = np.unique(self.annotations.image_index)
        readable = readable[~np.isin(ids[readable], bad)]
        unseen = np.isin(readable, self.unseen)
        order = np.concatenate([rng.permutation(readable[unseen]), rng.permutation(readable[~unseen])])
        return order[: self.request.images].astype(np.int64)

    def document(self) -> dict[str, Any]:
        """All figures, as JSON has them."""
        request, split = self.request, self.dataset.split
        groups = folds(len(split.base), len(split.novel), seed=request.seed)
        cases = self._held_out_cases(groups) if request.teacher else list(self._proposal_cases())
        held_out = unseen_images(self.annotations, self.store, by="teacher")
        ids = [one for one in self.annotations.images.id[held_out].tolist() if one not in self.store.bad_images]
        environment = self.store.environment
        return {
            "store": {
                "name": self.store.path.name,
                "digest": self.store.digest,
                "manifest": self.store.manifest.digest,
                "dataset": str(dataset_inputs(self.store.manifest)["name"]),
                "teacher": str(model_inputs(self.store.manifest).get("name", "unknown")),
                "search": self._search(),
                "base": len(split.base),
                "novel": len(split.novel),
                "re_normalised": bool(self.store.teacher[1]["steps"]),
                "limit": environment.get("limit"),
            },
            "images": {
                "looked_at": len(self.chosen),
                "unseen": int(np.isin(self.chosen, self.unseen).sum()),
                "with_base_boxes": len(np.unique(self.annotations.image_index)),
                "ids": self.annotations.images.id[self.chosen].tolist(),
            },
            "options": self._options(),
            "survey": survey(self.store),
            "base_objects": named_objects(self.store, ids),
            "held_out": {
                "groups": [[split.base[index] for index in group] for group in groups] if request.teacher else [],
                **self._measured(cases),
            },
            "evaluation": self._evaluation() if request.evaluate else None,
        }

    def _options(self) -> dict[str, Any]:
        """Options of the command that gives this document again."""
        request = self.request
        paths = {"store": request.store, "out": request.out, "weights": request.weights, "data_root": request.data_root}
        return {
            "images": request.images,
            "top": request.top,
            "seed": request.seed,
            "teacher": request.teacher,
            **{name: None if path is None else str(path) for name, path in paths.items()},
        }

    def _search(self) -> str:
        """Origin of the store's proposals."""
        learned = self.store.manifest.products.get("proposer")
        if "boxes_sha256" in self.store.manifest.products["proposals"].inputs:
            return "file"
        if learned is None:
            return "grid, novel" if self.settings["score"] == "novel" else "grid"
        return "run" if "run_sha256" in learned.inputs else "learned"

    def _candidates(self, image_id: int) -> NDArray[np.float32]:
        """Proposals of an image as the filters get them, best first, (P, 4)."""
        rows = self.store.proposals[image_id]
        proposals = {"box": rows.box, "score": rows.score}
        if self.settings["refine"] == "none":
            return rows.box
        box, _ = refined(self.config.proposals, proposals)
        return box.numpy()

    def _held_out_cases(self, groups: Sequence[Sequence[int]]) -> list[Case]:
        """A case for each image and group of held-out names that it shows, with the regions of filters without them."""
        recorded = self.config.teacher
        teacher = recorded_teacher(
            recorded,
            model_inputs(self.store.manifest),
            where=str(self.store.path),
            weights=self.request.weights,
            device=self.request.device,
        )
        filters = HeldOutFilters(self.store, self.dataset, self.annotations, self.config, teacher)
        cases = []
        with Progress("look", len(self.chosen), unit="image") as progress:
            for position in self.chosen.tolist():
                label = self.annotations.class_index[self.annotations.rows(position)]
                shown = [group for group in groups if np.isin(label, group).any()]
                for group, regions in zip(shown, filters.regions(position, shown), strict=True):
                    hidden = np.isin(label, group)
                    cases.append(self._case(position, hidden, regions["box"], regions["class_index"]))
                progress.advance(note=f"{filters.passes / progress.seconds:,.0f} crops/s")
        return cases

    def _measured(self, cases: Sequence[Case]) -> dict[str, Any]:
        # Boxes of a file are taken as they are; voting suppresses those, too.
        suppressed = self._search() != "file" or self.settings["refine"] != "none"
        nms_iou = float(str(self.settings["nms_iou"])) if suppressed else 1.0
        return measure(cases, base_iou=self.base_iou, nms_iou=nms_iou, seed=self.request.seed)

    def _proposal_cases(self) -> Iterator[Case]:
        """A case for each image, with all its base objects and no regions."""
        for position in self.chosen.tolist():
            rows = self.annotations.rows(position)
            yield self._case(position, np.ones(rows.stop - rows.start, np.bool_), None, None)

    def _case(
        self,
        position: int,
        wanted: NDArray[np.bool_],
        regions: NDArray[np.float32] | None,
        guesses: NDArray[np.int32] | None,
    ) -> Case:
        record, rows = self.annotations.images[position], self.annotations.rows(position)
        box = np.array(self.annotations.box[rows])
        return Case(
            image_id=record.id,
            width=record.width,
            height=record.height,
            objects=box[wanted],
            classes=self.annotations.class_index[rows][wanted],
            base_boxes=box[~wanted],
            proposals=self._candidates(record.id),
            regions=regions,
            guesses=guesses,
        )

    @cached_property
    def _truth(self) -> Annotations:
        """Base and novel boxes of the training images: read for evaluation alone."""
        return evaluation_annotations(self.dataset.annotations("train"), self.dataset.split)

    def _novel(self, position: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Boxes (N, 4) and names (N,) of the novel objects of an image, groups left out."""
        rows = self._truth.rows(position)
        label = self._truth.class_index[rows]
        wanted = (label >= len(self.dataset.split.base)) & ~self._truth.crowd[rows]
        return np.array(self._truth.box[rows][wanted]), label[wanted]

    def _evaluation(self) -> dict[str, Any]:
        """Recall of novel objects by the store's own regions, over images that do not depend on novel boxes."""
        log.warning("look: novel boxes are read for evaluation; no setting may be chosen by what they show")
        ids = self.annotations.images.id
        rng = np.random.default_rng([self.request.seed, 2])
        readable = np.flatnonzero(~np.isin(ids, list(self.store.bad_images)))
        chosen = np.sort(rng.permutation(readable)[:EVALUATED]).tolist()
        cases = []
        with Progress("evaluate", len(chosen), unit="image") as progress:
            for position in chosen:
                cases += self._novel_case(position)
                progress.advance()
        return {"looked_at": len(chosen), **self._measured(cases)}

    def _novel_case(self, position: int) -> list[Case]:
        """The case of an image, if it shows a novel object."""
        objects, classes = self._novel(position)
        if not len(objects):
            return []
        record, regions = (
            self.annotations.images[position],
            self.store.regions[int(self.annotations.images.id[position])],
        )
        return [
            Case(
                image_id=record.id,
                width=record.width,
                height=record.height,
                objects=objects,
                classes=classes,
                base_boxes=np.array(self.annotations.box[self.annotations.rows(position)]),
                proposals=self._candidates(record.id),
                regions=regions.box,
                guesses=regions.class_index,
            )
        ]

    def pictures(self) -> list[Picture]:
        """The drawn images."""
        names, _ = self.store.text
        records = [self.annotations.images[position] for position in self.drawn.tolist()]
        regions = [self.store.regions[record.id] for record in records]
        colours = guess_colours(regions, names, self.request.top)
        source = self.dataset.images("train")
        return [
            Picture(
                file_name=record.file_name,
                address=thumbnail(source.read(record)),
                width=record.width,
                height=record.height,
                regions=region_boxes(rows, names, colours, self.request.top),
                base=self._base_boxes(position),
                novel=self._novel_boxes(position) if self.request.evaluate else (),
            )
            for position, record, rows in zip(self.drawn.tolist(), records, regions, strict=True)
        ]

    def _base_boxes(self, position: int) -> list[Box]:
        rows, names = self.annotations.rows(position), self.annotations.names
        return truth_boxes(self.annotations.box[rows], [names[i] for i in self.annotations.class_index[rows]])

    def _novel_boxes(self, position: int) -> list[Box]:
        box, label = self._novel(position)
        return truth_boxes(box, [self._truth.names[i] for i in label])
