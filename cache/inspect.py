"""Looking at a store, finished or not, without changing it: what is in it, and whether it is still intact."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.commit import Committer
from cache.durable import file_digest
from cache.journal import Entry, journal_folder
from cache.manifest import Manifest, parse_json
from cache.mark import ENVIRONMENT, MANIFEST, UNLISTED, CommitMark, read_mark, relative_files, size_problems
from cache.plan import Plan, block_done, block_name, read_block, read_plan
from cache.reader import require_mark
from cache.schema import FORMAT_VERSION, RAGGED, WHOLE, StoreError, StoreIncomplete


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductInfo:
    """Rows of one ragged product: in all, and per image (mean)."""

    name: str
    rows: int
    rows_per_image: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreInfo:
    """What `info` found. `images` of an unfinished store counts all planned ones, rows only the finished blocks'."""

    path: Path
    complete: bool
    format_version: int
    images: int
    blocks_done: int
    """Blocks of an unfinished build; both numbers are 0 in a complete store, which knows no blocks."""
    blocks: int
    embed_dim: int
    products: tuple[ProductInfo, ...]
    bytes_: int
    """Bytes of all files in the folder."""
    files: int
    manifest: Manifest
    environment: Mapping[str, Any] | None
    """Who built it, where and with what; None when nothing is recorded."""
    problems: tuple[str, ...]
    """Files that are missing or of the wrong size; `verify` looks closer."""


def info(path: str | os.PathLike[str]) -> StoreInfo:
    """Describe the store at `path`, complete or not; damage is reported in `problems`.

    Raises:
        StoreError: no store, another format version, or damage that leaves nothing to describe.
    """
    store = Path(path).absolute()
    mark = read_mark(store)
    if mark is not None:
        return _complete_info(store, mark)
    try:
        require_mark(store)
    except StoreIncomplete:
        return _unfinished_info(read_plan(store))
    raise AssertionError("a store without a mark is incomplete")


def _complete_info(store: Path, mark: CommitMark) -> StoreInfo:
    attributes = _load(store / "zarr.json")["attributes"]["ezsd_store"]
    images = int(attributes["images"])
    return StoreInfo(
        complete=True,
        images=images,
        blocks_done=0,
        blocks=0,
        embed_dim=mark.embed_dim,
        products=_products(attributes["rows"], images),
        manifest=Manifest(_load(store / MANIFEST)),
        problems=tuple(size_problems(store, mark)),
        **_folder(store),
    )


def _unfinished_info(plan: Plan) -> StoreInfo:
    done = [block for block in plan.blocks if block_done(plan, block.index)]
    rows = Committer(plan, tuple(read_block(plan, block.index) for block in done))
    present = sum(block.stop - block.start for block in done)
    return StoreInfo(
        complete=False,
        images=len(plan.image_ids),
        blocks_done=len(done),
        blocks=len(plan.blocks),
        embed_dim=plan.embed_dim,
        products=_products({product: rows.rows(product) for product in RAGGED}, present),
        manifest=plan.manifest,
        problems=(),
        **_folder(plan.store),
    )


def _products(rows: Mapping[str, int], images: int) -> tuple[ProductInfo, ...]:
    return tuple(
        ProductInfo(name=name, rows=rows[name], rows_per_image=rows[name] / images if images else 0.0)
        for name in RAGGED
    )


def _folder(store: Path) -> dict[str, Any]:
    names = relative_files(store)
    environment = store / ENVIRONMENT
    return {
        "path": store,
        "format_version": FORMAT_VERSION,
        "files": len(names),
        "bytes_": sum((store / name).stat().st_size for name in names),
        "environment": _load(environment) if environment.exists() else None,
    }


def _load(file: Path) -> dict[str, Any]:
    try:
        return parse_json(file.read_bytes(), str(file))
    except OSError as error:
        raise StoreError(f"{file}: cannot be read ({error.strerror}); the store is damaged") from error


def verify(path: str | os.PathLike[str]) -> list[str]:
    """Read every byte and compare digests; one line for each file that is damaged, missing or foreign.

    Looks at a complete store's files, or at the journal of an unfinished one.

    Raises:
        StoreError: not a store, another format version, or a damaged commit mark.
    """
    store = Path(path).absolute()
    mark = read_mark(store)
    return _verify_journal(store) if mark is None else _verify_files(store, mark)


def _verify_files(store: Path, mark: CommitMark) -> list[str]:
    problems = size_problems(store, mark)
    for name, expected in mark.files.items():
        file = store / name
        if file.is_file() and file.stat().st_size == expected.size and file_digest(file) != expected:
            problems.append(f"{file}: its bytes are not those that were committed (sha256 differs)")
    for name in relative_files(store):
        if name not in mark.files and name not in UNLISTED and not name.startswith("journal/"):
            problems.append(f"{store / name}: does not belong to the store")
    return problems


def _verify_journal(store: Path) -> list[str]:
    try:
        require_mark(store)
    except StoreIncomplete:
        plan = read_plan(store)
    names = [block_name(block.index) for block in plan.blocks] + [f"whole-{product}" for product in WHOLE]
    folders = [journal_folder(store) / name for name in names]
    return [problem for folder in folders if folder.exists() for problem in _entry_problems(folder)]


def _entry_problems(folder: Path) -> list[str]:
    problems = []
    try:
        entry = Entry.read(folder)
        for name in entry.arrays:
            entry.array(name)
    except StoreError as error:
        problems.append(str(error))
    return problems
