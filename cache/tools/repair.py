"""Making a damaged store whole: exactly what is lost, bit for bit, or not at all."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ezsd.cache.errors import StoreError, StoreMismatch, StoreUnreadable
from ezsd.cache.files import (
    FileDigest,
    discard,
    make_folders,
    rename,
    require_room,
    scratch_name,
    write_atomic,
    write_new,
)
from ezsd.cache.format import zarr_bytes as encoding
from ezsd.cache.format.checksums import ChunkSums, bad_chunks, checksum_spec
from ezsd.cache.format.commit_mark import (
    COMMIT,
    ENVIRONMENT,
    INCOMPLETE,
    LOCK,
    MANIFEST,
    TRANSFER,
    CommitMark,
    is_mark_lost,
    read_incomplete,
    read_mark,
)
from ezsd.cache.format.manifest import Manifest
from ezsd.cache.format.names import inside
from ezsd.cache.format.schema import CHECKSUM, CHECKSUMS, IMAGES, OFFSET, ArraySpec, Block, RaggedRows
from ezsd.cache.format.sealed_json import parse_json
from ezsd.cache.journal.commit import root_attributes
from ezsd.cache.journal.entries import journal_folder, little_endian, lock_store, raw_bytes, scratch_folder
from ezsd.cache.journal.plan import plan_folder, stored_columns
from ezsd.cache.journal.validation import check_per_store
from ezsd.cache.storage.locations import unfinished_plan
from ezsd.cache.tools.lost_rows import LostShard, Offsets, Patch, runs
from ezsd.cache.tools.remake_mark import remake_mark
from ezsd.cache.tools.verify import Damage, LocalFiles, Locator, damaged_files
from ezsd.errors import quantity

StoredValues = tuple[Mapping[str, NDArray[Any]], Mapping[str, Any]]
"""Arrays by field name, and attributes, of a per-store product, as `Store.read_per_store` gives them."""


class RowSource(Protocol):
    """Source of lost rows: the annotations, and the images, from which they are computed again as the build did."""

    @property
    def manifest(self) -> Manifest:
        """The manifest of the rows; it must be the store's."""
        ...

    @property
    def images(self) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
        """Ids, widths and heights of the store's images, in its order."""
        ...

    def per_store(self, product: str, stored: Mapping[str, StoredValues]) -> Mapping[str, NDArray[Any]]:
        """All arrays of a per-store product by field name; `stored` holds the products that the store still has."""
        ...

    def annotated(self, block: Block) -> RaggedRows:
        """Ground truth of a slice of the image list, without embeddings: what the annotations alone say."""
        ...

    def rows(self, blocks: Sequence[Block], stored: Mapping[str, StoredValues]) -> Iterator[Mapping[str, RaggedRows]]:
        """The rows of each slice of the image list, as `write_block` takes them, by the `stored` per-store products."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """Result of `repair`."""

    repaired: tuple[str, ...]
    """Files that are again what was committed."""
    left: tuple[Damage, ...]
    """Files that are not; where there are any, the store is marked incomplete."""
    images: int = 0
    """Images whose rows were computed again."""
    remade: str | None = None
    """Digest of the store, where its commit mark was made again, see `ezsd.cache.tools.remake_mark`; else None."""


def repair(path: str | os.PathLike[str], source: RowSource | None = None) -> RepairReport:
    """Rebuild the damaged and missing files of a store that was complete once.

    Metadata, checksums and chunk indexes are made again from what is left of the store, boxes and classes of the
    ground truth from the annotations. Everything else needs the images, and of them those with rows in a chunk that
    does not match its checksum: each is computed once, for all damaged files. A file is replaced only by the very bytes
    that were committed. A store that stays
    damaged loses its commit mark (`INCOMPLETE.json` takes its place), so that nobody reads it; one that is whole
    again gets it back. A commit mark that is itself lost or damaged is made again where every checksum of the store
    holds, without `source`. A damaged `environment.json`, which only tells who built the store, is removed.

    Raises:
        StoreIncomplete: a copy that is not finished.
        StoreError: no finished store, a build or repair is at work, or the commit mark is lost and some other file is
            damaged.
        StoreUnreadable: the system does not let a file be read; it is left as it is, and so is the commit mark.
        StoreMismatch: `source` would make another store.
    """
    store = Path(path).absolute()
    lost = is_mark_lost(store)
    mark = None if lost else read_mark(store) or read_incomplete(store)
    if mark is None:
        _require_finished(store)
        mark = remake_mark(store)
    if source is not None and source.manifest.digest != mark.manifest_digest:
        raise StoreMismatch(
            f"{store}: these images and settings make another store than this one (manifest digest "
            f"{source.manifest.digest[:12]}, here {mark.manifest_digest[:12]}); give the `source` it was made from"
        )
    # Refuses a link in its place, before a lock file would be put there.
    scratch_folder(store)
    lock = lock_store(store)
    try:
        if lost:
            write_atomic(store / COMMIT, mark.to_bytes(), scratch=_scratch(store), point="commit")
            discard(store / INCOMPLETE)
        report = _Repair(store, mark, source).run()
        return replace(report, repaired=(COMMIT, *report.repaired), remade=mark.digest) if lost else report
    finally:
        discard(scratch_folder(store))
        journal = journal_folder(store)
        if journal.is_dir() and not any(journal.iterdir()):
            journal.rmdir()
        discard(store / LOCK)
        lock.release()


def _require_finished(store: Path) -> None:
    """Refuse a folder without a commit mark that holds a build, a copy that is not finished, or no store."""
    if (store / MANIFEST).is_file() and not (store / TRANSFER).exists() and not plan_folder(store).exists():
        return
    unfinished_plan(store)
    raise StoreError(f"{store}: was never finished, so there is nothing to repair; run `StoreWriter.open(...)` again")


def _scratch(store: Path) -> Path:
    scratch = scratch_folder(store)
    make_folders(scratch)
    return scratch


def _require_readable(found: Sequence[Damage]) -> None:
    """Refuse to judge a store with files that could not be read: they may be whole."""
    hidden = [damage for damage in found if damage.kind == "unreadable"]
    if hidden:
        more = f" and {quantity(len(hidden) - 1, 'more file')} cannot be read," if len(hidden) > 1 else ""
        raise StoreUnreadable(f"{hidden[0]};{more} then run `repair()` again")


@dataclass(frozen=True)
class _Repair:
    store: Path
    mark: CommitMark
    source: RowSource | None
    _asked: dict[str, Mapping[str, NDArray[Any]]] = field(default_factory=dict)
    """Arrays of per-store products that the source has made, by product."""

    def run(self) -> RepairReport:
        damaged = self._damages()
        _require_readable(damaged)
        names = {damage.name for damage in damaged}
        if ENVIRONMENT in names:
            discard(self.store / ENVIRONMENT)
        # Each kind serves the later ones.
        checksums, rows = set(filter(_is_checksums, names)), set(filter(self._is_of_images, names))
        for name in sorted(names - {ENVIRONMENT} - checksums - rows, key=self._turn):
            self._put(name, self._metadata(name) if name.endswith(".json") else self._whole(name))
        images = self._mend_rows(rows)
        for name in sorted(checksums):
            self._put(name, self._whole(name))
        left = self._damages() if damaged else []
        _require_readable(left)
        self._mark_as(complete=not left)
        repaired = names - {damage.name for damage in left}
        return RepairReport(repaired=tuple(sorted(repaired)), left=tuple(left), images=images)

    def _is_of_images(self, name: str) -> bool:
        """True if a file is a shard of a per-image product."""
        return name.partition("/")[0] in self.mark.schema.per_image and "/c/" in name

    def _turn(self, name: str) -> tuple[int, str]:
        """Order of the repairs, each serves the later ones: metadata, the image list, per-store products."""
        turns = (
            name == MANIFEST,
            name == "zarr.json",
            name.endswith("zarr.json"),
            name.startswith("images/"),
            *(name.startswith(f"{product}/") for product in self.mark.schema.per_store),
            True,
        )
        return turns.index(True), name

    def _damages(self) -> list[Damage]:
        return damaged_files(self.store, self.mark, deep=True)

    def _mark_as(self, *, complete: bool) -> None:
        before, after = (INCOMPLETE, COMMIT) if complete else (COMMIT, INCOMPLETE)
        if (self.store / before).exists():
            rename(self.store / before, self.store / after, point="commit")

    def _put(self, name: str, parts: Iterable[bytes | memoryview] | None) -> None:
        """Put a file in the place of a damaged one, if it has become what was committed; None is no file."""
        if parts is None:
            return
        temporary = self._scratch_name()
        try:
            self._place(name, temporary, write_new(temporary, parts))
        finally:
            discard(temporary)

    def _scratch_name(self) -> Path:
        return scratch_name(_scratch(self.store), "repair")

    def _place(self, name: str, temporary: Path, found: FileDigest) -> None:
        if found == self.mark.files[name]:
            target = inside(self.store, name)
            make_folders(target.parent)
            rename(temporary, target, point="shard")

    @property
    def _locate(self) -> Locator:
        return Locator(LocalFiles(self.store), self.mark)

    def _metadata(self, name: str) -> list[bytes] | None:
        """The manifest from the source, the root's metadata from all others', theirs from the copy in the root."""
        if name == MANIFEST:
            return [self.source.manifest.to_json().encode()] if self.source is not None else None
        nodes = [file for file in self.mark.files if file.endswith("/zarr.json")]
        if name == "zarr.json":
            return [self._root(nodes)] if all(map(self._locate.intact, [MANIFEST, *nodes])) else None
        if not self._locate.intact("zarr.json"):
            return None
        return [
            encoding.metadata_bytes(encoding.consolidated(self._json("zarr.json"), name.removesuffix("/zarr.json")))
        ]

    def _json(self, name: str) -> dict[str, Any]:
        return parse_json((self.store / name).read_bytes(), str(self.store / name))

    def _root(self, files: list[str]) -> bytes:
        nodes = {file.removesuffix("/zarr.json"): self._json(file) for file in files}
        rows = {product: _length(nodes[self._first(product)]) for product in self.mark.schema.per_image}
        manifest = Manifest.from_fields(self._json(MANIFEST), str(self.store / MANIFEST))
        images = _length(nodes["images/id"])
        attributes = root_attributes(manifest, rows, images=images, embed_dim=self.mark.embed_dim)
        return encoding.metadata_bytes(encoding.root_metadata(attributes, nodes))

    def _first(self, product: str) -> str:
        """Name of an array whose length is the number of a per-image product's rows."""
        return f"{product}/{self.mark.schema.per_image[product].fields[0].name}"

    def _shard(self, name: str) -> tuple[ArraySpec, int] | None:
        """Array and number of a shard; None for one that cannot become what was committed.

        That is not computed: the geometry is a file's word, and may be any.
        """
        array, _, place = name.partition("/c/")
        shard, spec = int(place.partition("/")[0]), self._locate.spec(array)
        if spec is None or shard >= spec.shards or name not in self.mark.files:
            return None
        size = encoding.shard_bytes_on_disk(spec, shard)
        if self.mark.files[name].size != size:
            return None
        require_room(self.store, size)
        return spec, shard

    def _whole(self, name: str) -> Iterable[bytes | memoryview] | None:
        """A shard of an array that is made again as a whole; None where nothing says what it held."""
        found = self._shard(name)
        values = None if found is None else self._values(found[0])
        if found is None or values is None:
            return None
        start, stop = found[0].shard_range(found[1])
        return encoding.shard_parts(*found, [raw_bytes(values[start:stop])])

    def _values(self, spec: ArraySpec) -> NDArray[Any] | None:
        product, _, name = spec.name.partition("/")
        if product == CHECKSUMS:
            return self._checksums(spec.name.removeprefix(f"{CHECKSUMS}/"))
        if self.source is None:
            return None
        if product == "images":
            place = [column.name for column in IMAGES].index(name)
            return little_endian(self.source.images[place], spec.dtype)
        return little_endian(self._computed(product)[name], spec.dtype)

    def _computed(self, product: str) -> Mapping[str, NDArray[Any]]:
        """All arrays of a per-store product from the source, asked once for all damaged files of the product."""
        assert self.source is not None
        if product not in self._asked:
            arrays = self.source.per_store(product, self._stored())
            try:
                check_per_store(product, arrays, {}, schema=self.mark.schema)
            except StoreError as error:
                raise StoreError(f"{self.store}: what `source` gives cannot be stored: {error}") from error
            self._asked[product] = arrays
        return self._asked[product]

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
        for product, of in self.mark.schema.per_store.items():
            values = {field.name: self._locate.values(f"{product}/{field.name}") for field in of.fields}
            arrays = {name: array for name, array in values.items() if array is not None}
            file = f"{product}/zarr.json"
            attributes = self._json(file).get("attributes") if self._locate.intact(file) else None
            # A stranger's may say anything there, and nothing can be computed with that.
            if len(arrays) == len(values) and isinstance(attributes, dict):
                found[product] = arrays, attributes
        return found

    def _mend_rows(self, names: Iterable[str]) -> int:
        """Mend shards of per-image products; returns for how many images rows had to be computed."""
        lost = [found for name in sorted(names) if (found := self._lost(name)) is not None]
        for one in lost:
            if not one.chunks:
                # What is wrong lies around the rows.
                self._finish(self._patch(one, np.zeros(0, np.int64)))
        if self.source is None:
            return 0
        # Only ezsd's own stores have annotated boxes.
        annotated = [one for one in lost if self.mark.recorded is None and one.chunks and _is_annotated(one)]
        self._mend_from(annotated, partial(_annotated, self.source))
        computed = [one for one in lost if one.chunks and one not in annotated]
        if not computed or self._per_store.keys() != self.mark.schema.per_store.keys():
            return 0
        return self._mend_from(computed, partial(self.source.rows, stored=self._per_store))

    def _lost(self, name: str) -> LostShard | None:
        found = self._shard(name)
        if found is None:
            return None
        spec, shard = found
        sums = self._locate.doubtful(checksum_spec(spec, shard_bytes=1).name)
        chunks = range(encoding.shard_chunks(spec, shard))
        # A checksum that is damaged itself makes its chunk a bad one, and nothing more.
        if sums is not None and sums.shape == (-(-spec.shape[0] // spec.chunk_rows),):
            return LostShard(name, spec, shard, tuple(bad_chunks(spec, shard, self._held(name), sums)))
        return LostShard(name, spec, shard, tuple(chunks))

    def _held(self, name: str) -> bytes:
        """The bytes of a file, damaged or not; none where there is no file."""
        file = inside(self.store, name)
        return file.read_bytes() if file.is_file() else b""

    def _patch(self, lost: LostShard, images: NDArray[np.int64]) -> Patch:
        return Patch(lost, inside(self.store, lost.name), self._scratch_name(), images)

    def _finish(self, patch: Patch) -> None:
        with patch:
            self._place(patch.lost.name, patch.path, patch.finish())

    def _mend_from(
        self, lost: Sequence[LostShard], compute: Callable[[Sequence[Block]], Iterator[Mapping[str, RaggedRows]]]
    ) -> int:
        """Mend shards by the rows of the images that their lost rows belong to, each computed once; returns how many.

        A shard is in its place as soon as the last of its images was computed: a repair that is killed goes on there.
        """
        found = {product: self._offsets(product) for product in dict.fromkeys(one.product for one in lost)}
        offsets = {product: values for product, values in found.items() if values is not None}
        rows = [one for one in lost if not one.is_offset and one.product in offsets]
        patches = [self._patch(one, offsets[one.product].owners(one.rows)) for one in rows]
        blocks = runs([patch.images for patch in patches] + [values.unknown_images for values in offsets.values()])
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            for block, computed in zip(blocks, compute(blocks) if blocks else (), strict=True):
                for product, values in offsets.items():
                    first = values.fill(block, computed[product].counts)
                    here = [one for one in patches if one.lost.product == product and one.has_rows_of(block)]
                    self._fill(
                        here,
                        first,
                        stored_columns(computed[product].fields, self.mark.schema.per_image[product].fields),
                    )
                for patch in patches:
                    if patch.ends_in(block):
                        self._finish(patch)
        for one in lost:
            if one.is_offset and one.product in offsets:
                self._put(one.name, _offset_parts(one, offsets[one.product]))
        return sum(block.stop - block.start for block in blocks)

    def _fill(self, patches: Iterable[Patch], first: int, columns: Mapping[str, NDArray[Any]]) -> None:
        for patch in patches:
            patch.fill(first, little_endian(columns[patch.lost.field], patch.lost.spec.dtype))

    def _offsets(self, product: str) -> Offsets | None:
        """Offsets of a per-image product, as far as they are undamaged; None where nothing says how many there are."""
        assert self.source is not None
        spec, box = (self._locate.spec(name) for name in (f"{product}/{OFFSET.name}", self._first(product)))
        if spec is None or box is None or spec.shape != (len(self.source.images[0]) + 1,):
            return None
        if any(spec.shard_file(shard) not in self.mark.files for shard in range(spec.shards)):
            return None
        values, known = np.zeros(spec.shape, np.int64), np.ones(spec.shape, bool)
        for shard in range(spec.shards):
            start, stop = spec.shard_range(shard)
            size = (stop - start) * spec.row_bytes
            data = self._held(spec.shard_file(shard))
            values[start:stop] = np.frombuffer(data[:size].ljust(size, b"\0"), OFFSET.dtype)
            if not self._locate.intact(spec.shard_file(shard)):
                lost = self._lost(spec.shard_file(shard))
                for low, high in [(start, stop)] if lost is None else lost.rows:
                    known[low:high] = False
        values[0], values[-1] = 0, box.shape[0]
        known[[0, -1]] = True
        return Offsets(values, known)


def _annotated(source: RowSource, blocks: Sequence[Block]) -> Iterator[Mapping[str, RaggedRows]]:
    return ({"ground_truth": source.annotated(block)} for block in blocks)


def _is_annotated(lost: LostShard) -> bool:
    """True if the annotations say what a shard held."""
    return lost.product == "ground_truth" and not lost.field.startswith("embedding")


def _offset_parts(lost: LostShard, offsets: Offsets) -> Iterator[bytes | memoryview]:
    start, stop = lost.spec.shard_range(lost.shard)
    rows = little_endian(offsets.values[start:stop], lost.spec.dtype)
    return encoding.shard_parts(lost.spec, lost.shard, [raw_bytes(rows)])


def _is_checksums(name: str) -> bool:
    """True if a file is a shard of checksums."""
    return name.startswith(f"{CHECKSUMS}/") and "/c/" in name


def _length(node: Mapping[str, Any]) -> int:
    """Rows that an array's metadata tell of; 0 where they tell of none, and the root is then not what it was."""
    shape = node.get("shape")
    return int(shape[0]) if isinstance(shape, list) and shape and isinstance(shape[0], int) else 0
