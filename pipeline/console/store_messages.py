"""Output of `ezsd cache`, as lines. Nothing here needs torch."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ezsd.cache import (
    Damage,
    Format,
    RepairReport,
    StoreError,
    StoreInfo,
    Verify,
    collect,
    compare,
    export,
    info,
    list_stores,
    pull,
    push,
    verify,
)
from ezsd.errors import inflected, quantity
from ezsd.pipeline.console.options import as_options
from ezsd.pipeline.extraction.manifest_names import as_settings
from ezsd.pipeline.progress import duration

if TYPE_CHECKING:
    from ezsd.pipeline.extraction.build import BuildReport, ShareReport
    from ezsd.pipeline.extraction.forecast import BuildForecast


def build_lines(store: Path, report: BuildReport) -> list[str]:
    """Summary of a build."""
    if report.already_complete:
        return [f"{store}: complete already, nothing to do"]
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())
    found = info(store)
    regions = next(product.rows for product in found.products if product.name == "regions")
    lines = [
        f"{store}: complete ({times})",
        f"{quantity(report.images, 'image')}, {quantity(regions or 0, 'region')}, {found.bytes_:,} bytes in "
        f"{quantity(found.files, 'file')}",
    ]
    if report.crops:
        rate = report.crops / max(report.seconds["extract"], 1e-9)
        crops, images = quantity(report.crops, "crop"), quantity(report.extracted, "image")
        lines.append(f"the teacher saw {crops} of {images}, {rate:,.0f} a second")
    lines += _left_out(store, report.bad_images)
    lines += _no_regions(store, regions)
    if report.reused:
        lines.append(f"reused: {', '.join(report.reused)}; computed: {', '.join(report.computed) or 'nothing'}")
    typed = shlex.quote(str(store))
    return [*lines, f"next: ezsd cache look {typed} to see its regions, or ezsd train --cache {typed}"]


def _no_regions(store: Path, regions: int | None) -> list[str]:
    """Warning about a store without regions to distil from; empty where it has some."""
    if regions != 0:
        return []
    from ezsd.pipeline.extraction.filters import why_no_regions

    return [f"warning: {as_options(why_no_regions(store))}"]


def _left_out(store: Path, bad_images: int) -> list[str]:
    if not bad_images:
        return []
    left_out = f"{quantity(bad_images, 'image')} cannot be read and {inflected(bad_images, 'was', 'were')} left out"
    return [f"{left_out}; `ezsd cache info {store}` says which and why"]


def share_lines(store: Path, report: ShareReport) -> list[str]:
    """Summary of one part of a build, with the next step."""
    if report.already_complete:
        return [f"{store}: complete already, nothing to do"]
    done = f"{store}: share {report.share} is done, {quantity(report.blocks, 'block')}"
    left_out = _left_out(store, report.bad_images)
    if report.missing:
        return [f"{done}; other shares' {quantity(report.missing, 'block is', 'blocks are')} missing", *left_out]
    return [f"{done}; all blocks are there, next: ezsd cache commit {shlex.quote(str(store))}", *left_out]


def commit_lines(store: Path, seconds: float | None) -> list[str]:
    """Summary of a commit."""
    if seconds is None:
        return [f"{store}: complete already, nothing to do"]
    found = info(store)
    regions = next(product.rows for product in found.products if product.name == "regions")
    done = f"{store}: complete ({seconds:.1f} s)"
    return [done, *_left_out(store, len(found.bad_images)), *_no_regions(store, regions)]


def forecast_lines(store: Path, found: BuildForecast) -> list[str]:
    """Size, time and disk that a build would need."""
    missing = f", {found.missing} of them missing" if found.missing else ""
    return [
        f"{store}: {quantity(found.images, 'image')} in {quantity(found.blocks, 'block')}{missing}",
        f"store, at most: {found.at_most.final:,} bytes",
        f"disk while it is built, at most: {found.at_most.peak:,} bytes",
        f"free there: {found.free:,} bytes",
        f"crops for the teacher, at most: {found.passes:,}, {found.passes / found.images:,.0f} an image",
        f"extraction, at most: {duration(found.seconds)} {_by(found.processes)} (a probe: one process of this machine "
        f"encoded {found.probe.crops:,} crops in {found.probe.seconds:.0f} s; re-normalisation and the training of a "
        "learned proposer come on top)",
    ]


def _by(processes: int | None) -> str:
    if processes is None:
        return "for each worker, divided by their number,"
    return f"by {processes} processes" if processes > 1 else "by one process"


def info_json(path: str | Path) -> str:
    """A store described as JSON, with everything that its files say of it."""
    found = info(path)
    table = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    table["manifest"] = found.manifest.fields
    table["products"] = [dataclasses.asdict(product) for product in found.products]
    return json.dumps(table, indent=1, default=str, ensure_ascii=False)


def info_lines(path: str | Path) -> list[str]:
    """A store described for a reader: state, size, products, origin, bad images."""
    from ezsd.pipeline.inference.evaluation_tables import aligned

    found = info(path)
    bad = f", {len(found.bad_images):,} of them could not be read" if found.bad_images else ""
    dimensions = f" of {found.embed_dim} dimensions" if found.embed_dim else ""
    facts = {
        "state": f"{_state(found)}, format version {found.format_version}",
        "images": f"{found.images:,}{bad}",
        "embeddings": f"{found.embedding}{dimensions}" if found.embedding else None,
        "size": f"{found.bytes_:,} bytes in {quantity(found.files, 'file')}",
        **_origin(found),
        "manifest": f"digest {found.manifest.digest}",
    }
    rows = [
        [one.name, *_row_counts(one.rows, one.rows_per_image), one.fingerprint[:_FINGERPRINT]] for one in found.products
    ]
    lines = [str(found.path), *(f"  {name:<10}  {_printable(said)}" for name, said in facts.items() if said)]
    lines += ["", *aligned(["product", "rows", "per image", "fingerprint"], rows)]
    some = sorted(found.bad_images.items())[:_NAMED]
    lines += ["", *(f"image {number} could not be read: {_printable(why)}" for number, why in some)] if some else []
    if len(found.bad_images) > _NAMED:
        lines.append(f"and {quantity(len(found.bad_images) - _NAMED, 'more image')}; --json lists all")
    # A call in backticks becomes a command before anything is cut off.
    problems = [_printable(as_options(one)) for one in found.problems]
    lines += ["", *(f"problem: {one}" for one in problems)] if problems else []
    return [*lines, "", "all settings and versions: add --json"]


_FINGERPRINT = 12
"""Characters of a fingerprint in a table."""
_NAMED = 20
"""Most bad images in a description."""


def _row_counts(rows: int | None, per_image: float | None) -> list[str]:
    return ["-" if rows is None else f"{rows:,}", "-" if per_image is None else f"{per_image:.1f}"]


def _origin(found: StoreInfo) -> dict[str, str | None]:
    """Dataset, teacher and build of a store of regions, as its manifest and its build's record say; None for neither.

    The values of the record may be anything: nothing depends on them.
    """
    inputs = {name: product.inputs for name, product in found.manifest.products.items()}
    environment = found.environment or {}
    names = inputs.get("text", {})
    teacher = inputs.get("teacher", {}).get("model")
    counts = [len(one) for one in (names.get("base_names"), names.get("novel_names")) if isinstance(one, list)]
    classes = "{:,} base and {:,} novel classes".format(*counts) if len(counts) == 2 else None
    root = environment.get("data_root")
    said = {
        "built": [
            _text(environment.get("finished") or environment.get("started")),
            _named("host", environment.get("host")),
            _named("device", environment.get("device")),
            *(_named(name, version) for name, version in _mapping(environment.get("versions")).items()),
        ],
        "dataset": [
            _text(_mapping(environment.get("dataset")).get("name")),
            classes,
            None if root is None else f"images in {_text(root)}",
        ],
        "teacher": [
            _text(_mapping(teacher).get("name")),
            _named("weights", _mapping(environment.get("teacher")).get("weights")),
        ],
    }
    return {name: ", ".join(filter(None, parts)) or None for name, parts in said.items()}


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) or value is None else json.dumps(value, default=str, ensure_ascii=False)


def _named(name: str, value: object) -> str | None:
    return None if value is None else f"{name} {_text(value)}"


def _printable(said: str) -> str:
    """Text of a file as a terminal may have it: without control characters, and not without an end."""
    short = said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in short)


_LONGEST = 300
"""Characters of one value in a description."""


def list_lines(folder: str | Path) -> list[str]:
    """List the stores of a folder or below a URL, one line each."""
    found = list_stores(folder)
    if not found:
        return [f"{folder}: no stores in it"]
    names = [str(path).rpartition("/")[2] for path in found]
    width = max(map(len, names))
    return [f"{name:<{width}}  {_summary(store)}" for name, store in zip(names, found.values(), strict=True)]


def _summary(store: StoreInfo | StoreError) -> str:
    if isinstance(store, StoreError):
        return f"cannot be read: {as_options(str(store))}"
    shown = [
        one for one in store.products if one.name == "regions" or (store.embedding is None and one.rows is not None)
    ]
    rows = ", ".join(f"{one.rows:,} {one.name}" for one in shown)
    ending = f", {store.embedding}" if store.embedding else ""
    return f"{_state(store)}, {quantity(store.images, 'image')}, {rows}, {store.bytes_:,} bytes{ending}"


def _state(store: StoreInfo) -> str:
    done = f"{store.blocks_done} of {store.blocks} blocks" if store.blocks else "marked incomplete"
    return ("damaged" if store.problems else "complete") if store.complete else f"unfinished, {done}"


def verify_lines(path: str | Path, *, deep: bool) -> list[str]:
    """Describe what is wrong with a store, one line for each problem."""
    return [as_options(str(damage)) for damage in verify(path, deep=deep)]


def collect_lines(path: Path, *, strays: bool = False, dry_run: bool = False) -> list[str]:
    """Remove leftovers; one line for each file, and one for all."""
    found = collect(path, strays=strays, dry_run=dry_run)
    done = "would be removed" if dry_run else "removed"
    lines = [f"{done}: {name} ({size:,} bytes)" for name, size in found.removed.items()]
    lines += [f"kept: {name} ({size:,} bytes), not made by ezsd" for name, size in found.kept.items()]
    lines.append(f"{path}: {quantity(len(found.removed), 'file')}, {sum(found.removed.values()):,} bytes {done}")
    if found.kept:
        lines.append(f"kept what ezsd did not make ({len(found.kept)}); --strays removes it too")
    return lines


def compare_lines(first: str | Path, second: str | Path) -> list[str]:
    """Differences of two stores: settings, products, content."""
    found = compare(first, second)
    same = ", ".join(found.same_fingerprint) or "none"
    return [
        *dict.fromkeys(one.line("first", "second", verb="has ") for one in as_settings(found.settings)),
        f"products with the same fingerprint: {same}",
        *(found.content or ["same content, file for file"]),
    ]


def repair_lines(path: Path, report: RepairReport) -> list[str]:
    """Summary of a repair; the last line is the store's state now."""
    lines = [f"repaired {name}" for name in report.repaired]
    if report.images:
        lines.append(f"computed the rows of {quantity(report.images, 'image')} again")
    lines += [_left(damage) for damage in report.left]
    if report.remade is not None:
        lines.append(
            f"the store's digest by its new commit mark is {report.remade}; compare it with the one in a run's "
            "stores.json, or the store with a copy (`ezsd cache diff`): files exchanged for those of another store "
            "do not show otherwise"
        )
    if not report.left:
        return [*lines, f"{path}: complete, every file is what was committed"]
    left = quantity(len(report.left), "file is", "files are")
    return [*lines, f"{path}: marked incomplete, {left} still damaged"]


def _left(damage: Damage) -> str:
    return f"not repaired {as_options(str(damage))}"


def transfer_line(way: Literal["push", "pull"], source: str, target: str) -> str:
    """Copy a store and say what was copied."""
    files = push(source, target) if way == "push" else pull(source, target)
    return (
        f"{target}: complete already, nothing to do"
        if not files
        else f"{target}: complete ({quantity(files, 'file')} copied)"
    )


def export_line(store: str, out: Path, name: Format, *, verify: Verify = "full") -> str:
    """Export a store and say where it is."""
    return f"{export(store, out, format=name, verify=verify)}: exported as {name}"
