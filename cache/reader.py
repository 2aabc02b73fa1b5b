"""Reading a complete store: image id -> rows, from any process, read-only.

Nothing is opened until it is needed, and what is opened belongs to the process that opened it: a Store may be used
before a fork, after it, and be pickled; each process opens its own arrays.
"""

import operator
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from cache.manifest import Manifest, parse_json
from cache.mark import MANIFEST, CommitMark, read_mark, size_problems
from cache.plan import block_done, plan_folder, read_plan, refuse
from cache.schema import RAGGED, WHOLE, StoreError, StoreIncomplete, StoreKeyError

if TYPE_CHECKING:
    import zarr

_KEPT_BYTES = 32 * 2**20
"""Arrays up to this size are read once by each process and kept in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalRows:
    """Proposals of one image: box (n, 4) float32 pixels, score (n,) float32."""

    box: NDArray[np.float32]
    score: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionRows:
    """Kept regions of one image.

    box (n, 4) float32 pixels; score, confidence (n,) float32; class_index (n,) int32; embedding (n, D) float16, unit.
    """

    box: NDArray[np.float32]
    score: NDArray[np.float32]
    confidence: NDArray[np.float32]
    class_index: NDArray[np.int32]
    embedding: NDArray[np.float16]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroundTruthRows:
    """Annotated boxes of one image.

    box (n, 4) float32 pixels; class_index (n,) int32; annotation_id (n,) int64; embedding (n, D) float16, unit.
    """

    box: NDArray[np.float32]
    class_index: NDArray[np.int32]
    annotation_id: NDArray[np.int64]
    embedding: NDArray[np.float16]


Rows = TypeVar("Rows", bound=ProposalRows | RegionRows | GroundTruthRows)


class Store:
    """A complete store, opened for reading; cheap to make, safe to fork and to pickle.

    Raises:
        StoreIncomplete: its build is not finished.
        StoreError: no store, another format version, or files that are missing or of the wrong size.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Check that the store at `path` is complete; the arrays are opened when first used."""
        self.path = Path(path).absolute()
        self._mark = require_mark(self.path)
        problems = size_problems(self.path, self._mark)
        if problems:
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise StoreError(
                f"{problems[0]}{more}; the store is damaged: build it again, or restore the file from a copy"
            )
        file = self.path / MANIFEST
        self.manifest = Manifest.from_json(file.read_bytes(), str(file))
        if self.manifest.digest != self._mark.manifest_digest:
            raise StoreError(f"{file}: is not the manifest this store was committed with; the store is damaged")
        self._opened = _Opened(self.path, os.getpid())

    def __reduce__(self) -> tuple[type["Store"], tuple[Path]]:
        return Store, (self.path,)

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    @property
    def embed_dim(self) -> int:
        """D, the width of the embeddings."""
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
    def proposals(self) -> "Product[ProposalRows]":
        """Image id -> ProposalRows."""
        return Product(self, "proposals", ProposalRows)

    @property
    def regions(self) -> "Product[RegionRows]":
        """Image id -> RegionRows."""
        return Product(self, "regions", RegionRows)

    @property
    def ground_truth(self) -> "Product[GroundTruthRows]":
        """Image id -> GroundTruthRows."""
        return Product(self, "ground_truth", GroundTruthRows)

    @property
    def text(self) -> tuple[tuple[str, ...], NDArray[np.float32]]:
        """Class names, and their text embeddings (C, D) float32, unit."""
        arrays, attributes = self.read_whole("text")
        return tuple(attributes["names"]), arrays["embedding"]

    @property
    def teacher(self) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """The tuned parameters one after another (K,) float32, and the attributes that describe them."""
        arrays, attributes = self.read_whole("teacher")
        return arrays["values"], attributes

    def read_whole(self, product: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Arrays and attributes of `teacher` or `text`."""
        field = WHOLE[product]
        values = self._here.read(f"{product}/{field.name}", 0, None)
        _require_finite(values, f"{self.path}: {product}/{field.name}")
        file = self.path / product / "zarr.json"
        return {field.name: values}, dict(parse_json(file.read_bytes(), str(file))["attributes"])

    def require(self, wanted: Manifest) -> None:
        """Refuse to use this store for an experiment that needs another one.

        Raises:
            StoreMismatch: names each difference with both values.
        """
        cure = "use a store made for these settings (`ezsd cache build --out NEW_FOLDER`), or change them back"
        refuse(self.path, self.manifest.differences(wanted), cure=cure)

    @property
    def _here(self) -> "_Opened":
        """What this process opened; a forked child starts with nothing open."""
        if self._opened.process != os.getpid():
            self._opened = _Opened(self.path, os.getpid())
        return self._opened


