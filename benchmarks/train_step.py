"""What does distillation cost a step? `python benchmarks/train_step.py --cache STORE [--steps 30] [--set KEY=VALUE]`.

Three arms that differ in the source of the distillation alone: none; embeddings from the store; embeddings of the same
boxes from the teacher, run online at every step. They take turns on the same batches, each first as often as last, so
that other work on the machine slows all alike. Then the middle arm alone goes on, as a training does, and the time it
waits for data is taken. Last, each arm takes a few steps in a process of its own, whose peak of memory is kept. One row
per head goes to results/train_step.jsonl: the median over steps of the ratios, the share of time spent waiting, and the
peaks. Median times are in the row too; on a busy machine ratios alone mean something.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import driver
import torch

from ezsd.adapt import restore
from ezsd.cache import Store
from ezsd.crops import crop_boxes
from ezsd.data.dataset import DetectionDataset
from ezsd.detector.model import Batch
from ezsd.pipeline.config.schema import Config
from ezsd.pipeline.console.defaults import train_config
from ezsd.pipeline.devices import resolve_device
from ezsd.pipeline.extraction.teacher import configured_teacher
from ezsd.pipeline.runs.model import build_detector
from ezsd.pipeline.training.dataloader import load_batches
from ezsd.pipeline.training.distributed import Distributed
from ezsd.pipeline.training.train import build_trainer, store_dataset, training_samples
from ezsd.pipeline.training.trainer import Trainer
from ezsd.teacher.open_clip import Teacher

ARMS = ("none", "store", "online")
MEMORY_STEPS = 8
HEADS = {
    "fast": ("model.head=fast",),
    "paper": ("model.head=paper", "model.tower_depth=3", "model.box_hidden=1024"),
}
"""The fast head as the preset has it; the paper's is always the authors'."""


def with_online_targets(batch: Batch, teacher: Teacher, config: Config) -> Batch:
    """The batch with embeddings that the teacher computes now, of the same boxes."""
    targets = torch.zeros(len(batch.region_boxes), teacher.embed_dim, device=batch.images.device)
    for number, (height, width) in enumerate(batch.sizes):
        mine = batch.region_image == number
        if not mine.any():
            continue
        image = batch.images[number, :, :height, :width]
        rule = config.proposals
        crops = crop_boxes(
            image, batch.region_boxes[mine], size=teacher.input_size, ratio=rule.crop_ratio, surround=rule.padding
        )
        with torch.no_grad():
            targets[mine] = teacher.encode_image(crops.float() / 255).float()
    return dataclasses.replace(batch, region_target=targets)


def build_arms(store: Store, config: Config, device: str, base: int, arms: Sequence[str] = ARMS) -> dict[str, Trainer]:
    """A trainer per arm, from the same first weights."""
    text, made = torch.from_numpy(store.text[1].copy()), {}
    for arm in arms:
        loss = dataclasses.replace(config.loss, distillation=config.loss.distillation * (arm != "none"))
        torch.manual_seed(config.train.seed)
        detector = build_detector(config, store.embed_dim, None).to(device).train()
        made[arm] = build_trainer(detector, dataclasses.replace(config, loss=loss), text, base, Distributed())
    return made


def store_teacher(store: Store, config: Config, device: str) -> Teacher:
    """The teacher with the store's re-normalised LayerNorms."""
    teacher = configured_teacher(config.teacher, device)
    values, attributes = store.teacher
    restore(teacher.layer_norms(), values, attributes["parameters"])
    return teacher


