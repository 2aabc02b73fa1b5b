"""Does a store of COCO's size build, verify and read with memory and open files that stay as they are?

    python benchmarks/load.py --work DIR                   # 118,287 images x 200 regions, D = 512, int8: some 20 GB
    python benchmarks/load.py --work DIR --images 2000     # the same, smaller

The build is `ezsd cache build` itself with four worker processes: images are read, cropped and encoded, blocks are
journaled and committed. Only the teacher is a stand-in, a plug-in with one matrix, and the images are small. Then the
store is verified, also byte by byte, and read for an epoch by eight processes in the batches of a training. Meanwhile
memory, open files and CPU time of all processes and the bytes on the disk are looked at, and kept in DIR. One row goes
to results/load.jsonl; exit code 1 if the store is damaged, or if memory or open files grow in building or reading:
slope (least squares, once a first image or block is done, and without the first tenth of what follows) times duration
has to be below 2 % of the mean.

A start that was killed goes on with the same command: figures of a stage are then of all its starts together, slopes of
the longest one.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import driver
import numpy as np
import psutil
import torch
from PIL import Image

from ezsd.cache import Store, verify
from ezsd.pipeline.config.relations import load_settings
from ezsd.pipeline.data.dataset_toml import Places, dataset_toml
from ezsd.pipeline.data.datasets import find_dataset
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.training.dataloader import load_batches
from ezsd.pipeline.training.train import training_samples
from ezsd.vocabulary import COCO_SPLIT

COCO_IMAGES, REGIONS, OBJECTS = 118_287, 200, 7
"""Images of COCO's training set; regions and base objects of each."""
SIDE, CROP, PICTURES = 64, 8, 256
"""Sides of the drawn images and of their windows, pixels, and how many images differ."""
BATCH = 16
SETTINGS = (
    *("teacher.precision=fp32", "adapt.steps=0", "adapt.held_out=0.001", "adapt.min_crop_size=0"),
    # 225 windows, which are crops as they are: this is about what comes after them.
    *("proposals.search=exhaustive", "proposals.grid=sliding", f"proposals.sizes=[{CROP}]", "proposals.ratios=[1.0]"),
    *("proposals.stride=0.5", "proposals.crop_ratio=1.0", "build.embedding=int8", "proposals.nms_iou=1.0"),
    # As many as are asked for are kept.
    *(f"proposals.max_proposals={REGIONS}", f"proposals.max_regions={REGIONS}", "proposals.base_iou=2"),
    *("proposals.drop_base_guesses=false", "train.min_size=0", "train.max_size=0", f"train.batch_size={BATCH}"),
)
JUDGED_SECONDS = 60.0
"""A stage that is shorter says nothing of growth."""
MOST_DRIFT = 0.02
STAGES = ("prepare", "extract", "commit", "verify", "verify deep", "read")


