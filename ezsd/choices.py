"""Named choices of settings, importable without the code that implements them."""

from typing import Literal

Backend = Literal["auto", "eager", "triton"]
"""Implementation of the fused operators."""
Metric = Literal["cosine", "l1"]
"""Distillation metrics, see `ezsd.losses.METRICS`."""
ClassificationLoss = Literal["cross_entropy", "seesaw"]
"""Loss of regions against class names and background, see `ezsd.losses`."""
BoxClass = Literal["foreground", "reference", "topk"]
"""Source of the text embedding for the box regressor at inference, see `DetectorSettings.box_class`."""
HeadName = Literal["fast", "paper"]
"""Region head of the detector."""
MAX_TEMPERATURE = 100.0
"""Upper limit of the logit scale: above CLIP's own 100 the softmax saturates and gradients vanish."""
RESNETS = ("resnet18", "resnet34", "resnet50")
MOBILENETS = ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small")
BACKBONES = ("tiny", *RESNETS, *MOBILENETS)
"""Backbones known to `build_backbone` by a name of their own; models of timm and plug-ins have a prefix."""
Surround = Literal["black", "context"]
"""Padding of a crop whose box is not square: black, or the image's own context."""
Names = Literal["raw", "clean"]
"""Form of class names in prompts: unchanged, or cleaned by `clean_names`."""
Activation = Literal["gelu", "quickgelu"]
"""Activation function of CLIP's two towers."""
Normalisation = Literal["openai", "inception", "imagenet", "none"]
"""Mean and standard deviation of pixels that a model was trained with, see `NORMALISATIONS`."""
Precision = Literal["auto", "fp32", "bf16"]
"""Precision of convolutions and linear layers; LayerNorms are always float32."""
AdaptLoss = Literal["bce", "softmax_ce"]
"""Loss of re-normalisation: binary cross-entropies over the base classes, or cross-entropy of their softmax."""
Mode = Literal["exhaustive", "grown-stride", "coarse-to-fine", "learned"]
"""Candidates for proposals: all anchors of the grid, fewer large ones, a sparse grid and then the neighbours of its
best; or the boxes of a proposal network that the build trains on base boxes."""
Refinement = Literal["none", "vote"]
"""Refinement of proposals before regions are chosen among them, see `ezsd.proposals.refine`."""
Score = Literal["entropy", "novel"]
"""Score by which anchors become proposals, see `ezsd.proposals.select`."""
Logger = Literal["csv", "mlflow", "tensorboard", "wandb"]
"""Loggers of a training's metrics beside metrics.jsonl."""
Benchmark = Literal["shapes", "clutter"]
"""Embedded benchmarks: scenes without and with distractors, see `ezsd.data.shapes`."""
