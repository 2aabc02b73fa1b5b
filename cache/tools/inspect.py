"""Looking at a store, finished or not, without changing it: what is in it, and who made it how."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ezsd.cache.errors import StoreError
from ezsd.cache.files import read_bytes
from ezsd.cache.format.commit_mark import (
    COMMIT,
    INCOMPLETE,
    MANIFEST,
    TRANSFER,
    CommitMark,
    file_problem,
    read_incomplete,
    read_mark,
)
from ezsd.cache.format.manifest import Manifest
from ezsd.cache.format.names import ROOT, files_below, size_of
from ezsd.cache.format.regions import EmbeddingType
from ezsd.cache.format.schema import SCHEMA_VERSION
from ezsd.cache.format.sealed_json import parse_json
from ezsd.cache.journal.bad_images import NO_ROOT, all_bad_images, bad_images_of
from ezsd.cache.journal.commit import Shards
from ezsd.cache.journal.entries import ENTRY
from ezsd.cache.journal.plan import Plan, block_done, plan_folder, read_block
from ezsd.cache.storage.locations import LocalPlace, Place, find_place, read_environment, unfinished_plan
from ezsd.cache.storage.remote import RemotePlace


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductInfo:
    """A product: its fingerprint, and its rows in all and per image (mean); None where it has no rows of images."""

    name: str
    fingerprint: str
    rows: int | None
    rows_per_image: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreInfo:
    """Description of a store. Of an unfinished one `images` counts all planned ones, rows those of finished blocks."""

    path: Path | str
    """Folder or URL of the store."""
    complete: bool
    format_version: int
    images: int
    blocks_done: int
    """Blocks of an unfinished build; both numbers are 0 in a complete store, which knows no blocks."""
    blocks: int
    embed_dim: int | None
    """D of a store of regions; None for any other schema."""
    embedding: EmbeddingType | None
    products: tuple[ProductInfo, ...]
    bytes_: int
    """Bytes of all files in the folder."""
    files: int
    bad_images: Mapping[int, str]
    """Images that could not be read when the store was built, by id, and why: they have no rows."""
    manifest: Manifest
    environment: Mapping[str, Any] | None
    """The build's record of host, versions and settings; None without one."""
    problems: tuple[str, ...]
    """Files that are missing or of the wrong size; `verify` looks closer."""


def info(path: str | os.PathLike[str]) -> StoreInfo:
    """Describe the store at `path`, complete or not, or a complete one at a URL; damage is reported in `problems`.

    Raises:
        StoreIncomplete: a copy that is not finished.
        StoreError: no store, another format version, or damage to what describes it; or the URL cannot be reached.
    """
    place = find_place(path)
    if isinstance(place, RemotePlace):
        return _committed_info(place, place.mark(), complete=True)
    store = Path(path).absolute()
    mark = read_mark(store)
    if mark is not None:
        return _committed_info(place, mark, complete=True)
    damaged = read_incomplete(store)
    if damaged is not None:
        return _committed_info(place, damaged, complete=False)
    return _unfinished_info(unfinished_plan(store))


def _committed_info(place: Place, mark: CommitMark, *, complete: bool) -> StoreInfo:
    root, where = _load(place, mark, ROOT), f"{place}/{ROOT}"
    try:
        attributes = root["attributes"]["ezsd_store"]
        images = int(attributes["images"])
        rows = {product: int(attributes["rows"][product]) for product in mark.schema.per_image}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StoreError(f"{where}: {NO_ROOT.format(type(error).__name__, error)}") from error
    bad_images = bad_images_of(root, where)
    manifest = Manifest.from_fields(_load(place, mark, MANIFEST), f"{place}/{MANIFEST}")
    return StoreInfo(
        complete=complete,
        format_version=manifest.format_version,
        images=images,
        blocks_done=0,
        blocks=0,
        embed_dim=mark.embed_dim,
        embedding=mark.embedding,
        products=_products(manifest, rows, images),
        bad_images=bad_images,
        manifest=manifest,
        problems=tuple(place.size_problems(mark)),
        **_files(place, mark),
    )


