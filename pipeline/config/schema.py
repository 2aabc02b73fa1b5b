"""Configuration of an experiment: frozen dataclasses, presets in TOML, overrides `section.key=value`."""

from __future__ import annotations

import dataclasses
import functools
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval, MinLen

from ezsd.cache import EmbeddingType
from ezsd.choices import (
    BACKBONES,
    Activation,
    AdaptLoss,
    Backend,
    ClassificationLoss,
    Logger,
    Metric,
    Mode,
    Names,
    Normalisation,
    Precision,
    Refinement,
    Score,
    Surround,
)
from ezsd.detector.requirements import has_form
from ezsd.detector.settings import DetectorSettings
from ezsd.pipeline.config.descriptions import Descriptions, read_descriptions
from ezsd.pipeline.config.names import FORMER_VALUES, hint
from ezsd.pipeline.errors import ConfigError
from ezsd.vocabulary import texts

LEAST_SIDE = 32
"""Pixels that images may be resized to: the coarsest level of a pyramid then has a cell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """The teacher: model, weights, prompts."""

    name: str
    """An open_clip model, "tiny-shapes", or "plugin:package.module:factory"."""
    weights: str | None = None
    """An open_clip tag or a local file."""
    template: str | tuple[str, ...] = "a photo of a {}"
    """Prompt; "{}" is the class name. With a list, a name's embedding is the normalised mean over all its prompts;
    "imagenet" stands for CLIP's list of 80."""
    descriptions: Descriptions = ()
    """A JSON file {"NAME": ["SENTENCE", ...]}: sentences, used as they are, that take the place of a name's prompts. A
    store and its runs keep them."""
    background: str | tuple[str, ...] | None = None
    """A name for a crop of nothing, or a list of them, put into the template: the background's probability is the sum
    of theirs. None leaves background to the entropy alone."""
    names: Names = "raw"
    """"raw" puts names into the template as they are; "clean" as one says them, see `clean_names`."""
    activation: Activation | None = None
    """Activation of a local file of an unknown model: "gelu" or "quickgelu", as its authors state. Checked only."""
    normalisation: Normalisation | None = None
    """Pixel normalisation of a local file: "openai", "inception", "imagenet" or "none"; asked for where the model's
    published weights differ in it. Changes the embeddings, and is part of the store's fingerprint."""
    precision: Precision = "auto"
    """Precision of the weights: "auto" is "bf16" where the hardware has it, after a comparison with "fp32"."""

    def __post_init__(self) -> None:
        for key in ("template", "background"):
            object.__setattr__(self, key, _text_or_texts(f"teacher.{key}", getattr(self, key)))
        # A record in JSON has lists.
        object.__setattr__(self, "descriptions", tuple(map(tuple, self.descriptions)))

    @property
    def backgrounds(self) -> tuple[str, ...]:
        """All names for a crop of nothing."""
        return texts(self.background)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptConfig:
    """Re-normalisation of the teacher's LayerNorms on base crops."""

    steps: Annotated[int, Interval(ge=0)]
    """Optimiser steps; 0 keeps the teacher as it is."""
    batch_size: Annotated[int, Interval(gt=0)]
    """Crops per step."""
    learning_rate: Annotated[float, Interval(gt=0)]
    """Learning rate of AdamW, constant."""
    loss: AdaptLoss
    """"bce" (the reference's) or "softmax_ce"."""
    towers: Literal["both", "vision"] = "both"
    """LayerNorms to tune: "vision" leaves the text rows as the teacher was published."""
    weight_decay: Annotated[float, Interval(ge=0)] = 1e-4
    """Weight decay of AdamW."""
    max_grad_norm: Annotated[float, Interval(gt=0)] = 0.1
    """Largest gradient norm."""
    held_out: Annotated[float, Interval(gt=0, lt=1)] = 0.1
    """Fraction of images whose base crops only measure accuracy."""
    flip: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Probability that a crop is mirrored (the authors': 0.5)."""
    min_crop_size: Annotated[float, Interval(ge=0)] = 0.0
    """Least side of a base box when it is cropped, here and for its own embedding, in pixels of the image."""

    def __post_init__(self) -> None:
        _require_bounds("adapt", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalConfig:
    """CLIP proposals: anchor grid, scores, NMS, regions to keep."""

    grid: Literal["paper", "sliding"]
    """"paper" is the method's grid on the 1333 x 800 image; "sliding" windows are inside the original image."""
    sizes: Annotated[tuple[Annotated[float, Interval(ge=1)], ...], MinLen(1)]
    """Square roots of anchor areas: pixels of the resized image ("paper") or of the image ("sliding")."""
    ratios: Annotated[tuple[Annotated[float, Interval(ge=0.01, le=100)], ...], MinLen(1)]
    """Height over width."""
    stride: float
    """Pixels of the resized image ("paper"), or fraction of the window's side ("sliding")."""
    crop_ratio: Annotated[float, Interval(ge=1)]
    """Enlargement of a box before it is cropped; the same for scoring and embedding."""
    score: Score
    """"entropy" is log C - H over the classes; "novel" the probability of the novel classes."""
    padding: Surround = "black"
    """Pixels that the teacher sees beside a box that is not square: "black" (the method's) or the image's "context"."""
    nms_iou: Annotated[float, Interval(gt=0, le=1)] = 0.7
    """IoU threshold of NMS, all classes together; of a network's boxes within a level of its pyramid."""
    max_proposals: Annotated[int, Interval(ge=1)] = 1000
    """Proposals kept per image after NMS; of a learned proposer at most `proposer.max_proposals`."""
    base_iou: Annotated[float, Interval(gt=0)] = 0.3
    """Regions overlapping a base box this much are dropped."""
    drop_base_guesses: bool = True
    """Drop regions whose likeliest name is a base one."""
    max_regions: Annotated[int, Interval(gt=0)] = 300
    """Regions kept per image."""
    drop_background: bool = True
    """Drop regions that `teacher.background` is likelier for than all classes together."""
    boxes: str = ""
    """A results file in COCO's format: its boxes are the proposals, best score first, instead of scored anchors."""
    search: Mode = "exhaustive"
    """Choice of the boxes that the teacher is shown: "exhaustive" all anchors of the grid, "grown-stride" fewer large
    ones, "coarse-to-fine" a sparse grid and then the neighbours of its best; the latter two thin out the grid "paper",
    for sliding windows already have a spacing that grows with their size. "learned" takes no grid but the boxes of a
    proposal network that the build trains on base boxes, or takes from a run, see [proposer]."""
    growth: Annotated[float, Interval(gt=0)] = 0.375
    """Spacing of anchors, a fraction of their size: of all ("grown-stride"), of the sparse grid ("coarse-to-fine")."""
    anchor_fraction: Annotated[float, Interval(gt=0, le=1)] = 0.1
    """Fraction of the grid's anchors that "coarse-to-fine" looks at."""
    objectness_weight: Annotated[float, Interval(ge=0, le=1)] = 1.0
    """Weight a of objectness in the ranking of regions that a network or a file proposes, objectness^a
    confidence^(1 - a): 1 keeps their order and the teacher is shown only as many as are kept, 0 takes the teacher's."""
    refine: Refinement = "none"
    """"vote": each proposal becomes the score-weighted mean of the proposals around it, and NMS is applied again,
    before regions are chosen among them."""
    refine_iou: Annotated[float, Interval(gt=0, le=1)] = 0.3
    """Least IoU of the proposals that have a vote on another one."""

    def __post_init__(self) -> None:
        _require_bounds("proposals", self)
        # Less would be more anchors than any memory holds.
        least = 1 if self.grid == "paper" else 0.01
        _require(self.stride >= least, f"proposals.stride must be >= {least}, got {self.stride}")
        _require(
            self.search in ("exhaustive", "learned") or self.grid == "paper",
            f'proposals.search={self.search} thins out the grid "paper", and proposals.grid is {self.grid!r}; '
            "set proposals.search=exhaustive",
        )
        for name in ("sizes", "ratios") if self.search == "coarse-to-fine" else ():
            values: tuple[float, ...] = getattr(self, name)
            _require(
                list(values) == sorted(set(values)),
                f"proposals.{name} must ascend for proposals.search=coarse-to-fine, got {values}",
            )

    @property
    def learned(self) -> bool:
        """True where a proposal network makes the proposals."""
        return self.search == "learned" and not self.boxes

    @property
    def has_objectness(self) -> bool:
        """True where the score of a proposal is the objectness of a network or a file, not the teacher's certainty."""
        return self.search == "learned" or bool(self.boxes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposerConfig:
    """Learned proposer: a proposal network that the build trains on base boxes, for proposals.search = "learned"."""

    run: str | None = None
    """A finished run, whose backbone and proposal network propose; none trains a network with the settings below."""
    steps: Annotated[int, Interval(ge=2)] = 2000
    """Optimiser steps."""
    batch_size: Annotated[int, Interval(ge=1)] = 8
    """Images per step."""
    learning_rate: Annotated[float, Interval(gt=0)] = 1e-3
    """Peak learning rate of AdamW; it rises for 6 % of the steps and then falls to zero, both as a cosine."""
    weight_decay: Annotated[float, Interval(ge=0)] = 1e-4
    """Weight decay of AdamW."""
    backbone: str = "resnet50"
    """Backbone of the proposal network, by a name that model.backbone takes too."""
    weights: str | None = None
    """A local file with pretrained weights of the backbone; none starts from random values."""
    frozen_stages: Annotated[int, Interval(ge=-1)] = 1
    """Stages after the stem that a backbone with pretrained weights does not train; 0 is the stem alone, -1 nothing."""
    backbone_lr_mult: Annotated[float, Interval(gt=0)] = 1.0
    """Factor of the learning rate for the backbone's body; its pyramid has the whole rate."""
    fpn_channels: Annotated[int, Interval(ge=1)] = 128
    """Width of the pyramid."""
    rpn_sizes: tuple[Annotated[int, Interval(ge=1)], ...] = (32, 64, 128, 256, 512)
    """Anchor size per level, input pixels; ratios 1/2, 1, 2."""
    min_size: Annotated[int, Interval(ge=0)] = 400
    """Images are resized to fit min_size x max_size (shorter and longer side), ratio kept; 0 keeps them as they are."""
    max_size: Annotated[int, Interval(ge=0)] = 672
    """Limit of the longer side, pixels."""
    max_proposals: Annotated[int, Interval(ge=1)] = 100
    """Boxes per image after NMS, each of them a crop that the teacher is shown."""

    def __post_init__(self) -> None:
        _require_bounds("proposer", self)
        _require_backbone("proposer", self.backbone)
        _require(
            (self.min_size == 0) == (self.max_size == 0) and self.min_size <= self.max_size,
            f"proposer.min_size={self.min_size} and proposer.max_size={self.max_size} must be 0 together, or ascend",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildConfig:
    """Stage one's seed, blocks and batches; embeddings depend on them by the batch's make-up alone."""

    seed: Annotated[int, Interval(ge=0)] = 0
    """Random seed of stage one."""
    block_images: Annotated[int, Interval(gt=0)] = 64
    """Images per block: one task, one journal entry. Batches never cross a block."""
    batch_size: Annotated[int, Interval(gt=0)] = 256
    """Crops per encoder call."""
    max_bad_images: Annotated[float, Interval(ge=0, lt=1)] = 0.001
    """Fraction of the images that may be left out because they cannot be read; with fewer than one, the first stops."""
    embedding: EmbeddingType = "float16"
    """Type of the embeddings in the store; "int8", with a scale per row, takes half the disk."""

    def __post_init__(self) -> None:
        _require_bounds("build", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(DetectorSettings):
    """The detector's own settings, with their bounds."""

    def __post_init__(self) -> None:
        _require_backbone("model", self.backbone)
        _require_bounds("model", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """Weights of the objective."""

    distillation: Annotated[float, Interval(ge=0)]
    """Distillation weight, given for L1 as by the authors; another metric is scaled to pull as hard, see
    `ezsd.losses.distillation_scale`. 0 leaves it out (see also model.ignore_confidence, which reads cached regions)."""
    metric: Metric = "cosine"
    """Distance to the cached embedding: "cosine", or "l1" between unit vectors (the authors')."""
    novel_names: bool = False
    """Put novel classes into the cross-entropy too; the authors have base classes alone."""
    rpn: Annotated[float, Interval(ge=0)] = 1.0
    """Weight of the proposal network's two terms."""
    rpn_box: Annotated[float, Interval(ge=0)] = 1.0
    """Further weight of the second of them, its box regression; the two are multiplied."""
    classification: Annotated[float, Interval(ge=0)] = 1.0
    """Weight of the classification."""
    classification_loss: ClassificationLoss = "cross_entropy"
    """"seesaw" protects classes with few objects from those with many (arXiv 2008.10032, with p = 0.8 and q = 2)."""
    box: Annotated[float, Interval(ge=0)] = 1.0
    """Weight of the box regression."""
    mask: Annotated[float, Interval(ge=0)] = 1.0
    """Weight of the mask loss, with model.masks."""

    def __post_init__(self) -> None:
        _require_bounds("loss", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The training loop: optimiser, schedule, augmentation, checkpoints."""

    steps: Annotated[int, Interval(gt=0)]
    """Optimiser steps."""
    batch_size: Annotated[int, Interval(gt=0)]
    """Images per step, over all processes and accumulated batches: what a run learns does not depend on the GPUs."""
    optimizer: Literal["adamw", "sgd"]
    """SGD has momentum 0.9."""
    learning_rate: Annotated[float, Interval(gt=0)]
    """Highest rate of the schedule, for `reference_batch_size` images per step."""
    backbone_lr_mult: Annotated[float, Interval(gt=0)] = 1.0
    """Factor of the learning rate, at every step, for the backbone's body; its pyramid has the whole rate."""
    weight_decay: Annotated[float, Interval(ge=0)]
    """Weight decay, on all weights but the temperature, background row, biases and norms."""
    min_size: int
    """Images are resized to fit min_size x max_size (shorter and longer side), ratio kept; 0 keeps them as they are."""
    max_size: int
    """Longest side after resizing, in pixels, see `min_size`; 0 with min_size 0."""
    reference_batch_size: Annotated[int, Interval(ge=0)] = 0
    """The rate is multiplied by batch_size / reference_batch_size, with AdamW by its root; 0 takes it as it stands."""
    warmup_steps: Annotated[int, Interval(ge=0)] = 0
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "step"] = "cosine"
    """After the warm-up: "cosine" falls to zero, "step" divides by ten at each of `decay_at`."""
    decay_at: tuple[Annotated[float, Interval(gt=0, lt=1)], ...] = (2 / 3, 11 / 12)
    """Fractions of all steps: epochs 8 and 11 of 12."""
    max_grad_norm: Annotated[float, Interval(gt=0)] = 10.0
    """Largest gradient norm."""
    grad_accumulation: Annotated[int, Interval(gt=0)] = 1
    """Batches per step and process: memory is that of one."""
    rng: Literal["step", "image"] = "step"
    """"image" seeds what is drawn per image and divides losses by what was asked for, so that several processes or
    accumulated batches learn what one does, and needs it; "step" draws from one stream per step."""
    ema_decay: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Decay of a moving average of the weights, which is then evaluated; 0 keeps none."""
    repeat_threshold: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Repeat-factor sampling: images with a base class that fewer than this fraction of them show come more often, by
    sqrt(repeat_threshold / fraction) of their scarcest class (arXiv 1908.03195); 0 takes each once per epoch."""
    regions_per_image: Annotated[int, Interval(ge=0)] = 200
    """Cached regions drawn per image and step, without replacement; base ground truth comes on top."""
    pseudo_confidence: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Least confidence of a cached region of a novel class that becomes a pseudo-label, treated as an object by all
    losses but the mask's; 0 makes none. For stores of proposals.search = "learned"."""
    pseudo_objectness: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """Least objectness of a pseudo-label, by the network that proposed it."""
    multiscale_min_size: int = 0
    """The shorter side is drawn between this and min_size for each image; 0 fixes it."""
    scale_jitter: tuple[float, ...] = ()
    """Large-scale jitter: images fit into a square of max_size times a factor between these two, of which a window of
    max_size is cut."""
    checkpoint_every: Annotated[int, Interval(gt=0)] = 500
    """Steps between checkpoints."""
    checkpoint_minutes: Annotated[float, Interval(gt=0)] = 15.0
    """Most minutes between checkpoints, but for the step that is under way."""
    validate_every: Annotated[int, Interval(ge=0)] = 0
    """Epochs between evaluations on a slice of the validation images; 0 never. They choose nothing."""
    validate_images: Annotated[int, Interval(gt=0)] = 500
    """Images of that slice."""
    num_workers: Annotated[int, Interval(ge=0)] = 0
    """Processes that read images; with 0 a thread of the training process reads one batch ahead."""
    seed: Annotated[int, Interval(ge=0)] = 0
    """Random seed of weights, sampling and augmentation."""
    backend: Backend = "auto"
    """Kernel backend."""
    channels_last: bool = False
    """Memory layout of convolutions; GPUs like it in 16 bits."""
    compile: bool = False
    """Compile the backbone with torch."""
    loggers: tuple[Logger, ...] = ()
    """Loggers of metrics beside metrics.jsonl, such as ["csv", "tensorboard"]; all but csv need the extra so named."""

    def __post_init__(self) -> None:
        _require_bounds("train", self)
        _require(len(set(self.loggers)) == len(self.loggers), "train.loggers: a logger is in the list twice")
        sides = (self.min_size, self.max_size)
        _require(
            sides == (0, 0) or LEAST_SIDE <= sides[0] <= sides[1],
            f"train.min_size, max_size: 0 and 0, or {LEAST_SIDE} <= min_size <= max_size; got {sides}",
        )
        self._check_step()
        self._check_augmentation()

    def _check_step(self) -> None:
        _require(
            self.batch_size % self.grad_accumulation == 0,
            f"train.batch_size must be a multiple of train.grad_accumulation, got {self.batch_size} and "
            f"{self.grad_accumulation}",
        )
        _require(
            self.grad_accumulation == 1 or self.rng == "image",
            "train.grad_accumulation needs train.rng=image: losses could not be added up otherwise",
        )

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

    score_threshold: Annotated[float, Interval(ge=0, lt=1)] = 0.001
    """Detections below it are dropped."""
    nms_iou: Annotated[float, Interval(gt=0, le=1)] = 0.5
    """IoU threshold of NMS, within a class unless `class_agnostic_nms`."""
    class_agnostic_nms: bool = False
    """Suppress between classes too: an object keeps its best-scored name alone."""
    max_detections: Annotated[int, Interval(gt=0)] = 100
    """Most detections per image of `ezsd detect`; an evaluation asks for 300."""
    objectness: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Weight a of the proposal network's objectness in a detection's score, p(class)^(1 - a) p(object)^a."""
    teacher_weight_base: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Weight w of the re-normalised teacher in scores of base classes, p(detector)^(1 - w) p(teacher)^w: it is shown a
    crop of each detection. Evaluations during a training leave it out."""
    teacher_weight_novel: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Weight of the re-normalised teacher in scores of all other classes, whether the run knows them or not."""

    def __post_init__(self) -> None:
        _require_bounds("eval", self)

    @property
    def shows_teacher(self) -> bool:
        """True where the teacher is shown crops of detections."""
        return max(self.teacher_weight_base, self.teacher_weight_novel) > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of an experiment."""

    teacher: TeacherConfig
    adapt: AdaptConfig
    proposals: ProposalConfig
    model: ModelConfig
    loss: LossConfig
    train: TrainConfig
    proposer: ProposerConfig = field(default_factory=ProposerConfig)
    build: BuildConfig = field(default_factory=BuildConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def max_proposals(self) -> int:
        """Most proposals kept per image."""
        most = self.proposals.max_proposals
        return min(most, self.proposer.max_proposals) if self.proposals.learned else most


STAGE_ONE = ("teacher", "adapt", "proposer", "proposals", "build")
"""The tables that a store is built with; a training reads none of them."""

TEST_TIME = (
    "model.box_class",
    "model.box_top_k",
    "model.masks",
    "eval.score_threshold",
    "eval.nms_iou",
    "eval.class_agnostic_nms",
    "eval.max_detections",
    "eval.objectness",
    "eval.teacher_weight_base",
    "eval.teacher_weight_novel",
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


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields. Kept: to evaluate them takes most of the time of reading a configuration."""
    return typing.get_type_hints(cls)


@functools.cache
def _annotations(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields with all that `Annotated` says of them."""
    return typing.get_type_hints(cls, include_extras=True)


def from_tables(tables: dict[str, dict[str, object]], *, where: str) -> Config:
    """Build a configuration from nested tables; every unknown or missing key is an error."""
    hints = _hints(Config)
    _refuse_unknown("", tables, list(hints), where)
    sections: dict[str, Any] = {n: _section(n, hints[n], tables.get(n, {}), f"{where}, [{n}]") for n in hints}
    return Config(**sections)


def to_tables(config: Config) -> dict[str, dict[str, object]]:
    """Nested tables of a configuration, as JSON-able values: the inverse of `from_tables`."""
    return {
        name: {key: list(v) if isinstance(v, tuple) else v for key, v in table.items()}
        for name, table in dataclasses.asdict(config).items()
    }


def with_defaults(tables: Mapping[str, Mapping[str, object]]) -> dict[str, dict[str, object]]:
    """Add defaults to the tables of a record: a setting that came after it has one with which nothing changed."""
    hints = _hints(Config)
    return {name: {**(_defaults(hints[name]) if name in hints else {}), **table} for name, table in tables.items()}


def _defaults(section: Any) -> dict[str, object]:  # noqa: ANN401 - a dataclass of settings
    return {
        entry.name: list(entry.default) if isinstance(entry.default, tuple) else entry.default
        for entry in fields(section)
        if entry.default is not dataclasses.MISSING
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
    if (section, key) == ("teacher", "descriptions"):
        if not isinstance(value, str):
            raise ConfigError(f"`teacher.descriptions`: expected the path of a JSON file, found {value!r}")
        value = read_descriptions(Path(value))
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
    hints = _hints(cls)
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
        if value is None and type(None) in arguments:
            return None
        lists = isinstance(value, list | tuple)
        fitting = (a for a in arguments if lists == (typing.get_origin(a) is tuple) and a is not type(None))
        return _convert(value, next(fitting, arguments[0]), where)
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


def _text_or_texts(where: str, value: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    """A list of one text as that text, so that both are the same setting. ConfigError for no text or a double one."""
    if value is None or isinstance(value, str):
        return value
    found = tuple(value)
    _require(bool(found), f"{where}: expected a text or a list of texts, found an empty list")
    doubles = [text for place, text in enumerate(found) if text in found[:place]]
    _require(not doubles, f"{where}: {doubles and doubles[0]!r} is in the list twice; leave one of them out")
    return found[0] if len(found) == 1 else found


def _require_bounds(section: str, settings: object) -> None:
    """Raise ConfigError for a value, or an element of a tuple, outside the bounds beside its field."""
    cls: type = type(settings)
    for name, annotation in _annotations(cls).items():
        said = list(_metadata(annotation))
        value = getattr(settings, name)
        values = value if isinstance(value, tuple) else (value,)
        long_enough = all(len(values) >= one.min_length for one in said if isinstance(one, MinLen))
        for bounds in said:
            if isinstance(bounds, Interval):
                inside = long_enough and all(_within(v, bounds) for v in values)
                _require(inside, f"{section}.{name} must {_in_words(bounds)}, got {value}")


def _metadata(annotation: object) -> Iterator[object]:
    """All that `Annotated` says in a type, of elements too."""
    yield from getattr(annotation, "__metadata__", ())
    for inner in typing.get_args(annotation):
        yield from _metadata(inner)


def _within(value: Any, bounds: Interval) -> bool:  # noqa: ANN401 - a number
    return (
        (bounds.gt is None or value > bounds.gt)
        and (bounds.ge is None or value >= bounds.ge)
        and (bounds.lt is None or value < bounds.lt)
        and (bounds.le is None or value <= bounds.le)
    )


def _in_words(bounds: Interval) -> str:
    low = bounds.ge if bounds.gt is None else bounds.gt
    high = bounds.le if bounds.lt is None else bounds.lt
    if high is None:
        return f"be {'>=' if bounds.gt is None else '>'} {low}"
    return f"lie in {'[' if bounds.gt is None else '('}{low}, {high}{']' if bounds.lt is None else ')'}"


def _require_backbone(section: str, name: str) -> None:
    _require(
        has_form(name),
        f"{section}.backbone {name!r} is not one of {', '.join(BACKBONES)}, timm:MODEL, plugin:package.module:factory",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
