"""What a read from the store costs, beside a memory-mapped .npy, zarr-python and one JSON file per image.

    python benchmarks/store.py --work DIR [--images 4000] [--dim 512] [--rounds 7]
    python benchmarks/store.py --work DIR --verification    # what checking costs a training that reads a store
    python benchmarks/store.py --work DIR --geometry [coco lvis objects365 open-images]    # of stores of that size

`--geometry` is about all but the rows, see `store_geometry.py`.

Everything is synthetic, made below DIR and removed at the end. All readers must first give the same bytes. Times
are process CPU time per image in microseconds, medians over rounds in which the readers take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import driver
import numpy as np
import store_geometry
import torch
import zarr
from numpy.typing import NDArray

from ezsd.cache import (
    OPTIONAL,
    PRODUCTS,
    Manifest,
    Origin,
    RaggedRows,
    Store,
    StoreWriter,
    Verify,
    commit_shard,
    images_digest,
    region_schema,
    write_block,
)
from ezsd.cache.format.schema import array_spec

BATCH = 16
MODES: tuple[Verify, ...] = ("quick", "full")
COCO_IMAGES, COCO_ROWS = 118_287, 200
NEEDED = [name for name in PRODUCTS if name not in OPTIONAL]
Reader = Callable[[list[int]], NDArray[np.float16]]


def build(folder: Path, images: int, dim: int) -> Path:
    """A store with lognormal numbers of rows, about 200 a image; embeddings are random and of unit length."""
    rng = np.random.default_rng(0)
    counts = np.minimum(rng.lognormal(np.log(165), 0.63, images), 1000).astype("i4")
    ids, sizes = rng.permutation(10 * images)[:images], np.full(images, 640, "i4")
    manifest = Manifest({name: Origin(1, {}) for name in NEEDED}, images_digest(ids, sizes, sizes))
    arguments = {"image_ids": ids, "widths": sizes, "heights": sizes, "embed_dim": dim, "block_images": 256}
    with StoreWriter.open(folder, manifest, **arguments) as writer:
        writer.write_per_store("teacher", {"values": np.zeros(8, "f4")}, {})
        writer.write_per_store("text", {"embedding": np.eye(2, dim, dtype="f4")}, {"names": ["a", "b"]})
        for block in writer.pending():
            write_block(folder, block, block_rows(counts[block.start : block.stop], dim, rng))
        for task in writer.commit_tasks():
            commit_shard(folder, task)
        writer.finish()
    return folder


def block_rows(counts: NDArray[np.int32], dim: int, rng: np.random.Generator) -> dict[str, RaggedRows]:
    """All rows of a block; ground truth has few, proposals as many as regions."""
    n, few = int(counts.sum()), np.minimum(counts, 7)
    vectors = rng.standard_normal((n, dim), dtype="f4")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    corner = rng.random((n, 2), dtype="f4") * 300
    box = np.concatenate([corner, corner + 100], axis=1)
    score, kind, embedding, m = rng.random(n, dtype="f4"), np.zeros(n, "i4"), vectors.astype("f2"), int(few.sum())
    regions = {"box": box, "score": score, "confidence": score, "class_index": kind, "embedding": embedding}
    truth = {"box": box[:m], "class_index": kind[:m], "annotation_id": np.arange(m), "embedding": embedding[:m]}
    return {
        "proposals": RaggedRows(counts=counts, fields={"box": box, "score": score}),
        "regions": RaggedRows(counts=counts, fields=regions),
        "ground_truth": RaggedRows(counts=few, fields=truth),
    }


class Readers:
    """The same rows in four places, and a way to read a batch of images from each."""

    def __init__(self, folder: Path, store: Path, json_images: int) -> None:
        self.folder, self.path = folder, store
        self.offset = zarr.open_array(store / "regions/offset", mode="r")[:]
        self.places = np.arange(len(self.offset) - 1)
        self.ids = Store(store).image_ids
        self._json_places = set(self.places[:json_images].tolist())
        self.npy = folder / "embedding.npy"
        embedding = zarr.open_array(store / "regions/embedding", mode="r")
        target = np.lib.format.open_memmap(self.npy, mode="w+", dtype="f2", shape=embedding.shape)
        for start in range(0, len(target), 65536):
            target[start : start + 65536] = embedding[start : start + 65536]
        target.flush()
        for place in self._json_places:
            rows = target[self.offset[place] : self.offset[place + 1]].astype("f4").tolist()
            (folder / f"{place}.json").write_text(json.dumps(rows))
        self.map = np.load(self.npy, mmap_mode="r")
        self.zarr = embedding
        self.store = Store(store)

    def ours(self, places: list[int]) -> NDArray[np.float16]:
        """One flat array through the store."""
        return self.store.regions.column("embedding", self.ids[places].tolist())[0]

    def memmap(self, places: list[int]) -> NDArray[np.float16]:
        """One flat array from the memory-mapped .npy."""
        return np.concatenate([self.map[self.offset[at] : self.offset[at + 1]] for at in places])

    def through_zarr(self, places: list[int]) -> NDArray[np.float16]:
        """One flat array through zarr-python."""
        return np.concatenate([self.zarr[self.offset[at] : self.offset[at + 1]] for at in places])

    def one_json(self, places: list[int]) -> NDArray[np.float16]:
        """One flat array from a text file per image."""
        dim = self.map.shape[1]
        files = [json.loads((self.folder / f"{at}.json").read_text()) for at in places]
        return np.concatenate([np.array(rows, "f2").reshape(-1, dim) for rows in files])

    def single(self, places: list[int]) -> None:
        """Image by image through the store, each dropped again."""
        for image_id in self.ids[places].tolist():
            self.store.regions.column("embedding", [image_id])

    def single_memmap(self, places: list[int]) -> None:
        """Image by image from the .npy, each copied and dropped again."""
        for at in places:
            np.array(self.map[self.offset[at] : self.offset[at + 1]])

    def evict(self) -> None:
        """Drop store and .npy from the page cache; other mappings of these files must be closed."""
        self.store, self.map = Store(self.path), np.load(self.npy, mmap_mode="r")
        for file in [self.npy, *(f for f in self.path.rglob("*") if f.is_file())]:
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def batches(places: NDArray[np.int64], seed: int, most: int) -> Iterator[list[int]]:
    """Random places in batches."""
    order = np.random.default_rng(seed).permutation(places)[:most].tolist()
    for start in range(0, len(order) - BATCH + 1, BATCH):
        yield order[start : start + BATCH]


def cost(read: Callable[[list[int]], object], work: list[list[int]]) -> tuple[float, float]:
    """CPU and wall microseconds per image."""

    def read_all() -> None:
        for places in work:
            read(places)

    _, spent = driver.timed(read_all)
    images = BATCH * len(work)
    return spent.cpu / images * 1e6, spent.wall / images * 1e6


def gate(readers: Readers) -> None:
    """All readers give the same bytes, or nothing is timed."""
    json_places = readers.places[: len(readers._json_places)]
    for places in batches(json_places, 1, len(json_places)):
        expected = readers.memmap(places).tobytes()
        for read in (readers.ours, readers.through_zarr, readers.one_json):
            if read(places).tobytes() != expected:
                raise SystemExit(f"{read.__name__} does not give the bytes of the memory-mapped file")
    for places in batches(readers.places, 2, 320):
        if readers.ours(places).tobytes() != readers.memmap(places).tobytes():
            raise SystemExit("the store does not give the bytes of the memory-mapped file")


def warm(readers: Readers, rounds: int) -> dict[str, float]:
    """CPU per image with everything in the page cache."""
    work = list(batches(readers.places, 3, 1600))
    json_work = list(batches(readers.places[: len(readers._json_places)], 3, 64))
    # Pages are mapped for the first time, and ours looks at every value once.
    everything = list(batches(readers.places, 3, len(readers.places)))
    first, plain = cost(readers.ours, everything)[0], cost(readers.memmap, everything)[0]
    contestants = {
        "ours": (readers.ours, work),
        "memmap": (readers.memmap, work),
        "ours_single": (readers.single, work),
        "memmap_single": (readers.single_memmap, work),
        "zarr": (readers.through_zarr, work[:20]),
        "json": (readers.one_json, json_work),
    }

    def read_warm(read: Callable[[list[int]], object], todo: list[list[int]], _: int) -> float:
        # The first batches pay for what the reader before left in the caches.
        cost(read, todo[:10])
        return cost(read, todo)[0]

    calls = {name: partial(read_warm, *contestant) for name, contestant in contestants.items()}
    spent = driver.in_turns(calls, range(rounds))
    middle = {name: statistics.median(times) for name, times in spent.items()}
    return {
        **{f"{name}_cpu_us": round(value, 2) for name, value in middle.items()},
        "ours_first_pass_cpu_us": round(first, 2),
        "memmap_first_pass_cpu_us": round(plain, 2),
        "ours_over_memmap": round(middle["ours"] / middle["memmap"], 3),
        "first_pass_over_memmap": round(first / plain, 3),
        "single_over_memmap_single": round(middle["ours_single"] / middle["memmap_single"], 3),
        "zarr_over_ours": round(middle["zarr"] / middle["ours"], 1),
        "json_over_ours": round(middle["json"] / middle["ours"], 1),
    }


def cold(readers: Readers, rounds: int) -> dict[str, float]:
    """The same after the page cache dropped the files; the host may still hold them."""

    def read_evicted(name: str, turn: int) -> tuple[float, float]:
        readers.evict()
        return cost(getattr(readers, name), list(batches(readers.places, 100 + turn, 320)))

    spent = driver.in_turns({name: partial(read_evicted, name) for name in ("ours", "memmap")}, range(rounds))
    found = {}
    for name, times in spent.items():
        found[f"{name}_cpu_us"] = round(statistics.median(t[0] for t in times), 1)
        found[f"{name}_wall_us"] = round(statistics.median(t[1] for t in times), 1)
    found["ours_over_memmap_cpu"] = round(found["ours_cpu_us"] / found["memmap_cpu_us"], 3)
    found["ours_over_memmap_wall"] = round(found["ours_wall_us"] / found["memmap_wall_us"], 3)
    return found


class Loaded(torch.utils.data.Dataset):
    """Batches for a DataLoader: one item is one batch of places."""

    def __init__(self, read: Reader, work: list[list[int]]) -> None:
        self.read, self.work = read, work

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, at: int) -> torch.Tensor:
        return torch.from_numpy(self.read(self.work[at]))


def loader(readers: Readers, rounds: int) -> dict[str, float]:
    """Wall time of a two-worker DataLoader per image, after its start."""
    work = list(batches(readers.places, 5, 3200))

    def load(read: Reader, _: int) -> float:
        stream = iter(torch.utils.data.DataLoader(Loaded(read, work), batch_size=None, num_workers=2))
        for _ in range(8):
            next(stream)
        left, spent = driver.timed(lambda: sum(1 for _ in stream))
        return spent.wall / left / BATCH * 1e6

    calls = {name: partial(load, getattr(readers, name)) for name in ("ours", "memmap")}
    spent = driver.in_turns(calls, range(rounds))
    ours, memmap = (statistics.median(spent[name]) for name in ("ours", "memmap"))
    found = {"ours_wall_us": ours, "memmap_wall_us": memmap, "ours_over_memmap": ours / memmap}
    return {name: round(value, 3) for name, value in found.items()}


def read_epochs(path: Path, verify: Verify, turn: int) -> dict[str, float]:
    """CPU of opening a store, milliseconds, and of a first and a later epoch, microseconds per image.

    An epoch reads what training reads, image by image.
    """

    def opened() -> Store:
        store = Store(path, verify=verify)
        store.ground_truth.batch([]), store.regions.batch([])  # noqa: B018
        return store

    def read(order: list[int]) -> None:
        for image_id in order:
            store.ground_truth[image_id], store.regions[image_id]  # noqa: B018

    (store, opening), random = driver.timed(opened), np.random.default_rng(turn)
    found = {"opening_cpu_ms": opening.cpu * 1e3}
    for name in ("first", "later"):
        order = random.permutation(store.image_ids).tolist()
        found[f"{name}_epoch_cpu_us"] = driver.timed(partial(read, order))[1].cpu / len(order) * 1e6
    return found


def same_rows(path: Path) -> None:
    """Both ways of reading give the same bytes, or nothing is timed."""
    quick, full = (Store(path, verify=mode) for mode in MODES)
    for image_id in quick.image_ids.tolist():
        for product in ("ground_truth", "regions"):
            one, other = getattr(quick, product)[image_id], getattr(full, product)[image_id]
            if any(getattr(one, name).tobytes() != getattr(other, name).tobytes() for name in one.__slots__):
                raise SystemExit(f"image {image_id}: the two ways of reading do not give the same {product}")


def verification(path: Path, rounds: int) -> dict[str, float]:
    """CPU of opening and of epochs with and without checksums, in turns; all is in the page cache."""
    same_rows(path)
    spent = driver.in_turns({mode: partial(read_epochs, path, mode) for mode in MODES}, range(rounds))
    middle = {
        f"{mode}_{figure}": statistics.median(turn[figure] for turn in turns)
        for mode, turns in spent.items()
        for figure in turns[0]
    }
    first, later = middle["full_first_epoch_cpu_us"], middle["full_later_epoch_cpu_us"]
    return {
        **{name: round(value, 1) for name, value in sorted(middle.items())},
        "first_epoch_full_over_quick": round(first / middle["quick_first_epoch_cpu_us"], 2),
        "later_epochs_full_over_quick": round(later / middle["quick_later_epoch_cpu_us"], 3),
        "first_epoch_over_later": round(first / later, 2),
        "opening_full_over_quick": round(middle["full_opening_cpu_ms"] / middle["quick_opening_cpu_ms"], 2),
    }


def sizes(readers: Readers, store: Path) -> dict[str, float]:
    """Bytes of the embedding array, and how many files a store of COCO's size has by its geometry."""
    stored = sum(f.stat().st_size for f in (store / "regions/embedding").rglob("*") if f.is_file())
    whole = sum(f.stat().st_size for f in store.rglob("*") if f.is_file())
    raw = readers.map.nbytes
    places = sorted(readers._json_places)
    text = sum((readers.folder / f"{at}.json").stat().st_size for at in places)
    json_rows = sum(int(readers.offset[at + 1] - readers.offset[at]) for at in places)
    return {
        "embedding_over_raw_float16": round(stored / raw, 5),
        "json_over_embedding": round(text / json_rows * len(readers.map) / stored, 2),
        "whole_store_over_raw_float16": round(whole / raw, 3),
        "files": sum(1 for f in store.rglob("*") if f.is_file()),
        "files_at_coco_size": coco_files(store),
    }


