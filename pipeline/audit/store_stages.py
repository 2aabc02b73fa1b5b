"""Findings on the stages of a store: what each was made from, beside an annotation file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ezsd.cache import Store
from ezsd.data.records import image_list_digest
from ezsd.errors import inflected, quantity
from ezsd.pipeline.audit.annotation_file import BASE, NOVEL, OTHER, AnnotationFile
from ezsd.pipeline.audit.boxes import Source, is_on_novel_one, objects_on_novel_ones, regions_on_novel_ones, wrong_boxes
from ezsd.pipeline.audit.findings import Finding, Level, NamedBox
from ezsd.pipeline.extraction.provenance import dataset_inputs, model_inputs, proposal_settings
from ezsd.pipeline.files import reading
from ezsd.pipeline.runs.training_boxes import StoredBoxes, stored_boxes
from ezsd.vocabulary import canonical, first_few

_FEW = 5
"""Most names in one line."""


class StoreStages:
    """A store beside the annotations of a file."""

    def __init__(self, store: Store, file: AnnotationFile) -> None:
        self.store, self.file = store, file
        self.names = store.text[0]
        self.environment: Mapping[str, Any] = store.environment
        self.settings = proposal_settings(store.manifest)

    @cached_property
    def trained_images(self) -> NDArray[np.int64]:
        """Ids of the images that could be read: those that a training draws."""
        ids = self.store.image_ids
        return ids[~np.isin(ids, list(self.store.bad_images))]

    @cached_property
    def stored(self) -> StoredBoxes:
        """Base objects of the store."""
        return stored_boxes(self.store, self.store.image_ids.tolist())

    @cached_property
    def stored_digest(self) -> str:
        """Sha256 of the base objects of the store."""
        return self.stored.digest(self.names)

    @cached_property
    def _wrong(self) -> tuple[NDArray[np.int64], list[NamedBox]]:
        return wrong_boxes(self.stored, self.names, self.file)

    @cached_property
    def _objects(self) -> Finding:
        count, named = len(self._wrong[0]), self._wrong[1]
        boxes, digest = len(self.stored.box), self.stored_digest
        if count:
            on_novel = is_on_novel_one(self.stored, self._wrong[0], self.file)
            verb = inflected(count, "is", "are")
            text = f"{count:,} of {boxes:,} rows {verb} no base annotation of {self.file.path.name}"
            return Finding(
                level="violation" if on_novel else "unproven",
                subject="ground truth",
                text=text if on_novel else f"{text}, and on no novel one",
                boxes=boxes,
                digest=digest,
                named=tuple(named),
            )
        text = f"{quantity(boxes, 'row')}, each a base annotation with its image, class and box"
        missing = len(self.file.rows(BASE, self.trained_images)) - boxes
        if missing > 0:
            text += f"; {quantity(missing, 'base annotation has', 'base annotations have')} no row"
        return Finding(
            level="note" if missing > 0 else "ok", subject="ground truth", text=text, boxes=boxes, digest=digest
        )

    def findings(self) -> Iterator[Finding]:
        """Findings on all stages, in their order."""
        yield self._annotations()
        dataset, teacher = dataset_inputs(self.store.manifest), self.store.manifest.products["teacher"].inputs
        yield self.stage("re-normalisation", _text(teacher.get("dataset"), "base_boxes_sha256"))
        yield from self._proposals()
        regions = self.store.manifest.products["regions"].inputs
        yield self.stage("filters", _text(regions, "base_boxes_sha256"))
        yield self.stage("cached objects", _text(dataset, "base_boxes_sha256"))
        yield self._objects
        count, doubled = objects_on_novel_ones(self.stored, self.names, self.file, but=self._wrong[0])
        if count:
            have = quantity(count, "base annotation has", "base annotations have")
            text = f"{have} exactly the box of a novel one: one object with two labels?"
            yield Finding(level="note", subject="ground truth", text=text, named=tuple(doubled))
        yield from self._regions()

    def _annotations(self) -> Finding:
        file, ids = self.file, self.store.image_ids
        counts = [len(file.rows(kind, ids)) for kind in (BASE, NOVEL, OTHER)]
        text = f"{file.path.name}: {quantity(len(ids), 'image')}, {counts[0]:,} base and "
        text += quantity(counts[1], "novel box", "novel boxes")
        text += f", {counts[2]:,} of other classes" if counts[2] else ""
        recorded = self.environment.get("annotations_sha256")
        same_images = dataset_inputs(self.store.manifest)["image_list_sha256"] == self._image_list()
        level: Level = "ok"
        if recorded is None:
            level, said = "note", "of the file that the store was built from: not recorded"
        elif recorded == file.sha256:
            said = "the file that the store was built from"
        else:
            level, said = "note", f"another file than the store was built from (sha256 {str(recorded)[:12]})"
        if file.unread:
            level = "note"
            text += f"; {file.unread:,} that may be novel have no image, class or box that can be read"
        if not same_images:
            level, said = "note", f"{said}; another list of images"
        return Finding(level=level, subject="annotations", text=f"{text}; sha256 {file.sha256[:12]}, {said}")

    def _image_list(self) -> str:
        return image_list_digest(self.file.images[: len(self.store.image_ids)])

    def stage(
        self,
        subject: str,
        digest: str | None,
        *,
        boxes: int | None = None,
        read: NDArray[np.int64] | None = None,
        annotations: str | None = None,
    ) -> Finding:
        """Judge the boxes that entered a stage by their digest.

        Args:
            subject: the stage.
            digest: sha256 of ids, classes and boxes; None where it was not recorded.
            boxes: their number as recorded, if it was.
            read: ids of the images that the stage read; None for all of the store.
            annotations: sha256 of the annotation file as recorded with them, "" where the images that could be read
                may have been others; None takes the store's record.
        """
        if digest is None:
            return Finding(level="unproven", subject=subject, text="not recorded: which boxes entered")
        images = self.store.image_ids if read is None else read
        expected = len(self.file.rows(BASE, images))
        known = f"{quantity(expected if boxes is None else boxes, 'box', 'boxes')}, digest {digest[:12]}"
        if digest == self.file.base_digest(images):
            text = f"{known}: the base boxes of the annotation file, all of them and no others"
            return Finding(level="ok", subject=subject, text=text, boxes=expected, digest=digest)
        if digest == self.stored_digest:
            level: Level = "ok" if self._objects.level == "note" else self._objects.level
            stored = quantity(len(self.stored.box), "box", "boxes")
            text = f"{stored}, digest {digest[:12]}: the rows of the ground truth, see there"
            return Finding(level=level, subject=subject, text=text, boxes=len(self.stored.box), digest=digest)
        known = f"boxes of digest {digest[:12]}" if boxes is None else known
        if (self.environment.get("annotations_sha256") if annotations is None else annotations) == self.file.sha256:
            text = f"{known}: others than the base boxes of the very file that was read"
            return Finding(level="violation", subject=subject, text=text, boxes=boxes, digest=digest)
        text = f"{known}: neither the base boxes of this annotation file nor the rows of the store"
        return Finding(level="unproven", subject=subject, text=text, boxes=boxes, digest=digest)

    def _proposals(self) -> Iterator[Finding]:
        """Origin of the proposals: windows, a network of the build, a run's, or a file."""
        products = self.store.manifest.products
        boxes = _text(products["proposals"].inputs, "boxes_sha256")
        if boxes is not None:
            text = (
                f"boxes from outside, a file of sha256 {boxes[:12]}: not recorded what its maker had learned from; a "
                "detector that has seen novel boxes would show in them"
            )
            yield Finding(level="unproven", subject="proposals", text=text)
        elif "proposer" not in products:
            yield Finding(level="ok", subject="proposals", text="windows of a grid: nothing is learned from boxes")
        elif (network := _text(products["proposer"].inputs, "run_sha256")) is not None:
            yield self._of_run(network)
        else:
            inputs = products["proposer"].inputs
            yield self.stage("proposer", _text(inputs.get("dataset"), "base_boxes_sha256"))
            weights = _text(inputs.get("network"), "weights")
            if weights is not None:
                yield _outside_weights("proposer", weights)

    def _of_run(self, network: str) -> Finding:
        known = f"network of a run, from outside, sha256 {network[:12]}"
        record = self.environment.get("proposer_run")
        if not isinstance(record, Mapping):
            text = f"{known}: not recorded which classes and boxes it had learned from"
            return Finding(level="unproven", subject="proposer", text=text)
        with reading(Path(f"{self.store}/environment.json"), "build the store anew in another folder"):
            return self._of_record(known, record)

    def _of_record(self, known: str, record: Mapping[str, Any]) -> Finding:
        """Judge a run's network by what the build recorded of the run."""
        novel = {canonical(name) for name in self.file.split.novel}
        learned = [name for name in record["base_names"] if canonical(name) in novel]
        if learned:
            text = f"{known}: learned from boxes of {first_few(learned, _FEW)}, novel here"
            return Finding(level="violation", subject="proposer", text=text)
        entries = record["boxes"]
        if not entries:
            text = f"{known}: not recorded which boxes it had learned from; its base classes are none of the novel ones"
            return Finding(level="unproven", subject="proposer", text=text)
        if entries[0]["step"] > 0:
            text = f"{known}: not recorded which boxes it had learned from before step {entries[0]['step']}"
            return Finding(level="unproven", subject="proposer", text=text)
        found = [self._of_entry(one) for one in entries]
        own = record.get("proposals_from")
        if own != "build" and all(one.level == "ok" for one in found):
            said = {"file": "a file", "run": "another run"}.get(str(own), "a place that was not recorded")
            text = f"{known}: learned from base boxes; the proposals of its own store came from {said}; audit that run "
            text += "too: `ezsd audit RUN`"
            return Finding(level="unproven", subject="proposer", text=text, digest=entries[-1]["sha256"])
        if all(one.level == "ok" for one in found):
            return Finding(
                level="ok",
                subject="proposer",
                text=f"{known}: learned from {found[0].text}",
                boxes=found[0].boxes,
                digest=found[0].digest,
            )
        names = f"base classes of dataset {record['dataset']}, none of them novel here"
        text = f"{known}: learned from other boxes (digest {entries[-1]['sha256'][:12]}) of {names}; audit that run too"
        return Finding(level="unproven", subject="proposer", text=text, digest=entries[-1]["sha256"])

    def _of_entry(self, one: Mapping[str, Any]) -> Finding:
        """Judge the boxes that a run had learned from; it had drawn the images that it could read."""
        every, readable = (
            self.stage("proposer", one["sha256"], boxes=one["boxes"], read=ids, annotations=one["annotations_sha256"])
            for ids in (self.store.image_ids, self.trained_images)
        )
        return readable if readable.level == "ok" else every

    def names_of_run(self) -> list[str]:
        """Novel names that the run whose network proposes was told, as recorded; none where no run's does."""
        record = self.environment.get("proposer_run")
        names = record.get("novel_names") if isinstance(record, Mapping) else None
        return list(map(str, names)) if isinstance(names, list) else []

    def _regions(self) -> Iterator[Finding]:
        """Regions and proposals that are a novel box, bit for bit."""
        compared, certain, chance = regions_on_novel_ones(self.store, self.file, self._source)
        of_all = f"{compared:,} regions and proposals"
        if not certain.count and not chance.count:
            text = f"{of_all}, none with exactly the box of a novel annotation"
            yield Finding(level="ok", subject="regions", text=text)
        if certain.count:
            verb = inflected(certain.count, "has", "have")
            text = f"{certain.count:,} of {of_all} {verb} exactly the box of a novel annotation"
            yield Finding(level="violation", subject="regions", text=text, named=tuple(certain.named))
        if chance.count:
            verb = inflected(chance.count, "has", "have")
            text = f"{chance.count:,} of {of_all} {verb} exactly the box of a novel annotation: "
            text += "windows" if self._source == "windows" else "boxes of whole pixels"
            text += " may, by chance"
            yield Finding(level="note", subject="regions", text=text, named=tuple(chance.named))

    @property
    def _source(self) -> Source:
        if "boxes_sha256" in self.store.manifest.products["proposals"].inputs:
            return "file"
        return "network" if self._from_network else "windows"

    @property
    def _from_network(self) -> bool:
        products = self.store.manifest.products
        return "proposer" in products or "boxes_sha256" in products["proposals"].inputs

    def teacher(self) -> Finding:
        """The published teacher and its weights."""
        model = model_inputs(self.store.manifest)
        digest = model.get("weights_sha256")
        said = f"weights of sha256 {str(digest)[:12]}" if digest else "digest of its weights not recorded"
        text = f"{model.get('name', 'unknown')}, {said}: what it was trained on was not examined"
        return Finding(level="note", subject="teacher", text=text)

    def uses_of_names(self) -> list[str]:
        """Settings by which the novel names took part in the store's regions; none where there is no novel name."""
        if not self.file.split.novel:
            return []
        settings = self.settings
        scored = [] if self._from_network else [f"proposals.score={settings['score']}"]
        guessed = ["proposals.drop_base_guesses=true"] if settings["drop_base_guesses"] else []
        return [*scored, *guessed, "the teacher's guess and confidence of every region"]

    def unlabelled(self) -> tuple[dict[str, int], dict[str, int], int]:
        """Count objects without a label in the images of training: novel ones and others by class, and their images."""
        novel, other = (self.file.rows(kind, self.trained_images) for kind in (NOVEL, OTHER))
        images = np.unique(self.file.image_index[np.concatenate([novel, other])])
        return self.file.counted(novel), self.file.counted(other), len(images)


def _outside_weights(subject: str, digest: str) -> Finding:
    text = f"its backbone began with weights of sha256 {digest[:12]}: what they were trained on was not examined"
    return Finding(level="note", subject=subject, text=text)


def backbone_weights(spec: Mapping[str, object]) -> Finding:
    """The weights that the backbone of a run began with; `spec` is its run.json."""
    if "backbone_weights" not in spec:
        return Finding(level="note", subject="backbone", text="not recorded: which weights it began with")
    digest = spec["backbone_weights"]
    if digest is None:
        return Finding(level="ok", subject="backbone", text="began with random weights")
    return _outside_weights("backbone", str(digest))


def _text(table: object, key: str) -> str | None:
    """A text in a table of a manifest; None without one."""
    value = table.get(key) if isinstance(table, Mapping) else None
    return value if isinstance(value, str) else None
