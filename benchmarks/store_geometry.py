"""Stores as large as the training sets of COCO, LVIS, Objects365 and Open Images, but for their rows.

Image lists, journal entries, offsets, shard indexes, checksums and marks are as long as those of the real stores, and
are written, committed and read by the store's own code. Rows are holes in sparse files, which read as zeros; so what is
measured is all but the copying of rows.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from unittest import mock

import driver
import numpy as np

from ezsd.cache import OPTIONAL, PRODUCTS, Block, Manifest, Origin, StoreWriter, commit_numbered, images_digest
from ezsd.cache.format.packed import packed
from ezsd.cache.format.schema import SHARD_BYTES, ArraySpec, array_spec
from ezsd.cache.format.sealed_json import JSON, seal
from ezsd.cache.format.zarr_bytes import fill_value, shard_bytes_on_disk, shard_index
from ezsd.cache.journal import commit, plan
from ezsd.cache.journal.entries import DATA, ENTRY, journal_folder
from ezsd.cache.journal.shards import ShardTask, record_name

DIM, REGIONS, PROPOSALS, CLASSES = 512, 200, 1000, 80
BATCH, TOUCHED = 16, 2000
OPENINGS = 3
NEEDED = [name for name in PRODUCTS if name not in OPTIONAL]


@dataclass(frozen=True)
class Geometry:
    """Images of a training set, annotations in each on average, how far apart its ids lie; and images in a block."""

    images: int
    annotations: int
    spread: int = 1
    block_images: int = 256


GEOMETRIES = {
    "coco": Geometry(118_287, 7, spread=5),
    "lvis": Geometry(100_170, 13, spread=5),
    "objects365": Geometry(1_742_289, 15),
    "open-images": Geometry(9_011_219, 2, block_images=2048),
}


def journal(store: Path, geometry: Geometry) -> None:
    """A build whose blocks are all finished, and none committed."""
    random, n = np.random.default_rng(0), geometry.images
    ids, sizes = random.permutation(geometry.spread * n)[:n], np.full(n, 640)
    manifest = Manifest({name: Origin(1, {}) for name in NEEDED}, images_digest(ids, sizes, sizes))
    arguments = {
        "image_ids": ids,
        "widths": sizes,
        "heights": sizes,
        "embed_dim": DIM,
        "block_images": geometry.block_images,
    }
    with StoreWriter.open(store, manifest, **arguments) as writer:
        writer.write_per_store("teacher", {"values": np.zeros(2**15, "f4")}, {})
        names = [str(number) for number in range(CLASSES)]
        writer.write_per_store("text", {"embedding": np.eye(CLASSES, DIM, dtype="f4")}, {"names": names})
    found = plan.read_plan(store)
    for block in found.blocks:
        write_block(found, block, geometry, random)


def write_block(of: plan.Plan, block: Block, geometry: Geometry, random: np.random.Generator) -> None:
    """The journal entry of one block, and a hole where its rows would be."""
    means = {"proposals": PROPOSALS, "regions": REGIONS, "ground_truth": geometry.annotations}
    counts = {
        product: random.integers(mean // 2, mean + mean // 2 + 1, block.stop - block.start)
        for product, mean in means.items()
    }
    places: dict[str, JSON] = {}
    end = 0
    for product, found in counts.items():
        for field in of.schema.stored(product):
            shape, crc = [int(found.sum()), *field.trailing], int(random.integers(2**32))
            places[f"{product}/{field.name}"] = {"dtype": field.dtype, "shape": shape, "offset": end, "crc32": crc}
            end += -(-int(np.prod(shape)) * np.dtype(field.dtype).itemsize // 64) * 64
    attributes: dict[str, JSON] = {
        "plan": of.digest,
        "block": [block.index, block.start, block.stop],
        "counts": {product: packed(found) for product, found in counts.items()},
    }
    folder = journal_folder(of.store) / plan.block_name(block.index)
    folder.mkdir()
    (folder / ENTRY).write_bytes(seal({"arrays": places, "attributes": attributes, "bytes": end}))
    hole(folder / DATA, end)


def hole(file: Path, size: int, end: bytes = b"") -> None:
    """A sparse file of `size` bytes, the last of which are `end`."""
    with file.open("wb") as handle:
        handle.truncate(size)
        handle.seek(size - len(end))
        handle.write(end)


def write_shard(store: Path, task: ShardTask) -> None:
    """A shard of zeros and its record, as if the task had been done."""
    spec, file = task.array, store / task.file
    start, stop = spec.shard_range(task.shard)
    size = shard_bytes_on_disk(spec, task.shard)
    file.parent.mkdir(parents=True, exist_ok=True)
    hole(file, size, index_of(spec.dtype, spec.shape, stop - start))
    whole, rest = divmod(stop - start, spec.chunk_rows)
    sums = [zeros_crc(spec, spec.chunk_rows)] * whole + [zeros_crc(spec, rest)] * bool(rest)
    record: dict[str, JSON] = {"file": task.file, "size": size, "digest": "0" * 64, "sources": task.sources}
    folder = journal_folder(store) / "shards"
    folder.mkdir(exist_ok=True)
    (folder / record_name(spec, task.shard)).write_bytes(seal({**record, "chunk_crc32": packed(sums)}))


@cache
def zeros_crc(spec: ArraySpec, rows: int) -> int:
    """CRC-32 of a chunk whose first rows are zero, and the others padding."""
    padding = np.full((spec.chunk_rows - rows, *spec.shape[1:]), fill_value(spec.dtype), spec.dtype)
    return zlib.crc32(padding.tobytes(), zlib.crc32(bytes(rows * spec.row_bytes)))


@cache
def index_of(dtype: str, shape: tuple[int, ...], rows: int) -> bytes:
    """The end of a shard with this many rows."""
    return shard_index(array_spec("", dtype, shape, shard_bytes=SHARD_BYTES), rows)


def first_worker(store: Path, digest: str, number: int) -> None:
    """What a shard costs a process that has read nothing of the build, beside its bytes and its record."""
    plan._read_plan.cache_clear()
    commit._shards.cache_clear()
    read_entries(store, commit._shards(store, digest).task(number))


def read_entries(store: Path, task: ShardTask) -> None:
    """Read the journal entries of a shard's blocks, as whoever writes it does."""
    of = plan.read_plan(store)
    for piece in task.pieces:
        plan.read_block(of, piece.block)


