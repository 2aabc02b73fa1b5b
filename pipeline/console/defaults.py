"""Defaults and printed tables of commands. Loads nothing heavy before it is needed."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ezsd.pipeline.config.relations import load_settings
from ezsd.pipeline.config.schema import STAGE_ONE, Config, load_preset, setting_of
from ezsd.pipeline.data.datasets import DRAWN, Dataset
from ezsd.pipeline.errors import ArgumentError, ConfigError
from ezsd.pipeline.inference.evaluation_tables import headline_columns, percent

if TYPE_CHECKING:
    from ezsd.cache import Store

log = logging.getLogger("ezsd")


def build_config(
    preset: str,
    overrides: Sequence[str],
    *,
    teacher: str | None,
    weights: str | None,
    activation: str | None = None,
    backbone_weights: Path | None = None,
    prompts: Mapping[str, object] | None = None,
    proposals_from: Path | None = None,
) -> Config:
    """Configuration of a cache build: preset, then the dataset's prompts, `--set`, and the options for settings.

    Raises:
        ArgumentError: `proposals_from` is neither a run nor a file.
        ConfigError: `--set` says otherwise where proposals come from, or a value does not fit.
    """
    of_proposals = [] if proposals_from is None else _proposal_overrides(proposals_from, overrides)
    of_dataset = [_override(f"teacher.{key}", value) for key, value in (prompts or {}).items()]
    of_teacher = []
    if teacher is not None:
        of_teacher.append(_override("teacher.name", teacher))
    if weights is not None:
        of_teacher.append(_override("teacher.weights", weights))
    if activation is not None:
        of_teacher.append(_override("teacher.activation", activation))
    of_proposer = [] if backbone_weights is None else [_override("proposer.weights", str(backbone_weights))]
    config = load_settings(preset, [*of_dataset, *overrides, *of_teacher, *of_proposer, *of_proposals])
    if teacher is not None and weights is None:
        # Another teacher's weights would never fit.
        config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, weights=None))
    return config


def _override(setting: str, value: object) -> str:
    """An override with a text or a list of texts as TOML has them: it does not know JSON's pairs of surrogates."""
    return f"{setting}={json.dumps(value, ensure_ascii=False)}"


def _proposal_overrides(place: Path, overrides: Sequence[str]) -> list[str]:
    """Settings that `--proposals-from` stands for."""
    for override in overrides:
        if setting_of(override) in ("proposals.search", "proposals.boxes", "proposer.run"):
            raise ConfigError(
                f"--proposals-from {place} and --set {override} both say where proposals come from; leave one of them "
                "out"
            )
    if place.is_file():
        return [_override("proposals.boxes", str(place))]
    if (place / "run.json").is_file():
        return ["proposals.search=learned", _override("proposer.run", str(place))]
    raise ArgumentError(
        f"--proposals-from {place}: neither a run nor a file; give the folder of a finished `ezsd train`, or a results "
        "file in COCO's format"
    )


def require_known_teacher(config: Config) -> None:
    """Raise TeacherError for a teacher that is misspelt or lacks its weights, before data is drawn for it."""
    from ezsd.teacher.requirements import require_teacher

    require_teacher(config.teacher.name, config.teacher.weights)


def require_known_proposer(config: Config) -> None:
    """Raise BackboneError for a backbone of the learned proposer that is misspelt or missing, where one is trained."""
    from ezsd.detector.requirements import require_backbone

    if config.proposals.learned and config.proposer.run is None:
        require_backbone(config.proposer.backbone, "proposer")


