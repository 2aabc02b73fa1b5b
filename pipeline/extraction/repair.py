"""Recomputation of a damaged store's rows, from its images and its teacher."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ezsd.adapt import restore
from ezsd.cache import (
    JSON,
    Block,
    Manifest,
    RaggedRows,
    RepairReport,
    StoredValues,
    StoreError,
    StoreMismatch,
    differences,
    info,
    is_mark_lost,
    read_environment,
    repair,
)
from ezsd.errors import EzsdError
from ezsd.pipeline.config.schema import ProposerConfig
from ezsd.pipeline.data.datasets import from_definition
from ezsd.pipeline.extraction.build import adapted, embed_names, extract_job, trained_proposer
from ezsd.pipeline.extraction.proposer import proposer_weights
from ezsd.pipeline.extraction.provenance import built_settings, describe, model_inputs, recorded_config
from ezsd.pipeline.extraction.request import BuildRequest, read_annotations
from ezsd.pipeline.extraction.run_proposer import run_digest
from ezsd.pipeline.extraction.teacher import configured_teacher, with_recorded_normalisation
from ezsd.pipeline.extraction.worker import block_rows
from ezsd.pipeline.files import as_json
from ezsd.pipeline.progress import Progress
from ezsd.teacher.open_clip import Teacher


def repair_store(path: Path, data_root: Path, *, weights: str | None, device: str) -> RepairReport:
    """Repair a store, lost rows from its images.

    A lost commit mark is made again where all else is whole, for which neither images nor teacher are looked at.

    Raises:
        ConfigError: the store does not say how it was built.
        StoreError: see `ezsd.cache.repair`.
    """
    if is_mark_lost(path):
        return repair(path)
    return repair(path, _source(path, data_root, weights=weights, device=device))


def _source(path: Path, data_root: Path, *, weights: str | None, device: str) -> _Images:
    recorded = read_environment(path)
    config = recorded_config(path, recorded)
    if weights is not None:
        config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, weights=weights))
    model = None
    # Where the manifest is what has to be repaired, only the settings can say it.
    with contextlib.suppress(StoreError):
        manifest = info(path).manifest
        model = model_inputs(manifest)
        config = dataclasses.replace(config, teacher=with_recorded_normalisation(config.teacher, model))
        if "proposer" in manifest.products:
            config = dataclasses.replace(config, proposer=_as_recorded(config.proposer, manifest))
    dataset = from_definition(recorded["dataset"], data_root).require()
    return _Images(
        BuildRequest(dataset=dataset, config=config, out=path, limit=recorded["limit"], device=device), model
    )


def _as_recorded(proposer: ProposerConfig, manifest: Manifest) -> ProposerConfig:
    """Put the manifest's digests in the place of what has gone or changed: only lost weights need the files."""
    built = built_settings(manifest)["proposer"]
    if proposer.weights and not Path(proposer.weights).is_file():
        proposer = dataclasses.replace(proposer, weights=str(built["weights"]))
    if proposer.run:
        with contextlib.suppress(EzsdError):
            if str(built["run"]).endswith(run_digest(proposer)):
                return proposer
        proposer = dataclasses.replace(proposer, run=str(built["run"]))
    return proposer


class _Images:
    """The images of a store, their annotations, and what computes its rows: `ezsd.cache.RowSource`.

    Args:
        request: the store's build.
        model: fingerprint of its published teacher; None where the store does not say it any more. With it, the
            teacher is loaded and compared when rows have to be computed, and not for what the annotations say.
    """

    def __init__(self, request: BuildRequest, model: Mapping[str, JSON] | None) -> None:
        self._request, self._model = request, model
        self._annotations = read_annotations(request)

    @cached_property
    def manifest(self) -> Manifest:
        """Manifest of the store."""
        request = self._request
        model = self._loaded_teacher().fingerprint() if self._model is None else self._model
        return describe(request.dataset, self._annotations, request.config, model)

    def _loaded_teacher(self) -> Teacher:
        """The teacher as published; StoreMismatch where it is not the one of the store."""
        teacher = configured_teacher(self._request.config.teacher, self._request.device)
        changed = [] if self._model is None else differences(self._model, as_json(teacher.fingerprint()))
        if changed:
            raise StoreMismatch.between(
                self._request.out,
                changed,
                cure="rows are computed by its own teacher alone: give the weights it was built with (`weights=FILE`)",
            )
        return teacher

    @property
    def images(self) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
        """Ids, widths, heights."""
        images = self._annotations.images
        return (
            np.array([image.id for image in images], np.int64),
            np.array([image.width for image in images], np.int32),
            np.array([image.height for image in images], np.int32),
        )

    def annotated(self, block: Block) -> RaggedRows:
        """Boxes, classes and annotation ids of the base objects in a slice of the images."""
        annotations = self._annotations
        rows = [
            slice(0, 0) if annotations.images[place].id in self._left_out else annotations.rows(place)
            for place in range(block.start, block.stop)
        ]
        columns = {name: getattr(annotations, name) for name in ("box", "class_index", "annotation_id")}
        return RaggedRows(
            counts=np.array([at.stop - at.start for at in rows], np.int32),
            fields={name: np.concatenate([values[at] for at in rows]) for name, values in columns.items()},
        )

    def per_store(self, product: str, stored: Mapping[str, StoredValues]) -> Mapping[str, NDArray[np.float32]]:
        """The teacher's values, the text rows, or the proposer's weights."""
        if product == "proposer":
            return {"values": trained_proposer(self._request, self._annotations)[0]}
        teacher = self._loaded_teacher()
        if product == "teacher" or "teacher" not in stored:
            values, _ = adapted(self._request, teacher, self._annotations)
            if product == "teacher":
                return {"values": values}
        else:
            arrays, attributes = stored["teacher"]
            restore(teacher.layer_norms(), arrays["values"], attributes["parameters"])
        return {"embedding": embed_names(teacher, self._request.dataset.split.names)}

    def rows(self, blocks: Sequence[Block], stored: Mapping[str, StoredValues]) -> Iterator[Mapping[str, RaggedRows]]:
        """All rows of slices of the images."""
        self._loaded_teacher()
        (teacher, attributes), (text, _) = stored["teacher"], stored["text"]
        network = None
        if "proposer" in stored:
            network = proposer_weights(*stored["proposer"])
        job = extract_job(
            self._request,
            attributes["parameters"],
            teacher["values"],
            text["embedding"],
            self.manifest.digest,
            proposer=network,
        )
        with Progress("repair", sum(block.stop - block.start for block in blocks), unit="image") as progress:
            for block in blocks:
                yield block_rows(job, block, left_out=self._left_out)
                progress.advance(block.stop - block.start)

    @cached_property
    def _left_out(self) -> Collection[int]:
        """Images that have no rows in the store, readable or not."""
        try:
            return info(self._request.out).bad_images.keys()
        except StoreError:
            # The list is lost with what holds it; rows that then come out otherwise are not put into the store.
            return ()