def bookkeeping(store: Path, digest: str, numbers: Sequence[int]) -> None:
    """What all shards cost beside their bytes, in one process that has read nothing of the build."""
    first_worker(store, digest, numbers[0])
    for number in numbers:
        read_entries(store, commit._shards(store, digest).task(number))
        commit_numbered(store, digest, number)


def committed(store: Path) -> driver.Row:
    """Commit a journal, and what each step of it costs, in seconds of CPU time; the rows are written by nobody."""
    found: driver.Row = {}

    def timed(name: str, call: Callable[[], driver.T]) -> driver.T:
        result, spent = driver.timed(call)
        found[f"{name}_cpu_s"] = round(spent.cpu, 3)
        return result

    plan._read_plan.cache_clear()
    begun = timed("plan", partial(plan.read_plan, store))
    timed("plan_again", partial(plan.read_plan, store))
    # Holes need no room on the disk.
    with mock.patch("ezsd.cache.writer.require_room"), StoreWriter.reopen(store) as writer:
        timed("blocks", writer.pending)
        digest, numbers = timed("tasks", writer.commit_numbers)
        # The last shard is one of the largest array, as most of them are.
        timed("worker", partial(first_worker, store, digest, numbers[-1]))
        for task in commit._shards(store, digest).tasks:
            write_shard(store, task)
        timed("bookkeeping", partial(bookkeeping, store, digest, numbers))
        timed("finish", writer.finish)
    return {"blocks": len(begun.blocks), "shards": len(numbers), **found}


OPENING = """
import json, os, sys, time
import numpy
from ezsd.cache import Store
import ezsd.cache.storage.direct, ezsd.cache.reader
def megabytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024
anonymous, resident = megabytes("RssAnon"), megabytes("VmRSS")
began, spent = time.perf_counter(), time.process_time()
store = Store(sys.argv[1])
opened = time.process_time() - spent
ids = store.image_ids
def all_over(count):
    return ids[:: max(1, len(ids) // count)][:count].tolist()
asked = all_over(int(sys.argv[2]))
store.regions.batch(asked), store.ground_truth.batch(asked)
found = {"store_cpu_s": opened, "opening_cpu_s": time.process_time() - spent, "opening_s": time.perf_counter() - began}
found |= {"anonymous_mb": megabytes("RssAnon") - anonymous, "peak_mb": megabytes("VmHWM") - resident}
for image in all_over(int(sys.argv[3])):
    store.regions[image]
found["descriptors"] = len(os.listdir("/proc/self/fd"))
found["maps"] = sum("/c/" in line for line in open("/proc/self/maps"))
print(json.dumps(found))
"""


def opened(store: Path) -> driver.Row:
    """Open a store with all its checks and read a first batch, in fresh processes; the best of some.

    Descriptors and maps are counted after images all over the store were read.
    """
    command = [sys.executable, "-c", OPENING, str(store), str(BATCH), str(TOUCHED)]
    rows = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(OPENINGS)]
    return {name: round(min(row[name] for row in rows), 3) for name in rows[0]}


def measured(work: Path, name: str) -> driver.Row:
    """The row of one training set."""
    store, geometry = work / name, GEOMETRIES[name]
    journal(store, geometry)
    return {
        "what": "geometry",
        "geometry": name,
        "images": geometry.images,
        "regions": REGIONS,
        "proposals": PROPOSALS,
        "annotations": geometry.annotations,
        "block_images": geometry.block_images,
        "dim": DIM,
        "rows": "holes",
        "build": committed(store),
        "mark_bytes": (store / "COMMIT.json").stat().st_size,
        "open": opened(store),
        "file_system": driver.file_system(work),
        "descriptor_limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "load": round(os.getloadavg()[0], 2),
        **driver.versions("numpy"),
    }


def shown(row: driver.Row) -> str:
    """One line of the table in benchmarks/README.md."""
    done, first = row["build"], row["open"]
    cells = [
        row["geometry"],
        f"{row['images']:,}",
        f"{done['blocks']:,}",
        f"{done['shards']:,}",
        *(f"{done[f'{name}_cpu_s']:.2f}" for name in ("plan", "blocks", "tasks", "worker", "bookkeeping", "finish")),
        f"{first['opening_cpu_s']:.2f}",
        f"{first['anonymous_mb']:.0f}",
        f"{first['peak_mb']:.0f}",
        str(first["descriptors"]),
    ]
    return f"| {' | '.join(cells)} |"
