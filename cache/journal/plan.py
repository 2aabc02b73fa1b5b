"""The plan of a build (manifest, image list, block size) and the blocks journaled under it."""

import hashlib
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ezsd.cache.errors import StoreError, StoreIncomplete, StoreMismatch, StoreUnreadable
from ezsd.cache.files import FileState, disk_room, file_state
from ezsd.cache.format.manifest import Manifest, images_digest
from ezsd.cache.format.packed import packed, unpacked
from ezsd.cache.format.quantise import quantise
from ezsd.cache.format.schema import IMAGES, SCALE, Block, Field, RaggedRows, Schema, require_supported
from ezsd.cache.format.sealed_json import JSON, Difference, canonical_json
from ezsd.cache.journal.bad_images import all_bad_images, bad_attributes, require_no_rows
from ezsd.cache.journal.entries import DATA, ENTRY, Entry, journal_folder, little_endian, set_aside, write_entry
from ezsd.cache.journal.validation import check_block, check_images, check_per_store, check_text_names

PLAN = "plan"
_BLOCKS = ("block_images", "shard_bytes")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Plan of a store: fixed at its creation, compared when its build is resumed.

    image_ids (n,) int64, widths and heights (n,) int32 in pixels, in the order of the blocks.
    """

    store: Path
    manifest: Manifest
    image_ids: NDArray[np.int64]
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]
    embed_dim: int | None
    block_images: int
    shard_bytes: int
    digest: str = ""

    def __post_init__(self) -> None:
        check_images(self.image_ids, self.widths, self.heights)
        if self.manifest.images_sha256 != self.images_digest:
            raise StoreError(f"{self.store}: the manifest was made for another list of images than the one given")
        # First: what has no schema has no geometry.
        self.manifest.layout(self.embed_dim if self.embed_dim is None else max(self.embed_dim, 1))
        for name in self.geometry:
            if getattr(self, name) < 1:
                raise StoreError(f"{self.store}: {name} must be at least 1, got {getattr(self, name)}")

    @property
    def geometry(self) -> dict[str, int]:
        """Numbers that shape the store and are in no manifest; D only in a store of regions."""
        found = {name: getattr(self, name) for name in _BLOCKS}
        return found if self.embed_dim is None else {"embed_dim": self.embed_dim, **found}

    @cached_property
    def schema(self) -> Schema:
        """Schema of the store."""
        return self.manifest.layout(self.embed_dim)

    @cached_property
    def blocks(self) -> list[Block]:
        """The image list cut into blocks; the last may be shorter."""
        total = len(self.image_ids)
        starts = range(0, total, self.block_images)
        return [Block(index, start, min(start + self.block_images, total)) for index, start in enumerate(starts)]

    @cached_property
    def journal(self) -> Path:
        """Folder of the journal; looked at once, see `journal_folder`."""
        return journal_folder(self.store)

    @cached_property
    def columns(self) -> tuple[tuple[str, str, Field], ...]:
        """Arrays of the per-image products as they are stored: path in the store, product, field."""
        return tuple(
            (f"{product}/{field.name}", product, field)
            for product in self.schema.per_image
            for field in self.schema.stored(product)
        )

    @cached_property
    def _known(self) -> dict[int, tuple[FileState, Entry]]:
        """Entries of blocks that were read before, by index, and the state of their file then; for `read_block`."""
        return {}

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The image list as the columns of the `images` product."""
        columns: tuple[NDArray[Any], ...] = (self.image_ids, self.widths, self.heights)
        return {field.name: little_endian(values, field.dtype) for field, values in zip(IMAGES, columns, strict=True)}

    @cached_property
    def images_digest(self) -> str:
        """Sha256 of the image list, as of `ezsd.cache.format.manifest.images_digest`."""
        return images_digest(self.image_ids, self.widths, self.heights)

    def write(self) -> "Plan":
        """Write the plan as the journal's first entry; a store exists from this rename on."""
        attributes: dict[str, JSON] = {
            "format_version": self.manifest.format_version,
            "manifest": self.manifest.fields,
            **self.geometry,
        }
        write_entry(self.store, PLAN, self.arrays, attributes, point="plan")
        return read_plan(self.store)

    def require_same(self, wanted: "Plan") -> None:
        """Refuse to go on with a build that was started as something else.

        Raises:
            StoreMismatch: names each difference.
        """
        found = self.manifest.differences(wanted.manifest)
        found += geometry_differences(self.geometry, wanted)
        refuse(self.store, found, cure=unfinished_folder(self.store))