def _unfinished_info(plan: Plan) -> StoreInfo:
    done = [block for block in plan.blocks if block_done(plan, block.index)]
    entries = [read_block(plan, block.index) for block in done]
    shards = Shards.of_entries(plan, entries)
    present = sum(block.stop - block.start for block in done)
    return StoreInfo(
        complete=False,
        format_version=plan.manifest.format_version,
        images=len(plan.image_ids),
        blocks_done=len(done),
        blocks=len(plan.blocks),
        embed_dim=plan.embed_dim,
        embedding=plan.manifest.embedding,
        products=_products(
            plan.manifest, {product: shards.rows(product) for product in plan.schema.per_image}, present
        ),
        bad_images=all_bad_images(entry.attributes for entry in entries),
        manifest=plan.manifest,
        problems=(),
        **_files(LocalPlace(plan.store)),
    )


def _products(manifest: Manifest, rows: Mapping[str, int], images: int) -> tuple[ProductInfo, ...]:
    return tuple(
        ProductInfo(
            name=name,
            fingerprint=fingerprint,
            rows=rows.get(name),
            rows_per_image=rows[name] / images if name in rows and images else None,
        )
        for name, fingerprint in manifest.fingerprints.items()
    )


def _files(place: Place, mark: CommitMark | None = None) -> dict[str, Any]:
    if isinstance(place, LocalPlace):
        sizes = {name: size_of(place.path / name) for name in files_below(place.path)}
    else:
        assert isinstance(place, RemotePlace)
        assert mark is not None
        # A web server has no list of its files.
        stated = {name: at.size for name, at in mark.files.items()}
        sizes = stated if place.checks_when_read else place.sizes()
    return {
        "path": place.path if isinstance(place, LocalPlace) else str(place),
        "files": len(sizes),
        "bytes_": sum(sizes.values()),
        "environment": _environment(place),
    }


def _environment(place: Place) -> dict[str, Any] | None:
    """The build's record, or None for a damaged one: `verify` says so, and the store does not depend on it."""
    try:
        return read_environment(place) or None
    except StoreError:
        return None


def _load(place: Place, mark: CommitMark, name: str) -> dict[str, Any]:
    """A file that describes the store, once it is what was committed: a wrong figure would be told as a fact."""
    where = f"{place}/{name}"
    if isinstance(place, LocalPlace):
        reason = file_problem(place.path / name, mark.files[name], deep=True)
        if reason is not None:
            raise StoreError(f"{where}: {reason}; the store is damaged: `repair({place})` mends it")
    return parse_json(place.read_file(name), where)


def records_schema(store: Path) -> bool:
    """True if the store in a folder says that its schema is not the one of regions; it may be unfinished or damaged."""
    for name in (COMMIT, INCOMPLETE, TRANSFER, MANIFEST):
        with suppress(StoreError):
            return parse_json(read_bytes(store / name), name).get("format_version") == SCHEMA_VERSION
    with suppress(StoreError):
        plan = parse_json(read_bytes(plan_folder(store) / ENTRY), ENTRY).get("attributes")
        return isinstance(plan, dict) and plan.get("format_version") == SCHEMA_VERSION
    return False


def list_stores(folder: str | os.PathLike[str]) -> dict[Path | str, StoreInfo | StoreError]:
    """The stores directly below a folder or URL, complete or not, in order; the error where one cannot be described.

    Returns:
        By path, or by URL.

    Raises:
        StoreError: there is no such folder, or the URL cannot be reached.
    """
    place = find_place(folder)
    found: dict[Path | str, StoreInfo | StoreError] = {}
    for path in place.folders() if isinstance(place, RemotePlace) else _stores_in(Path(folder).absolute()):
        try:
            if isinstance(path, Path) or _holds_store(path):
                found[path] = info(path)
        except StoreError as error:
            found[path] = error
    return found


def _stores_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise StoreError(f"{folder}: is not a folder; give one that holds stores, such as cache")
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_dir() and any((path / sign).exists() for sign in (COMMIT, INCOMPLETE, TRANSFER, plan_folder(path)))
    ]


def _holds_store(url: str) -> bool:
    return not {COMMIT, INCOMPLETE, TRANSFER}.isdisjoint(RemotePlace(url).names())
