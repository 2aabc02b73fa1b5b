"""What `ezsd cache` says about stores, and how it mends them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache import (
    Block,
    Damage,
    Manifest,
    RaggedRows,
    RepairReport,
    StoreError,
    StoreInfo,
    collect,
    compare,
    info,
    list_stores,
    repair,
    verify,
)
from cache.repair import Whole
from ezsd.adapt import restore
from pipeline.build import BuildForecast, BuildReport, BuildRequest, adapted, embed_names, extract_job, read_annotations
from pipeline.config import ConfigError, from_tables
from pipeline.datasets import from_definition
from pipeline.extract import block_rows, load_config_teacher
from pipeline.provenance import describe


def build_lines(store: Path, report: BuildReport) -> list[str]:
    """What a build did."""
    if report.already_complete:
        return [f"{store}: complete already, nothing to do"]
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())
    lines = [f"{store}: complete ({times})"]
    if report.reused:
        lines.append(f"reused: {', '.join(report.reused)}; computed: {', '.join(report.computed) or 'nothing'}")
    return lines


def forecast_lines(store: Path, found: BuildForecast) -> list[str]:
    """What a build would do."""
    return [
        f"{store}: {found.images:,} images in {found.blocks:,} blocks",
        f"store, at most: {found.at_most.final:,} bytes",
        f"disk while it is built, at most: {found.at_most.peak:,} bytes",
        f"free there: {found.free:,} bytes",
    ]


def info_text(path: Path) -> str:
    """A store described as JSON."""
    found = info(path)
    table = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    table["manifest"] = found.manifest.fields
    table["products"] = [dataclasses.asdict(product) for product in found.products]
    return json.dumps(table, indent=1, default=str, ensure_ascii=False)


def list_lines(folder: Path) -> list[str]:
    """One line for each store in a folder."""
    found = list_stores(folder)
    if not found:
        return [f"{folder}: no stores in it"]
    width = max(len(path.name) for path in found)
    return [f"{path.name:<{width}}  {_summary(store)}" for path, store in found.items()]


def _summary(store: StoreInfo | StoreError) -> str:
    if isinstance(store, StoreError):
        return f"cannot be read: {store}"
    done = f"{store.blocks_done} of {store.blocks} blocks" if store.blocks else "marked incomplete"
    state = ("damaged" if store.problems else "complete") if store.complete else f"unfinished, {done}"
    regions = next(product for product in store.products if product.name == "regions")
    return f"{state}, {store.images:,} images, {regions.rows:,} regions, {store.bytes_:,} bytes, {store.embedding}"


def verify_lines(path: Path, *, deep: bool) -> list[str]:
    """One line for each thing that is wrong with a store."""
    return [str(damage) for damage in verify(path, deep=deep)]


def collect_lines(path: Path) -> list[str]:
    """Remove leftovers; one line for each file, and one for all."""
    removed = collect(path)
    return [
        *(f"removed {name} ({size:,} bytes)" for name, size in removed.items()),
        f"{path}: {len(removed)} files, {sum(removed.values()):,} bytes removed",
    ]


def compare_lines(first: Path, second: Path) -> list[str]:
    """How two stores differ: settings, products, content."""
    found = compare(first, second)
    same = ", ".join(found.same_fingerprint) or "none"
    return [
        *(line.replace("store has", "first has").replace("wanted", "second has") for line in found.settings),
        f"products with the same fingerprint: {same}",
        *(found.content or ["same content, file for file"]),
    ]


def repair_store(path: Path, data_root: Path | None, *, weights: str | None, device: str) -> RepairReport:
    """Repair a store, from its images if their folder is given.

    Raises:
        ConfigError: the store does not say how it was built.
        StoreError: see `cache.repair`.
    """
    return repair(path, None if data_root is None else _source(path, data_root, weights=weights, device=device))


def repair_lines(path: Path, report: RepairReport) -> list[str]:
    """What a repair did; the last line says how the store is now."""
    lines = [f"repaired {name}" for name in report.repaired]
    lines += [_left(damage) for damage in report.left]
    if not report.left:
        return [*lines, f"{path}: complete, every file is what was committed"]
    return [*lines, f"{path}: marked incomplete, {len(report.left)} files are still damaged"]


def _left(damage: Damage) -> str:
    return f"not repaired {damage}"


def _source(path: Path, data_root: Path, *, weights: str | None, device: str) -> _Images:
    recorded = _environment(path)
    if "config" not in recorded:
        raise ConfigError(f"{path}: environment.json does not say how it was built; build it anew in another folder")
    config = from_tables(recorded["config"], where=str(path / "environment.json"))
    if weights is not None:
        config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, weights=weights))
    dataset = from_definition(recorded["dataset"], data_root).require()
    return _Images(BuildRequest(dataset=dataset, config=config, out=path, limit=recorded["limit"], device=device))


def _environment(path: Path) -> dict[str, Any]:
    file = path / "environment.json"
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); it says how the store was built") from error
    return found


class _Images:
    """The images of a store and what computes its rows: `cache.RowSource`."""

    def __init__(self, request: BuildRequest) -> None:
        self._request = request
        self._annotations = read_annotations(request)
        self._teacher = load_config_teacher(request.config, request.device)

    @cached_property
    def manifest(self) -> Manifest:
        """What the store is made from."""
        request = self._request
        return describe(request.dataset, self._annotations, request.config, self._teacher.fingerprint())

    @property
    def images(self) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
        """Ids, widths, heights."""
        images = self._annotations.images
        return (
            np.array([image.id for image in images], np.int64),
            np.array([image.width for image in images], np.int32),
            np.array([image.height for image in images], np.int32),
        )

    def whole(self, product: str, wholes: Mapping[str, Whole]) -> NDArray[np.float32]:
        """The teacher's values, or the text rows."""
        teacher = load_config_teacher(self._request.config, self._request.device)
        if product == "teacher" or "teacher" not in wholes:
            values, _ = adapted(self._request, teacher, self._annotations)
            if product == "teacher":
                return values
        else:
            values, attributes = wholes["teacher"]
            restore(teacher.layer_norms(), values, attributes["parameters"])
        return embed_names(teacher, self._request.dataset.split.names)

    def rows(self, block: Block, wholes: Mapping[str, Whole]) -> Mapping[str, RaggedRows]:
        """All rows of a slice of the images."""
        (values, attributes), (text, _) = wholes["teacher"], wholes["text"]
        return block_rows(extract_job(self._request, attributes["parameters"], values, text), block)
