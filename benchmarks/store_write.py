"""What writing a store costs beside writing its bytes: journal, commit, disk, resumption.

    python benchmarks/store_write.py --folder DIR --images 1024
    python benchmarks/store_write.py --folder DIR --resume-only

All stores are synthetic: unit vectors of noise, 200 regions, 200 proposals and 7 base boxes per image. Ratios are taken
within one run, of wall and of CPU time: under other load the second are the sturdy ones. The page cache is warm. Rows
go to results/store.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rows

from ezsd.cache import (
    PRODUCTS,
    Block,
    Manifest,
    Origin,
    RaggedRows,
    StoreWriter,
    commit_shard,
    images_digest,
    write_block,
)
from ezsd.cache.format.manifest import seal, unseal
from ezsd.cache.journal.plan import block_name
from ezsd.cache.journal.validation import check_block

COCO_IMAGES = 118_287
REGIONS, PROPOSALS, TRUTH, DIM, BLOCK = 200, 200, 7, 512, 256
COUNTS = {"proposals": PROPOSALS, "regions": REGIONS, "ground_truth": TRUTH}
NEEDS = {"text": ("teacher",), "proposals": ("text",), "regions": ("proposals",), "ground_truth": ("teacher",)}


def block_rows(images: int, *, seed: int) -> dict[str, RaggedRows]:
    """Rows of `images` images, the same number for each."""
    random = np.random.default_rng(seed)
    products = {}
    for product, each in COUNTS.items():
        n = images * each
        columns = {"box": np.tile(np.array([0, 0, 64, 48], "f4"), (n, 1))}
        if product != "ground_truth":
            columns["score"] = random.random(n, dtype="f4")
        if product == "regions":
            columns["confidence"] = random.random(n, dtype="f4")
        if product != "proposals":
            columns["class_index"] = random.integers(0, 65, n, dtype="i4")
            vectors = random.standard_normal((n, DIM), dtype="f4")
            columns["embedding"] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype("f2")
        if product == "ground_truth":
            columns["annotation_id"] = np.arange(n, dtype="i8")
        products[product] = RaggedRows(np.full(images, each, "i4"), columns)
    return products


def open_store(path: Path, images: int, *, block_images: int, shard_bytes: int) -> StoreWriter:
    """A writer for that many images of 64 x 48 pixels, teacher and text written."""
    columns = np.arange(images), np.full(images, 64), np.full(images, 48)
    manifest = Manifest({name: Origin(1, {}, NEEDS.get(name, ())) for name in PRODUCTS}, images_digest(*columns))
    writer = StoreWriter.open(
        path,
        manifest,
        image_ids=columns[0],
        widths=columns[1],
        heights=columns[2],
        embed_dim=DIM,
        block_images=block_images,
        shard_bytes=shard_bytes,
    )
    if not writer.has_whole("teacher"):
        writer.write_whole("teacher", {"values": np.ones(40_000, "f4")}, {"parameters": []})
        writer.write_whole("text", {"embedding": np.eye(65, DIM, dtype="f4")}, {"names": [str(i) for i in range(65)]})
    return writer


def written(path: Path) -> int:
    """Bytes that the files of a folder take on the disk."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


class Clock:
    """Wall and CPU seconds of pieces of work, added up."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Count what is done inside."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


def plain_write(folder: Path, products: dict[str, RaggedRows]) -> None:
    """Write the same columns into plain files, without checks, checksums, flushing or renaming."""
    for product, ragged in products.items():
        for name, values in ragged.fields.items():
            with (folder / f"{product}.{name}").open("wb") as file:
                file.write(memoryview(values).cast("B"))


def check_rows(block: Block, products: dict[str, RaggedRows]) -> None:
    """The checks of values that `write_block` begins with."""
    images = block.stop - block.start
    check_block(
        products,
        image_ids=np.arange(block.start, block.stop),
        widths=np.full(images, 64, "i4"),
        heights=np.full(images, 48, "i4"),
        embed_dim=DIM,
        where="block",
    )


def copy_once(store: Path, target: Path) -> None:
    """Copy a folder's files through memory and flush each."""
    for source in [file for file in store.rglob("*") if file.is_file()]:
        to = target / source.relative_to(store)
        to.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as read, to.open("wb") as write:
            shutil.copyfileobj(read, write, 2**22)
            write.flush()
            os.fsync(write.fileno())


