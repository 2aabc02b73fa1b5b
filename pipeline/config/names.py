"""Names of settings: those that earlier versions had, and those that people type by habit.

Records of earlier versions (run.json, a store's environment.json and manifest) have the former names and are read on; a
person who types one is told the new one. Manifests are written with the former names for good: fingerprints of stores
depend on them.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from ezsd.pipeline.errors import ConfigError

FORMER: Mapping[str, Mapping[str, str]] = {
    "adapt": {"clip_norm": "max_grad_norm", "crops": "batch_size"},
    "build": {"batch": "batch_size"},
    "proposals": {
        "keep": "max_proposals",
        "mode": "search",
        "passes": "anchor_fraction",
        "regions": "max_regions",
        "surround": "padding",
    },
    "model": {
        "channels": "fpn_channels",
        "positive_share": "box_positive_fraction",
        "sampled_regions": "box_batch_size_per_image",
        "spare_confidence": "ignore_confidence",
        "spare_rpn": "ignore_rpn",
        "temperature": "logit_scale",
    },
    "train": {
        "accumulate": "grad_accumulation",
        "average": "ema_decay",
        "clip_norm": "max_grad_norm",
        "images": "batch_size",
        "jitter": "scale_jitter",
        "loader_workers": "num_workers",
        "long_side": "max_size",
        "optimiser": "optimizer",
        "rate_images": "reference_batch_size",
        "regions": "regions_per_image",
        "sampling": "rng",
        "short_side": "min_size",
        "short_side_min": "multiscale_min_size",
        "warmup": "warmup_steps",
    },
    "eval": {"keep": "max_detections", "score_floor": "score_threshold"},
}
"""Today's name of a setting by section and former name."""
FORMER_VALUES: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("proposals", "grid"): {"faithful": "paper"},
    ("proposals", "search"): {"faithful": "exhaustive"},
    ("train", "rng"): {"stream": "step"},
}
"""Today's word of a choice by its former one, by section and today's name of the setting."""

ALIASES: Mapping[str, str] = {
    "accumulate_grad_batches": "train.grad_accumulation",
    "agnostic_nms": "eval.class_agnostic_nms",
    "anchor_sizes": "model.rpn_sizes",
    "backbone": "model.backbone",
    "backbone_lr": "train.backbone_lr_mult (a factor of train.learning_rate)",
    "backbone_lr_factor": "train.backbone_lr_mult",
    "backbone_lr_mult": "train.backbone_lr_mult",
    "backbone_multiplier": "train.backbone_lr_mult",
    "backbone_weights": "the option `backbone_weights`",
    "base_lr": "train.learning_rate",
    "batch": "train.batch_size",
    "batchsize": "train.batch_size",
    "bs": "train.batch_size",
    "clip_grad": "train.max_grad_norm",
    "clip_grad_norm": "train.max_grad_norm",
    "conf": "eval.score_threshold",
    "conf_thres": "eval.score_threshold",
    "device": "the option `device`",
    "ema": "train.ema_decay",
    "epochs": "train.steps (epochs x training images / train.batch_size)",
    "fc_dim": "model.box_hidden",
    "freeze": "model.frozen_stages",
    "freeze_backbone": "model.frozen_stages (4 is the whole body)",
    "freeze_layers": "model.frozen_stages",
    "frozen": "model.frozen_stages",
    "frozen_layers": "model.frozen_stages",
    "frozen_stages": "model.frozen_stages",
    "freeze_at": "model.frozen_stages (one less: 0 is the stem, 1 the first stage too, -1 nothing)",
    "gradient_accumulation_steps": "train.grad_accumulation",
    "gradient_clip_val": "train.max_grad_norm",
    "grad_accum": "train.grad_accumulation",
    "grad_clip": "train.max_grad_norm",
    "image_size": "train.min_size and train.max_size",
    "img_size": "train.min_size and train.max_size",
    "imgsz": "train.min_size and train.max_size",
    "input_size": "train.min_size and train.max_size",
    "iou": "eval.nms_iou",
    "kd_weight": "loss.distillation",
    "distill_weight": "loss.distillation",
    "distillation_weight": "loss.distillation",
    "log": "train.loggers",
    "logger": "train.loggers",
    "lr": "train.learning_rate",
    "lr_backbone": "train.backbone_lr_mult (a factor of train.learning_rate)",
    "lr_mult": "train.backbone_lr_mult",
    "lr0": "train.learning_rate",
    "mlflow": "train.loggers",
    "max_dets": "eval.max_detections",
    "max_det": "eval.max_detections",
    "max_epochs": "train.steps (epochs x training images / train.batch_size)",
    "max_iters": "train.steps",
    "iterations": "train.steps",
    "milestones": "train.decay_at (shares of all steps)",
    "nms": "eval.nms_iou",
    "nms_thresh": "eval.nms_iou",
    "nms_threshold": "eval.nms_iou",
    "num_epochs": "train.steps (epochs x training images / train.batch_size)",
    "num_iterations": "train.steps",
    "optim": "train.optimizer",
    "pretrained": "the option `backbone_weights` (a file)",
    "oversample_thr": "train.repeat_threshold",
    "per_device_train_batch_size": "train.batch_size (of all devices together)",
    "lr_scheduler": "train.schedule",
    "scheduler": "train.schedule",
    "repeat_thresh": "train.repeat_threshold",
    "roi_batch_size": "model.box_batch_size_per_image",
    "batch_size_per_image": "model.box_batch_size_per_image",
    "positive_fraction": "model.box_positive_fraction",
    "score_thresh": "eval.score_threshold",
    "score_thr": "eval.score_threshold",
    "tau": "model.logit_scale (it multiplies cosines: the reciprocal of a temperature)",
    "tensorboard": "train.loggers",
    "temperature": "model.logit_scale (it multiplies cosines: the reciprocal of a temperature)",
    "top_k": "proposals.max_proposals or proposals.max_regions",
    "topk": "proposals.max_proposals or proposals.max_regions",
    "trainable_backbone_layers": "model.frozen_stages (4 less that number)",
    "trainable_layers": "model.frozen_stages (4 less that number)",
    "warmup_iters": "train.warmup_steps",
    "wandb": "train.loggers",
    "wd": "train.weight_decay",
    "workers": "train.num_workers (readers of a training), or the option `workers` (a build)",
    "short_edge": "train.min_size",
    "long_edge": "train.max_size",
}
"""Setting by the name that people type by habit, without its section."""
NO_SETTINGS: Mapping[str, str] = {
    "amp": "mixed precision is always on on a GPU",
    "freeze_bn": "batch normalisation of a backbone with pretrained weights is always frozen",
    "frozen_bn": "batch normalisation of a backbone with pretrained weights is always frozen",
    "norm_eval": "batch normalisation of a backbone with pretrained weights is always frozen",
    "fp16": "mixed precision is always on on a GPU",
    "mixed_precision": "mixed precision is always on on a GPU",
    "momentum": "that of SGD is 0.9",
}
"""Explanation by the name that people type by habit where there is no such setting."""