class StandIn:
    """A teacher that costs the same for every crop: a random matrix, fixed by its seed, on 8 x 8 pixels."""

    name, embed_dim, input_size, logit_scale = "stand-in", 512, CROP, 100.0

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(3 * self.input_size**2, self.embed_dim, generator=generator)

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Unit embeddings (B, D) of crops (B, 3, S, S)."""
        return torch.nn.functional.normalize((pixels.flatten(1) - 0.5) @ self.matrix, dim=1)

    def encode_text(self, names: Sequence[str]) -> torch.Tensor:
        """Unit embeddings (C, D) of names."""
        rows = [np.random.default_rng(list(name.encode())).standard_normal(self.embed_dim, "f4") for name in names]
        return torch.nn.functional.normalize(torch.from_numpy(np.stack(rows)), dim=1)

    def layer_norms(self, *, vision_only: bool = False) -> dict[str, torch.nn.Parameter]:
        """None: nothing is re-normalised."""
        return {}

    def fingerprint(self) -> dict[str, object]:
        """All that makes an embedding."""
        return {"name": self.name, "seed": 0, "input_size": self.input_size}


def teacher(device: str = "cpu") -> StandIn:
    """The factory of the plug-in."""
    return StandIn()


def draw(folder: Path, images: int) -> None:
    """A dataset in COCO's layout; a few of its images differ."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    pictures = []
    for _ in range(PICTURES):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), "u1")).save(file, "jpeg")
        pictures.append(file.getvalue())
    for number in range(images):
        (folder / f"images/{number + 1:012d}.jpg").write_bytes(pictures[number % PICTURES])
    with (folder / "train.json").open("w") as file:
        # Piece by piece: in memory all of it would be more than what is looked at here.
        pieces = (
            {"id": at + 1, "file_name": f"{at + 1:012d}.jpg", "width": SIDE, "height": SIDE} for at in range(images)
        )
        file.write('{"images": ')
        _write_list(file.write, pieces)
        file.write(', "annotations": ')
        _write_list(file.write, (_object(at, random) for at in range(images * OBJECTS)))
        names = enumerate(COCO_SPLIT.base, start=1)
        file.write(f', "categories": {json.dumps([{"id": number, "name": name} for number, name in names])}}}')
    places = {"train": Places("images", "train.json")}
    (folder / "load.toml").write_text(dataset_toml("load", places, COCO_SPLIT))


def _object(number: int, random: np.random.Generator) -> dict[str, object]:
    """A base object of image `number // OBJECTS`."""
    x, y = (int(value) for value in random.integers(0, SIDE - CROP, 2))
    return {
        "id": number + 1,
        "image_id": number // OBJECTS + 1,
        "category_id": number % len(COCO_SPLIT.base) + 1,
        "bbox": [x, y, CROP, CROP],
        "area": CROP**2,
        "iscrowd": 0,
    }


def _write_list(write: Callable[[str], object], entries: Iterator[dict[str, object]]) -> None:
    write("[")
    for number, entry in enumerate(entries):
        write(f"{',' if number else ''}\n{json.dumps(entry)}")
    write("]")


@dataclass(frozen=True, slots=True)
class Sample:
    """All processes at one moment; memory in bytes, time in seconds since the start."""

    start: int
    stage: str
    seconds: float
    cpu: float
    """Of all processes of this start so far, also of those that have ended."""
    processes: int
    memory: int
    """Memory of their own: resident pages that map no file and are not shared."""
    mapped: int
    """Resident pages of files and of shared memory, which count in each process that maps them."""
    handles: int
    disk: int
    """Bytes of the store's folder."""
    done: int
    """Images that are read, or blocks that are in the journal."""


class Recorder:
    """Looks at this process and all below it from time to time, and keeps what it sees, in `file`."""

    def __init__(self, file: Path, store: Path, period: float) -> None:
        self._file, self._store, self._period = file, store, period
        if file.exists():
            # A kill may have cut the last line.
            file.write_text("".join(line for line in file.read_text().splitlines(True) if line.endswith("\n")))
        self._begun = time.monotonic()
        self._cpu: dict[tuple[int, float], float] = {}
        self._start = 1 + max((one.start for one in self.samples()), default=0)
        self.images = 0
        """Images that have been read."""

    def samples(self) -> list[Sample]:
        """Those of all starts."""
        if not self._file.exists():
            return []
        return [Sample(**json.loads(line)) for line in self._file.read_text().splitlines()]

    @contextmanager
    def during(self, stage: Callable[[], str]) -> Iterator[None]:
        """Look while something is done; `stage` says what that is at the moment."""
        done = threading.Event()

        def look() -> None:
            while True:
                ended = done.wait(self._period)
                self._keep(self._look(stage()))
                if ended:
                    return

        self._keep(self._look(stage()))
        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _keep(self, sample: Sample) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(asdict(sample)) + "\n")

    def _look(self, stage: str) -> Sample:
        here = psutil.Process()
        memory = mapped = handles = processes = 0
        for process in [here, *here.children(recursive=True)]:
            # It may end meanwhile.
            with suppress(psutil.Error), process.oneshot():
                size, times = process.memory_info(), process.cpu_times()
                handles += process.num_fds()
                memory += size.rss - size.shared
                mapped += size.shared
                processes += 1
                self._cpu[process.pid, process.create_time()] = times.user + times.system
        disk, blocks = (0, 0) if stage == "read" else _size(self._store)
        return Sample(
            start=self._start,
            stage=stage,
            seconds=round(time.monotonic() - self._begun, 3),
            cpu=round(sum(self._cpu.values()), 2),
            processes=processes,
            memory=memory,
            mapped=mapped,
            handles=handles,
            disk=disk,
            done=self.images if stage == "read" else blocks,
        )


