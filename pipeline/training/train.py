"""`ezsd train`: train the detector from base boxes and cached regions."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ezsd.cache import Store, Verify, info
from ezsd.choices import Backend
from ezsd.data.annotations import Annotations, ImageRecord, ImageTable
from ezsd.data.dataset import DetectionDataset, MaskSource, PseudoLabels, repeat_factors
from ezsd.data.transforms import Augmentation
from ezsd.detector.model import Batch, Detector
from ezsd.detector.sampling import step_seed
from ezsd.errors import inflected, quantity
from ezsd.pipeline.config.schema import Config, TrainConfig, to_tables
from ezsd.pipeline.data.datasets import Dataset, recorded_dataset
from ezsd.pipeline.data.image_source import ImageSource
from ezsd.pipeline.data.mask_cache import training_masks
from ezsd.pipeline.devices import describe_machine, is_out_of_memory, require_backend_there, said_instead
from ezsd.pipeline.errors import ConfigError, DatasetError, NonFiniteLoss, OutOfMemory, RunError
from ezsd.pipeline.extraction.annotation_check import checked_annotations
from ezsd.pipeline.extraction.provenance import as_built, dataset_inputs, scored_by_objectness
from ezsd.pipeline.inference.predictor import load_weights
from ezsd.pipeline.interrupts import Request, Stopped, finishing
from ezsd.pipeline.progress import Progress
from ezsd.pipeline.runs.card import has_card, write_card
from ezsd.pipeline.runs.loggers import MetricsLog, require_loggers
from ezsd.pipeline.runs.model import build_detector, read_backbone, require_sizes, warn_of_random_weights
from ezsd.pipeline.runs.run import CHANGEABLE, Run, restore_optimiser, rows_digest
from ezsd.pipeline.runs.schedule import peak_rate
from ezsd.pipeline.runs.store_digests import record_store, require_same_bytes
from ezsd.pipeline.runs.training_boxes import record_boxes
from ezsd.pipeline.training.dataloader import load_batches
from ezsd.pipeline.training.distributed import Distributed, join_process_group, local_device
from ezsd.pipeline.training.out_of_memory import step_does_not_fit
from ezsd.pipeline.training.trainer import (
    AverageWeights,
    Objective,
    Trainer,
    build_optimiser,
    in_effect,
)
from ezsd.pipeline.training.validation import Validation, require_validation
from ezsd.teacher.open_clip import state_digest

log = logging.getLogger("ezsd")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """Arguments of a training run."""

    cache: Path
    """A committed store."""
    run: Path
    """Run folder; resumed if it contains the same run."""
    config: Config
    """Configuration of training; settings of stage one are ignored, the run records those of the store."""
    data_root: Path | None = None
    """Image folder; None takes the one that the store was built from."""
    backbone_weights: Path | None = None
    """File of pretrained weights for the backbone."""
    device: str = "cpu"
    verify: Verify = "full"
    """Checks of the store's bytes when they are read, see `Store`."""
    accept_store: bool = False
    """Allow a run to go on with other bytes than it was trained on so far."""
    preset: str | None = None
    """Name of the preset that the configuration came from, for the run's card."""


