"""Run or store that a page shows: its parts with images, objects, detections, regions and proposals."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ezsd.cache import Store, StoreError
from ezsd.data.annotations import Annotations, ImageTable
from ezsd.errors import AnnotationError
from ezsd.metrics import Results, Truth, read_results, read_truth
from ezsd.metrics.error_kinds import KINDS
from ezsd.metrics.judging import Found, Objects, found_of_results, judge_image, objects_of_truth
from ezsd.pipeline.console.options import as_options
from ezsd.pipeline.data.annotation_cache import training_annotations
from ezsd.pipeline.data.datasets import Dataset
from ezsd.pipeline.data.image_source import ImageSource
from ezsd.pipeline.errors import ArgumentError, RunError, is_of_a_place
from ezsd.pipeline.extraction.annotation_check import checked_annotations
from ezsd.pipeline.inference.evaluate import run_dataset
from ezsd.pipeline.inference.evaluation_tables import may_have_masks
from ezsd.pipeline.report.run_data import RunData, collect, run_store
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.training.train import store_dataset
from ezsd.pipeline.view.boxes import ALL_KINDS, Kind, as_rows, images_with, objects_of_annotations, xywh_as_rows
from ezsd.pipeline.view.judging import Judging
from ezsd.pipeline.view.masks import ObjectOutlines, mask_outlines
from ezsd.vocabulary import Split

log = logging.getLogger("ezsd")

SHOWN_PROPOSALS = 50
"""Most proposals and regions of an image that the page gets, best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewRequest:
    """Request for a page, as the command line makes it."""

    target: Path
    """Folder of a run or of a complete store."""
    compare: Path | None = None
    """Folder of another run on the same dataset; None for none."""
    evaluate: bool = False
    """True to show novel objects of training images too."""
    data_root: Path | None = None
    """Folder of the images now; None takes the recorded one."""
    weights: Path | None = None
    """The teacher's weights, if they have moved."""
    device: str = "cpu"
    overrides: tuple[str, ...] = ()
    """Settings used instead of the runs' in images that are dropped on the page."""


