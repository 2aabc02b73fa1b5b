"""Reading a complete store: image id -> rows, from any process, read-only.

Nothing is opened until it is needed, and what is opened belongs to the process that opened it: a Store may be used
before a fork, after it, and be pickled; each process opens its own arrays.
"""

import html
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ezsd.cache.errors import StoreError, StoreKeyError
from ezsd.cache.files import MENDED, PUSHED
from ezsd.cache.format.commit_mark import CommitMark
from ezsd.cache.format.manifest import Manifest
from ezsd.cache.format.offsets import image_places, of_images
from ezsd.cache.format.quantise import dequantise
from ezsd.cache.format.records import GroundTruthRows, ProposalRows, RegionRows, RowBatch, Rows
from ezsd.cache.format.schema import CHECKSUM, CHECKSUMS, OFFSET, SCALE, Field, PerImage, Schema
from ezsd.cache.format.sealed_json import parse_json
from ezsd.cache.journal.bad_images import bad_images_of
from ezsd.cache.journal.plan import refuse
from ezsd.cache.storage.arrays import RowArray, VerifiedArray, all_finite
from ezsd.cache.storage.image_index import ImageIndex
from ezsd.cache.storage.locations import LocalPlace, Place, find_place, read_environment, read_manifest
from ezsd.errors import quantity

Verify: TypeAlias = Literal["quick", "full"]
"""Depth of the checks before values are handed out, see `Store`."""


