"""Findings on the stages of a run: what training, pseudo-labels and evaluation took, beside an annotation file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ezsd.cache import file_digest
from ezsd.errors import quantity
from ezsd.pipeline.audit.annotation_file import BASE, NOVEL, read_annotation_file
from ezsd.pipeline.audit.findings import Finding, Level
from ezsd.pipeline.audit.store_stages import StoreStages, backbone_weights
from ezsd.pipeline.data.datasets import Dataset
from ezsd.pipeline.files import read_object
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.runs.store_digests import read_stores
from ezsd.pipeline.runs.training_boxes import read_boxes


class RunStages:
    """A run beside its store and the annotations of a file."""

    def __init__(self, run: Run, store: StoreStages, dataset: Dataset) -> None:
        self.run, self.store, self.dataset = run, store, dataset
        self.config = run.config

    def findings(self) -> Iterator[Finding]:
        """Findings on all stages, in their order."""
        yield self._bytes()
        yield from self._training()
        yield self._pseudo_labels()
        if self.config.train.validate_every:
            text = (
                f"every {self.config.train.validate_every} epochs on images of the validation part, with their novel "
                "boxes, to be looked at: it chooses nothing"
            )
            yield Finding(level="note", subject="validation", text=text)
        yield from self._evaluations()
        yield backbone_weights(self.run.spec)

    def _bytes(self) -> Finding:
        known, digest = read_stores(self.run), self.store.store.digest
        if not known:
            return Finding(level="unproven", subject="store", text="not recorded: which bytes the run was trained on")
        others = [one for one in known if one["sha256"] != digest]
        if not others:
            return Finding(level="ok", subject="store", text=f"the bytes that the run was trained on, {digest[:12]}")
        text = (
            f"holds {digest[:12]}; from step {others[0]['step']} on the run was trained on other bytes of equal "
            f"settings, {others[0]['sha256'][:12]}, which nobody has looked at here"
        )
        return Finding(level="unproven", subject="store", text=text)

    def _training(self) -> Iterator[Finding]:
        known, digests = read_boxes(self.run), {one["sha256"] for one in read_stores(self.run)}
        same_bytes = digests == {self.store.store.digest}
        if not known or known[0]["step"] > 0:
            steps = f" before step {known[0]['step']}" if known else ""
            yield Finding(level="unproven", subject="training", text=f"not recorded: which boxes entered{steps}")
        for one in known:
            subject = "training" if len(known) == 1 else f"training from step {one['step']}"
            # Other bytes may have had rows of other images.
            images, annotations = self.store.trained_images, one["annotations_sha256"] if same_bytes else ""
            yield self.store.stage(subject, one["sha256"], boxes=one["boxes"], read=images, annotations=annotations)
        if self.config.model.masks:
            yield self._masks([one["annotations_sha256"] for one in known])

    def _masks(self, files: list[str]) -> Finding:
        if files and set(files) == {self.store.file.sha256}:
            text = "outlines of the same base annotations, from this very annotation file"
            return Finding(level="ok", subject="masks", text=text)
        text = "outlines of base annotations of another file than this one" if files else "not recorded: of which file"
        return Finding(level="unproven", subject="masks", text=text)

    def _pseudo_labels(self) -> Finding:
        train = self.config.train
        if not train.pseudo_confidence:
            return Finding(level="ok", subject="pseudo-labels", text="none (train.pseudo_confidence=0)")
        text = (
            f"regions that the teacher calls by a novel name with a confidence of {train.pseudo_confidence:g} and an "
            f"objectness of {train.pseudo_objectness:g} or more: boxes and names of networks, none of the annotations"
        )
        return Finding(level="ok", subject="pseudo-labels", text=text)

    def evaluation_files(self) -> list[Path]:
        """Results of `ezsd eval` in the run's folder."""
        return sorted(self.run.folder.glob("eval*.json"))

    def _evaluations(self) -> Iterator[Finding]:
        places = {self.dataset.annotations(part).name: self.dataset.annotations(part) for part in self.dataset.parts}
        found = self.evaluation_files()
        if not found:
            yield Finding(level="ok", subject="evaluation", text="none yet")
        for file in found:
            source = read_object(file).get("annotations")
            if not isinstance(source, dict) or not {"file", "sha256"} <= source.keys():
                yield Finding(
                    level="note", subject="evaluation", text=f"{file.name}: not recorded on which annotations"
                )
            else:
                yield self._evaluation(file.name, str(source["file"]), str(source["sha256"]), places)

    def _evaluation(self, name: str, file: str, digest: str, places: dict[str, Path]) -> Finding:
        text = f"{name}: novel boxes may be read here; {file}, sha256 {digest[:12]}"
        place = places.get(file)
        level: Level = "note"
        if place is None or not place.is_file():
            return Finding(level=level, subject="evaluation", text=f"{text}, which is not there now")
        if file_digest(place).sha256 != digest:
            return Finding(level=level, subject="evaluation", text=f"{text}, is another file now")
        truth = read_annotation_file(place, self.store.file.split)
        base, novel = (len(truth.rows(kind, truth.images.id)) for kind in (BASE, NOVEL))
        text += f", as it is now: {base:,} base and {quantity(novel, 'novel box', 'novel boxes')}"
        if digest == self.store.file.sha256:
            text += "; these are the training images"
        else:
            level = "ok"
        return Finding(level=level, subject="evaluation", text=text, boxes=base + novel)

    def uses_of_names(self) -> list[str]:
        """Settings of the training by which novel names took part in it."""
        if not self.store.file.split.novel:
            return []
        loss, train = self.config.loss, self.config.train
        uses = ["loss.novel_names=true"] if loss.novel_names else []
        return uses + ([f"train.pseudo_confidence={train.pseudo_confidence:g}"] if train.pseudo_confidence else [])
