"""`ezsd train`: the detector, from base boxes and cached regions."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cache import Store, StoreMismatch
from ezsd.data.dataset import DetectionDataset, collate, epoch_order
from ezsd.detector.backbone import build_backbone
from ezsd.detector.model import Batch, Detector, DetectorSettings
from ezsd.teacher import state_digest
from pipeline.build import take_first
from pipeline.config import Config, ConfigError, LossConfig, TrainConfig, to_tables
from pipeline.datasets import Dataset, DatasetError, read_dataset_image, recorded_dataset
from pipeline.parsed import training_annotations
from pipeline.progress import Progress
from pipeline.runs import Run, restore_optimiser

log = logging.getLogger("ezsd")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """One training run, as the command line asks for it."""

    cache: Path
    """A committed store."""
    run: Path
    """Run folder; resumed if it holds this very run."""
    config: Config
    data_root: Path | None = None
    """Where the images lie now; None takes the place that the store was built from."""
    backbone_weights: Path | None = None
    """ImageNet state of the backbone."""
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Objective:
    """What training minimises, whatever the batch."""

    text: Tensor
    """Unit rows of the names in the cross-entropy, base names first, (C, D)."""
    base: int
    """How many of them are base names."""
    config: LossConfig


def train(request: TrainRequest) -> Run:
    """Train to the last step, resuming from the newest checkpoint.

    Raises:
        ValueError: (of many kinds) the store is unfinished or made from other data, or an input is wrong.
        FloatingPointError: a loss is not finite; names step, images and parts.
    """
    store = Store(request.cache)
    dataset = store_dataset(store, request.data_root)
    file_names = _check_dataset(store, dataset)
    config, device = request.config, torch.device(request.device)
    names, text = store.text
    weights = None if request.backbone_weights is None else read_backbone(request.backbone_weights)
    torch.manual_seed(config.train.seed)
    detector = build_detector(config, store.embed_dim, weights).to(device)
    values, attributes = store.teacher
    card = {
        "config": to_tables(config),
        "store": {"digest": store.manifest.digest, "manifest": dict(store.manifest.fields)},
        "dataset": dataset.name,
        "names": list(names),
        "base_count": len(dataset.split.base),
        "embed_dim": store.embed_dim,
        "layer_norms": attributes["parameters"],
        "re_normalisation": _accuracy(attributes),
        "backbone_weights": None if weights is None else state_digest(weights),
    }
    tables = {"text": torch.from_numpy(text.copy()), "layer_norms": torch.from_numpy(values.copy())}
    run = Run.create_or_resume(request.run, card, tables)
    run.write_environment(_environment(store, dataset, request.device))
    rows = len(names) if config.loss.novel_names else len(dataset.split.base)
    text_rows = tables["text"][:rows].to(device)
    optimiser = build_optimiser(detector, config.train)
    step = _resume(run, detector, optimiser)
    reader = partial(_read_by_id, dataset.root / dataset.train_images, file_names)
    samples = DetectionDataset(
        [int(i) for i in store.image_ids],
        reader,
        store.ground_truth,
        store.regions,
        regions_per_image=config.train.regions,
        short_side=config.train.short_side,
        long_side=config.train.long_side,
        seed=config.train.seed,
    )
    batches = load_batches(samples, config.train, first_step=step)
    objective = Objective(text_rows, len(dataset.split.base), config.loss)
    _loop(run, detector, optimiser, batches, objective, config.train, device, step)
    return run


def _loop(
    run: Run,
    detector: Detector,
    optimiser: torch.optim.Optimizer,
    batches: Iterator[tuple[list[tuple[int, int]], Batch]],
    objective: Objective,
    config: TrainConfig,
    device: torch.device,
    step: int,
) -> None:
    detector.train()
    steps = config.steps
    with (run.folder / "metrics.jsonl").open("a") as metrics, Progress("train", steps, unit="step", done=step) as bar:
        for keys, batch in batches:
            began = time.perf_counter()
            # One seed per step: a resumed run samples the same regions as an unbroken one.
            torch.manual_seed(config.seed * 1_000_003 + step)
            parts = train_step(detector, optimiser, batch.to(device), objective, config, step)
            step += 1
            _require_finite(parts, step, keys)
            record = {"step": step, **parts, "seconds": round(time.perf_counter() - began, 4)}
            metrics.write(json.dumps(record) + "\n")
            if step % config.checkpoint_every == 0 or step == steps:
                metrics.flush()
                run.save(step, detector, optimiser)
            bar.advance(note=f"loss {parts['loss']:.3f}")


def train_step(
    detector: Detector,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    objective: Objective,
    config: TrainConfig,
    step: int,
) -> dict[str, float]:
    """One optimiser step; returns the weighted sum `loss`, its unweighted parts and the learning rate."""
    rate = learning_rate(step, config)
    for group in optimiser.param_groups:
        group["lr"] = rate
    with torch.autocast(batch.images.device.type, dtype=torch.bfloat16, enabled=batch.images.is_cuda):
        parts = detector.losses(
            batch,
            objective.text,
            base=objective.base,
            distill=objective.config.metric if objective.config.distillation > 0 else None,
        )
    loss = weigh(parts, objective.config)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(detector.parameters(), config.clip_norm)
    optimiser.step()
    values = torch.stack([loss.detach(), *(p.detach().float() for p in parts.values())]).tolist()
    return {"loss": values[0], **dict(zip(parts, values[1:], strict=True)), "learning_rate": rate}


def weigh(parts: dict[str, Tensor], config: LossConfig) -> Tensor:
    """The objective: weighted sum of the parts that are there."""
    weight = {
        "rpn_objectness": config.rpn,
        "rpn_box": config.rpn,
        "classification": config.classification,
        "box": config.box,
        "distillation": config.distillation,
    }
    return torch.stack([weight[name] * part.float() for name, part in parts.items()]).sum()


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to zero; a pure function of the step."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def build_detector(
    config: Config, embed_dim: int, weights: dict[str, Tensor] | None, *, frozen_norms: bool | None = None
) -> Detector:
    """The detector of a configuration, freshly initialised; `build_backbone` explains the last two arguments."""
    model = config.model
    try:
        backbone = build_backbone(model.backbone, channels=model.channels, weights=weights, frozen_norms=frozen_norms)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if len(model.rpn_sizes) != len(backbone.strides):
        raise ConfigError(
            f"model.rpn_sizes needs one size per level of {model.backbone} (strides {backbone.strides}), "
            f"got {len(model.rpn_sizes)}"
        )
    return Detector(
        backbone,
        DetectorSettings(
            embed_dim=embed_dim,
            rpn_sizes=tuple((size,) for size in model.rpn_sizes),
            rpn_proposals=model.rpn_proposals,
            pool_size=model.pool_size,
            canonical_size=model.canonical_size,
            canonical_level=model.canonical_level,
            tower_depth=model.tower_depth,
            box_hidden=model.box_hidden,
            semantic_boxes=model.semantic_boxes,
            temperature=model.temperature,
            sampled_regions=model.sampled_regions,
            positive_share=model.positive_share,
            spare_confidence=model.spare_confidence,
            backend=config.train.backend,
        ),
    )


def build_optimiser(detector: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD; vectors (biases, norms, background row) and the temperature do not decay."""
    trained = [p for p in detector.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def load_batches(
    samples: DetectionDataset, config: TrainConfig, *, first_step: int
) -> Iterator[tuple[list[tuple[int, int]], Batch]]:
    """The batches from `first_step` to the end, each with the (epoch, position) pairs it was made from."""
    order = list(
        epoch_order(len(samples), per_step=config.images, first_step=first_step, steps=config.steps, seed=config.seed)
    )
    loader = torch.utils.data.DataLoader(
        samples, batch_sampler=order, num_workers=config.loader_workers, collate_fn=collate
    )
    yield from zip(order, loader, strict=True)


def store_dataset(store: Store, data_root: Path | None) -> Dataset:
    """The dataset a store was built from, where it lies now."""
    fields = store.manifest.fields["dataset"]
    assert isinstance(fields, dict)
    recorded = store.path / "environment.json"
    environment = json.loads(recorded.read_text()) if recorded.is_file() else {}
    if data_root is None:
        if "data_root" not in environment:
            raise DatasetError(f"{store.path}: does not say where its images lie; give --data-root DIR")
        data_root = Path(environment["data_root"])
        if not data_root.is_dir():
            raise DatasetError(f"{store.path}: its images lay in {data_root}, which is gone; give --data-root DIR")
    return recorded_dataset(environment.get("dataset"), str(fields["name"]), data_root).require()


def _check_dataset(store: Store, dataset: Dataset) -> dict[int, tuple[str, int, int]]:
    """Compare the annotations as they are now with those the store was made from; returns files and sizes by id."""
    annotations = take_first(
        training_annotations(dataset.root / dataset.train_annotations, dataset.split), len(store.image_ids)
    )
    fields = store.manifest.fields["dataset"]
    assert isinstance(fields, dict)
    digest = annotations.digest()
    now = {"image_list_sha256": digest["images"], "base_boxes_sha256": digest["boxes"]}
    changed = [
        f"dataset.{key}: store has {fields[key]}, now {value}" for key, value in now.items() if fields[key] != value
    ]
    if changed:
        raise StoreMismatch(
            f"{store.path}: made from other annotations than {dataset.root / dataset.train_annotations}: "
            f"{'; '.join(changed)}; build a new store, or give the --data-root it was made from"
        )
    return {image.id: (image.file_name, image.width, image.height) for image in annotations.images}


def _read_by_id(root: Path, files: dict[int, tuple[str, int, int]], image_id: int) -> Tensor:
    file_name, width, height = files[image_id]
    return read_dataset_image(root, file_name, width, height)


def read_backbone(path: Path) -> dict[str, Tensor]:
    """An ImageNet state from .safetensors, or from .pth without running code in it."""
    if not path.is_file():
        raise ConfigError(f"--backbone-weights {path}: no such file")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--backbone-weights {path}: not a plain state of tensors: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ConfigError(f"--backbone-weights {path}: expected a dictionary of tensors")
    return state


def _resume(run: Run, detector: Detector, optimiser: torch.optim.Optimizer) -> int:
    latest = run.latest()
    if latest is None:
        run.cut_metrics(0)
        return 0
    detector.load_state_dict(latest.model())
    restore_optimiser(optimiser, latest.optimiser())
    run.cut_metrics(latest.step)
    log.info("resuming %s at step %d", run.folder, latest.step)
    return latest.step


def _environment(store: Store, dataset: Dataset, device: str) -> dict[str, object]:
    """Where things lie and what ran: recorded, never compared."""
    recorded = store.path / "environment.json"
    built = json.loads(recorded.read_text()) if recorded.is_file() else {}
    return {
        "data_root": str(dataset.root.absolute()),
        "dataset": dataset.definition(),
        "cache": str(store.path.absolute()),
        "teacher": built.get("teacher"),
        "build_seconds": built.get("seconds", {}),
        "device": device,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "ezsd")},
    }


def _require_finite(parts: dict[str, float], step: int, keys: list[tuple[int, int]]) -> None:
    if not math.isfinite(parts["loss"]):
        positions = [position for _, position in keys]
        raise FloatingPointError(f"the loss is not finite at step {step}; parts: {parts}; image positions: {positions}")


def _accuracy(attributes: dict[str, object]) -> dict[str, object]:
    return {key: attributes[key] for key in ("base_accuracy_before", "base_accuracy_after", "held_out_crops")}
