"""Settings by the names that manifests have for them. Loads no torch.

Manifests keep the names that settings had first, since fingerprints are made of them. A person knows today's names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ezsd.cache import JSON, Difference
from ezsd.pipeline.config.names import FORMER, FORMER_VALUES
from ezsd.pipeline.config.schema import ProposalConfig

_PLACES = {
    "block_images": "build.block_images",
    "embedding": "build.embedding",
    "ground_truth.batch": "build.batch_size",
    "proposals.background": "teacher.background",
    "proposals.batch": "build.batch_size",
    "teacher.crop.ratio": "proposals.crop_ratio",
    "teacher.crop.surround": "proposals.padding",
    "teacher.model.names": "teacher.names",
    "teacher.model.precision": "teacher.precision",
    "teacher.model.template": "teacher.template",
    "proposer.held_out": "adapt.held_out",
    "proposer.seed": "build.seed",
    "teacher.seed": "build.seed",
}
"""Settings that manifests have elsewhere than in a table of the setting's section."""
UNSAID: Mapping[str, JSON] = {
    "adapt.flip": 0.0,
    "adapt.min_crop_size": 0.0,
    "proposals.drop_background": True,
    "proposals.nms_iou": 0.7,
    "proposals.objectness_weight": 1.0,
    "proposals.refine": "none",
    "proposals.search": "exhaustive",
    "proposer.backbone_lr_mult": 1.0,
    "proposer.frozen_stages": 1,
}
"""Values of settings that a manifest without them was made with."""
_PROPOSALS = frozenset(field.name for field in dataclasses.fields(ProposalConfig))


def unsaid(section: str) -> dict[str, JSON]:
    """Settings of a section, by today's names, with the values that a manifest without them was made with."""
    return {name.removeprefix(f"{section}."): value for name, value in UNSAID.items() if name.startswith(f"{section}.")}


def as_settings(found: Sequence[Difference]) -> list[Difference]:
    """Differences of two manifests, named and worded by `as_setting`.

    Between a grid and a learned proposer the search alone is listed, without what follows from it: the settings that
    only one of them has, and the number of proposals; between one of them and boxes of a file, the file alone. Between
    a proposer that a build trains and one of a run, the weights of the run alone.
    """
    if any(one.name == "proposer.run_sha256" and one.absent is not None for one in found):
        proposer = (
            "proposer.network",
            "proposer.body",
            "proposer.seed",
            "proposer.held_out",
            "proposer.dataset",
            "proposer.images",
        )
        found = [one for one in found if one.absent is None or not one.name.startswith(proposer)]
    # A value that is not there may be what the other one says.
    named = [one for one in map(as_setting, found) if one.absent is not None or one.stored != one.wanted]
    search = next((one for one in named if one.name == "proposals.search"), None)
    if search is None or "learned" not in (search.stored, search.wanted):
        return named
    boxes = [one for one in named if one.name == "proposals.boxes_sha256"]
    follows = ("proposals.needs", "proposals.max_proposals", *(("proposals.search",) if boxes else ()))
    return boxes + [
        one
        for one in named
        if one.name not in follows and (one.absent is None or not one.name.startswith(("proposals.", "proposer")))
    ]


def as_setting(difference: Difference) -> Difference:
    """A difference of two manifests with the setting's name and its values as people type them.

    Anything but a setting, such as the digest of a file, stays as it is.
    """
    name, bracket, place = difference.name.partition("[")
    setting = setting_name(name)
    if setting is None:
        return difference
    section, _, key = setting.partition(".")
    words = FORMER_VALUES.get((section, key), {})
    stored, wanted = (words.get(v, v) if isinstance(v, str) else v for v in (difference.stored, difference.wanted))
    absent = difference.absent
    if absent is not None and setting in UNSAID:
        stored, wanted = (UNSAID[setting], wanted) if absent == "stored" else (stored, UNSAID[setting])
        absent = None
    return dataclasses.replace(
        difference, name=f"{setting}{bracket}{place}", stored=stored, wanted=wanted, absent=absent
    )


def setting_name(name: str) -> str | None:
    """Today's name of the setting that a manifest's dotted name stands for; None where it stands for none."""
    if name in _PLACES:
        return _PLACES[name]
    table, _, key = name.rpartition(".")
    if table == "proposer.network" and key != "weights":
        return f"proposer.{key}"
    if table == "teacher.adapt":
        return f"adapt.{FORMER['adapt'].get(key, key)}"
    today = FORMER["proposals"].get(key, key)
    return f"proposals.{today}" if table in ("proposals", "regions") and today in _PROPOSALS else None