def settle(device: str) -> float:
    """Seconds, once the device has done what it was told."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(store: Store, config: Config, device: str) -> dict[str, object]:
    """Median seconds per arm and what follows from them, for one head."""
    dataset = store_dataset(store, None)
    arms = build_arms(store, config, device, len(dataset.split.base))
    teacher = store_teacher(store, config, device)
    samples = training_samples(store, dataset, config.train)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    regions = []
    batches = load_batches(samples, config.train, first_step=0)
    for step, (_, (loaded,)) in enumerate(batches):
        regions.append(len(loaded.region_boxes) / len(loaded.sizes))
        turn = step % len(ARMS)
        for arm in (*ARMS[turn:], *ARMS[:turn]):
            torch.manual_seed(step)
            began = settle(device)
            batch = loaded.to(torch.device(device))
            arms[arm].step([with_online_targets(batch, teacher, config) if arm == "online" else batch], step)
            seconds[arm].append(settle(device) - began)
    # The first steps tune kernels and fill caches.
    skipped = min(3, config.train.steps - 1)
    kept = {arm: spent[skipped:] for arm, spent in seconds.items()}
    median = {arm: statistics.median(spent) for arm, spent in kept.items()}
    return {
        "store_over_none": _ratio(kept["store"], kept["none"]),
        "online_over_store": _ratio(kept["online"], kept["store"]),
        "data_share": data_share(arms["store"], samples, config, device),
        "seconds": {arm: round(value, 4) for arm, value in median.items()},
        "regions_per_image": round(statistics.mean(regions), 1),
    }


def data_share(trainer: Trainer, samples: DetectionDataset, config: Config, device: str) -> float:
    """Share of its time that a training waits for batches, those read before its first step left out."""
    waited, spent = 0.0, 0.0
    batches = load_batches(samples, config.train, first_step=0)
    next(batches)
    for step in range(1, config.train.steps):
        began = settle(device)
        _, (loaded,) = next(batches)
        waited += time.perf_counter() - began
        torch.manual_seed(step)
        trainer.step([loaded.to(torch.device(device))], step)
        spent += settle(device) - began
    return round(waited / spent, 4)


def _ratio(over: list[float], under: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(over, under, strict=True)), 3)


def peak_alone(path: Path, config: Config, arm: str, device: str) -> float:
    """Peak memory of a process that trains one arm and nothing else, MiB."""
    store = Store(path)
    dataset = store_dataset(store, None)
    trainer = build_arms(store, config, device, len(dataset.split.base), [arm])[arm]
    teacher = store_teacher(store, config, device) if arm == "online" else None
    batches = load_batches(training_samples(store, dataset, config.train), config.train, first_step=0)
    for step, (_, (loaded,)) in enumerate(islice(batches, MEMORY_STEPS)):
        batch = loaded.to(torch.device(device))
        trainer.step([batch if teacher is None else with_online_targets(batch, teacher, config)], step)
    # Of a GPU the memory of tensors, of the CPU that of the process.
    return driver.peak_mib() if device == "cpu" else round(torch.cuda.max_memory_allocated() / 2**20, 1)


def peaks_alone(path: Path, config: Config, device: str) -> dict[str, float]:
    """`peak_alone` of every arm, each in a new process."""
    found = {}
    for arm in ARMS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found[arm] = pool.submit(peak_alone, path, config, arm, device).result()
    return found


def rows(arguments: argparse.Namespace) -> Iterator[driver.Row]:
    """One row a head."""
    device, store = resolve_device(arguments.device), Store(arguments.cache)
    for head, own in HEADS.items():
        settings = [*own, f"train.steps={arguments.steps}", *arguments.overrides]
        config = train_config(store, arguments.preset, settings)
        yield {
            "head": head,
            "backbone": config.model.backbone,
            "images": config.train.batch_size,
            "steps": arguments.steps,
            "device": device,
            "threads": torch.get_num_threads(),
            **measure(store, config, device),
            "peak_mib": peaks_alone(arguments.cache, config, device),
            "overrides": arguments.overrides,
            "note": arguments.note,
        }


if __name__ == "__main__":
    steps = driver.option("--steps", type=int, default=30)
    preset, device = driver.option("--preset"), driver.option("--device", default="auto")
    driver.run("train_step", rows, __doc__, "--cache", preset, steps, device, "--note", "--set")