def unfinished_folder(store: Path) -> str:
    """Advice for an unfinished store of other settings, from which nothing can be taken over."""
    return (
        f"it is not finished: go on with the settings that it was begun with, or remove the folder {store}, or build "
        f"into another folder: `path={free_folder(store)}`"
    )


def free_folder(store: Path) -> Path:
    """A folder beside a store that is not there yet."""
    return next(name for n in itertools.count(2) if not (name := store.with_name(f"{store.name}-{n}")).exists())


def geometry_differences(stored: Mapping[str, Any], wanted: Plan) -> list[Difference]:
    """A store's geometry values that differ from the plan's."""
    return [
        Difference(name, value, getattr(wanted, name))
        for name, value in stored.items()
        if value != getattr(wanted, name)
    ]


def refuse(store: Path | str, differences: Sequence[Difference], *, cure: str) -> None:
    """Raise StoreMismatch if there are differences; `cure` says what to do about them."""
    if differences:
        raise StoreMismatch.between(store, differences, cure=cure)


def plan_folder(store: Path) -> Path:
    """Folder of the plan while the store is being built."""
    return journal_folder(store) / PLAN


def read_plan(store: Path) -> Plan:
    """The plan of the unfinished store at `store`.

    A process reads, checks and keeps it once, as long as its files stay as they are: with millions of images that takes
    seconds, and every block and shard asks for it.

    Raises:
        StoreError: no build is in progress here, the plan is damaged or of another format version.
    """
    folder = plan_folder(store)
    if not folder.is_dir():
        raise StoreError(f"{store}: no store is being built here; start one with StoreWriter.open")
    return _read_plan(store, folder, (file_state(folder / ENTRY), file_state(folder / DATA)))


@lru_cache(maxsize=1)
def _read_plan(store: Path, folder: Path, _: tuple[FileState | None, ...]) -> Plan:
    entry = Entry.read(folder)
    require_supported(entry.attributes.get("format_version"), str(store))
    described = canonical_json([entry.arrays, entry.attributes])
    try:
        manifest = Manifest.from_fields(entry.attributes["manifest"], str(folder))
        names = _BLOCKS if manifest.schema is not None else ("embed_dim", *_BLOCKS)
        geometry = {name: int(entry.attributes[name]) for name in names}
        embed_dim = geometry.pop("embed_dim", None)
        # Copies: a file server keeps a mapped file when it is removed, and the journal's folder with it.
        columns = {name: np.array(entry.array(name)) for name in ("id", "width", "height")}
    except StoreError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"{folder}: does not describe a build ({type(error).__name__}: {error}); ezsd wrote no such file: "
            "do not use this folder"
        ) from error
    for column in columns.values():
        column.flags.writeable = False
    return Plan(
        store=store,
        manifest=manifest,
        image_ids=columns["id"],
        widths=columns["width"],
        heights=columns["height"],
        embed_dim=embed_dim,
        **geometry,
        digest=hashlib.sha256(described.encode()).hexdigest(),
    )


def block_name(index: int) -> str:
    """Name of a block's journal entry."""
    return f"block-{index:06d}"