def _size(store: Path) -> tuple[int, int]:
    """Bytes of a store's folder, and finished blocks in its journal."""
    size = blocks = 0
    for folder, names, files in os.walk(store):
        if folder.endswith("journal"):
            blocks = sum(name.startswith("block-") for name in names)
        for name in files:
            # It may be renamed or dropped meanwhile.
            with suppress(FileNotFoundError):
                size += os.stat(os.path.join(folder, name)).st_size
    return size, blocks


def stage_of(store: Path) -> str:
    """The stage of a build, by what there is of the store."""
    if (store / "regions").is_dir():
        return "commit"
    # The names are embedded last before images are.
    return "extract" if (store / "journal/whole-text").is_dir() else "prepare"


def build(data: Path, store: Path, arguments: argparse.Namespace, recorder: Recorder) -> None:
    """Build the store, or go on with it."""
    own = (f"teacher.name=plugin:{Path(__file__).stem}:teacher", f"build.block_images={arguments.block_images}")
    request = BuildRequest(
        dataset=find_dataset(str(data / "load.toml")),
        config=load_settings("coco", [*SETTINGS, *own]),
        out=store,
        workers=arguments.workers,
    )
    with recorder.during(lambda: stage_of(store)):
        build_cache(request)


def read(data: Path, store: Path, readers: int, recorder: Recorder) -> None:
    """Read an epoch as a training does, from the image on that an earlier start had come to."""
    dataset, opened = find_dataset(str(data / "load.toml")).require("train"), Store(store)
    steps = -(-len(opened.image_ids) // BATCH)
    recorder.images = max((one.done for one in recorder.samples() if one.stage == "read"), default=0)
    config = load_settings("coco", [*SETTINGS, f"train.num_workers={readers}", f"train.steps={steps}"]).train
    samples = training_samples(opened, dataset, config)
    with recorder.during(lambda: "read"):
        for _, (batch,) in load_batches(samples, config, first_step=recorder.images // BATCH):
            expected, found = ((REGIONS + OBJECTS) * BATCH, StandIn.embed_dim), tuple(batch.region_target.shape)
            if found != expected:
                raise SystemExit(f"step {recorder.images // BATCH}: expected embeddings {expected}, found {found}")
            recorder.images += BATCH


def figures(samples: Sequence[Sample], images: int) -> driver.Row:
    """Time, throughput, memory, open files and bytes of a stage."""
    starts = [list(of) for _, of in itertools.groupby(samples, key=lambda one: one.start)]
    seconds = sum(of[-1].seconds - of[0].seconds for of in starts)
    longest = max(starts, key=len)
    # Before the first image or block is done processes start, and at the end they go.
    working = [one for one in longest if one.done] or longest
    usual = statistics.mode(one.processes for one in working)
    steady = [one for one in working[len(working) // 10 :] if one.processes == usual]
    lasted = steady[-1].seconds - steady[0].seconds if steady else 0.0
    judged = lasted >= JUDGED_SECONDS
    drifts = {name: drift(steady, name) if judged else None for name in ("memory", "handles")}
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(of[-1].cpu - of[0].cpu for of in starts), 1),
        "images_per_second": round(images / seconds, 1) if seconds else None,
        "samples": len(samples),
        "steady_seconds": round(lasted, 1),
        "processes": usual,
        "memory_mb": round(statistics.mean(one.memory for one in steady or longest) / 2**20, 1),
        "peak_memory_mb": round(max(one.memory for one in samples) / 2**20, 1),
        "mapped_mb": round(max(one.mapped for one in samples) / 2**20, 1),
        "handles": round(statistics.mean(one.handles for one in steady or longest), 1),
        "peak_handles": max(one.handles for one in samples),
        **{f"{name}_drift": value for name, value in drifts.items()},
        "flat": all(value is not None and value < MOST_DRIFT for value in drifts.values()) if judged else None,
    }


def drift(samples: Sequence[Sample], name: str) -> float:
    """Growth of a figure over all samples by least squares, as a fraction of its mean."""
    seconds = np.array([one.seconds for one in samples])
    values = np.array([getattr(one, name) for one in samples], float)
    slope = np.polyfit(seconds - seconds[0], values, 1)[0]
    return round(float(slope * (seconds[-1] - seconds[0]) / values.mean()), 4)


def require_same(work: Path, arguments: argparse.Namespace) -> None:
    """Refuse to go on with another number of images, workers or readers."""
    asked, file = (
        {name: getattr(arguments, name) for name in ("images", "block_images", "workers", "readers")},
        work / "asked.json",
    )
    if not file.exists():
        file.write_text(json.dumps(asked))
    if (found := json.loads(file.read_text())) != asked:
        raise driver.UsageError(f"--work: {work} is of {found}; choose another folder, or remove it")


def measure(arguments: argparse.Namespace) -> Iterator[driver.Row]:
    """One row."""
    torch.set_num_threads(1)
    work = arguments.work.absolute()
    require_same(work, arguments)
    data, store = work / "data", work / "store"
    if not data.is_dir():
        draft = work / "data.draft"
        if draft.is_dir():
            raise driver.UsageError(f"--work: {draft} was not finished; remove it")
        draw(draft, arguments.images)
        draft.rename(data)
    recorder = Recorder(work / "samples.jsonl", store, arguments.period)
    build(data, store, arguments, recorder)
    with recorder.during(lambda: "verify"):
        damage = list(map(str, verify(store)))
    with recorder.during(lambda: "verify deep"):
        damage += map(str, verify(store, deep=True))
    read(data, store, arguments.readers, recorder)
    samples = recorder.samples()
    stages = {stage: [one for one in samples if one.stage == stage] for stage in STAGES}
    found = {stage: figures(of, arguments.images) for stage, of in stages.items() if of}
    files = [file for file in store.rglob("*") if file.is_file()]
    yield {
        "images": arguments.images,
        "block_images": arguments.block_images,
        "regions": REGIONS,
        "objects": OBJECTS,
        "dim": StandIn.embed_dim,
        "embedding": "int8",
        "workers": arguments.workers,
        "readers": arguments.readers,
        "starts": samples[-1].start,
        "bytes": sum(file.stat().st_size for file in files),
        "files": len(files),
        "peak_bytes": max(one.disk for one in samples),
        "digest": Store(store, verify="quick").digest,
        "damage": damage,
        "stages": found,
        "file_system": driver.file_system(work),
        "load": round(os.getloadavg()[0], 2),
        "note": arguments.note,
        **driver.versions("numpy", "zarr", "distributed"),
    }
    growing = [stage for stage, of in found.items() if stage in ("extract", "read") and of["flat"] is False]
    if damage or growing:
        raise SystemExit(f"damaged: {damage}; memory or open files grow: {growing}")


OPTIONS = (
    driver.option("--work", help="where to make the data; a start that was killed goes on there"),
    driver.option("--images", default=COCO_IMAGES),
    driver.option("--block-images", type=int, default=256, help="images of a block of the build"),
    driver.option("--workers", type=int, default=4, help="processes that build"),
    driver.option("--readers", type=int, default=8, help="processes that read"),
    driver.option("--period", type=float, default=2.0, help="seconds from one look at the processes to the next"),
    "--note",
)

if __name__ == "__main__":
    driver.run("load", measure, __doc__, *OPTIONS)