class Store:
    """A complete store, opened for reading; cheap to make, safe to fork and to pickle.

    Args:
        path: a folder, or a URL that fsspec understands (`s3://bucket/store`, `https://...`).
        verify: both compare the size of every file and the digest of each that holds no rows (metadata, names, ids,
            offsets, teacher values, checksums) now. "full" also compares each chunk of rows with its checksum when
            this process first reads it: no value from a damaged chunk is handed out. "quick" takes rows as they are.
            Behind http(s):// the mark alone is read now, and each of these files is compared when it is first used.

    Raises:
        StoreIncomplete: its build or copy is not finished.
        StoreUnreadable: the system does not let a file be read.
        StoreError: no store, another format version, or files that are missing, of the wrong size or damaged.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: Verify = "full") -> None:
        """Check that the store is complete; the arrays are opened when first used."""
        if verify not in ("quick", "full"):
            raise ValueError(f"verify must be 'quick' or 'full', got {verify!r}")
        self._place = find_place(path)
        self._verify = verify
        self._opened: _Opened | None = None
        # Read here, so that what is no store is said where it is opened.
        self._mark  # noqa: B018

    def __getstate__(self) -> tuple[str, Verify]:
        return str(self._place), self._verify

    def __setstate__(self, state: tuple[str, Verify]) -> None:
        # Looked at when it is first used: what is wrong then reaches whoever reads, not whoever starts a process.
        self._place, self._verify, self._opened = find_place(state[0]), state[1], None

    @cached_property
    def _mark(self) -> CommitMark:
        """The commit mark, once the store is what it says, as far as all but the rows tell."""
        mark = self._place.mark()
        if not self._place.checks_when_read:
            _refuse_damage(self._place, self._place.size_problems(mark))
        _refuse_damage(self._place, _digest_problems(self._place, mark, full=self._verify == "full"))
        return mark

    @cached_property
    def manifest(self) -> Manifest:
        """Everything that shaped the store's bytes."""
        return read_manifest(self._place, self._mark)

    @property
    def digest(self) -> str:
        """Sha256 of what the store holds, every byte of it: the one that its commit mark carries, 64 hex digits."""
        return self._mark.digest

    def __repr__(self) -> str:
        return f"Store({str(self._place)!r})"

    def _repr_html_(self) -> str:
        """A table, in a notebook."""
        counts = {"images": len(self.image_ids)}
        if self._mark.recorded is None:
            counts |= {"classes": len(self.text[0]), "embedding width": self.embed_dim}
        for product in self.schema.per_image:
            counts[product.replace("_", " ")] = int(self._here.column(f"{product}/{OFFSET.name}")[-1])
        rows = "".join(f"<tr><th>{name}</th><td>{count:,}</td></tr>" for name, count in counts.items())
        return f"<table><caption>{html.escape(str(self))}</caption>{rows}</table>"

    def __str__(self) -> str:
        return str(self._place)

    @property
    def path(self) -> Path:
        """The store's folder.

        Raises:
            StoreError: it is read from a URL and has none.
        """
        if not isinstance(self._place, LocalPlace):
            raise StoreError(f"{self._place}: is not a local folder; copy it with `pull({self._place}, DIR)` first")
        return self._place.path

    @property
    def schema(self) -> Schema:
        """Products of the store and their arrays."""
        return self._mark.schema

    @property
    def embed_dim(self) -> int:
        """D, the width of the embeddings.

        Raises:
            StoreError: no store of regions.
        """
        self.require_regions()
        assert self._mark.embed_dim is not None
        return self._mark.embed_dim

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """Ids of all images in the store's order, (n,) int64, read-only."""
        return self._here.column("images/id")

    @property
    def sizes(self) -> NDArray[np.int32]:
        """Width and height of each image in pixels, (n, 2) int32, in the order of `image_ids`."""
        return np.stack([self._here.column("images/width"), self._here.column("images/height")], axis=1)

    @property
    def bad_images(self) -> dict[int, str]:
        """Images that could not be read when the store was built, by id, and why: they have no rows."""
        # First: an unpickled store has compared nothing yet.
        self._mark  # noqa: B018
        where = f"{self}/zarr.json"
        return bad_images_of(parse_json(self._place.read_file("zarr.json"), where), where)

    def product(self, name: str) -> "Product[dict[str, NDArray[Any]]]":
        """Image id -> its rows of a per-image product: one array for each field, by name.

        Raises:
            StoreError: the store has no such product.
        """
        self.schema.per_image_product(name, self)
        return Product(self, name, dict)

    def require_regions(self) -> None:
        """Refuse a store of another schema than ezsd's, whatever its products are called.

        Raises:
            StoreError: it is one; says what the store holds.
        """
        if self._mark.recorded is not None:
            raise StoreError(f"{self}: holds {', '.join(self._mark.products)}, expected a store of regions")

    # Not kept: a product keeps its store, which would then wait for the garbage collector with all its maps.
    @property
    def proposals(self) -> "Product[ProposalRows]":
        """Image id -> ProposalRows."""
        self.require_regions()
        return Product(self, "proposals", ProposalRows)

    @property
    def regions(self) -> "Product[RegionRows]":
        """Image id -> RegionRows."""
        self.require_regions()
        return Product(self, "regions", RegionRows)

    @property
    def ground_truth(self) -> "Product[GroundTruthRows]":
        """Image id -> GroundTruthRows."""
        self.require_regions()
        return Product(self, "ground_truth", GroundTruthRows)

    @property
    def text(self) -> tuple[tuple[str, ...], NDArray[np.float32]]:
        """Class names, and their text embeddings (C, D) float32, unit."""
        self.require_regions()
        arrays, attributes = self.read_per_store("text")
        names, rows = attributes.get("names"), arrays["embedding"]
        if not isinstance(names, list) or len(names) != len(rows) or not all(isinstance(name, str) for name in names):
            raise StoreError(
                f"{self}: text/zarr.json does not name the {quantity(len(rows), 'row')} of text/embedding; the store "
                f"is damaged: {MENDED}"
            )
        return tuple(names), rows

    @property
    def teacher(self) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """The tuned parameters one after another (K,) float32, and the attributes that describe them."""
        self.require_regions()
        arrays, attributes = self.read_per_store("teacher")
        return arrays["values"], attributes

    @property
    def environment(self) -> dict[str, Any]:
        """The build's record of host, versions, times, settings and places; empty without one.

        Raises:
            StoreError: the record is damaged.
        """
        return read_environment(self._place)

    def read_per_store(self, product: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Arrays and attributes of a per-store product, such as `teacher` and `text` in a store of regions.

        Raises:
            StoreError: the store has no such product.
        """
        arrays = {}
        for field in self.schema.per_store_product(product, self).fields:
            name = f"{product}/{field.name}"
            values = arrays[field.name] = self._here.column(name).copy()
            if not all_finite(values):
                raise _not_finite(f"{self}: {name}")
        file = f"{product}/zarr.json"
        attributes = parse_json(self._place.read_file(file), f"{self}/{file}").get("attributes")
        if not isinstance(attributes, dict):
            raise StoreError(f"{self}/{file}: has no attributes; the store is damaged: {MENDED}")
        return arrays, attributes

    def require(self, wanted: Manifest) -> None:
        """Refuse to use this store for an experiment that needs another one.

        Raises:
            StoreMismatch: names each difference with both values.
        """
        cure = "use a store made for these settings (`StoreWriter.open(NEW_FOLDER, ...)`), or change them back"
        refuse(str(self), self.manifest.differences(wanted), cure=cure)

    @property
    def _here(self) -> "_Opened":
        """Arrays that this process opened; a forked child starts with none."""
        if self._opened is None or self._opened.process != _process:
            self._opened = _Opened(self._place, self._mark, checked=self._verify == "full")
        return self._opened


class Product(Mapping[int, Rows], Generic[Rows]):
    """A product of a store as a mapping from image id to that image's rows, which may be none."""

    def __init__(self, store: Store, name: str, record: type[Rows]) -> None:
        """Use `Store.product`, or `Store.regions` and its like, which know that the store has it."""
        self._store, self._name, self._record = store, name, record
        self._source: _ProductRows | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._store, self._name, self._record)

    def __len__(self) -> int:
        return len(self._store.image_ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self._store.image_ids.tolist())

    def __contains__(self, image_id: object) -> bool:
        return isinstance(image_id, int | np.integer) and self._store._here.index.place(int(image_id)) >= 0

    def __getitem__(self, image_id: int) -> Rows:
        """Rows of one image.

        Raises:
            StoreKeyError: no such image in the store.
            StoreError: a value that is read is not finite, or damaged: names the image and the field.
        """
        source = self._rows
        rows = source.again(operator.index(image_id))
        if rows is None:
            rows, _ = source.read(source.names, [operator.index(image_id)])
        return self._record(**rows)

    def batch(self, image_ids: Iterable[int]) -> RowBatch[Rows]:
        """Rows of several images at once, in the order given; the disk is asked for all of them at the start.

        Raises:
            StoreKeyError: an image is not in the store.
            StoreError: see `__getitem__`.
        """
        rows, counts = self._rows.read(self._rows.names, list(map(operator.index, image_ids)))
        return RowBatch(counts=np.array(counts, _COUNT), rows=self._record(**rows))

    def column(self, field: str, image_ids: Iterable[int]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Values of a field for several images, as `batch` gives them: its rows, and how many each image has (n,).

        Raises:
            StoreError: the product has no such field; see also `batch`.
        """
        source, ids = self._rows, list(map(operator.index, image_ids))
        if len(ids) == 1:
            # A field that is known so far is one that there is.
            known = source.column_again(field, ids[0])
            if known is not None:
                return known, np.array([len(known)], _COUNT)
        if field not in source.names:
            raise StoreError(f"{self._store}: {self._name} has no field {field!r}; it has {', '.join(source.names)}")
        rows, counts = source.read((field,), ids)
        return rows[field], np.array(counts, _COUNT)

    @property
    def _rows(self) -> "_ProductRows":
        source = self._source
        if source is None or source.process != _process:
            source = self._source = self._store._here.product(self._name)
        return source


_COUNT = np.dtype(np.int64)
_BITS = ((8, np.uint8), (16, np.uint16), (32, np.uint32), (64, np.uint64))
"""Numbers with a bit for each of so many arrays."""


_process = os.getpid()
"""Id of this process; a child that was forked notes its own, for to ask the system takes a tenth of a short read."""


def _note_process() -> None:
    global _process
    _process = os.getpid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_process)


class _Opened:
    """Arrays that one process has open."""

    def __init__(self, place: Place, mark: CommitMark, *, checked: bool) -> None:
        self.process = _process
        self._place = place
        self.is_far = not isinstance(place, LocalPlace)
        """True for files that may have to be fetched again, and are then looked at again."""
        self._mark = mark
        self._checked = checked
        self._arrays: dict[str, RowArray] = {}
        self._columns: dict[str, NDArray[Any]] = {}
        self._products: dict[str, _ProductRows] = {}

    @cached_property
    def index(self) -> ImageIndex:
        """Places of images in the store's order."""
        return ImageIndex(np.ascontiguousarray(self.column("images/id"), np.int64))

    def product(self, name: str) -> "_ProductRows":
        """A product's rows, opened once."""
        found = self._products.get(name)
        return self._products.setdefault(name, _ProductRows(self, name)) if found is None else found

    def per_image(self, product: str) -> PerImage:
        """A product with rows of images."""
        return self._mark.schema.per_image_product(product, self)

    def stored(self, product: str) -> tuple[Field, ...]:
        """Arrays of a product as they are in the store."""
        return self._mark.schema.stored(product)

    def __str__(self) -> str:
        return str(self._place)

    def array(self, name: str) -> RowArray:
        """An array, opened once.

        Raises:
            StoreError: it is not what the arrays beside it need it to be.
        """
        found = self._arrays.get(name)
        if found is None:
            found = self._place.open_array(name)
            self._require_listed(name, found)
            self._require_geometry(name, found)
            if self._checked and self._mark.schema.holds_rows(name) and _has_checksums(self._mark, name):
                sums = self.column(f"{CHECKSUMS}/{name}")
                found = VerifiedArray(found, sums, partial(self._damage, name, found))
            self._arrays[name] = found
        return found

    def _damage(self, name: str, array: RowArray, start: int, stop: int) -> StoreError:
        """The error for rows that do not match their checksum."""
        product = name.partition("/")[0]
        places = image_places(self.column(f"{product}/{OFFSET.name}"), [(start, stop)])
        images = of_images(self.column("images/id")[places].tolist())
        return StoreError(
            f"{array.file(start)}: rows {start} to {stop - 1} of {name} do not match their checksum{images}; "
            f"the store is damaged: {MENDED}"
        )

    def _require_listed(self, name: str, array: RowArray) -> None:
        """Refuse an array with a file that the mark does not list: nobody has checked its bytes, or its place."""
        for file in array.shard_files():
            if f"{name}/{file}" not in self._mark.files:
                raise StoreError(
                    f"{self._place}/{name}/{file}: belongs to an array, and the commit mark does not list it; "
                    "ezsd wrote no such store: do not use it"
                )

    def _require_geometry(self, name: str, array: RowArray) -> None:
        dtype, shape = self._geometry(name, array.shape[:1])
        if array.shape != shape or array.dtype.newbyteorder("<") != np.dtype(dtype):
            raise StoreError(
                f"{self._place}/{name}/zarr.json: describes {array.dtype} {array.shape}, the arrays beside it need "
                f"{np.dtype(dtype)} {shape}; the store is damaged: {MENDED}"
            )

    def _geometry(self, name: str, own: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """Type and shape that an array must have; its `own` length where it is the measure of others, or of none."""
        product, _, field = name.partition("/")
        if product == CHECKSUMS:
            return CHECKSUM.dtype, own or (0,)
        schema = self._mark.schema
        of = schema.arrays[name]
        if product in schema.per_store or name == "images/id":
            return of.dtype, (*(own or (0,)), *of.trailing)
        if product == "images":
            return of.dtype, self.column("images/id").shape
        if field == OFFSET.name:
            return of.dtype, (len(self.column("images/id")) + 1,)
        return of.dtype, (self.column(f"{product}/{OFFSET.name}").item(-1), *of.trailing)

    def column(self, name: str) -> NDArray[Any]:
        """A whole small array, read once, read-only.

        Raises:
            StoreError: offsets that no rows can have.
        """
        if name not in self._columns:
            array = self.array(name)
            values = array.read(0, array.shape[0]).view()
            values.flags.writeable = False
            if name.partition("/")[2] == OFFSET.name:
                _require_offsets(values, array.file(0))
            self._columns[name] = values
        return self._columns[name]


class _ProductRows:
    """Rows of one product in one process: where they are, and which of them it has looked at."""

    def __init__(self, here: _Opened, product: str) -> None:
        """Use `_Opened.product`."""
        self._here, self._product, self.process = here, product, here.process
        self._place = here.index.place
        # Numbers come out of a memoryview in a third of the time that an array takes.
        self._offset = np.ascontiguousarray(here.column(f"{product}/{OFFSET.name}"), np.int64).data
        # A number for each image, a byte for up to eight arrays, and in it a bit for each array whose rows of the image
        # are known to be good: their chunks match their checksums, and every number is finite. None from afar, where a
        # chunk may be fetched again.
        # Zeros take no memory until they are changed.
        fields = here.stored(product)
        bits = next(kind for size, kind in _BITS if len(fields) <= size)
        self._seen = np.zeros(len(self._offset) - 1, bits).data
        self._columns: dict[str, _Column] = {}
        given = here.per_image(product).fields
        self.names = tuple(field.name for field in given)
        """The product's fields, in their order."""
        self._scaled = frozenset(field.name for field in given if field.kept == "int8")
        self._bits = {field.name: 1 << number for number, field in enumerate(fields)}
        # Of an image whose fields may all be copied as they are: none that has a scale.
        self._all = -1 if self._scaled else sum(self._bits.values())

    def again(self, image_id: int) -> dict[str, NDArray[Any]] | None:
        """All fields of an image that this process has looked at before, as `read` gives them; None for any other."""
        at = self._place(image_id)
        if at < 0 or self._seen[at] != self._all:
            return None
        start, stop = self._offset[at], self._offset[at + 1]
        for column in self._columns.values():
            column.array.read_ahead([(start, stop)])
        return {name: self._columns[name].plain.read(start, stop).copy() for name in self.names}

    def column_again(self, name: str, image_id: int) -> NDArray[Any] | None:
        """One field, like `again`."""
        at = self._place(image_id)
        column = self._columns.get(name)
        if at < 0 or column is None or column.scaled or not self._seen[at] & column.bit:
            return None
        return column.plain.read(self._offset[at], self._offset[at + 1]).copy()

    def read(self, names: Sequence[str], image_ids: Sequence[int]) -> tuple[dict[str, NDArray[Any]], list[int]]:
        """Rows of some images, one after another, in memory of their own, by field; and how many each image has.

        Raises:
            StoreKeyError: an image is not in the store.
            StoreError: a value is not finite, or damaged.
        """
        places = list(map(self._place, image_ids))
        if -1 in places:
            raise self._absent(image_ids[places.index(-1)])
        offset = self._offset
        spans = [(offset[at], offset[at + 1]) for at in places]
        columns = [self._columns.get(name) or self._open(name) for name in names]
        # What is read at once anyway needs no hint, which costs a system call.
        if len(spans) * len(columns) > 1:
            for column in columns:
                column.array.read_ahead(spans)
        rows = {column.name: self._gather(column, places, spans) for column in columns}
        return rows, [stop - start for start, stop in spans]

    def _absent(self, image_id: int) -> StoreKeyError:
        count = len(self._offset) - 1
        return StoreKeyError(f"{self._here}: has no image with id {image_id}; it holds {quantity(count, 'image')}")

    def _open(self, name: str) -> "_Column":
        array = self._here.array(f"{self._product}/{name}")
        plain = array.plain if isinstance(array, VerifiedArray) else array
        self._columns[name] = _Column(name, self._bits[name], name in self._scaled, array, plain)
        return self._columns[name]

    def _gather(self, column: "_Column", places: Sequence[int], spans: Sequence[tuple[int, int]]) -> NDArray[Any]:
        seen, bit = self._seen, column.bit
        known = all([seen[at] & bit for at in places])
        read = column.plain.read if known else column.array.read
        parts = [read(start, stop) for start, stop in spans]
        # One part is copied too: rows are the caller's own, and a view would hold the file.
        rows = parts[0].copy() if len(parts) == 1 else np.concatenate(parts or [read(0, 0)])
        if not known:
            self._look(column, places, spans, rows)
        if not column.scaled:
            return rows
        name = f"{column.name}{SCALE}"
        scale = self._gather(self._columns.get(name) or self._open(name), places, spans)
        return dequantise(rows, scale).astype(np.float16)

    def _look(
        self, column: "_Column", places: Sequence[int], spans: Sequence[tuple[int, int]], rows: NDArray[Any]
    ) -> None:
        """Look at the rows of those images that this process has not found to be finite before."""
        first = 0
        for at, (start, stop) in zip(places, spans, strict=True):
            last = first + stop - start
            if not self._seen[at] & column.bit:
                if not all_finite(rows[first:last]):
                    image = self._here.column("images/id")[at]
                    raise _not_finite(f"{self._here}: {self._product}/{column.name} of image {image}")
                if not self._here.is_far:
                    self._seen[at] |= column.bit
            first = last


@dataclass(frozen=True, slots=True)
class _Column:
    """A field of a product that is open: its bit among those of `_ProductRows`, if it has a scale, and its rows.

    `plain` are the same rows as `array`, without a comparison with checksums.
    """

    name: str
    bit: int
    scaled: bool
    array: RowArray
    plain: RowArray


def _require_offsets(values: NDArray[np.int64], file: str) -> None:
    """Refuse offsets that do not start at 0, or fall; their end is compared when rows are opened."""
    if values[0] != 0:
        raise StoreError(f"{file}: begins with {values[0]}, expected 0; the store is damaged: {MENDED}")
    falls = np.flatnonzero(values[1:] < values[:-1])
    if len(falls):
        at = int(falls[0])
        raise StoreError(
            f"{file}: falls from {values[at]} to {values[at + 1]} at entry {at + 1}, and offsets never do; "
            f"the store is damaged: {MENDED}"
        )


def _not_finite(where: str) -> StoreError:
    return StoreError(f"{where}: holds a value that is not finite; the store is damaged: {MENDED}")


def _refuse_damage(place: Place, problems: Sequence[str]) -> None:
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        cure = MENDED if isinstance(place, LocalPlace) else PUSHED
        raise StoreError(f"{problems[0]}{more}; the store is damaged: {cure}")


def _digest_problems(place: Place, mark: CommitMark, *, full: bool) -> list[str]:
    """Describe each file that is not what was committed, one line each, but for shards of rows.

    With `full` those too, unless they have checksums to be read by.
    """
    arrays = {name: name.partition("/c/")[0] for name in mark.files}
    small = {name for name, array in arrays.items() if array == name or not mark.schema.holds_rows(array)}
    found = {} if place.checks_when_read else dict(place.digests(sorted(small)))
    if full:
        left = [name for name, array in arrays.items() if name not in small and not _has_checksums(mark, array)]
        found |= {name: place.digest(name) for name in left}
    return [
        f"{place}/{name}: its bytes are not those that were committed (sha256 differs)"
        for name, digest in found.items()
        if digest != mark.files[name]
    ]


def _has_checksums(mark: CommitMark, array: str) -> bool:
    return f"{CHECKSUMS}/{array}/zarr.json" in mark.files