def coco_files(store: Path) -> int:
    """Files of a store with COCO's images and 200 rows each of proposals and regions, counted by `array_spec`."""
    now = sum(1 for f in store.rglob("*") if f.is_file())
    rows = {"proposals": COCO_ROWS, "regions": COCO_ROWS, "ground_truth": 7}
    more = 0
    for product, each in rows.items():
        for field in region_schema(512, "float16").stored(product):
            shape = (COCO_IMAGES * each, *field.trailing)
            spec = array_spec("", field.dtype, shape, shard_bytes=256 * 2**20)
            more += spec.shards - len([f for f in (store / product / field.name / "c").rglob("*") if f.is_file()])
    return now + more


def verifying(store: Path, arguments: argparse.Namespace) -> driver.Row:
    """The row of `--verification`."""
    return {
        "what": "verification",
        "rows": zarr.open_array(store / "regions/box", mode="r").shape[0],
        "page_cache": "warm",
        "verification": verification(store, arguments.rounds),
    }


def reading(work: Path, store: Path, arguments: argparse.Namespace) -> driver.Row:
    """The row of all readers."""
    readers = Readers(work, store, arguments.json_images)
    gate(readers)
    return {
        "what": "read",
        "rows": len(readers.map),
        "warm": warm(readers, arguments.rounds),
        "loader": loader(readers, arguments.rounds),
        "cold": cold(readers, min(3, arguments.rounds)),
        "size": sizes(readers, store),
    }