def read_block(plan: Plan, index: int) -> Entry:
    """The journal entry of block `index`, its counts as arrays; its data may have been dropped, see `Entry.dropped`.

    It is read once for each plan, and again when its file was replaced.

    Raises:
        StoreError: not there, damaged, or made for another plan.
    """
    folder = plan.journal / block_name(index)
    state = file_state(f"{folder}/{ENTRY}")
    if state is None:
        # Another worker may put it there before it is read; kept under no state, it would outlast its file.
        return _checked_block(plan, index, Entry.read(folder))
    if index not in plan._known or plan._known[index][0] != state:
        plan._known[index] = state, _checked_block(plan, index, Entry.read(folder))
    return plan._known[index][1]


def _checked_block(plan: Plan, index: int, entry: Entry) -> Entry:
    if {key: entry.attributes.get(key) for key in ("plan", "block")} != _block_attributes(plan, plan.blocks[index]):
        raise StoreError(f"{entry.folder}: belongs to another build; remove this folder and run the build again")
    counts = _checked_counts(entry, plan, plan.blocks[index])
    return replace(entry, attributes={**entry.attributes, "counts": counts})


def _checked_counts(entry: Entry, plan: Plan, block: Block) -> dict[str, NDArray[np.uint32]]:
    """Rows of each image of a block, by product; refuses an entry that does not hold what a block does."""
    try:
        counts = {product: _counts(entry, product, block.stop - block.start) for product in plan.schema.per_image}
        rows = {product: int(np.add.reduce(found, dtype=np.int64)) for product, found in counts.items()}
        shapes = {name: (field.dtype, [rows[product], *field.trailing]) for name, product, field in plan.columns}
        all_bad_images([entry.attributes])
        sound = shapes == {name: (place["dtype"], place["shape"]) for name, place in entry.arrays.items()}
    except ValueError:
        sound = False
    if not sound:
        raise StoreError(
            f"{entry.folder}: does not hold the rows of a block; remove this folder and run the build again"
        )
    return counts


def _counts(entry: Entry, product: str, images: int) -> NDArray[np.uint32]:
    """Rows of each image of a block; ValueError where its entry does not say them."""
    counts = entry.attributes.get("counts")
    found = counts.get(product) if isinstance(counts, dict) else None
    numbers = unpacked(found)
    if len(numbers) != images:
        raise ValueError("no counts")
    return numbers


def per_store_folder(plan: Plan, product: str) -> Path:
    """Folder of the journal entry of a per-store product.

    Raises:
        StoreError: the store has no such product.
    """
    plan.schema.per_store_product(product, plan.store)
    return journal_folder(plan.store) / f"whole-{product}"


def per_store_entry(plan: Plan, product: str) -> Entry:
    """The checked journal entry of a per-store product.

    Raises:
        StoreIncomplete: it was not written yet.
        StoreError: it is damaged, or belongs to another build; or the store has no such product.
    """
    folder = per_store_folder(plan, product)
    if not folder.is_dir():
        raise StoreIncomplete(f"{plan.store}: {product} was not written yet; use write_per_store first")
    entry = Entry.read(folder)
    if entry.attributes.get("plan") != plan.digest:
        raise StoreError(f"{folder}: belongs to another build; remove this folder and run the build again")
    arrays = {name: entry.array(name) for name in entry.arrays}
    try:
        # The seal of an entry tells damage, not malice.
        require_per_store(plan, product, arrays, entry.attributes.get("user"))
    except StoreError as error:
        raise StoreError(f"{folder}: {error}; remove this folder and run the build again") from error
    return entry


def require_per_store(plan: Plan, product: str, arrays: Mapping[str, NDArray[Any]], attributes: object) -> None:
    """Refuse a per-store product that must not get into the store.

    Raises:
        StoreError: says which field, row or attribute.
    """
    check_per_store(product, arrays, attributes, schema=plan.schema)
    if plan.manifest.schema is None and product == "text":
        assert isinstance(attributes, Mapping)
        check_text_names(attributes.get("names"), len(arrays["embedding"]))