class Product(Mapping[int, Rows], Generic[Rows]):
    """One product of a store as a mapping from image id to that image's rows, which may be none."""

    def __init__(self, store: Store, name: str, record: type[Rows]) -> None:
        """Use `Store.regions` and its like."""
        self._store, self._name = store, name
        self._record = record

    def __len__(self) -> int:
        return len(self._store.image_ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self._store.image_ids.tolist())

    def __contains__(self, image_id: object) -> bool:
        return isinstance(image_id, int | np.integer) and self._store._here.position(int(image_id)) is not None

    def __getitem__(self, image_id: int) -> Rows:
        """Rows of one image.

        Raises:
            StoreKeyError: no such image in the store.
            StoreError: a value that is read is not finite: the store is damaged.
        """
        here = self._store._here
        position = here.position(operator.index(image_id))
        if position is None:
            raise StoreKeyError(f"{self._store.path}: has no image with id {image_id}; it holds {len(self)} images")
        start, stop = here.column(f"{self._name}/offset")[position : position + 2].tolist()
        rows: dict[str, Any] = {}
        for field in RAGGED[self._name]:
            rows[field.name] = here.read(f"{self._name}/{field.name}", start, stop)
            _require_finite(rows[field.name], f"{self._store.path}: {self._name}/{field.name} of image {image_id}")
        return self._record(**rows)


class _Opened:
    """Arrays that one process has open, and the small ones it holds in memory."""

    def __init__(self, path: Path, process: int) -> None:
        self.process = process
        self._path = path
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._columns: dict[str, NDArray[Any]] = {}
        self._order: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None

    def read(self, name: str, start: int, stop: int | None) -> NDArray[Any]:
        """Rows `start` to `stop` (exclusive) of an array, as a copy in memory that may be changed."""
        array = self._open(name)
        # A slice through zarr costs a millisecond, from memory a microsecond.
        if array.nbytes <= _KEPT_BYTES:
            return self.column(name)[start:stop].copy()
        return np.asarray(array[start:stop])

    def _open(self, name: str) -> "zarr.Array[Any]":
        if name not in self._arrays:
            # Half a second to import: a worker that only writes never pays it.
            import zarr

            self._arrays[name] = zarr.open_array(self._path / name, mode="r")
        return self._arrays[name]

    def column(self, name: str) -> NDArray[Any]:
        """A whole small array, read once and kept, read-only."""
        if name not in self._columns:
            values = np.asarray(self._open(name)[:])
            values.flags.writeable = False
            self._columns[name] = values
        return self._columns[name]

    def position(self, image_id: int) -> int | None:
        """Place of an image in the store's order."""
        if self._order is None:
            ids = self.column("images/id")
            order = np.argsort(ids)
            self._order = order, ids[order]
        order, ordered = self._order
        at = int(np.searchsorted(ordered, image_id))
        return int(order[at]) if at < len(ordered) and ordered[at] == image_id else None


def require_mark(store: Path) -> CommitMark:
    """The commit mark of a complete store.

    Raises:
        StoreIncomplete: a build that is not finished; says how far it is.
        StoreError: no store at all.
    """
    mark = read_mark(store)
    if mark is not None:
        return mark
    if not plan_folder(store).is_dir():
        raise StoreError(f"{store}: is not a store (no COMMIT.json, no journal); `ezsd cache build` makes one")
    plan = read_plan(store)
    done = sum(block_done(plan, block.index) for block in plan.blocks)
    raise StoreIncomplete(
        f"{store}: the store is not finished, {done} of {len(plan.blocks)} blocks are done; "
        "run the same `ezsd cache build` command again to go on"
    )


def _require_finite(values: NDArray[Any], where: str) -> None:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise StoreError(f"{where}: holds a value that is not finite; the store is damaged, run a check of its digests")