def train(request: TrainRequest) -> Run:
    """Train to the last step, resuming from the newest checkpoint.

    Raises:
        ValueError: (of many kinds) the store is unfinished or made from other data, or an input is wrong.
        NonFiniteLoss: a loss or gradient is not finite; names step, images and parts.
        OSError: the run folder cannot be written to.
        OutOfMemory: a step does not fit; says what to change.
        Stopped: after a checkpoint, when SIGINT or SIGTERM was received; it is a SystemExit with code 130 or 143.
    """
    device = local_device(request.device)
    require_backend_there(request.config.train.backend, device)
    require_loggers(request.config.train.loggers)
    with ExitStack() as stack:
        distributed = stack.enter_context(join_process_group(device))
        _check_distributed(request.config.train, distributed)
        store = Store(request.cache, verify=request.verify)
        store.require_regions()
        _require_regions(store, request.config)
        _require_objectness(store, request.config.train)
        dataset = store_dataset(store, request.data_root)
        if distributed.is_main:
            require_validation(dataset, request.config)
        # Before the annotations are read, for a backbone may be refused.
        backend = distributed.agree(request.config.train.backend, device)
        detector, spec = _begin(request, store, dataset, backend)
        masks = training_masks(dataset) if request.config.model.masks else None
        samples = training_samples(store, dataset, request.config.train, masks)
        tables = _tables(store)
        if distributed.is_main:
            check = partial(require_same_bytes, store=store, accept=request.accept_store)
            run = stack.enter_context(Run.claim(request.run, spec, tables, check))
            run.write_environment(_environment(store, dataset, request))
        distributed.barrier()
        run = Run.open(request.run)
        base = len(dataset.split.base)
        trainer = build_trainer(detector.to(device), request.config, tables["text"], base, distributed)
        run.began_at = step = _resume(run, trainer)
        if distributed.is_main and step < request.config.train.steps:
            record_store(run, store, step)
            record_boxes(run, store, samples.image_ids, dataset.annotations("train"), step)
        validation = Validation.of_run(run, trainer, dataset, request.config, samples.epoch_images)
        if step == request.config.train.steps and not validation.missing(step):
            if distributed.is_main and not has_card(run):
                # A training that was killed after its last checkpoint has left none.
                write_card(run)
            return run
        if distributed.is_main:
            run.record_start(step, _changeable_settings(request.config, request.device, distributed))
        stop = stack.enter_context(finishing("this step"))
        loading = load_batches(
            samples,
            request.config.train,
            first_step=step,
            distributed=distributed,
            # Several processes end after the same step.
            stopping=lambda: distributed.world_size == 1 and bool(stop.signal),
            pinned=device.type == "cuda",
        )
        batches = stack.enter_context(closing(loading))
        _Training(run, trainer, samples, validation, stop, step).finish(batches)
        if distributed.is_main:
            write_card(run)
    return run


def _require_regions(store: Store, config: Config) -> None:
    """Raise ConfigError for distillation without regions: its loss would be 0 in every step."""
    regions = next(product.rows for product in info(store.path).products if product.name == "regions")
    if config.loss.distillation and config.train.regions_per_image and not regions:
        raise ConfigError(
            f"{store.path}: has no region to distil from, so that loss.distillation={config.loss.distillation:g} would "
            f"do nothing; build another store (`ezsd cache build` says which filter dropped them), or train without: "
            f"`loss.distillation=0`"
        )


def _require_objectness(store: Store, config: TrainConfig) -> None:
    """Raise ConfigError for pseudo-labels from a store whose regions are not scored by objectness alone."""
    if config.pseudo_confidence and not scored_by_objectness(store.manifest):
        raise ConfigError(
            f"{store.path}: train.pseudo_confidence={config.pseudo_confidence:g} needs regions with the objectness of "
            "a proposal network, and the teacher has a part in the scores of this store; build one with "
            "`proposals.search=learned` and `proposals.objectness_weight=1`, or train with `train.pseudo_confidence=0`"
        )


def _changeable_settings(config: Config, device: str, distributed: Distributed) -> dict[str, object]:
    """Settings of one start of training that run.json does not fix."""
    train = config.train
    settings = {name: getattr(train, name) for name in (*CHANGEABLE, "grad_accumulation")}
    return {**settings, "device": device, "processes": distributed.world_size}


def _has_batch_norm(detector: nn.Module) -> bool:
    """Test whether the results of an image depend on the other images of its batch."""
    return any(isinstance(module, nn.BatchNorm2d) for module in detector.modules())


def _begin(
    request: TrainRequest, store: Store, dataset: Dataset, backend: Backend
) -> tuple[Detector, dict[str, object]]:
    """Detector with its initial weights, and the record that identifies the run."""
    config = request.config
    weights = None if request.backbone_weights is None else read_backbone(request.backbone_weights)
    torch.manual_seed(config.train.seed)
    chosen = dataclasses.replace(config, train=dataclasses.replace(config.train, backend=backend))
    detector = build_detector(chosen, store.embed_dim, weights)
    if weights is None and config.model.backbone != "tiny":
        warn_of_random_weights(config.model.backbone, "backbone_weights")
    if not (request.run / "run.json").is_file():
        require_sizes("model", config.model, detector.backbone, config.train, store.sizes)
    names, text = store.text
    attributes = store.teacher[1]
    return detector, {
        "config": to_tables(as_built(config, store.manifest, store.environment)),
        "in_effect": in_effect(config, store.embed_dim),
        "store": {"digest": store.manifest.digest, "manifest": dict(store.manifest.fields)},
        "dataset": dataset.name,
        "names": list(names),
        "base_count": len(dataset.split.base),
        "text_sha256": rows_digest(text),
        "embed_dim": store.embed_dim,
        "layer_norms": attributes["parameters"],
        "re_normalisation": _accuracy(attributes),
        "backbone_weights": None if weights is None else state_digest(weights),
        # As good as no entry where the name says it all.
        "backbone": detector.backbone.fingerprint,
    }


