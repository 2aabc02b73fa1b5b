"""The plan of a build (manifest, image list, block size) and the blocks journaled under it."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.checks import check_block, check_images
from cache.journal import Entry, journal_folder, little_endian, raw_bytes, set_aside, write_entry
from cache.manifest import JSON, Manifest, canonical_json
from cache.schema import FORMAT_VERSION, IMAGES, RAGGED, Block, RaggedRows, StoreError, StoreMismatch, require_supported

PLAN = "plan"
ANOTHER_FOLDER = "choose another --out folder"
_GEOMETRY = ("embed_dim", "block_images", "shard_bytes")
_LISTED = 10
"""Most differences named in one error."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a store is going to hold: fixed when it is created, compared when its build is resumed.

    image_ids (n,) int64, widths and heights (n,) int32 in pixels, in the order of the blocks.
    """

    store: Path
    manifest: Manifest
    image_ids: NDArray[np.int64]
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]
    embed_dim: int
    block_images: int
    shard_bytes: int
    digest: str = ""

    def __post_init__(self) -> None:
        check_images(self.image_ids, self.widths, self.heights)
        for name in _GEOMETRY:
            if getattr(self, name) < 1:
                raise StoreError(f"{self.store}: {name} must be at least 1, got {getattr(self, name)}")

    @cached_property
    def blocks(self) -> list[Block]:
        """The image list cut into blocks; the last may be shorter."""
        total = len(self.image_ids)
        starts = range(0, total, self.block_images)
        return [Block(index, start, min(start + self.block_images, total)) for index, start in enumerate(starts)]

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The image list as the columns of the `images` product."""
        columns: tuple[NDArray[Any], ...] = (self.image_ids, self.widths, self.heights)
        return {field.name: little_endian(values, field.dtype) for field, values in zip(IMAGES, columns, strict=True)}

    @property
    def images_digest(self) -> str:
        """Sha256 of the image list: all ids, then all widths, then all heights, little-endian."""
        return hashlib.sha256(b"".join(raw_bytes(rows) for rows in self.arrays.values())).hexdigest()

    def write(self) -> "Plan":
        """Write the plan as the journal's first entry; a store exists from this rename on."""
        geometry = {name: getattr(self, name) for name in _GEOMETRY}
        attributes: dict[str, JSON] = {
            "format_version": FORMAT_VERSION,
            "manifest": self.manifest.fields,
            **geometry,
        }
        write_entry(self.store, PLAN, self.arrays, attributes, point="plan")
        return read_plan(self.store)

    def require_same(self, wanted: "Plan") -> None:
        """Refuse to go on with a build that was started as something else.

        Raises:
            StoreMismatch: names each difference.
        """
        found = self.manifest.differences(wanted.manifest)
        found += geometry_differences({name: getattr(self, name) for name in ("images_digest", *_GEOMETRY)}, wanted)
        refuse(self.store, found, cure=ANOTHER_FOLDER)


def geometry_differences(stored: Mapping[str, Any], wanted: Plan) -> list[str]:
    """One line for each of a store's geometry values that differs from the plan's."""
    return [
        f"{name}: store has {value}, wanted {getattr(wanted, name)}"
        for name, value in stored.items()
        if value != getattr(wanted, name)
    ]


def refuse(store: Path, differences: list[str], *, cure: str) -> None:
    """Raise StoreMismatch if there are differences; `cure` says what to do about them."""
    if differences:
        rest = len(differences) - _LISTED
        listed = differences[:_LISTED] + ([f"and {rest} more"] if rest > 0 else [])
        raise StoreMismatch(f"{store}: this store was made from something else: {'; '.join(listed)}; {cure}")


def plan_folder(store: Path) -> Path:
    """Where the plan lies while the store is being built."""
    return journal_folder(store) / PLAN


def read_plan(store: Path) -> Plan:
    """The plan of the unfinished store at `store`.

    Raises:
        StoreError: no build is in progress here, the plan is damaged or of another format version.
    """
    folder = plan_folder(store)
    if not folder.is_dir():
        raise StoreError(f"{store}: no store is being built here; start one with StoreWriter.open")
    entry = Entry.read(folder)
    require_supported(entry.attributes.get("format_version"), str(store))
    described = canonical_json([entry.arrays, entry.attributes])
    return Plan(
        store=store,
        manifest=Manifest(entry.attributes["manifest"]),
        image_ids=entry.array("id"),
        widths=entry.array("width"),
        heights=entry.array("height"),
        embed_dim=int(entry.attributes["embed_dim"]),
        block_images=int(entry.attributes["block_images"]),
        shard_bytes=int(entry.attributes["shard_bytes"]),
        digest=hashlib.sha256(described.encode()).hexdigest(),
    )


def block_name(index: int) -> str:
    """Name of a block's journal entry."""
    return f"block-{index:06d}"


def read_block(plan: Plan, index: int) -> Entry:
    """The journal entry of block `index`.

    Raises:
        StoreError: not there, damaged, or made for another plan.
    """
    entry = Entry.read(journal_folder(plan.store) / block_name(index))
    if entry.attributes != _block_attributes(plan, plan.blocks[index]):
        raise StoreError(f"{entry.folder}: belongs to another build; remove this folder and run the build again")
    return entry


def block_done(plan: Plan, index: int) -> bool:
    """Whether block `index` is finished, by its description and size."""
    try:
        return read_block(plan, index).sized
    except StoreError:
        return False


def _block_attributes(plan: Plan, block: Block) -> dict[str, JSON]:
    return {"plan": plan.digest, "block": [block.index, block.start, block.stop]}


def _block_arrays(products: Mapping[str, RaggedRows]) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    for product, fields in RAGGED.items():
        arrays[f"{product}/count"] = little_endian(products[product].counts, "<i4")
        for field in fields:
            arrays[f"{product}/{field.name}"] = little_endian(products[product].fields[field.name], field.dtype)
    return arrays


def write_block(path: str | os.PathLike[str], block: Block, products: Mapping[str, RaggedRows]) -> None:
    """Check and journal all rows of one block: the whole block, or nothing. Called in a worker process.

    Args:
        path: the store's folder, created by `StoreWriter.open`.
        block: one of `StoreWriter.blocks`.
        products: the rows of proposals, regions and ground_truth of the block's images.

    Raises:
        StoreError: rows that must not get into a store; says which field, row and image.
    """
    plan = read_plan(Path(path).absolute())
    if block not in plan.blocks[block.index : block.index + 1]:
        raise StoreError(f"{path}: {block} is not a block of this store; take blocks from StoreWriter.pending()")
    if block_done(plan, block.index):
        return
    images = slice(block.start, block.stop)
    check_block(
        products,
        image_ids=plan.image_ids[images],
        widths=plan.widths[images],
        heights=plan.heights[images],
        embed_dim=plan.embed_dim,
        where=f"block {block.index}",
    )
    name = block_name(block.index)
    # Not done, yet something is there: damaged, or of another build.
    set_aside(plan.store, name)
    write_entry(plan.store, name, _block_arrays(products), _block_attributes(plan, block), point="block")