def with_todays_names(tables: object) -> dict[str, Any]:
    """Tables of settings as today's version names them, from a record of this or an earlier one.

    Raises:
        ConfigError: the record holds no tables.
    """
    if not isinstance(tables, Mapping) or not all(isinstance(table, Mapping) for table in tables.values()):
        raise ConfigError(f"config: expected tables of settings, found {reprlib.repr(tables)}")
    found: dict[str, Any] = {}
    for section, table in tables.items():
        names = FORMER.get(section, {})
        found[section] = {}
        for key, value in table.items():
            if (section, key) == ("train", "tensorboard"):
                found[section].setdefault("loggers", ["tensorboard"] if value else [])
                continue
            name = names.get(key, key)
            words = FORMER_VALUES.get((section, name), {})
            found[section][name] = words.get(value, value) if isinstance(value, str) else value
    return found


def with_former_names(section: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the settings of a table to the names that manifests use."""
    names = {new: old for old, new in FORMER.get(section, {}).items()}
    found: dict[str, Any] = {}
    for key, value in table.items():
        words = {new: old for old, new in FORMER_VALUES.get((section, key), {}).items()}
        found[names.get(key, key)] = words.get(value, value) if isinstance(value, str) else value
    return found


def hint(section: str, key: str, known: list[str]) -> str:
    """Suggestion for a setting that does not exist, as the second half of an error.

    Args:
        section: where it was given.
        key: its name there.
        known: names of the section's settings.
    """
    former = FORMER.get(section, {}).get(key)
    if former is not None:
        also = " (it multiplies cosines: the reciprocal of a temperature)" if key == "temperature" else ""
        return f"it is called {section}.{former} now{also}"
    if key in NO_SETTINGS:
        return f"{NO_SETTINGS[key]}; leave it out"
    if key in ALIASES:
        of, _, name = ALIASES[key].split()[0].partition(".")
        # The section's own, where it has one of that name.
        return f"did you mean {f'{section}.{name}' if of != section and name in known else ALIASES[key]}?"
    near = get_close_matches(key, known, n=1, cutoff=0.75)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
