"""Configuration of an experiment: frozen dataclasses, presets in TOML, overrides `section.key=value`."""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from typing import Any, Literal

from ezsd.cache import EmbeddingType
from ezsd.choices import (
    BACKBONES,
    Activation,
    AdaptLoss,
    Backend,
    Metric,
    Mode,
    Names,
    Normalisation,
    Precision,
    Score,
    Surround,
)
from ezsd.detector.settings import DetectorSettings
from ezsd.pipeline.config.names import FORMER_VALUES, hint
from ezsd.pipeline.errors import ConfigError

LEAST_SIDE = 32
"""Pixels that images may be resized to: the coarsest level of a pyramid then has a cell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """The teacher: model, weights, prompts."""

    name: str
    """An open_clip model, "tiny-shapes", or "plugin:package.module:factory"."""
    weights: str | None = None
    """An open_clip tag or a local file."""
    template: str = "a photo of a {}"
    """Prompt; "{}" is the class name."""
    background: str | None = None
    """A name for a crop of nothing, put into the template; none leaves background to the entropy alone."""
    names: Names = "raw"
    """"raw" puts names into the template as they are; "clean" as one says them, see `clean_names`."""
    activation: Activation | None = None
    """Of a local file that nobody knows: "gelu" or "quickgelu", as its authors say. Checked, changes nothing."""
    normalisation: Normalisation | None = None
    """Of a local file's pixels: "openai", "inception", "imagenet" or "none"; asked for where the model's published
    weights differ in it. Changes the embeddings, and stands in the store's fingerprint."""
    precision: Precision = "auto"
    """Of the weights: "auto" is "bf16" where the hardware has it, after a comparison with "fp32"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptConfig:
    """Re-normalisation of the teacher's LayerNorms on base crops."""

    steps: int
    """Optimiser steps; 0 keeps the teacher as it is."""
    batch_size: int
    """Crops per step."""
    learning_rate: float
    """Learning rate of AdamW, constant."""
    loss: AdaptLoss
    """"bce" (the reference's) or "softmax_ce"."""
    towers: Literal["both", "vision"] = "both"
    """Whose LayerNorms: "vision" leaves the text rows as the teacher was published."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    max_grad_norm: float = 0.1
    """Largest gradient norm."""
    held_out: float = 0.1
    """Share of images whose base crops only measure accuracy."""

    def __post_init__(self) -> None:
        _require(self.steps >= 0, f"adapt.steps must be >= 0, got {self.steps}")
        _above_zero("adapt", self, "batch_size", "learning_rate", "max_grad_norm")
        _at_least(0, "adapt", self, "weight_decay")
        _require(0 < self.held_out < 1, f"adapt.held_out must lie between 0 and 1, got {self.held_out}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalConfig:
    """CLIP proposals: anchor grid, scores, suppression, regions to keep."""

    grid: Literal["paper", "sliding"]
    """"paper" is the method's grid on the 1333 x 800 image; "sliding" windows lie inside the original image."""
    sizes: tuple[float, ...]
    """Square roots of anchor areas: pixels of the resized image ("paper") or of the image ("sliding")."""
    ratios: tuple[float, ...]
    """Height over width."""
    stride: float
    """Pixels of the resized image ("paper"), or share of the window's side ("sliding")."""
    crop_ratio: float
    """Enlargement of a box before it is cropped; the same for scoring and embedding."""
    score: Score
    """"entropy" is log C - H over the names; "novel" the probability of the novel names."""
    padding: Surround = "black"
    """What a teacher sees beside a box that is not square: "black" (the method's) or the image's "context"."""
    nms_iou: float = 0.7
    """Suppression threshold, all names together."""
    max_proposals: int = 1000
    """Proposals kept per image after suppression."""
    base_iou: float = 0.3
    """Regions overlapping a base box this much are dropped."""
    drop_base_guesses: bool = True
    """Drop regions whose likeliest name is a base one."""
    max_regions: int = 300
    """Regions kept per image."""
    drop_background: bool = True
    """Drop regions that `teacher.background` is likelier for than all names together."""
    boxes: str = ""
    """A results file in COCO's format: its boxes are the proposals, best score first, instead of scored anchors."""
    search: Mode = "exhaustive"
    """Which anchors the teacher is shown: "exhaustive" all of the grid, "grown-stride" less of large ones,
    "coarse-to-fine" a sparse grid and then what lies around the best of it. The latter two thin out the grid "paper";
    sliding windows have a spacing that grows as it is."""
    growth: float = 0.375
    """Spacing of anchors as a share of their size: of all ("grown-stride"), of the sparse grid ("coarse-to-fine")."""
    anchor_fraction: float = 0.1
    """Share of the grid's anchors that "coarse-to-fine" looks at."""

    def __post_init__(self) -> None:
        # Less would be more anchors than any memory holds.
        _at_least(1 if self.grid == "paper" else 0.01, "proposals", self, "stride")
        _require(
            bool(self.sizes) and all(s >= 1 for s in self.sizes), f"proposals.sizes must be >= 1, got {self.sizes}"
        )
        _require(
            bool(self.ratios) and all(0.01 <= r <= 100 for r in self.ratios),
            f"proposals.ratios must lie between 0.01 and 100, got {self.ratios}",
        )
        _at_least(1, "proposals", self, "crop_ratio", "max_proposals")
        _above_zero("proposals", self, "base_iou")
        _require(0 < self.nms_iou <= 1, f"proposals.nms_iou must lie in (0, 1], got {self.nms_iou}")
        _require(self.max_regions > 0, f"proposals.max_regions must be > 0, got {self.max_regions}")
        _require(self.growth > 0, f"proposals.growth must be > 0, got {self.growth}")
        _require(
            0 < self.anchor_fraction <= 1, f"proposals.anchor_fraction must lie in (0, 1], got {self.anchor_fraction}"
        )
        _require(
            self.search == "exhaustive" or self.grid == "paper",
            f'proposals.search={self.search} thins out the grid "paper", and proposals.grid is {self.grid!r}; '
            "set proposals.search=exhaustive",
        )
        for name in ("sizes", "ratios") if self.search == "coarse-to-fine" else ():
            values: tuple[float, ...] = getattr(self, name)
            _require(
                list(values) == sorted(set(values)),
                f"proposals.{name} must ascend for proposals.search=coarse-to-fine, got {values}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildConfig:
    """Stage one's seed, blocks and batches; embeddings depend on them by the batch's make-up alone."""

    seed: int = 0
    """Random seed of stage one."""
    block_images: int = 64
    """Images per block: one task, one journal entry. Batches never cross a block."""
    batch_size: int = 256
    """Crops per encoder call."""
    max_bad_images: float = 0.001
    """Share of the images that may be left out because they cannot be read; with fewer than one, the first stops."""
    embedding: EmbeddingType = "float16"
    """How the store keeps embeddings; "int8" with a scale per row takes half the disk."""

    def __post_init__(self) -> None:
        _require(self.seed >= 0, f"build.seed must be >= 0, got {self.seed}")
        _require(self.block_images > 0, f"build.block_images must be > 0, got {self.block_images}")
        _require(0 <= self.max_bad_images < 1, f"build.max_bad_images must lie in [0, 1), got {self.max_bad_images}")
        _require(self.batch_size > 0, f"build.batch_size must be > 0, got {self.batch_size}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(DetectorSettings):
    """The detector's own settings, with their bounds."""

    def __post_init__(self) -> None:
        _require(self.backbone in BACKBONES, f"model.backbone {self.backbone!r} is not one of {', '.join(BACKBONES)}")
        _require(self.pool_size > 0, f"model.pool_size must be > 0, got {self.pool_size}")
        _require(self.canonical_size > 0, f"model.canonical_size must be > 0, got {self.canonical_size}")
        _require(self.logit_scale > 0, f"model.logit_scale must be > 0, got {self.logit_scale}")
        _above_zero("model", self, "fpn_channels", "rpn_proposals", "box_hidden", "box_batch_size_per_image")
        _at_least(0, "model", self, "canonical_level", "tower_depth", "ignore_confidence")
        _require(all(size > 0 for size in self.rpn_sizes), f"model.rpn_sizes must be > 0, got {self.rpn_sizes}")
        _require(
            0 <= self.box_positive_fraction <= 1,
            f"model.box_positive_fraction must lie in [0, 1], got {self.box_positive_fraction}",
        )
        _require(self.box_top_k > 0, f"model.box_top_k must be > 0, got {self.box_top_k}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """Weights of the objective."""

    distillation: float
    """Of the distillation: L1's, as the authors'; another metric is scaled to pull as hard, see
    `ezsd.losses.distillation_scale`. 0 leaves it out (see also model.ignore_confidence, which reads cached regions)."""
    metric: Metric = "cosine"
    """Distance to the cached embedding: "cosine", or "l1" between unit vectors (the authors')."""
    novel_names: bool = False
    """Put novel names into the cross-entropy too; the authors have base names alone."""
    rpn: float = 1.0
    """Weight of the proposal network's two terms."""
    classification: float = 1.0
    """Weight of the cross-entropy."""
    box: float = 1.0
    """Weight of the box regression."""
    mask: float = 1.0
    """Weight of the mask loss, with model.masks."""

    def __post_init__(self) -> None:
        _at_least(0, "loss", self, "distillation", "rpn", "classification", "box", "mask")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The training loop: optimiser, schedule, augmentation, checkpoints."""

    steps: int
    """Optimiser steps."""
    batch_size: int
    """Images per step, over all processes and accumulated batches: what a run learns does not depend on the GPUs."""
    optimizer: Literal["adamw", "sgd"]
    """SGD has momentum 0.9."""
    learning_rate: float
    """At its height, for `reference_batch_size` images per step."""
    weight_decay: float
    """Not on the temperature, background row, biases and norms."""
    min_size: int
    """Images are resized to fit min_size x max_size (shorter and longer side), ratio kept; 0 keeps them as they are."""
    max_size: int
    """Longest side after resizing, in pixels, see `min_size`; 0 with min_size 0."""
    reference_batch_size: int = 0
    """The rate is multiplied by batch_size / reference_batch_size, with AdamW by its root; 0 takes it as it stands."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "step"] = "cosine"
    """After the warm-up: "cosine" falls to zero, "step" divides by ten at each of `decay_at`."""
    decay_at: tuple[float, ...] = (2 / 3, 11 / 12)
    """Shares of all steps: epochs 8 and 11 of 12."""
    max_grad_norm: float = 10.0
    """Largest gradient norm."""
    grad_accumulation: int = 1
    """Batches per step and process: memory is that of one."""
    rng: Literal["step", "image"] = "step"
    """"image" seeds what is drawn per image and divides losses by what was asked for, so that several processes or
    accumulated batches learn what one does, and needs it; "step" draws from one stream per step."""
    ema_decay: float = 0.0
    """Decay of a moving average of the weights, which is then evaluated; 0 keeps none."""
    regions_per_image: int = 200
    """Cached regions drawn per image and step, without replacement; base ground truth comes on top."""
    multiscale_min_size: int = 0
    """The shorter side is drawn between this and min_size for each image; 0 fixes it."""
    scale_jitter: tuple[float, ...] = ()
    """Large-scale jitter: images fit into a square of max_size times a factor between these two, of which a window of
    max_size is cut."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    checkpoint_minutes: float = 15.0
    """Most minutes between checkpoints, but for the step that is under way."""
    validate_every: int = 0
    """Epochs between evaluations on a slice of the validation images; 0 never. They choose nothing."""
    validate_images: int = 500
    """Images of that slice."""
    num_workers: int = 0
    """Processes that read images; with 0 a thread of the training process reads one batch ahead."""
    seed: int = 0
    """Random seed of weights, sampling and augmentation."""
    backend: Backend = "auto"
    """Kernel backend."""
    channels_last: bool = False
    """Memory layout of convolutions; GPUs like it in 16 bits."""
    compile: bool = False
    """Compile the backbone with torch."""
    tensorboard: bool = False
    """Also log metrics to RUN/tensorboard; needs the extra "tensorboard"."""

    def __post_init__(self) -> None:
        _at_least(0, "train", self, "seed", "weight_decay", "warmup_steps", "regions_per_image", "num_workers")
        _above_zero("train", self, "steps", "batch_size", "learning_rate", "max_grad_norm")
        _above_zero("train", self, "checkpoint_every", "checkpoint_minutes")
        sides = (self.min_size, self.max_size)
        _require(
            sides == (0, 0) or LEAST_SIDE <= sides[0] <= sides[1],
            f"train.min_size, max_size: 0 and 0, or {LEAST_SIDE} <= min_size <= max_size; got {sides}",
        )
        self._check_step()
        self._check_augmentation()

    def _check_step(self) -> None:
        _require(
            self.reference_batch_size >= 0, f"train.reference_batch_size must be >= 0, got {self.reference_batch_size}"
        )
        _require(self.grad_accumulation > 0, f"train.grad_accumulation must be > 0, got {self.grad_accumulation}")
        _require(
            self.batch_size % self.grad_accumulation == 0,
            f"train.batch_size must be a multiple of train.grad_accumulation, got {self.batch_size} and "
            f"{self.grad_accumulation}",
        )
        _require(
            self.grad_accumulation == 1 or self.rng == "image",
            "train.grad_accumulation needs train.rng=image: losses could not be added up otherwise",
        )
        _require(0 <= self.ema_decay < 1, f"train.ema_decay must lie in [0, 1), got {self.ema_decay}")
        _require(
            all(0 < share < 1 for share in self.decay_at), f"train.decay_at must lie in (0, 1), got {self.decay_at}"
        )
        _require(self.validate_every >= 0, f"train.validate_every must be >= 0, got {self.validate_every}")
        _require(self.validate_images > 0, f"train.validate_images must be > 0, got {self.validate_images}")

    def _check_augmentation(self) -> None:
        _require(
            0 <= self.multiscale_min_size <= self.min_size,
            f"train.multiscale_min_size must lie between 0 and train.min_size, got {self.multiscale_min_size}",
        )
        ordered = len(self.scale_jitter) == 2 and 0 < self.scale_jitter[0] <= self.scale_jitter[1]
        _require(
            not self.scale_jitter or ordered,
            f"train.scale_jitter: two factors, 0 < low <= high; got {self.scale_jitter}",
        )
        _require(
            not self.scale_jitter or self.max_size > 0, "train.scale_jitter needs train.max_size, the window's side"
        )
        _require(
            not (self.scale_jitter and self.multiscale_min_size),
            "train.scale_jitter and train.multiscale_min_size exclude each other",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Inference settings of the evaluation."""

    score_threshold: float = 0.001
    """Detections below it are dropped."""
    nms_iou: float = 0.5
    """Suppression within a class."""
    max_detections: int = 100
    """Most detections per image of `ezsd detect`; an evaluation asks for 300."""

    def __post_init__(self) -> None:
        _above_zero("eval", self, "max_detections")
        _require(0 <= self.score_threshold < 1, f"eval.score_threshold must lie in [0, 1), got {self.score_threshold}")
        _require(0 < self.nms_iou <= 1, f"eval.nms_iou must lie in (0, 1], got {self.nms_iou}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One whole experiment."""

    teacher: TeacherConfig
    adapt: AdaptConfig
    proposals: ProposalConfig
    model: ModelConfig
    loss: LossConfig
    train: TrainConfig
    build: BuildConfig = field(default_factory=BuildConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


STAGE_ONE = ("teacher", "adapt", "proposals", "build")
"""The tables that a store is built with; a training reads none of them."""

TEST_TIME = (
    "model.box_class",
    "model.box_top_k",
    "model.masks",
    "eval.score_threshold",
    "eval.nms_iou",
    "eval.max_detections",
    "train.backend",
)
"""Settings that can be overridden at inference: no weight depends on them.

`ezsd eval` takes all but eval.max_detections, see `ezsd.pipeline.inference.evaluate.KEEP`.
"""


def preset_names() -> list[str]:
    """Presets that the package ships."""
    return sorted(
        p.name.removesuffix(".toml")
        for p in files("ezsd.pipeline.config.presets").iterdir()
        if p.name.endswith(".toml")
    )


PRESET_ALIASES = {"fast": "coco"}
"""Other names of shipped presets: the counterpart of `paper`."""


def load_preset(name: str, overrides: Iterable[str] = ()) -> Config:
    """Read a shipped preset and apply `section.key=value` overrides.

    Raises:
        ConfigError: unknown preset, section or key (with the nearest one), or a value that does not fit.
    """
    name, asked = PRESET_ALIASES.get(name, name), name
    if name not in preset_names():
        also = ", ".join(f"{alias} (the same as {meant})" for alias, meant in PRESET_ALIASES.items())
        raise ConfigError(f"no preset {asked!r}; choose one of {', '.join(preset_names())}, or {also}")
    tables = tomllib.loads((files("ezsd.pipeline.config.presets") / f"{name}.toml").read_text())
    for override in overrides:
        apply_override(tables, override)
    return from_tables(tables, where=f"preset {name}")


def from_tables(tables: dict[str, dict[str, object]], *, where: str) -> Config:
    """Build a configuration from nested tables; every unknown or missing key is an error."""
    hints = typing.get_type_hints(Config)
    _refuse_unknown("", tables, list(hints), where)
    sections: dict[str, Any] = {n: _section(n, hints[n], tables.get(n, {}), f"{where}, [{n}]") for n in hints}
    return Config(**sections)


def to_tables(config: Config) -> dict[str, dict[str, object]]:
    """Nested tables of a configuration, as JSON-able values: the inverse of `from_tables`."""
    return {
        name: {key: list(v) if isinstance(v, tuple) else v for key, v in table.items()}
        for name, table in dataclasses.asdict(config).items()
    }


def setting_of(override: str) -> str:
    """The `section.key` that an override `section.key=value` names."""
    name = override.partition("=")[0].strip()
    return "train.optimizer" if name == "train.optimiser" else name


def apply_override(tables: dict[str, dict[str, object]], override: str) -> None:
    """Put one `section.key=value` into tables. ConfigError when it is not of that form."""
    if len(override.splitlines()) > 1:
        # TOML would read what follows as settings of its own, which nobody would look at.
        raise ConfigError(f"`overrides` {override!r}: has a line break; give each setting by itself, in one line")
    path, equals, text = override.partition("=")
    section, dot, key = path.strip().partition(".")
    if not equals or not dot:
        raise ConfigError(f"`overrides` {override}: expected section.key=value, for example train.steps=500")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        # A bare word is a string: `--set model.backbone=tiny` needs no quotes.
        value = text.strip()
    # The one word that has two spellings.
    tables.setdefault(section, {})["optimizer" if key == "optimiser" else key] = value


def at_test_time(config: Config, overrides: Sequence[str]) -> Config:
    """Override settings of a trained run for inference, those of `TEST_TIME` alone, by `section.key=value`.

    Raises:
        ConfigError: another setting, which training has used, or a value that does not fit.
    """
    tables = to_tables(config)
    for override in overrides:
        key = setting_of(override)
        section, _, name = key.partition(".")
        if section in tables and name not in tables[section]:
            known = list(tables[section])
            raise ConfigError(f"`overrides` {override}: unknown key {name!r}; {hint(section, name, known)}")
        apply_override(tables, override)
        if key not in TEST_TIME:
            raise ConfigError(
                f"`overrides` {override}: {key} cannot be changed once a run is trained; what can is "
                f"{', '.join(TEST_TIME)}"
            )
    return from_tables(tables, where="`overrides`")


def changed_settings(overrides: Sequence[str], config: Config) -> dict[str, object]:
    """Values that a configuration has of the settings that overrides name."""
    tables = to_tables(config)
    keys = [setting_of(override) for override in overrides]
    return {key: tables[key.partition(".")[0]][key.partition(".")[2]] for key in keys}


def _refuse_unknown(section: str, table: Iterable[str], known: list[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; {hint(section, key, known)}")


def _section(section: str, cls: type, table: dict[str, object], where: str) -> object:
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: expected a table of settings, found {table!r}")
    hints = typing.get_type_hints(cls)
    _refuse_unknown(section, table, list(hints), where)
    for entry in fields(cls):
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and entry.name not in table:
            raise ConfigError(f"{where}: {entry.name} is missing")
    for key, value in table.items():
        words = FORMER_VALUES.get((section, key), {})
        if isinstance(value, str) and value in words:
            raise ConfigError(f"{where} {key}: {value!r} is called {words[value]!r} now")
    return cls(**{key: _convert(value, hints[key], f"{where} {key}") for key, value in table.items()})


def _convert(value: object, wanted: object, where: str) -> object:
    """Check a TOML value against a field's type; integers serve as floats, lists become tuples; all are finite."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(value, next(a for a in arguments if a is not type(None)), where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where}: expected one of {', '.join(map(str, arguments))}, found {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list, found {value!r}")
        return tuple(_convert(v, arguments[0], where) for v in value)
    if isinstance(value, int) and not -(2**31) <= value < 2**31:
        raise ConfigError(f"{where}: expected a whole number of 32 bits, found {value}")
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: expected a finite number, found {value}")
    if (
        not isinstance(wanted, type)
        or not isinstance(value, wanted)
        or (isinstance(value, bool) and wanted is not bool)
    ):
        name = wanted.__name__ if isinstance(wanted, type) else str(wanted)
        raise ConfigError(f"{where}: expected {name}, found {value!r}")
    return value


def _at_least(limit: float, section: str, settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        _require(value >= limit, f"{section}.{name} must be >= {limit}, got {value}")


def _above_zero(section: str, settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        _require(value > 0, f"{section}.{name} must be > 0, got {value}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
