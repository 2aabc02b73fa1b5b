"""The arms of the ablation: what each changes, and what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LEARNED = ("proposals.search=learned", "proposals.max_proposals=100")
"""Proposals of a network that the build trains on base boxes."""
GRID = ("proposals.search=exhaustive", "proposals.max_proposals=1000")
"""All windows of the preset's grid."""
AUTHORS_GRID = (
    "proposals.grid=paper",
    "proposals.sizes=[32, 64, 128, 256, 512]",
    "proposals.ratios=[0.5, 1.0, 2.0]",
    "proposals.stride=32",
    # All of the grid, 9,375 anchors of a scene, covers no more objects than this tenth ("proposals" in README.md).
    "proposals.search=coarse-to-fine",
    "proposals.max_proposals=1000",
)
UNFILTERED = ("proposals.base_iou=1.1", "proposals.drop_base_guesses=false", "proposals.drop_background=false")
NONE, UNSPARED, NO_PSEUDO = "loss.distillation=0", "model.ignore_confidence=2.0", "train.pseudo_confidence=0"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSpec:
    """How a store is built."""

    overrides: tuple[str, ...] = LEARNED
    """Settings of the build."""
    boxes: Literal["ours", "random", "run"] | None = None
    """Given boxes: the regions of the store "ours", as many random anchors, or what the proposal network of a run
    without CLIP and novel boxes finds."""
    background: bool = True
    """Whether the teacher has a background prompt."""
    reuse: str | None = None
    """A store to take over what is the same."""
    oracle: bool = False
    """All names are base names, so that novel boxes are trained on."""

    @property
    def after(self) -> str | None:
        """The arm whose run has to be there first."""
        return "plain" if self.boxes == "run" else None


STORES = {
    "ours": StoreSpec(),
    "again": StoreSpec(overrides=(*LEARNED, "build.seed=1")),
    "authors": StoreSpec(
        overrides=(*AUTHORS_GRID, "proposals.padding=black", "adapt.loss=bce"),
        background=False,
    ),
    "grid": StoreSpec(overrides=GRID, reuse="ours"),
    "refined grid": StoreSpec(overrides=(*GRID, "proposals.refine=vote"), reuse="grid"),
    "run": StoreSpec(boxes="run", reuse="ours"),
    "raw": StoreSpec(overrides=(*LEARNED, "adapt.steps=0")),
    "random": StoreSpec(overrides=(*GRID, *UNFILTERED), boxes="random", reuse="ours"),
    "unfiltered": StoreSpec(overrides=(*LEARNED, *UNFILTERED), reuse="ours"),
    # No region is kept where every name is a base name: one anchor per image spares the time of looking.
    "oracle": StoreSpec(overrides=(*GRID, "proposals.sizes=[128]", "proposals.stride=1.0"), oracle=True),
    "oracle, distilled": StoreSpec(overrides=(*GRID, *UNFILTERED), boxes="ours", reuse="oracle", oracle=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One row per dataset and seed. Arms differ from what they are compared with in the named thing alone."""

    name: str
    store: str = "ours"
    """One of `STORES`."""
    train: tuple[str, ...] = ()
    """Settings of the training."""
    length: float = 1.0
    """Steps, as a multiple of the preset's; the rate falls to zero over just as many."""
    again: bool = False
    """Whether other random numbers are drawn."""
    against: str = "ours"
    """The arm it is compared with."""
    permuted: bool = False
    """Evaluate the run "ours" with each novel name's text row given to the next; nothing is trained."""


AUTHORS = (
    "model.head=paper",
    "model.tower_depth=3",
    "model.box_hidden=1024",
    "model.semantic_boxes=true",
    "loss.metric=l1",
    "loss.novel_names=false",
    UNSPARED,
    NO_PSEUDO,
)
"""The authors' choices of method where the preset has others. What is tuned to the size of the data stays the preset's:
steps, rates, widths, loss weights, the logit scale, the number of regions, and crops that are neither mirrored nor
widened."""

ARMS = {
    arm.name: arm
    for arm in (
        Arm(name="ours"),
        Arm(name="none", train=(NONE, NO_PSEUDO)),
        Arm(name="plain", train=(NONE, UNSPARED, NO_PSEUDO)),
        Arm(name="as the authors", store="authors", train=AUTHORS),
        Arm(name="no pseudo-labels", train=(NO_PSEUDO,)),
        # Windows of a grid have no objectness, which pseudo-labels need.
        Arm(name="grid", store="grid", train=(NO_PSEUDO,), against="no pseudo-labels"),
        Arm(name="refined grid", store="refined grid", train=(NO_PSEUDO,), against="grid"),
        Arm(name="random boxes", store="random", train=(NO_PSEUDO,), against="no pseudo-labels"),
        Arm(name="boxes from a run", store="run"),
        Arm(name="no re-normalisation", store="raw"),
        Arm(name="unfiltered boxes", store="unfiltered"),
        Arm(name="semantic regression", train=("model.semantic_boxes=true",)),
        Arm(name="half the steps", length=0.5, against="none"),
        Arm(name="oracle", store="oracle", train=(NONE, NO_PSEUDO)),
        # Every name is a base name there, so no region can be a pseudo-label.
        Arm(name="oracle, distilled", store="oracle, distilled", train=(NO_PSEUDO,), against="oracle"),
        Arm(name="permuted novel names", permuted=True),
        Arm(name="ours, again", store="again", again=True),
    )
}
"""All arms by name."""


def chosen(words: list[str], arms: Mapping[str, Arm] = ARMS) -> list[Arm]:
    """Arms by name, in the order of `arms`; all without words. ValueError for an unknown word."""
    for word in words:
        if word not in arms:
            raise ValueError(f"--arms {word!r}: expected one of {', '.join(arms)}")
    return [arm for arm in arms.values() if not words or arm.name in words]
