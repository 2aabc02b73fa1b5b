"""Choices by name that settings offer: what they are called, without loading what they do."""

from typing import Literal

Backend = Literal["auto", "eager", "triton"]
"""Where the fused operators run."""
Metric = Literal["cosine", "l1"]
"""Distillation metrics, see `ezsd.losses.METRICS`."""
BoxClass = Literal["foreground", "reference", "topk"]
"""Whose text row the box regressor sees at inference, see `DetectorSettings.box_class`."""
HeadName = Literal["fast", "paper"]
"""Which region head a detector has."""
MAX_TEMPERATURE = 100.0
"""Above it the softmax is as hard as CLIP's own, and gradients vanish."""
RESNETS = ("resnet18", "resnet34", "resnet50")
BACKBONES = ("tiny", *RESNETS)
"""Names that `build_backbone` knows."""
Surround = Literal["black", "context"]
"""What lies beside a box that is not square: nothing, or what the image shows there."""
Names = Literal["raw", "clean"]
"""How prompts say a class name: as it is, or see `clean_names`."""
Activation = Literal["gelu", "quickgelu"]
"""What CLIP's two towers were trained with."""
Normalisation = Literal["openai", "inception", "imagenet", "none"]
"""Which mean and deviation of pixels a model was trained with, see `NORMALISATIONS`."""
Precision = Literal["auto", "fp32", "bf16"]
"""Of convolutions and linear layers; LayerNorms are float32 always."""
AdaptLoss = Literal["bce", "softmax_ce"]
"""What re-normalisation minimises: binary cross-entropies over the base names, or cross-entropy of their softmax."""
Mode = Literal["exhaustive", "grown-stride", "coarse-to-fine"]
"""How much of a grid is looked at: all of it, less of large anchors, or what a first look found promising."""
Score = Literal["entropy", "novel"]
"""What makes an anchor a proposal, see `ezsd.proposals.select`."""
