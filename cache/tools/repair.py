"""Making a damaged store whole: exactly the lost files, bit for bit, or not at all."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ezsd.cache.errors import StoreError, StoreMismatch, StoreUnreadable
from ezsd.cache.files import discard, make_folders, rename, scratch_name, write_new
from ezsd.cache.format import zarr_bytes as encoding
from ezsd.cache.format.checksums import ChunkSums
from ezsd.cache.format.commit_mark import (
    COMMIT,
    ENVIRONMENT,
    INCOMPLETE,
    LOCK,
    MANIFEST,
    CommitMark,
    read_incomplete,
    read_mark,
)
from ezsd.cache.format.manifest import Manifest
from ezsd.cache.format.names import inside
from ezsd.cache.format.schema import (
    CHECKSUM,
    CHECKSUMS,
    IMAGES,
    OFFSET,
    PER_IMAGE,
    PER_STORE,
    ArraySpec,
    Block,
    RaggedRows,
    per_store,
    stored_fields,
)
from ezsd.cache.format.sealed_json import parse_json
from ezsd.cache.journal.commit import root_attributes
from ezsd.cache.journal.entries import journal_folder, little_endian, lock_store, raw_bytes, scratch_folder
from ezsd.cache.journal.plan import stored_columns
from ezsd.cache.storage.locations import unfinished_plan
from ezsd.cache.tools.verify import Damage, Locator, consolidated, damaged_files

BLOCK_IMAGES = 64
"""Images computed at once."""

StoredValues = tuple[NDArray[np.float32], Mapping[str, Any]]
"""Values and attributes of a per-store product."""


class RowSource(Protocol):
    """Source of lost rows: computes them again from the images, as the build did."""

    @property
    def manifest(self) -> Manifest:
        """The manifest of the computed rows; it must be the store's."""
        ...

    @property
    def images(self) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
        """Ids, widths and heights of the store's images, in its order."""
        ...

    def per_store(self, product: str, stored: Mapping[str, StoredValues]) -> NDArray[np.float32]:
        """The array of a per-store product; `stored` holds those of the others that the store still has."""
        ...

    def rows(self, block: Block, stored: Mapping[str, StoredValues]) -> Mapping[str, RaggedRows]:
        """The rows of a slice of the image list, as `write_block` takes them, by the `stored` per-store products."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """Result of `repair`."""

    repaired: tuple[str, ...]
    """Files that are again what was committed."""
    left: tuple[Damage, ...]
    """Files that are not; where there are any, the store is marked incomplete."""


def repair(path: str | os.PathLike[str], source: RowSource | None = None) -> RepairReport:
    """Rebuild the damaged and missing files of a store that was complete once.

    Metadata and checksums are made again from what is left of the store. Everything else needs the images, and of
    them those whose rows were lost. A file is replaced only by the very bytes that were committed. A store that stays
    damaged loses its commit mark (`INCOMPLETE.json` takes its place), so that nobody reads it; one that is whole
    again gets it back. A damaged `environment.json`, which only tells who built the store, is removed.

    Raises:
        StoreIncomplete: a copy that is not finished.
        StoreError: no finished store, a damaged commit mark, or a build or repair is at work.
        StoreUnreadable: the system does not let a file be read; it is left as it is, and so is the commit mark.
        StoreMismatch: `source` would make another store.
    """
    store = Path(path).absolute()
    mark = read_mark(store) or read_incomplete(store)
    if mark is None:
        unfinished_plan(store)
        raise StoreError(f"{store}: was never finished, so there is nothing to repair; run `ezsd cache build` again")
    if source is not None and source.manifest.digest != mark.manifest_digest:
        raise StoreMismatch(
            f"{store}: these images and settings make another store than this one (manifest digest "
            f"{source.manifest.digest[:12]}, here {mark.manifest_digest[:12]}); give the `data_root` it was made from"
        )
    # Refuses a link in its place, before a lock file would be put there.
    scratch_folder(store)
    lock = lock_store(store)
    try:
        return _Repair(store, mark, source).run()
    finally:
        discard(scratch_folder(store))
        journal = journal_folder(store)
        if journal.is_dir() and not any(journal.iterdir()):
            journal.rmdir()
        discard(store / LOCK)
        lock.release()


def _require_readable(found: Sequence[Damage]) -> None:
    """Refuse to judge a store with files that could not be read: they may be whole."""
    hidden = [damage for damage in found if damage.kind == "unreadable"]
    if hidden:
        more = f" and {len(hidden) - 1} more files cannot be read," if len(hidden) > 1 else ""
        raise StoreUnreadable(f"{hidden[0]};{more} then run `ezsd cache repair` again")


@dataclass(frozen=True)
class _Repair:
    store: Path
    mark: CommitMark
    source: RowSource | None

    def run(self) -> RepairReport:
        damaged = self._damages()
        _require_readable(damaged)
        names = {damage.name for damage in damaged}
        if ENVIRONMENT in names:
            discard(self.store / ENVIRONMENT)
        for name in sorted(names - {ENVIRONMENT}, key=_turn):
            parts = self._metadata(name) if name.endswith(".json") else self._shard(name)
            if parts is not None:
                self._put(name, parts)
        left = self._damages() if damaged else []
        _require_readable(left)
        self._mark_as(complete=not left)
        repaired = names - {damage.name for damage in left}
        return RepairReport(repaired=tuple(sorted(repaired)), left=tuple(left))

    def _damages(self) -> list[Damage]:
        return damaged_files(self.store, self.mark, deep=True)

    def _mark_as(self, *, complete: bool) -> None:
        before, after = (INCOMPLETE, COMMIT) if complete else (COMMIT, INCOMPLETE)
        if (self.store / before).exists():
            rename(self.store / before, self.store / after, point="commit")

    def _put(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Put a file in the place of a damaged one, if it has become what was committed."""
        scratch, target = scratch_folder(self.store), inside(self.store, name)
        make_folders(scratch)
        make_folders(target.parent)
        temporary = scratch_name(scratch, "repair")
        try:
            if write_new(temporary, parts) == self.mark.files[name]:
                rename(temporary, target, point="shard")
        finally:
            discard(temporary)

    @property
    def _locate(self) -> Locator:
        return Locator(self.store, self.mark)

    def _metadata(self, name: str) -> list[bytes] | None:
        """The manifest from the source, the root's metadata from all others', theirs from the copy in the root."""
        if name == MANIFEST:
            return [self.source.manifest.to_json().encode()] if self.source is not None else None
        nodes = [file for file in self.mark.files if file.endswith("/zarr.json")]
        if name == "zarr.json":
            return [self._root(nodes)] if all(map(self._locate.intact, [MANIFEST, *nodes])) else None
        if not self._locate.intact("zarr.json"):
            return None
        return [encoding.metadata_bytes(consolidated(self._json("zarr.json"), name.removesuffix("/zarr.json")))]

    def _json(self, name: str) -> dict[str, Any]:
        return parse_json((self.store / name).read_bytes(), str(self.store / name))

    def _root(self, files: list[str]) -> bytes:
        nodes = {file.removesuffix("/zarr.json"): self._json(file) for file in files}
        rows = {product: _length(nodes[f"{product}/box"]) for product in PER_IMAGE}
        manifest = Manifest.from_fields(self._json(MANIFEST), str(self.store / MANIFEST))
        images = _length(nodes["images/id"])
        attributes = root_attributes(manifest, rows, images=images, embed_dim=self.mark.embed_dim)
        return encoding.metadata_bytes(encoding.root_metadata(attributes, nodes))

    def _shard(self, name: str) -> Iterable[bytes | memoryview] | None:
        array, _, place = name.partition("/c/")
        shard = int(place.partition("/")[0])
        spec = self._locate.spec(array)
        # What cannot become what was committed is not computed: the geometry is a file's word, and may be any.
        if (
            spec is None
            or shard >= spec.shards
            or self.mark.files[name].size != encoding.shard_bytes_on_disk(spec, shard)
        ):
            return None
        rows = self._rows_of(spec, shard)
        return None if rows is None else encoding.shard_parts(spec, shard, map(raw_bytes, rows))

    def _rows_of(self, spec: ArraySpec, shard: int) -> Iterable[NDArray[Any]] | None:
        """The rows of one shard in pieces, or None where nothing says what they were."""
        product, _, field = spec.name.partition("/")
        start, stop = spec.shard_range(shard)
        if product == CHECKSUMS:
            sums = self._checksums(spec.name.removeprefix(f"{CHECKSUMS}/"))
            return None if sums is None else [sums[start:stop]]
        if self.source is None:
            return None
        if product == "images":
            place = [column.name for column in IMAGES].index(field)
            return [little_endian(self.source.images[place], spec.dtype)[start:stop]]
        if product in PER_STORE:
            return [little_endian(self.source.per_store(product, self._stored()), spec.dtype)[start:stop]]
        if self._per_store.keys() != per_store(self.mark.products).keys():
            return None
        return [self._offsets(product)[start:stop]] if field == OFFSET.name else self._ragged(spec, start, stop)

    def _checksums(self, array: str) -> NDArray[Any] | None:
        spec = self._locate.spec(array)
        if spec is None:
            return None
        found: list[int] = []
        for shard in range(spec.shards):
            if not self._locate.intact(spec.shard_file(shard)):
                return None
            sums = ChunkSums(spec, shard)
            for _ in sums.watch([(self.store / spec.shard_file(shard)).read_bytes()]):
                found += sums.sums
        return little_endian(found, CHECKSUM.dtype)

    @cached_property
    def _per_store(self) -> dict[str, StoredValues]:
        """The per-store products that rows are computed by; they are repaired before this is asked."""
        return self._stored()

    def _stored(self) -> dict[str, StoredValues]:
        """The per-store products that the store has undamaged by now."""
        found: dict[str, StoredValues] = {}
        for product, field in per_store(self.mark.products).items():
            values, file = self._locate.values(f"{product}/{field.name}"), f"{product}/zarr.json"
            attributes = self._json(file).get("attributes") if self._locate.intact(file) else None
            # A stranger's may say anything there, and nothing can be computed with that.
            if values is not None and isinstance(attributes, dict):
                found[product] = values, attributes
        return found

    def _blocks(self, first: int, last: int) -> Iterator[tuple[Block, Mapping[str, RaggedRows]]]:
        assert self.source is not None
        for index, start in enumerate(range(first, last, BLOCK_IMAGES)):
            block = Block(index, start, min(start + BLOCK_IMAGES, last))
            yield block, self.source.rows(block, self._per_store)

    def _offsets(self, product: str) -> NDArray[np.int64]:
        assert self.source is not None
        counts = [rows[product].counts for _, rows in self._blocks(0, len(self.source.images[0]))]
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(counts), dtype=np.int64)])

    def _ragged(self, spec: ArraySpec, start: int, stop: int) -> Iterable[NDArray[Any]] | None:
        product, _, field = spec.name.partition("/")
        offset = self._locate.values(f"{product}/{OFFSET.name}")
        return None if offset is None else self._pieces(product, field, offset, (start, stop))

    def _pieces(self, product: str, field: str, offset: NDArray[Any], rows: tuple[int, int]) -> Iterator[NDArray[Any]]:
        dtype = next(at.dtype for at in stored_fields(product, self.mark.embedding) if at.name == field)
        first = int(np.searchsorted(offset, rows[0], side="right")) - 1
        last = int(np.searchsorted(offset, rows[1], side="left"))
        for block, found in self._blocks(first, last):
            column = stored_columns(found[product].fields, self.mark.embedding)[field]
            begin = int(offset[block.start])
            yield little_endian(column, dtype)[max(rows[0] - begin, 0) : rows[1] - begin]


def _length(node: Mapping[str, Any]) -> int:
    """Rows that an array's metadata tell of; 0 where they tell of none, and the root is then not what it was."""
    shape = node.get("shape")
    return int(shape[0]) if isinstance(shape, list) and shape and isinstance(shape[0], int) else 0


def _turn(name: str) -> tuple[int, str]:
    """Order of the repairs, each serves the later ones: metadata, per-store products, offsets, rows, checksums."""
    turns = (
        name == MANIFEST,
        name == "zarr.json",
        name.endswith("zarr.json"),
        name.startswith("images/"),
        *(name.startswith(f"{product}/") for product in PER_STORE),
        f"/{OFFSET.name}/" in name and not name.startswith(CHECKSUMS),
        not name.startswith(CHECKSUMS),
        True,
    )
    return turns.index(True), name
