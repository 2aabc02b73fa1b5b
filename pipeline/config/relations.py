"""Relations between settings: those that are scaled, refused or warned of together.

docs/settings.md has the table; a test compares it with `RELATIONS`, and another one wants every setting to be either in
a relation or among `ALONE`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Literal

from ezsd.choices import MAX_TEMPERATURE
from ezsd.pipeline.config.schema import Config, ProposerConfig, load_preset, setting_of, to_tables
from ezsd.pipeline.errors import ConfigError

log = logging.getLogger("ezsd")


@dataclass(frozen=True, slots=True)
class Relation:
    """A setting, those it depends on, and what is done when it alone is changed."""

    setting: str
    neighbours: tuple[str, ...]
    how: Literal["scaled", "refused", "warned", "listed"]
    """"scaled": the program keeps the meaning. "refused": where the two cannot be meant together. "warned": when the
    setting is given without any of its neighbours. "listed": a change alone is an experiment like any other."""
    effect: str
    """Effect of changing one of the settings alone."""


RELATIONS = (
    Relation(
        "loss.distillation",
        ("loss.metric",),
        "scaled",
        "equal weights give equal gradients at cosine 0.7, for every metric and embedding dimension",
    ),
    Relation(
        "train.learning_rate",
        ("train.batch_size", "train.reference_batch_size", "train.optimizer"),
        "scaled",
        "the rate is for `reference_batch_size` images per step; it scales with `batch_size`: linearly with "
        "SGD (arXiv 1706.02677), with the square root with AdamW (arXiv 2205.10287)",
    ),
    Relation(
        "train.backbone_lr_mult",
        ("train.learning_rate", "model.frozen_stages"),
        "scaled",
        "a factor of the rate at every step, warm-up and schedule included; it says nothing of stages that are not "
        "trained",
    ),
    Relation(
        "train.optimizer",
        ("train.learning_rate",),
        "warned",
        "learning rates of SGD are about ten times those of AdamW",
    ),
    Relation(
        "train.batch_size",
        ("train.steps",),
        "warned",
        "the learning rate scales with it, the number of epochs (steps x batch_size / training images) does not",
    ),
    Relation(
        "train.grad_accumulation",
        ("train.batch_size", "train.rng"),
        "scaled",
        "`batch_size` counts all batches of a step, so only batch normalisation that is not frozen depends on "
        "it; refused without `rng=image`",
    ),
    Relation(
        "train.decay_at",
        ("train.steps", "train.schedule"),
        "scaled",
        "fractions of all steps, so they scale with the length; refused if the schedule does not use them",
    ),
    Relation(
        "train.warmup_steps",
        ("train.steps",),
        "warned",
        "a number of steps, not a fraction: with `warmup_steps` >= `steps` the learning rate never reaches its peak",
    ),
    Relation(
        "train.ema_decay",
        ("train.steps",),
        "scaled",
        "the decay is at most (1 + step) / (10 + step), so the average of a short run also forgets its start",
    ),
    Relation(
        "train.weight_decay",
        ("train.learning_rate", "train.steps"),
        "listed",
        "the decay of one step is learning rate x weight_decay: it follows the rate, and its sum the steps",
    ),
    Relation(
        "train.max_grad_norm",
        ("loss.distillation", "loss.rpn", "loss.classification", "loss.box", "loss.mask"),
        "listed",
        "norm of the gradient of the whole objective: larger loss weights are clipped sooner",
    ),
    Relation(
        "train.checkpoint_every",
        ("train.steps",),
        "scaled",
        "the last step has a checkpoint with any interval",
    ),
    Relation(
        "train.validate_every",
        ("train.batch_size",),
        "scaled",
        "counts epochs, not steps",
    ),
    Relation(
        "train.validate_images",
        ("train.validate_every",),
        "refused",
        "has no effect without validation",
    ),
    Relation(
        "train.repeat_threshold",
        ("train.steps",),
        "listed",
        "an epoch has more images with repeats, so the same number of steps is fewer epochs",
    ),
    Relation(
        "train.regions_per_image",
        ("proposals.max_regions",),
        "listed",
        "drawn per step from the regions that the store keeps for an image; all of them if it has fewer",
    ),
    Relation(
        "train.pseudo_confidence",
        ("loss.novel_names", "train.pseudo_objectness", "teacher.background", "adapt.steps"),
        "refused",
        "pseudo-labels are of novel classes, which only `novel_names` puts into the cross-entropy; the confidence is a "
        "probability of the teacher's, like `model.ignore_confidence`",
    ),
    Relation(
        "train.pseudo_objectness",
        ("train.pseudo_confidence", "proposals.search", "proposals.objectness_weight"),
        "refused",
        "has no effect without pseudo-labels; the score that a proposal network gave to the region's box",
    ),
    Relation(
        "train.min_size",
        ("train.max_size", "model.rpn_sizes", "model.canonical_size"),
        "warned",
        "anchors and the level of a box are in pixels of the resized image, and do not scale with its size",
    ),
    Relation(
        "train.scale_jitter",
        ("train.max_size", "train.multiscale_min_size"),
        "refused",
        "the side of the crop window is `max_size`, and the factor replaces `multiscale_min_size`",
    ),
    Relation(
        "model.rpn_sizes",
        ("model.backbone", "train.max_size"),
        "refused",
        "one size per level of the backbone; an image smaller than the smallest anchor has no matching anchor",
    ),
    Relation(
        "model.frozen_stages",
        ("model.backbone",),
        "refused",
        "counts the backbone's own stages, and must not be more than it has; without pretrained weights all are "
        "trained, and the setting has no effect",
    ),
    Relation(
        "model.canonical_size",
        ("model.canonical_level", "train.min_size"),
        "listed",
        "a box of this side is pooled from the level of stride 2 ** `canonical_level`; both shift all levels",
    ),
    Relation(
        "model.head",
        ("model.tower_depth", "model.box_hidden"),
        "warned",
        "depth and width apply to different layers: on the feature maps and of the regressor (`fast`), of "
        "each region and of all layers (`paper`: 3 and 1024)",
    ),
    Relation(
        "model.logit_scale",
        ("train.learning_rate",),
        "refused",
        f"at most {MAX_TEMPERATURE:g}, where it is clamped during training; it is trained with the detector's "
        "learning rate, without decay",
    ),
    Relation(
        "model.box_batch_size_per_image",
        ("model.box_positive_fraction",),
        "refused",
        "their product is the largest number of positive regions: none if it is below one",
    ),
    Relation(
        "model.ignore_confidence",
        ("teacher.background", "adapt.steps", "adapt.loss", "proposals.drop_background"),
        "listed",
        "a probability of the teacher's softmax over the classes, times the object probability with a "
        "background prompt: it changes with the teacher, the prompts and the re-normalisation",
    ),
    Relation(
        "model.ignore_rpn",
        ("model.ignore_confidence",),
        "refused",
        "has no effect without ignored regions",
    ),
    Relation(
        "model.box_class",
        ("model.semantic_boxes",),
        "refused",
        "has no effect without a text embedding in box regression",
    ),
    Relation(
        "model.box_top_k",
        ("model.box_class",),
        "refused",
        "has an effect only for `topk`",
    ),
    Relation(
        "loss.metric",
        ("loss.distillation",),
        "scaled",
        "see `loss.distillation`; has no effect at weight 0",
    ),
    Relation(
        "loss.rpn_box",
        ("loss.rpn",),
        "scaled",
        "both are multiplied for the box term of the proposal network",
    ),
    Relation(
        "loss.classification_loss",
        ("train.repeat_threshold", "loss.novel_names"),
        "listed",
        "`seesaw` counts repeated images as often as they come, and weighs base classes only: novel names compete as "
        "in the cross-entropy",
    ),
    Relation(
        "loss.mask",
        ("model.masks",),
        "refused",
        "has no effect without masks",
    ),
    Relation(
        "loss.novel_names",
        ("model.ignore_confidence",),
        "listed",
        "novel classes compete with background on regions that are not ignored",
    ),
    Relation(
        "adapt.batch_size",
        ("adapt.learning_rate", "adapt.steps"),
        "warned",
        "the learning rate is not scaled: AdamW's best rate follows the square root of the crops (arXiv "
        "2205.10287), and crops x steps are seen in all",
    ),
    Relation(
        "adapt.loss",
        ("adapt.learning_rate", "adapt.steps"),
        "warned",
        "each loss has its own best learning rate; at low rates the binary one makes the teacher worse before "
        "it makes it better",
    ),
    Relation(
        "adapt.weight_decay",
        ("adapt.learning_rate",),
        "listed",
        "the decay of one step is learning rate x weight_decay",
    ),
    Relation(
        "adapt.held_out",
        ("adapt.batch_size",),
        "listed",
        "held-out images are not trained on: a large fraction leaves fewer crops to draw",
    ),
    Relation(
        "adapt.min_crop_size",
        ("proposals.crop_ratio",),
        "listed",
        "a base box is widened first, and then enlarged by the ratio",
    ),
    Relation(
        "teacher.descriptions",
        ("teacher.template",),
        "listed",
        "the template is for the names, of classes and of background, that have no descriptions",
    ),
    Relation(
        "teacher.template",
        ("adapt.towers",),
        "listed",
        "each step of re-normalisation embeds every prompt of every base class, unless it tunes the vision tower alone",
    ),
    Relation(
        "proposals.grid",
        ("proposals.sizes", "proposals.stride", "proposals.search"),
        "warned",
        "sizes and stride are in pixels of the resized image (`paper`), or in pixels of the image and a "
        "fraction of the window (`sliding`)",
    ),
    Relation(
        "proposals.stride",
        ("proposals.grid",),
        "refused",
        "a fraction of the window's side; above 1 it leaves strips between the windows that are never scored",
    ),
    Relation(
        "proposals.growth",
        ("proposals.search",),
        "refused",
        "has no effect while every anchor is scored",
    ),
    Relation(
        "proposals.anchor_fraction",
        ("proposals.search",),
        "refused",
        "has an effect only for `coarse-to-fine`",
    ),
    Relation(
        "proposals.max_proposals",
        ("proposals.max_regions",),
        "refused",
        "regions are selected from the kept proposals: keeping fewer than the regions requested is a mistake",
    ),
    Relation(
        "proposals.score",
        ("proposals.drop_base_guesses",),
        "listed",
        "a score by the novel classes ranks few proposals of base classes high anyway",
    ),
    Relation(
        "proposals.crop_ratio",
        ("proposals.padding",),
        "listed",
        "a larger crop shows more context, or more black",
    ),
    Relation(
        "proposals.drop_background",
        ("teacher.background",),
        "refused",
        "has no effect without a background prompt",
    ),
    Relation(
        "proposer.max_proposals",
        ("proposals.max_proposals", "proposals.max_regions"),
        "refused",
        "a learned proposer gives the smaller of both numbers, so the larger one has no effect; regions are selected "
        "from these boxes",
    ),
    Relation(
        "proposals.objectness_weight",
        ("proposals.search", "proposals.boxes"),
        "refused",
        "has an effect only for the boxes of a network or a file; below 1 the teacher is shown all that are clear of "
        "base objects, before the best `max_regions` are kept",
    ),
    Relation(
        "proposals.refine",
        ("proposals.nms_iou", "proposals.base_iou"),
        "listed",
        "voted boxes are suppressed and filtered like proposals",
    ),
    Relation(
        "proposals.refine_iou",
        ("proposals.refine",),
        "refused",
        "has no effect without box voting",
    ),
    Relation(
        "proposer.run",
        ("proposals.search", "proposer.backbone", "proposer.steps"),
        "refused",
        "the network is the run's and none is trained: no other setting of [proposer] has an effect",
    ),
    Relation(
        "proposer.batch_size",
        ("proposer.learning_rate", "proposer.steps"),
        "listed",
        "the learning rate is not scaled: AdamW's best rate follows the square root of the images (arXiv 2205.10287), "
        "and images x steps are seen in all",
    ),
    Relation(
        "proposer.rpn_sizes",
        ("proposer.backbone", "proposer.min_size"),
        "refused",
        "one size per level of the backbone, in pixels of the resized image",
    ),
    Relation(
        "proposer.weights",
        ("proposer.backbone",),
        "refused",
        "a file fits one backbone",
    ),
    Relation(
        "proposer.frozen_stages",
        ("proposer.backbone", "proposer.weights"),
        "refused",
        "as `model.frozen_stages`",
    ),
    Relation(
        "proposer.backbone_lr_mult",
        ("proposer.learning_rate", "proposer.frozen_stages"),
        "scaled",
        "as `train.backbone_lr_mult`",
    ),
    Relation(
        "proposer.max_size",
        ("proposer.min_size",),
        "refused",
        "both sides limit the image; 0 for both keeps its size",
    ),
    Relation(
        "eval.objectness",
        ("eval.score_threshold",),
        "listed",
        "changes every score: a threshold then cuts elsewhere",
    ),
    Relation(
        "eval.teacher_weight_base",
        ("eval.score_threshold", "teacher.background"),
        "listed",
        "changes the scores of base classes alone; `score_threshold` is applied to the detector's own score, and the "
        "store's background prompt takes part in the teacher's softmax",
    ),
    Relation(
        "eval.teacher_weight_novel",
        ("eval.score_threshold", "teacher.background"),
        "listed",
        "changes the scores of all other classes alone, in the same way",
    ),
    Relation(
        "eval.class_agnostic_nms",
        ("eval.nms_iou",),
        "listed",
        "`nms_iou` then also holds between classes: of two objects of different classes that overlap as much, one is "
        "lost",
    ),
    Relation(
        "eval.score_threshold",
        ("model.logit_scale",),
        "listed",
        "threshold on the softmax over all classes detected: more classes, lower scores",
    ),
)
"""All relations between settings. What a setting needs to have an effect is in `_NEEDS`."""

ALONE = frozenset(
    [
        "teacher.name",
        "teacher.weights",
        "teacher.names",
        "teacher.activation",
        "teacher.normalisation",
        "teacher.precision",
        "adapt.flip",
        "adapt.max_grad_norm",
        "proposals.ratios",
        "proposer.weight_decay",
        "proposer.fpn_channels",
        "build.seed",
        "build.block_images",
        "build.batch_size",
        "build.max_bad_images",
        "build.embedding",
        "model.fpn_channels",
        "model.rpn_proposals",
        "model.pool_size",
        "train.num_workers",
        "train.seed",
        "train.backend",
        "train.channels_last",
        "train.checkpoint_minutes",
        "train.compile",
        "train.loggers",
        "eval.max_detections",
    ]
)
"""Settings that mean the same whatever the others are."""

_PROPOSER = [entry.name for entry in fields(ProposerConfig)]
_NEEDS: dict[str, tuple[str, Callable[[Config], bool]]] = {
    "train.validate_images": ("train.validate_every above 0", lambda c: c.train.validate_every > 0),
    "train.pseudo_objectness": ("train.pseudo_confidence above 0", lambda c: c.train.pseudo_confidence > 0),
    "train.decay_at": ("train.schedule=step", lambda c: c.train.schedule == "step"),
    "model.ignore_rpn": (
        "model.ignore_confidence of at most 1",
        lambda c: not c.model.ignore_rpn or c.model.ignore_confidence <= 1,
    ),
    "model.box_class": (
        "model.semantic_boxes=true",
        lambda c: c.model.box_class == "foreground" or c.model.semantic_boxes,
    ),
    "model.box_top_k": ("model.box_class=topk", lambda c: c.model.box_class == "topk"),
    "loss.mask": ("model.masks=true", lambda c: c.model.masks),
    "proposals.growth": (
        "proposals.search=grown-stride or coarse-to-fine",
        lambda c: c.proposals.search in ("grown-stride", "coarse-to-fine"),
    ),
    "proposals.anchor_fraction": ("proposals.search=coarse-to-fine", lambda c: c.proposals.search == "coarse-to-fine"),
    **{
        f"proposer.{key}": (
            "proposals.search=learned (and without proposals.boxes and proposer.run)",
            lambda c: c.proposals.learned and c.proposer.run is None,
        )
        for key in _PROPOSER
    },
    "proposer.frozen_stages": (
        "proposals.search=learned (without proposals.boxes and proposer.run) and proposer.weights",
        lambda c: c.proposals.learned and c.proposer.run is None and c.proposer.weights is not None,
    ),
    "proposer.run": ("proposals.search=learned (and without proposals.boxes)", lambda c: c.proposals.learned),
    "proposer.max_proposals": (
        "proposals.search=learned (and without proposals.boxes), and at least as many proposals.max_proposals",
        lambda c: c.proposals.learned and c.proposer.max_proposals <= c.proposals.max_proposals,
    ),
    "proposals.max_proposals": (
        "a search of the grid, or as many proposer.max_proposals",
        lambda c: not c.proposals.learned or c.proposals.max_proposals <= c.proposer.max_proposals,
    ),
    **{
        f"proposals.{key}": (
            "a search of the grid, as proposals.search=exhaustive is",
            lambda c: not c.proposals.learned,
        )
        for key in ("grid", "sizes", "ratios", "stride", "score")
    },
    "proposals.objectness_weight": (
        "proposals.search=learned or proposals.boxes",
        lambda c: c.proposals.has_objectness,
    ),
    "proposals.refine_iou": ("proposals.refine=vote", lambda c: c.proposals.refine == "vote"),
    "proposals.drop_background": ("a teacher.background", lambda c: c.teacher.background is not None),
}
"""Condition under which a setting changes anything, in words and as a test."""


def load_settings(preset: str, overrides: Iterable[str] = ()) -> Config:
    """Load a preset with overrides, and check that its settings fit each other.

    Warns of a setting that was changed without its neighbours.

    Raises:
        ConfigError: see `load_preset`, `require_fit` and `require_use`.
    """
    overrides = list(overrides)
    config = load_preset(preset, overrides)
    preset_tables, tables = to_tables(load_preset(preset)), to_tables(config)
    # Who gives the preset's own value changes nothing.
    changed = {
        setting
        for setting in map(setting_of, overrides)
        for section, _, key in [setting.partition(".")]
        if tables[section][key] != preset_tables[section][key]
    }
    require_use(config, changed)
    require_fit(config)
    for line in changed_alone(config, changed):
        log.warning("%s", line)
    return config


def require_use(config: Config, changed: set[str]) -> None:
    """Raise ConfigError for a setting that was given and changes nothing."""
    for setting in sorted(changed & _NEEDS.keys()):
        needs, met = _NEEDS[setting]
        if not met(config):
            raise ConfigError(f"`{setting}`: changes nothing without {needs}; set both, or leave it out")


def require_fit(config: Config) -> None:
    """Raise ConfigError for two settings that contradict each other."""
    model, train, proposals = config.model, config.train, config.proposals
    _require(
        model.logit_scale <= MAX_TEMPERATURE,
        f"model.logit_scale must be at most {MAX_TEMPERATURE:g}, where it is held while it learns, got "
        f"{model.logit_scale:g}",
    )
    positives = int(model.box_batch_size_per_image * model.box_positive_fraction)
    _require(
        positives > 0 or model.box_positive_fraction == 0,
        f"model.box_batch_size_per_image={model.box_batch_size_per_image} times "
        f"model.box_positive_fraction={model.box_positive_fraction} leaves no region on an object; raise one of them",
    )
    _require(
        not 0 < train.max_size < min(model.rpn_sizes),
        f"model.rpn_sizes={list(model.rpn_sizes)} are all above train.max_size={train.max_size}: no anchor fits into "
        "an image; both are pixels of the resized image",
    )
    _require(
        not train.pseudo_confidence or config.loss.novel_names,
        f"train.pseudo_confidence={train.pseudo_confidence:g} makes pseudo-labels of novel classes, and the "
        "classification has base classes alone; set loss.novel_names=true, or train.pseudo_confidence=0",
    )
    _require(
        not 0 < config.proposer.max_size < min(config.proposer.rpn_sizes),
        f"proposer.rpn_sizes={list(config.proposer.rpn_sizes)} are all above proposer.max_size="
        f"{config.proposer.max_size}: no anchor fits into an image; both are pixels of the resized image",
    )
    _require(
        proposals.grid == "paper" or proposals.stride <= 1,
        f"proposals.stride={proposals.stride:g} is a share of the window's side with proposals.grid=sliding, and "
        "must be at most 1",
    )
    _require(
        proposals.learned or proposals.max_regions <= proposals.max_proposals,
        f"proposals.max_regions={proposals.max_regions} are chosen among "
        f"proposals.max_proposals={proposals.max_proposals}; set max_proposals to at least as many",
    )


def changed_alone(config: Config, changed: set[str]) -> list[str]:
    """Warnings about settings that were changed without those they depend on, one line each."""
    lines = [
        f"`{one.setting}` alone, without {' or '.join(one.neighbours)}: {one.effect.replace('`', '')}"
        for one in RELATIONS
        if one.how == "warned"
        and one.setting in changed
        and not changed & set(one.neighbours)
        # What it is about is the pair's order, which the next line looks at.
        and one.setting != "train.warmup_steps"
    ]
    if config.train.warmup_steps >= config.train.steps and changed & {"train.warmup_steps", "train.steps"}:
        lines.append(
            f"train.warmup_steps={config.train.warmup_steps} is not below train.steps={config.train.steps}: the "
            "learning rate never reaches its height"
        )
    return lines


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
