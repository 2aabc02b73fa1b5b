"""Where a run comes from, and the commands that make it again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ezsd.pipeline.config.schema import STAGE_ONE, load_preset, preset_names, to_tables
from ezsd.pipeline.data.datasets import DATASETS
from ezsd.pipeline.extraction.provenance import built_settings
from ezsd.pipeline.inference.predictor import run_manifest
from ezsd.pipeline.report.html import Html, element
from ezsd.pipeline.report.run_data import (
    Facts,
    dataset_label,
    flat_settings,
    read_table,
    shell_command,
    shown_path,
    store_environment,
)
from ezsd.pipeline.runs.store_digests import read_stores


def provenance_section(facts: Sequence[Facts], data_root: Path | None) -> Html:
    """Digests, seeds, versions, and commands."""
    main = facts[0]
    drawn = _shapes_card(main, data_root)
    config, environment = main.card["config"], main.environment
    built = built_settings(run_manifest(main.run))
    versions = ", ".join(f"{name} {version}" for name, version in sorted(environment.get("versions", {}).items()))
    teacher = environment.get("teacher") or {}
    entries = {
        "dataset": f"{main.card['dataset']}: {dataset_label(main)}",
        "teacher": " ".join(str(teacher[key]) for key in ("name", "weights") if teacher.get(key)) or "not recorded",
        "store": main.card["store"]["digest"],
        "its bytes": _bytes(main),
        "seeds": f"data {drawn.get('seed', 'not recorded')}, "
        f"store {built['build']['seed']}, training {config['train']['seed']}",
        "steps": f"{config['train']['steps']} of {config['train']['batch_size']} images",
        "backbone": "ImageNet weights" if main.card.get("backbone_weights") else "from random weights",
        "versions": f"{versions}; {environment.get('device', 'unknown device')}",
    }
    rows = [Html(element("dt", key) + element("dd", value)) for key, value in entries.items()]
    commands = element("pre", element("code", "\n".join([*_drawing(main, drawn), *_commands(facts)])))
    return element("footer", element("h2", "Where it comes from"), element("dl", *rows), commands)


def _bytes(main: Facts) -> str:
    """Digests of all that the run was trained on, each from the step on that began with it."""
    return (
        ", ".join(f"{entry['sha256']} from step {entry['step']}" for entry in read_stores(main.run)) or "not recorded"
    )


def _shapes_card(main: Facts, data_root: Path | None) -> dict[str, Any]:
    """What `shapes` images were drawn from; empty for other datasets, and where the images are gone."""
    root = Path(str(main.environment["data_root"])) if data_root is None else data_root
    return (read_table(root / "shapes.json") or {}) if main.card["dataset"] == "shapes" else {}


def _drawing(main: Facts, card: Mapping[str, Any]) -> list[str]:
    options = [word for key in ("train", "val", "seed") if key in card for word in (f"--{key}", str(card[key]))]
    return [shell_command("ezsd", "data", "shapes", "--out", _shown_place(main, "data_root"), *options)] if card else []


def _commands(facts: Sequence[Facts]) -> list[str]:
    """What makes this page again, from the images on."""
    main = facts[0]
    store, root = _shown_place(main, "cache"), _shown_place(main, "data_root")
    limit = store_environment(main).get("limit")
    built: dict[str, Mapping[str, object]] = {**built_settings(run_manifest(main.run))}
    if isinstance(main.environment.get("teacher"), dict):
        built["teacher"] = main.environment["teacher"]
    build = ["ezsd", "cache", "build", "--dataset", _asked_for(main), "--data-root", root, "--out", store]
    build += ["--limit", str(limit)] if limit else []
    lines = [shell_command(*build, *_options(built))]
    for fact in facts:
        folder = shown_path(fact.run.folder)
        # The store has the rest, and `ezsd train` refuses it.
        options = _options({name: table for name, table in fact.card["config"].items() if name not in STAGE_ONE})
        lines.append(shell_command("ezsd", "train", "--cache", _shown_place(fact, "cache"), "--run", folder, *options))
        lines.append(fact.command("eval", "--crops") if fact is main else fact.command("eval"))
    others = [word for fact in facts[1:] for word in ("--compare", shown_path(fact.run.folder))]
    return [*lines, main.command("report", *others)]


def _shown_place(fact: Facts, key: str) -> str:
    return shown_path(Path(str(fact.environment[key])))


def _asked_for(main: Facts) -> str:
    """The dataset as `--dataset` has it; of one's own file the place is not recorded."""
    name = str(main.card["dataset"])
    return name if name in DATASETS else f"{name}.toml"


def _options(tables: Mapping[str, Mapping[str, object]]) -> list[str]:
    """The nearest preset and the settings that differ from it, as command-line options."""
    wanted = flat_settings(tables)
    choices = {}
    for name in preset_names():
        preset = flat_settings(to_tables(load_preset(name)))
        # TOML knows no null; where a preset has a value and the run none, no option can say so.
        choices[name] = {k: v for k, v in wanted.items() if v is not None and v != preset.get(k)}
    best = min(choices, key=lambda name: len(choices[name]))
    options = ["--preset", best]
    for key, value in sorted(choices[best].items()):
        options += ["--set", f"{key}={json.dumps(value)}"]
    return options
