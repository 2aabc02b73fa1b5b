"""The arms of the ablation: what each changes, and what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ezsd.losses import distillation_scale

Boxes = Literal["random", "random, filtered", "rpn", "rpn, filtered", "raw", "baseline"]
"""Where given boxes come from: as many random anchors as the baseline has regions in an image, or all anchors in random
order; likewise the proposal network of a run without distillation; the CLIP proposals of another store."""

UNFILTERED = ("proposals.base_iou=1.1", "proposals.drop_base_guesses=false", "proposals.drop_background=false")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSpec:
    """How a store differs from the baseline's."""

    overrides: tuple[str, ...] = ()
    """Settings of the build."""
    boxes: Boxes | None = None
    """Given boxes in place of scored anchors."""
    reuse: str | None = None
    """A store to take over what is the same."""
    oracle: bool = False
    """All names are base names, so that novel boxes are trained on."""

    @property
    def after(self) -> str | None:
        """The arm whose run has to be there first."""
        return "none, unspared" if self.boxes in ("rpn", "rpn, filtered") else None


STORES = {
    "baseline": StoreSpec(),
    "raw": StoreSpec(overrides=("adapt.steps=0",)),
    "raw proposals": StoreSpec(boxes="raw", reuse="baseline"),
    "raw features": StoreSpec(overrides=("adapt.steps=0",), boxes="baseline", reuse="raw"),
    "random": StoreSpec(overrides=UNFILTERED, boxes="random", reuse="baseline"),
    "random, filtered": StoreSpec(boxes="random, filtered", reuse="baseline"),
    "rpn": StoreSpec(overrides=UNFILTERED, boxes="rpn", reuse="baseline"),
    "rpn, filtered": StoreSpec(boxes="rpn, filtered", reuse="baseline"),
    "5 regions": StoreSpec(overrides=("proposals.max_regions=5",), reuse="baseline"),
    "20 regions": StoreSpec(overrides=("proposals.max_regions=20",), reuse="baseline"),
    "all regions": StoreSpec(overrides=("proposals.max_regions=1000",), reuse="baseline"),
    "novel score": StoreSpec(overrides=("proposals.score=novel",), reuse="baseline"),
    # No region is kept where every name is a base name: one anchor per image spares the time of looking.
    "oracle": StoreSpec(overrides=("proposals.sizes=[128]", "proposals.stride=1.0"), oracle=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One row per seed. Arms differ from what they are compared with in the named thing alone."""

    name: str
    group: str
    train: tuple[str, ...] = ()
    """Settings of the training."""
    store: str = "baseline"
    """One of `STORES`."""
    length: float = 1.0
    """Steps, as a multiple of the preset's; the rate falls to zero over just as many."""
    against: str = "baseline"
    """The arm it is compared with."""
    evaluation: Literal["permuted", "reference box class"] | None = None
    """Another evaluation of the baseline's run; nothing is trained."""


NONE, UNSPARED = "loss.distillation=0", "model.ignore_confidence=2.0"
PAPER_HEAD = ("model.head=paper", "model.tower_depth=3", "model.box_hidden=1024")
EMBED_DIM = 128
"""Of the teacher `tiny-shapes`. The cosine arms are named by what multiplies the distance, which was the weight once;
in weights of now 0.13, 0.27 and 0.53."""
IDEAS = {
    "baseline": Arm(name="baseline", group="main"),
    "none": Arm(name="none", group="main", train=(NONE,)),
    "raw": Arm(name="raw", group="teacher", store="raw"),
    "rpn": Arm(name="rpn", group="regions", store="rpn"),
    "no class in box regression": Arm(
        name="no class in box regression", group="box regression", train=("model.semantic_boxes=false",)
    ),
}
"""Distillation with everything, not at all, and without each of the three ideas: re-normalisation, CLIP proposals,
semantic regression."""
LENGTHS = (0.25, 0.5, 2.0)

_ARMS = (
    *IDEAS.values(),
    Arm(name="ground truth", group="regions", train=("train.regions_per_image=0",)),
    Arm(name="random", group="regions", store="random"),
    Arm(name="random, filtered", group="regions", store="random, filtered"),
    Arm(name="rpn, filtered", group="regions", store="rpn, filtered"),
    Arm(name="novel score", group="regions", store="novel score"),
    Arm(name="raw proposals", group="teacher", store="raw proposals"),
    Arm(name="raw features", group="teacher", store="raw features"),
    Arm(name="reference box class", group="box regression", evaluation="reference box class"),
    Arm(name="paper head", group="head", train=PAPER_HEAD),
    Arm(name="paper head, as narrow", group="head", train=("model.head=paper",)),
    *(
        Arm(
            name=f"cosine, weight {factor}",
            group="loss",
            train=("loss.metric=cosine", f"loss.distillation={factor / distillation_scale('cosine', EMBED_DIM)!r}"),
        )
        for factor in (2.0, 4.0, 8.0)
    ),
    Arm(name="half weight", group="loss", train=("loss.distillation=0.225",)),
    Arm(name="double weight", group="loss", train=("loss.distillation=0.9",)),
    Arm(name="base names alone", group="loss", train=("loss.novel_names=false",)),
    Arm(name="5 regions", group="number of regions", store="5 regions", train=("train.regions_per_image=5",)),
    Arm(name="20 regions", group="number of regions", store="20 regions", train=("train.regions_per_image=20",)),
    Arm(name="all regions", group="number of regions", store="all regions", train=("train.regions_per_image=1000",)),
    Arm(name="unspared", group="background", train=(UNSPARED,)),
    Arm(name="none, unspared", group="background", train=(NONE, UNSPARED), against="unspared"),
    Arm(
        name="ground truth, unspared",
        group="background",
        train=("train.regions_per_image=0", UNSPARED),
        against="unspared",
    ),
    Arm(name="spared by the rpn too", group="background", train=("model.ignore_rpn=true",)),
    Arm(name="permuted novel names", group="control", evaluation="permuted"),
    Arm(name="oracle", group="novel boxes", store="oracle", train=(NONE,)),
    Arm(name="oracle, distilled", group="novel boxes", store="oracle"),
)


def named(name: str, length: float) -> str:
    """What an arm is called at another length."""
    return name if length == 1 else f"{name} x {length:g}"


def at_length(arm: Arm, length: float) -> Arm:
    """The same arm on a shorter or longer schedule; the longest is evaluated on its way too."""
    looks = ("train.validate_every=2",) if length == max(LENGTHS) else ()
    return replace(
        arm,
        name=named(arm.name, length),
        group="schedule",
        train=(*arm.train, *looks),
        length=length,
        against=named("baseline", length),
    )


ARMS = {arm.name: arm for arm in (*_ARMS, *(at_length(arm, length) for arm in IDEAS.values() for length in LENGTHS))}
"""All arms by name."""


def chosen(words: list[str]) -> list[Arm]:
    """Arms by name or group, in the order of `ARMS`; all without words. ValueError for a word that is neither."""
    known = ARMS.keys() | {arm.group for arm in ARMS.values()}
    for word in words:
        if word not in known:
            raise ValueError(f"--arms {word!r}: expected one of {', '.join(sorted(known))}")
    return [arm for arm in ARMS.values() if not words or arm.name in words or arm.group in words]
