"""What writing a store costs beside writing its bytes: journal, commit, disk, resumption.

    python -m benchmarks.store_write --folder DIR --images 1024
    python -m benchmarks.store_write --folder DIR --resume-only

All stores are synthetic: unit vectors of noise, 200 regions, 200 proposals and 7 base boxes per image. Ratios are taken
within one run. Everything written is flushed; the page cache is warm. Rows go to results/store.jsonl.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import rows
from cache import PRODUCTS, Block, Manifest, Origin, RaggedRows, StoreWriter, commit_shard, images_digest, write_block
from cache.manifest import seal, unseal
from cache.plan import block_name

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


def open_store(path: Path, images: int, *, shard_bytes: int) -> StoreWriter:
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
        block_images=BLOCK,
        shard_bytes=shard_bytes,
    )
    if not writer.has_whole("teacher"):
        writer.write_whole("teacher", {"values": np.ones(40_000, "f4")}, {"parameters": []})
        writer.write_whole("text", {"embedding": np.eye(65, DIM, dtype="f4")}, {"names": [str(i) for i in range(65)]})
    return writer


def written(path: Path) -> int:
    """Bytes that the files of a folder take on the disk."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def plain_write(folder: Path, products: dict[str, RaggedRows]) -> float:
    """Seconds to write the same columns into plain files, without checksums, flushing or renaming."""
    folder.mkdir()
    began = time.perf_counter()
    for product, ragged in products.items():
        for name, values in ragged.fields.items():
            with (folder / f"{product}.{name}").open("wb") as file:
                file.write(memoryview(values).cast("B"))
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return seconds


def copy_once(store: Path, target: Path) -> float:
    """Seconds to copy a folder's files and flush each."""
    began = time.perf_counter()
    for source in [file for file in store.rglob("*") if file.is_file()]:
        to = target / source.relative_to(store)
        to.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as read, to.open("wb") as write:
            shutil.copyfileobj(read, write, 2**22)
            write.flush()
            os.fsync(write.fileno())
    return time.perf_counter() - began


def measure_build(folder: Path, images: int) -> dict[str, object]:
    """Journal, commit and peak of one build; shards are as many as at COCO's size would be, and smaller."""
    path = folder / "store"
    total = images * REGIONS * DIM * 2
    shard_bytes = max(2**20, 2**28 * images // COCO_IMAGES)
    plain = journal = 0.0
    with open_store(path, images, shard_bytes=shard_bytes) as writer:
        for block in writer.pending():
            products = block_rows(block.stop - block.start, seed=block.index)
            plain += plain_write(folder / "plain", products)
            began = time.perf_counter()
            write_block(path, block, products)
            journal += time.perf_counter() - began
        began, peak, looking = time.perf_counter(), written(path), 0.0
        for task in writer.commit_tasks():
            commit_shard(path, task)
            paused = time.perf_counter()
            peak = max(peak, written(path))
            looking += time.perf_counter() - paused
        writer.finish()
        commit = time.perf_counter() - began - looking
    final, copied = written(path), copy_once(path, folder / "copy")
    return {
        "what": "write",
        "images": images,
        "block_images": BLOCK,
        "shard_bytes": shard_bytes,
        "embedding_bytes": total,
        "store_bytes": final,
        "files": sum(file.is_file() for file in path.rglob("*")),
        "plain_write_s": round(plain, 3),
        "write_block_s": round(journal, 3),
        "journal_share": round((journal - plain) / journal, 3),
        "commit_s": round(commit, 3),
        "copy_s": round(copied, 3),
        "commit_over_copy": round(commit / copied, 3),
        "peak_over_final": round(peak / final, 3),
    }


def measure_resume(folder: Path) -> dict[str, object]:
    """Seconds to decide what is left of a build of COCO's size whose blocks are all there.

    The first and the last block are real, the others described as the first; their data are files of the right length
    without contents, since the decision looks at descriptions and lengths alone.
    """
    path = folder / "coco"
    with open_store(path, COCO_IMAGES, shard_bytes=2**28) as writer:
        first, *middle, last = writer.blocks
        for block in (first, last):
            write_block(path, block, block_rows(block.stop - block.start, seed=block.index))
        pretend_blocks(path / "journal", first, middle)
    began, began_cpu = time.perf_counter(), time.process_time()
    with open_store(path, COCO_IMAGES, shard_bytes=2**28) as writer:
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


def file_system(folder: Path) -> str:
    """Type of the file system that a folder lies on."""
    found = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=True)
    return found.stdout.strip()


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
            results.append(measure_build(Path(temporary), arguments.images))
        for result in results:
            row = {**result, "file_system": file_system(arguments.folder), "page_cache": "warm", "dim": DIM, **versions}
            rows.append("store", row)
            for key, value in result.items():
                print(f"{key}: {value}")


if __name__ == "__main__":
    main()