def _tables(store: Store) -> dict[str, Tensor]:
    return {"text": torch.from_numpy(store.text[1].copy()), "layer_norms": torch.from_numpy(store.teacher[0].copy())}


def training_samples(
    store: Store, dataset: Dataset, config: TrainConfig, masks: MaskSource | None = None
) -> DetectionDataset:
    """Training samples of a store. StoreMismatch if the annotations differ from those it was built from."""
    annotations = checked_annotations(store, dataset)
    images, bad = annotations.images, store.bad_images
    if bad:
        log.info(
            "%d of %d images could not be read when the store was built and %s left out",
            len(bad),
            len(images),
            inflected(len(bad), "is", "are"),
        )
    image_ids = [image for image in store.image_ids.tolist() if image not in bad]
    return DetectionDataset(
        image_ids,
        partial(_read_by_id, dataset.images("train"), images),
        partial(_size_by_id, images),
        store.ground_truth,
        store.regions,
        regions_per_image=config.regions_per_image,
        short_side=config.min_size,
        long_side=config.max_size,
        seed=config.seed,
        augmentation=Augmentation(
            short_side_min=config.multiscale_min_size,
            jitter=(config.scale_jitter[0], config.scale_jitter[1]) if config.scale_jitter else None,
        ),
        seeded=config.rng == "image",
        masks=masks,
        repeats=_repeats(annotations, image_ids, config.repeat_threshold) if config.repeat_threshold else None,
        pseudo_labels=PseudoLabels(
            confidence=config.pseudo_confidence,
            objectness=config.pseudo_objectness,
            base_count=len(dataset.split.base),
        )
        if config.pseudo_confidence
        else None,
    )


def _repeats(annotations: Annotations, image_ids: list[int], threshold: float) -> NDArray[np.float64]:
    """Repeat factors of the images by their base objects, in the order of `image_ids`."""
    position = np.full(len(annotations.images), -1)
    position[np.searchsorted(annotations.images.id, image_ids)] = np.arange(len(image_ids))
    image = position[annotations.image_index]
    read = image >= 0
    factors = repeat_factors(image[read], annotations.class_index[read], images=len(image_ids), threshold=threshold)
    log.info(
        "repeat factors of %.2f on average, %.2f at most: an epoch has about %d images instead of %d",
        factors.mean(),
        factors.max(),
        round(factors.sum()),
        len(factors),
    )
    return factors


def build_trainer(detector: Detector, config: Config, text: Tensor, base: int, distributed: Distributed) -> Trainer:
    """Build the trainer of a detector on its device; `text` has the embeddings of all classes (C, D), base first."""
    device = next(detector.parameters()).device
    if config.train.channels_last:
        detector.to(memory_format=torch.channels_last)
    if config.train.compile:
        detector.backbone.compile()
    rows = len(text) if config.loss.novel_names else base
    average = AverageWeights(detector, config.train.ema_decay) if config.train.ema_decay else None
    _say_what_differs(detector, config.train, distributed)
    return Trainer(
        detector,
        build_optimiser(detector, config.train),
        Objective(text[:rows].to(device), config.loss),
        config.train,
        average,
        distributed,
        torch.zeros(base, dtype=torch.int64, device=device) if config.loss.classification_loss == "seesaw" else None,
    )