def geometries(arguments: argparse.Namespace) -> Iterator[driver.Row]:
    """The rows of `--geometry`; each store is removed before the next is made."""
    for name in arguments.geometry or store_geometry.GEOMETRIES:
        with tempfile.TemporaryDirectory(dir=arguments.work, prefix="store-") as folder:
            yield store_geometry.measured(Path(folder), name)


def shown(row: driver.Row) -> str:
    """What is printed of a row."""
    return store_geometry.shown(row) if row.get("what") == "geometry" else json.dumps(row, indent=1)


def measure(arguments: argparse.Namespace) -> Iterator[driver.Row]:
    """One row, of all readers or of checking, or one for each training set."""
    torch.set_num_threads(1)
    if arguments.geometry is not None:
        yield from geometries(arguments)
        return
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="store-") as folder:
        work = Path(folder)
        store = build(work / "store", arguments.images, arguments.dim)
        yield {
            "images": arguments.images,
            "dim": arguments.dim,
            "rounds": arguments.rounds,
            "file_system": driver.file_system(work),
            **(verifying(store, arguments) if arguments.verification else reading(work, store, arguments)),
            "load": round(os.getloadavg()[0], 2),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            **driver.versions("numpy", "zarr"),
        }


if __name__ == "__main__":
    driver.run(
        "store",
        measure,
        __doc__,
        driver.option("--work", help="where to make the data; a folder on a real disk"),
        driver.option("--images", default=4000),
        driver.option("--dim", type=int, default=512),
        driver.option("--json-images", type=int, default=64),
        driver.option("--rounds", default=7),
        driver.option("--verification", action="store_true", help="what checking costs, and nothing else"),
        driver.option(
            "--geometry", nargs="*", choices=list(store_geometry.GEOMETRIES), help="all, or these, and nothing else"
        ),
        show=shown,
    )