def read_per_store(plan: Plan, product: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays and attributes of a per-store product from the journal; errors as of `per_store_entry`."""
    entry = per_store_entry(plan, product)
    return {name: np.array(entry.array(name)) for name in entry.arrays}, dict(entry.attributes["user"])


def block_done(plan: Plan, index: int) -> bool:
    """True if block `index` is finished, by its description and size."""
    return finished_block(plan, index) is not None


def finished_block(plan: Plan, index: int) -> Entry | None:
    """The entry of block `index`, or None when it has to be computed (again)."""
    try:
        entry = read_block(plan, index)
    except StoreUnreadable:
        raise
    except StoreError:
        return None
    return entry if entry.finished else None


def _block_attributes(plan: Plan, block: Block) -> dict[str, JSON]:
    return {"plan": plan.digest, "block": [block.index, block.start, block.stop]}


def _block_arrays(products: Mapping[str, RaggedRows], schema: Schema) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    for product in schema.per_image.values():
        columns = stored_columns(products[product.name].fields, product.fields)
        for field in schema.stored(product.name):
            arrays[f"{product.name}/{field.name}"] = little_endian(columns[field.name], field.dtype)
    return arrays


def stored_columns(given: Mapping[str, NDArray[Any]], fields: Iterable[Field]) -> dict[str, NDArray[Any]]:
    """Checked columns of a product as they are stored: what is kept as int8 becomes whole numbers and a scale."""
    columns = dict(given)
    for field in fields:
        if field.kept == "int8" and field.name in given:
            columns[field.name], columns[f"{field.name}{SCALE}"] = quantise(given[field.name])
    return columns


def write_block(
    path: str | os.PathLike[str],
    block: Block,
    products: Mapping[str, RaggedRows],
    *,
    bad_images: Mapping[int, str] = MappingProxyType({}),
) -> None:
    """Check and journal all rows of one block: the whole block, or nothing. Called in a worker process.

    Args:
        path: the store's folder, created by `StoreWriter.open`.
        block: one of `StoreWriter.blocks`.
        products: the rows of each per-image product of the block's images; what the store keeps as int8 is given as
            float16.
        bad_images: by id, why an image of the block could not be read; it has no rows.

    Raises:
        StoreError: rows that must not get into a store; says which field, row and image. No room on the disk.
    """
    plan = read_plan(Path(path).absolute())
    if block not in plan.blocks[block.index : block.index + 1]:
        raise StoreError(f"{path}: {block} is not a block of this store; take blocks from StoreWriter.pending()")
    images = slice(block.start, block.stop)
    check_block(
        products,
        image_ids=plan.image_ids[images],
        widths=plan.widths[images],
        heights=plan.heights[images],
        schema=plan.schema,
        bad_images=bad_images,
        where=f"block {block.index}",
    )
    require_no_rows(bad_images, products, plan.image_ids[images], where=f"block {block.index}")
    name = block_name(block.index)
    arrays = _block_arrays(products, plan.schema)
    counts: dict[str, JSON] = {product: packed(products[product].counts) for product in plan.schema.per_image}
    attributes = {**_block_attributes(plan, block), "counts": counts, **bad_attributes(bad_images)}
    # Looked at last: another worker may have finished it while this one computed.
    done = finished_block(plan, block.index)
    if done is not None and done.sized:
        return
    with disk_room(plan.store, sum(rows.nbytes for rows in arrays.values())):
        # Not done, yet something is there: damaged, dropped, or of another build.
        set_aside(plan.store, name)
        write_entry(plan.store, name, arrays, attributes, point="block")


def journaled_bad_images(path: str | os.PathLike[str]) -> dict[int, str]:
    """Images of an unfinished store that could not be read so far, by id, and why."""
    plan = read_plan(Path(path).absolute())
    entries = (finished_block(plan, block.index) for block in plan.blocks)
    return all_bad_images(entry.attributes for entry in entries if entry is not None)


def forget_block(path: str | os.PathLike[str], block: Block) -> None:
    """Take a block out of the journal again: it is then still to be written."""
    set_aside(Path(path).absolute(), block_name(block.index))