def _say_what_differs(detector: Detector, config: TrainConfig, distributed: Distributed) -> None:
    if not distributed.is_main:
        return
    if config.reference_batch_size not in (0, config.batch_size):
        log.info(
            "learning rate %g = %g for %s per step, scaled %s to %d",
            peak_rate(config),
            config.learning_rate,
            quantity(config.reference_batch_size, "image"),
            "by the root" if config.optimizer == "adamw" else "in proportion",
            config.batch_size,
        )
    parts = config.grad_accumulation * distributed.world_size
    if parts > 1 and _has_batch_norm(detector):
        log.warning(
            "batch normalisation sees the %s of one batch, not all %d of a step: with pretrained weights its "
            "statistics are frozen, and nothing depends on how a step is shared out",
            quantity(config.batch_size // parts, "image"),
            config.batch_size,
        )


def _check_distributed(config: TrainConfig, distributed: Distributed) -> None:
    if distributed.world_size > 1 and config.rng != "image":
        raise ConfigError(
            f"{distributed.world_size} processes need `train.rng=image`: losses could not be added up otherwise"
        )


@dataclass
class _Training:
    """Training steps of one start, with their checkpoints."""

    run: Run
    trainer: Trainer
    samples: DetectionDataset
    validation: Validation
    request: Request
    step: int
    """Number of finished steps."""

    def __post_init__(self) -> None:
        self._distributed, self._config = self.trainer.distributed, self.trainer.config
        self._device = next(self.trainer.detector.parameters()).device
        self._saved, self._saved_at = self.step, time.monotonic()
        self._clock = _Clock(self.run)

    def finish(self, batches: Iterator[tuple[list[tuple[int, int]], list[Batch]]]) -> None:
        """Run the steps of all remaining batches, or until a request to stop."""
        self.trainer.detector.train()
        with ExitStack() as stack:
            first = self._distributed.is_main
            log_to = MetricsLog(self.run, loggers=self._config.loggers, begin=self.step) if first else None
            metrics = None if log_to is None else stack.enter_context(log_to)
            bar = Progress(f"train {self.run.folder.absolute().name}", self._config.steps, unit="step", done=self.step)
            if first:
                stack.enter_context(bar)
            if metrics is not None and self.validation.missing(self.step):
                self._validate(metrics)
            for keys, parts in batches:
                began = time.perf_counter()
                found = self._make_step(keys, parts)
                self.step += 1
                signal = self._distributed.all_reduce_max(self.request.signal, self._device)
                stopped, due = bool(signal) and self.step < self._config.steps, self.validation.due(self.step)
                if metrics is not None:
                    metrics.write({"step": self.step, **found, "seconds": round(time.perf_counter() - began, 4)})
                    # Before a validation too: it may take longer than whoever wants to end the training waits.
                    if stopped or due or self._is_time():
                        self._save(metrics)
                    bar.advance(note=f"loss {found['loss']:.3f}")
                if stopped:
                    raise self._stopped(signal)
                if metrics is not None and due:
                    self._validate(metrics)
            if self.step < self._config.steps:
                # Batches end early only where the request comes while they are waited for.
                if metrics is not None and self.step > self._saved:
                    self._save(metrics)
                raise self._stopped(self.request.signal)

    def _make_step(self, keys: list[tuple[int, int]], parts: list[Batch]) -> dict[str, float]:
        # One seed per step: a resumed run samples the same regions as an unbroken one.
        torch.manual_seed(step_seed(self._config.seed, self.step))
        try:
            ready = [_prepare(part, self._device, channels_last=self._config.channels_last) for part in parts]
            return self.trainer.step(ready, self.step)
        except NonFiniteLoss as error:
            ids = [self.samples.image_ids[position] for _, position in keys]
            raise NonFiniteLoss(f"{error}; images: {ids}") from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise step_does_not_fit(
                parts,
                self._config,
                world_size=self._distributed.world_size,
                step=self.step,
                saved=self._saved,
                frozen_norms=self.run.had_weights,
                said=said_instead(error),
            ) from error

    def _is_time(self) -> bool:
        if self.step % self._config.checkpoint_every == 0 or self.step == self._config.steps:
            return True
        return time.monotonic() - self._saved_at >= 60 * self._config.checkpoint_minutes

    def _save(self, metrics: MetricsLog) -> None:
        metrics.flush()
        average = None if self.trainer.average is None else self.trainer.average.state
        counts = self.trainer.class_counts
        self.run.save(self.step, self.trainer.detector, self.trainer.optimiser, average, counts)
        self._clock.record()
        self._saved, self._saved_at = self.step, time.monotonic()

    def _validate(self, metrics: MetricsLog) -> None:
        try:
            # It is made up for where it is left. Other processes wait for this one: there it is finished.
            with self.request.ending_anywhere() if self._distributed.world_size == 1 else nullcontext():
                self.validation.look(self.step, metrics)
        except (RuntimeError, MemoryError, OutOfMemory) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"out of memory in the validation after step {self.step}{said_instead(error)}, whose checkpoint is "
                "saved; add `train.validate_every=0` to go on without"
            ) from error
        except Stopped as stopped:
            stopped.kept = self._kept()
            raise

    def _stopped(self, signal: int) -> Stopped:
        stopped = Stopped(signal)
        stopped.kept = self._kept() if self._distributed.is_main else None
        return stopped

    def _kept(self) -> str:
        if not self._saved:
            return "no step is done yet; run the same command to begin again"
        return f"checkpoint of step {self._saved} saved; run the same command to go on"