class Part:
    """Images of one part of a dataset, with the boxes that are known of them. Threads may share it.

    Args:
        images: the images; positions everywhere are positions in these.
        source: where they are read from.
        objects: objects to show.
        complete: whether these are all objects of all classes, so that errors can be told.
        found: detections of each run; None for a run without.
        masks: masks of these, as `Results.masks` has them; None for a run without.
        outlines: outlines of the objects; None where none has one.
        store: store of regions and proposals; None without one.
    """

    def __init__(
        self,
        images: ImageTable,
        source: ImageSource,
        objects: Objects,
        *,
        complete: bool,
        found: list[Found | None],
        masks: list[tuple[bytes, ...] | None],
        outlines: ObjectOutlines | None,
        store: Store | None,
    ) -> None:
        self.images, self.source, self.objects, self.found, self.store = images, source, objects, found, store
        self._masks, self._outlines = masks, outlines
        self.has_kinds = complete and any(one is not None for one in found)
        self._judging: dict[int, Judging] = {}
        self._guesses: tuple[NDArray[np.int64], NDArray[np.int32]] | None = None
        self._lock = threading.Lock()

    def index(self) -> dict[str, Any]:
        """File names and sizes of all images."""
        return {
            "files": [one.file_name for one in self.images],
            "width": self.images.width.tolist(),
            "height": self.images.height.tolist(),
            "kinds": list(ALL_KINDS) if self.has_kinds else [],
            "detections": [one is not None for one in self.found],
            "masks": self._outlines is not None or any(one is not None for one in self._masks),
            "store": self.store is not None,
        }

    def boxes(self, position: int) -> dict[str, Any]:
        """All boxes of an image.

        Objects are corners, class and whether they are ignored; detections corners, class, score, kind and object;
        regions corners, class and confidence; proposals corners and score.
        """
        with self._lock:
            rows = self.objects.rows(position)
            objects = xywh_as_rows(
                self.objects.xywh[rows], self.objects.class_index[rows].tolist(), self.objects.ignored[rows].tolist()
            )
            runs = [
                None if one is None else self._detections(number, position) for number, one in enumerate(self.found)
            ]
            return {"objects": objects, "runs": runs, **self._of_store(int(self.images.id[position]))}

    def _detections(self, run: int, position: int) -> dict[str, Any]:
        found = self.found[run]
        assert found is not None
        rows = found.rows(position)
        columns: list[list[Any]] = [found.class_index[rows].tolist(), found.score[rows].round(4).tolist()]
        found_at: list[float | None] = []
        if self.has_kinds:
            # All images would take seconds.
            errors = judge_image(self.objects, found, position)
            columns += [
                ["not judged" if kind < 0 else KINDS[kind] for kind in errors.kind.tolist()],
                errors.matched.tolist(),
            ]
            # JSON has no infinity: None for what is never missed.
            found_at = [one if np.isfinite(one) else None for one in errors.found_at.round(4).tolist()]
        return {"boxes": xywh_as_rows(found.xywh[rows], *columns), "found_at": found_at}

    def masks(self, position: int) -> dict[str, Any]:
        """Outlines of objects and of detections of an image, in the order of `boxes`; see `outlines`.

        Raises:
            AnnotationError: the annotation file has an outline that is not in order.
        """
        height, width = int(self.images.height[position]), int(self.images.width[position])
        rows = self.objects.rows(position)
        nothing: list[list[str]] = [[] for _ in range(rows.stop - rows.start)]
        runs: list[list[list[str]] | None] = []
        for found, masks in zip(self.found, self._masks, strict=True):
            if found is None or masks is None:
                runs.append(None)
            else:
                of_image = [masks[row] for row in found.row[found.rows(position)].tolist()]
                runs.append(mask_outlines(of_image, height, width))
        return {"objects": nothing if self._outlines is None else self._outlines.of_image(position), "runs": runs}

    def judging(self, run: int) -> Judging:
        """Judging of a run's detections, begun if it is not yet.

        Raises:
            ArgumentError: no errors are known here.
        """
        found = self.found[run] if run < len(self.found) else None
        if not self.has_kinds or found is None:
            raise ArgumentError("no errors are known here: there are no detections of all classes to judge")
        with self._lock:
            if run not in self._judging:
                self._judging[run] = Judging(self.objects, found)
            return self._judging[run]

    def _of_store(self, image_id: int) -> dict[str, Any]:
        if self.store is None or image_id not in self.store.regions:
            return {"regions": [], "proposals": []}
        regions, proposals = self.store.regions[image_id], self.store.proposals[image_id]
        best = np.argsort(-proposals.score, kind="stable")[:SHOWN_PROPOSALS]
        surest = np.argsort(-regions.score, kind="stable")[:SHOWN_PROPOSALS]
        return {
            "regions": as_rows(
                regions.box[surest],
                regions.class_index[surest].tolist(),
                regions.confidence[surest].astype(np.float64).round(4).tolist(),
            ),
            "proposals": as_rows(proposals.box[best], proposals.score[best].astype(np.float64).round(4).tolist()),
        }

    def find(self, class_index: int | None, kind: Kind | None, *, run: int, threshold: float) -> list[int]:
        """Positions of images by class and kind of error, see `images_with`; regions count by their guesses.

        Waits until all images are judged, where a kind is asked for.

        Raises:
            ArgumentError: a kind is asked for where no errors are known.
        """
        found = self.found[run] if run < len(self.found) else None
        errors = None if kind is None else self.judging(run).errors()
        with self._lock:
            if class_index is None and kind is None:
                return list(range(len(self.images)))
            shown = images_with(
                class_index, kind, objects=self.objects, found=found, errors=errors, threshold=threshold
            )
            if kind is None and self.store is not None:
                image, guess = self._region_guesses(self.store)
                shown = np.union1d(shown, image[guess == class_index])
            return [int(one) for one in shown]

    def _region_guesses(self, store: Store) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Positions of images and guesses of all regions."""
        if self._guesses is None:
            ids = store.image_ids
            guess, counts = store.regions.column("class_index", ids.tolist())
            self._guesses = np.repeat(np.searchsorted(self.images.id, ids), counts), guess
        return self._guesses


class Target:
    """Run or store with its parts; parts are read when they are first asked for.

    Args:
        request: what to show.

    Raises:
        EzsdError: neither a run nor a store, or their files are gone, damaged or do not belong together.
    """

    def __init__(self, request: ViewRequest) -> None:
        self.request, self.notes = request, list[str]()
        self.runs: list[RunData] = []
        self.store: Store | None = None
        self._parts: dict[str, Part] = {}
        self._lock = threading.Lock()
        folder = request.target
        if (folder / "run.json").is_file():
            self._open_runs()
        elif request.compare is not None:
            raise ArgumentError(f"`compare={request.compare}`: goes with a run, and {folder} holds none")
        else:
            if not folder.is_dir():
                raise ArgumentError(f"{folder}: no such folder; give that of a run or a store")
            self.store = Store(folder)
            self.store.require_regions()
            self.dataset: Dataset = store_dataset(self.store, request.data_root)
        self.name = folder.absolute().name

    def _open_runs(self) -> None:
        folders = [self.request.target] + ([] if self.request.compare is None else [self.request.compare])
        runs = [Run.open(folder) for folder in folders]
        self.runs = collect(runs)
        self.dataset = run_dataset(runs[0], self.request.data_root)
        for run in self.runs:
            if tuple(run.spec["names"]) != self.dataset.split.names:
                raise RunError(
                    f"`run={run.run.folder}`: trained for other names than dataset {self.dataset.name} has now"
                )
        try:
            self.store = run_store(self.runs[0])
            self.store.require_regions()
        except (StoreError, RunError, OSError) as error:
            if isinstance(error, OSError) and not is_of_a_place(error):
                raise
            self.store = None
            self._note(f"no regions and proposals: {error}")

    def _note(self, text: str) -> None:
        log.warning("view: %s", text)
        self.notes.append(as_options(text))

    @property
    def split(self) -> Split:
        """Base and novel names."""
        return self.dataset.split

    @cached_property
    def part_names(self) -> tuple[str, ...]:
        """Parts that can be shown, the first one first: of a run the validation images, of a store its own."""
        if not self.runs:
            return ("train",)
        return tuple(part for part in ("val", "train") if part in self.dataset.parts)

    def part(self, name: str) -> Part:
        """A part by its name.

        Raises:
            ArgumentError: there is no such part.
            EzsdError: its files are not in order.
        """
        with self._lock:
            if name not in self.part_names:
                raise ArgumentError(f"part {name!r}: expected one of {', '.join(self.part_names)}")
            if name not in self._parts:
                self._parts[name] = self._read_part(name)
            return self._parts[name]

    def _read_part(self, name: str) -> Part:
        evaluated = name == "val" or self.request.evaluate
        path = self.dataset.annotations(name)
        truth = read_truth(path, self.split) if evaluated else None
        annotations = self._base_annotations() if name == "train" else None
        results = [self._results(run, name, truth) for run in self.runs]
        if truth is not None:
            images, objects, ids, names = truth.images, objects_of_truth(truth), truth.annotation_id, self.split.names
        else:
            assert annotations is not None
            images, objects, ids = annotations.images, objects_of_annotations(annotations), annotations.annotation_id
            names = self.split.base
        return Part(
            images,
            self.dataset.images(name),
            objects,
            complete=evaluated,
            found=[None if one is None or truth is None else found_of_results(one, truth) for one in results],
            masks=[None if one is None else one.masks for one in results],
            outlines=ObjectOutlines(path, names, objects, ids, images) if may_have_masks(path) else None,
            store=self.store if name == "train" else None,
        )

    def _base_annotations(self) -> Annotations:
        """Base objects of the training images, of all where no store is there to compare them with."""
        if self.store is None:
            return training_annotations(self.dataset.annotations("train"), self.split)
        return checked_annotations(self.store, self.dataset)

    def _results(self, run: RunData, part: str, truth: Truth | None) -> Results | None:
        """Detections of a run in a part; None, with a note, where there are none."""
        path = run.run.folder / ("detections.json" if part == "val" else f"detections-{part}.json")
        if truth is None:
            return None
        if not path.is_file():
            if part == "val":
                self._note(f"{run.label}: no detections; `{run.command('eval')}` makes them")
            return None
        return read_results(path, images=truth.sizes(), categories=truth.category_positions(), named=truth.named())


def require_position(part: Part, position: int) -> None:
    """AnnotationError for a position that no image of a part has."""
    if not 0 <= position < len(part.images):
        raise AnnotationError(f"image {position}: expected 0 to {len(part.images) - 1}")