def measure_build(folder: Path, images: int) -> dict[str, object]:
    """Time of journal and commit beside that of writing and copying the same bytes; shards as large as real ones.

    The journal's share is what checksums, flushing and renaming add: of `write_block`, all but the checks of its rows'
    values and a plain write of them, which is not flushed.
    """
    path = folder / "store"
    plain, checks, block_clock, commit, copied = Clock(), Clock(), Clock(), Clock(), Clock()
    with open_store(path, images, block_images=BLOCK, shard_bytes=2**28) as writer:
        for block in writer.pending():
            products = block_rows(block.stop - block.start, seed=block.index)
            (folder / "plain").mkdir()
            with plain():
                plain_write(folder / "plain", products)
            shutil.rmtree(folder / "plain")
            with checks():
                check_rows(block, products)
            with block_clock():
                write_block(path, block, products)
        with commit():
            for task in writer.commit_tasks():
                commit_shard(path, task)
            writer.finish()
    with copied():
        copy_once(path, folder / "copy")
    clocks = {"plain_write": plain, "checks": checks, "write_block": block_clock, "commit": commit, "copy": copied}
    return {
        "what": "write",
        "images": images,
        "block_images": BLOCK,
        "store_bytes": written(path),
        "files": sum(file.is_file() for file in path.rglob("*")),
        **{f"{name}_s": round(clock.wall, 3) for name, clock in clocks.items()},
        **{f"{name}_cpu_s": round(clock.cpu, 3) for name, clock in clocks.items()},
        "journal_share": round(1 - (plain.wall + checks.wall) / block_clock.wall, 3),
        "journal_share_cpu": round(1 - (plain.cpu + checks.cpu) / block_clock.cpu, 3),
        "commit_over_copy": round(commit.wall / copied.wall, 3),
        "commit_over_copy_cpu": round(commit.cpu / copied.cpu, 3),
    }


def measure_peak(folder: Path) -> dict[str, object]:
    """Most bytes on the disk during a build, of one with as many blocks and shards as COCO has, 128 times smaller."""
    path, block_images, shard_bytes = folder / "peak", BLOCK // 128, 2**28 // 128
    images = COCO_IMAGES // 128
    with open_store(path, images, block_images=block_images, shard_bytes=shard_bytes) as writer:
        for block in writer.pending():
            write_block(path, block, block_rows(block.stop - block.start, seed=block.index))
        peak = journal = written(path)
        for task in writer.commit_tasks():
            commit_shard(path, task)
            peak = max(peak, written(path))
        writer.finish()
    final = written(path)
    return {
        "what": "peak",
        "images": images,
        "block_images": block_images,
        "blocks": len(writer.blocks),
        "shard_bytes": shard_bytes,
        "journal_bytes": journal,
        "peak_bytes": peak,
        "store_bytes": final,
        "peak_over_final": round(peak / final, 3),
    }


def measure_resume(folder: Path) -> dict[str, object]:
    """Seconds to decide what is left of a build of COCO's size whose blocks are all there.

    The first and the last block are real, the others described as the first; their data are files of the right length
    without contents, since the decision looks at descriptions and lengths alone.
    """
    path = folder / "coco"
    with open_store(path, COCO_IMAGES, block_images=BLOCK, shard_bytes=2**28) as writer:
        first, *middle, last = writer.blocks
        for block in (first, last):
            write_block(path, block, block_rows(block.stop - block.start, seed=block.index))
        pretend_blocks(path / "journal", first, middle)
    began, began_cpu = time.perf_counter(), time.process_time()
    with open_store(path, COCO_IMAGES, block_images=BLOCK, shard_bytes=2**28) as writer:
        left = writer.pending()
    decided, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    assert left == []
    return {
        "what": "resume",
        "images": COCO_IMAGES,
        "blocks": len(writer.blocks),
        "decide_s": round(decided, 3),
        # On a machine with other load, the part of it that was ours.
        "decide_cpu_s": round(cpu, 3),
    }


def pretend_blocks(journal: Path, model: Block, blocks: list[Block]) -> None:
    """Journal blocks whose data take no space, described as `model`, which is there."""
    entry = unseal((journal / block_name(model.index) / "entry.json").read_bytes(), "entry")
    for block in blocks:
        folder = journal / block_name(block.index)
        folder.mkdir()
        attributes = {**entry["attributes"], "block": [block.index, block.start, block.stop]}
        (folder / "entry.json").write_bytes(seal({**entry, "attributes": attributes}))
        with (folder / "data.raw").open("wb") as file:
            file.truncate(entry["bytes"])


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="an existing folder on the disk to measure")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--resume-only", action="store_true")
    arguments = parser.parse_args()
    versions = {"zarr": importlib.metadata.version("zarr"), "numpy": np.__version__}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        results = [measure_resume(Path(temporary))]
        if not arguments.resume_only:
            results += [measure_build(Path(temporary), arguments.images), measure_peak(Path(temporary))]
        for result in results:
            place = {
                "file_system": rows.file_system(arguments.folder),
                "page_cache": "warm",
                "load": round(os.getloadavg()[0], 2),
            }
            row = {**result, **place, "dim": DIM, **versions}
            rows.append("store", row)
            for key, value in result.items():
                print(f"{key}: {value}")


if __name__ == "__main__":
    main()