def _prepare(batch: Batch, device: torch.device, *, channels_last: bool) -> Batch:
    batch = batch.to(device)
    if not channels_last:
        return batch
    return dataclasses.replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))


class _Clock:
    """Training time of a run, summed over all of its starts."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.before = run.seconds().get("train", 0.0)
        self.began = time.perf_counter()

    def record(self) -> None:
        self.run.record_seconds("train", self.before + time.perf_counter() - self.began)


def store_dataset(store: Store, data_root: Path | None) -> Dataset:
    """Dataset that a store was built from, at its current place."""
    fields = dataset_inputs(store.manifest)
    environment = store.environment
    if data_root is None:
        if "data_root" not in environment:
            raise DatasetError(f"{store.path}: does not say where its images lie; give `data_root=DIR`")
        data_root = Path(environment["data_root"])
        if not data_root.is_dir():
            raise DatasetError(f"{store.path}: its images lay in {data_root}, which is gone; give `data_root=DIR`")
    # Training reads nothing else.
    return recorded_dataset(environment.get("dataset"), str(fields["name"]), data_root).require("train")


def _read_by_id(source: ImageSource, images: ImageTable, image_id: int) -> Tensor:
    return source.read(_record(images, image_id))


def _size_by_id(images: ImageTable, image_id: int) -> tuple[int, int]:
    record = _record(images, image_id)
    return record.height, record.width


def _record(images: ImageTable, image_id: int) -> ImageRecord:
    return images[int(np.searchsorted(images.id, image_id))]


def _resume(run: Run, trainer: Trainer) -> int:
    """Load the newest complete checkpoint, as found by the main process; returns its step."""
    distributed = trainer.distributed
    device = next(trainer.detector.parameters()).device
    newest = run.latest() if distributed.is_main else None
    step = int(distributed.all_reduce(torch.tensor(newest.step if newest else 0, device=device)))
    if distributed.is_main:
        run.cut_metrics(step)
    if step == 0:
        return 0
    checkpoint = newest or run.checkpoint(step)
    load_weights(trainer.detector, checkpoint.trained(), run)
    restore_optimiser(trainer.optimiser, checkpoint.optimiser())
    if trainer.average is not None:
        average = checkpoint.average()
        if average is None:
            raise RunError(f"{checkpoint.folder}: holds no average of the weights, which train.ema_decay asks for")
        trainer.average.restore(average)
    if trainer.class_counts is not None:
        counts = checkpoint.class_counts()
        if counts is None:
            raise RunError(f"{checkpoint.folder}: holds no numbers of objects, which Seesaw loss needs")
        trainer.class_counts.copy_(counts)
    if distributed.is_main and step < trainer.config.steps:
        log.info("resuming %s at step %d", run.folder, step)
    return step


def _environment(store: Store, dataset: Dataset, request: TrainRequest) -> dict[str, object]:
    """Paths and environment of a run: recorded, never compared."""
    built = store.environment
    return {
        "data_root": str(dataset.root.absolute()),
        "dataset": dataset.definition(),
        "cache": str(store.path.absolute()),
        "teacher": built.get("teacher"),
        "build_seconds": built.get("seconds", {}),
        "preset": request.preset,
        "device": request.device,
        "machine": describe_machine(torch.device(request.device)),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "ezsd")},
    }


def _accuracy(attributes: dict[str, object]) -> dict[str, object]:
    return {key: attributes[key] for key in ("base_accuracy_before", "base_accuracy_after", "held_out_crops")}