def train_config(
    cache: Path,
    preset: str | None,
    overrides: Sequence[str],
    *,
    seed: int | None = None,
    backbone_weights: Path | None = None,
) -> tuple[Config, str]:
    """Configuration of a training from a store, and the preset that it starts from, by default the store's.

    Pseudo-labels that the preset alone asks for are left out, saying so, where the store's regions have no objectness.

    Raises:
        BackboneError: a backbone that is misspelt or missing.
        ConfigError: a setting that the store was built with, one that has no effect without weights of the backbone, a
            seed that is said twice, or a value that does not fit.
        StoreError: no complete store of regions.
    """
    _refuse_stage_one(cache, overrides)
    if backbone_weights is None:
        _refuse_frozen(overrides)
    overrides = [*overrides, *([] if seed is None else [_seed_override(seed, overrides)])]
    # What can be refused is, before a store is opened, which loads much.
    from ezsd.cache import Store

    # No rows are read of it here.
    store = Store(cache, verify="quick")
    store.require_regions()
    preset = preset or _preset_of(store)
    config = load_settings(preset, [*overrides, *_without_objectness(store, preset, overrides)])
    from ezsd.detector.requirements import require_backbone

    require_backbone(config.model.backbone)
    return config, preset


def _preset_of(store: Store) -> str:
    """The preset that a training from a store begins with: the one that the store was built with."""
    recorded = store.environment.get("preset")
    if recorded is not None:
        return str(recorded)
    from ezsd.pipeline.extraction.provenance import dataset_inputs

    return str(dataset_inputs(store.manifest)["name"])


def _refuse_frozen(overrides: Sequence[str]) -> None:
    for override in overrides:
        # -1 freezes none.
        if setting_of(override) == "model.frozen_stages" and override.partition("=")[2].strip() != "-1":
            raise ConfigError(
                f"--set {override}: without pretrained weights all stages are trained; give --backbone-weights, or "
                "leave it out"
            )


def _without_objectness(store: Store, preset: str, overrides: Sequence[str]) -> list[str]:
    from ezsd.pipeline.extraction.provenance import scored_by_objectness

    asked = any(setting_of(override) == "train.pseudo_confidence" for override in overrides)
    if asked or not load_preset(preset).train.pseudo_confidence or scored_by_objectness(store.manifest):
        return []
    log.info("no pseudo-labels: the regions of %s have no objectness of a proposal network", store.path)
    return ["train.pseudo_confidence=0"]


def _seed_override(seed: int, overrides: Sequence[str]) -> str:
    for override in overrides:
        if setting_of(override) == "train.seed":
            raise ConfigError(f"--seed {seed} and --set {override} both say the seed; leave one of them out")
    return f"train.seed={seed}"


def _refuse_stage_one(cache: Path, overrides: Sequence[str]) -> None:
    for override in overrides:
        section, dot, _ = setting_of(override).partition(".")
        if dot and section in STAGE_ONE:
            raise ConfigError(
                f"--set {override}: [{section}] is what the store {cache} was built with, and training does not change "
                f"it; build another store with it: ezsd cache build --set {override} --out STORE"
            )


def drawn(dataset: Dataset, root: Path | None) -> Dataset:
    """Check that a dataset's files are there; an embedded one is drawn when no folder is given and none is there."""
    if dataset.name in DRAWN and root is None and not dataset.root.exists():
        from ezsd.pipeline.data.shapes import write_shapes

        write_shapes(dataset.root, benchmark=DRAWN[dataset.name][0])
    return dataset.require()


def score_table(scores: Mapping[str, Mapping[str, float | None]]) -> str:
    """AP50 per run; generalised unless it says otherwise."""
    width = max(len(name) for name in [*scores, "AP50"])
    columns = headline_columns(scores.values())
    lines = [f"{'AP50':<{width}}" + "".join(f"  {said:>5}" for said in columns.values())]
    for name, row in scores.items():
        cells = (f"  {percent(row.get(key)):>{max(len(said), 5)}}" for key, said in columns.items())
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)


def crop_table(crops: Mapping[str, object]) -> str:
    """Crop accuracy of the teacher before and after re-normalisation."""
    lines = ["crop accuracy     base  novel"]
    for name in ("raw", "re_normalised"):
        row = crops[name]
        assert isinstance(row, Mapping)
        lines.append(f"{name:<16} {percent(row['base']):>5}  {percent(row['novel']):>5}")
    return "\n".join(lines)


def seconds_table(seconds: Mapping[str, float]) -> str:
    """Time per stage."""
    total = sum(seconds.values())
    return "\n".join(f"{stage:<16} {spent:7.1f} s" for stage, spent in [*seconds.items(), ("total", total)])
