"""Tables of the report: results, re-normalisation, classes, times, provenance, and the commands that repeat it."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ezsd.cache import Manifest
from ezsd.errors import quantity
from ezsd.pipeline.config.schema import STAGE_ONE, load_preset, preset_names, to_tables
from ezsd.pipeline.data.datasets import DATASETS, DRAWN
from ezsd.pipeline.extraction.provenance import built_settings
from ezsd.pipeline.inference import evaluation_tables as evaluations
from ezsd.pipeline.inference.evaluation_tables import COLUMNS, GROUPS, SHAPES, at_limit, evaluated
from ezsd.pipeline.inference.predictor import run_manifest
from ezsd.pipeline.report.run_data import (
    RunData,
    dataset_label,
    flat_settings,
    read_table,
    shell_command,
    shown_path,
    store_environment,
)
from ezsd.pipeline.runs.store_digests import read_stores

DASH = "\u2013"
"""Shown where there is no number."""


class Table(NamedTuple):
    """Titles of columns, and rows that begin with their own title."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Mapping[str, str] = MappingProxyType({})
    """Small print below the titles of some rows."""


_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First letters of what spreadsheets calculate. Names come from a dataset's file, which others may have made."""


def percent(value: float | None) -> str:
    """A fraction in percent; a dash for none."""
    return DASH if value is None else evaluations.percent(value)


def csv_address(content: Table) -> str:
    """A table as the data URL of a CSV file in UTF-8: numbers without thousands separators, nothing for a dash.

    A title that a spreadsheet would take for a formula begins with an apostrophe.
    """
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerow(content.head)
    for title, *values in content.rows:
        name = f"'{title}" if title.startswith(_FORMULA) else title
        writer.writerow([name, *("" if value == DASH else value.replace(",", "") for value in values)])
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(lines.getvalue().encode()).decode()


def results(runs: Sequence[RunData]) -> dict[str, Any]:
    """AP50 of all runs: titles of columns by group, and for each run its scores by group, in [0, 1]."""
    scores = [{} if run.evaluation is None else evaluations.headline(run.evaluation) for run in runs]
    rows = [
        {"label": run.label, "settings": _differing_settings(runs[0], run), "scores": of_run}
        for run, of_run in zip(runs, scores, strict=True)
    ]
    return {"columns": evaluations.headline_columns(scores), "rows": rows}


def _differing_settings(main: RunData, compared: RunData) -> str:
    """The settings of another run that differ from the main one's, a few of them."""
    if compared is main:
        return "this run"
    mine, theirs = flat_settings(main.spec["config"]), flat_settings(compared.spec["config"])
    differing = [f"{key} = {json.dumps(theirs[key])}" for key in sorted(theirs) if theirs[key] != mine.get(key)]
    if compared.spec["store"]["digest"] != main.spec["store"]["digest"]:
        differing.insert(0, "another store")
    if len(differing) > 4:
        differing[3:] = [f"and {len(differing) - 3} more"]
    return "; ".join(differing) or "the same settings"


def all_figures(runs: Sequence[RunData]) -> dict[str, dict[str, Table]]:
    """Figures of all groups at every limit, by run and by a title that says which."""
    return {run.label: _run_figures(run.evaluation) for run in runs if run.evaluation is not None}


def _run_figures(evaluation: Mapping[str, object]) -> dict[str, Table]:
    found: dict[str, Table] = {}
    for (space, table), key in product(evaluated(evaluation).items(), ("at", "masks_at")):
        for scores in table.get(key, {}).values():
            rows = {group: scores[group] for group in GROUPS if scores.get(group, {}).get("boxes")}
            title = (
                f"{space.replace('_', ' ')}, {SHAPES[scores['iou_type']]}, at most {scores['max_detections']} "
                f"detections per {scores['counted_per']}"
            )
            found[title] = _figures("classes", rows)
    return found


def _figures(title: str, scores: Mapping[str, Mapping[str, Any]]) -> Table:
    """AP and AR of groups or classes by their names."""
    rows = [[name, *(percent(one.get(key)) for key in COLUMNS), str(one["boxes"])] for name, one in scores.items()]
    return Table([title, *(f"{column}, %" for column in COLUMNS.values()), "objects"], rows)


def accuracies(main: RunData) -> Table:
    """The teacher's crop accuracy before and after re-normalisation, by kind of objects."""
    tuned, crops = main.spec["re_normalisation"], main.crops
    before, after = percent(tuned["base_accuracy_before"]), percent(tuned["base_accuracy_after"])
    rows = [["base, held out of the tuning", before, after, str(tuned["held_out_crops"])]]
    for group in ("base", "novel"):
        values = [DASH] * 3
        if crops is not None:
            values = [
                percent(crops["raw"][group]),
                percent(crops["re_normalised"][group]),
                str(crops["crops"][group]),
            ]
        rows.append([f"{group}, validation", *values])
    return Table(["objects", "right before, %", "right after, %", "crops"], rows)


def classes(runs: Sequence[RunData]) -> dict[str, Any]:
    """AP50 of each novel and base class, best first, beside that of the first compared run that is evaluated."""
    main = runs[0]
    scored = [(run.label, at_limit(run.evaluation, "generalised")["per_class"]) for run in runs if run.evaluation]
    own, (compared, theirs) = scored[0][1], scored[1] if len(scored) > 1 else (None, {})
    # The table itself comes out of JSON in alphabetical order.
    names = [name for name in main.spec["names"] if name in own]
    best_first = sorted(names, key=lambda name: -(own[name]["AP50"] or 0))
    rows = [(name, own[name]["AP50"], theirs.get(name, {}).get("AP50")) for name in best_first]
    groups = {
        "novel": [row for row in rows if row[0] in main.novel],
        "base": [row for row in rows if row[0] not in main.novel],
    }
    figures = _figures("class", {name: own[name] for name in names})
    grouped = [[name, "novel" if name in main.novel else "base", *values] for name, *values in figures.rows]
    return {
        "compared": compared,
        "groups": groups,
        "figures": Table([figures.head[0], "group", *figures.head[1:]], grouped),
    }


def times(runs: Sequence[RunData]) -> Table:
    """Wall-clock time of each stage, a column for each run."""
    recorded = store_environment(runs[0]).get("seconds")
    build = runs[0].environment.get("build_seconds") or (recorded if isinstance(recorded, dict) else {})
    columns = [run.seconds for run in runs]
    columns[0] = {f"cache: {stage}": float(seconds) for stage, seconds in build.items()} | columns[0]
    stages = dict.fromkeys(stage for column in columns for stage in column)
    rows = [[stage, *(_duration(column.get(stage)) for column in columns)] for stage in stages]
    return Table(["stage", *(run.label for run in runs)], rows)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.1f} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def provenance(main: RunData, data_root: Path | None) -> dict[str, str]:
    """Digests, seeds and versions of a run, by what they are called."""
    config, environment = main.spec["config"], main.environment
    stores = [f"{entry['sha256']} from step {entry['step']}" for entry in read_stores(main.run)]
    data_seed = _drawn_options(main, data_root).get("seed", "not recorded")
    store_seed = built_settings(run_manifest(main.run))["build"]["seed"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(environment.get("versions", {}).items()))
    teacher, pretrained = environment.get("teacher") or {}, bool(main.spec.get("backbone_weights"))
    return {
        "dataset": f"{main.spec['dataset']}: {dataset_label(main)}",
        "teacher": " ".join(str(teacher[key]) for key in ("name", "weights") if teacher.get(key)) or "not recorded",
        "store": main.spec["store"]["digest"],
        "its bytes": ", ".join(stores) or "not recorded",
        "seeds": f"data {data_seed}, store {store_seed}, training {config['train']['seed']}",
        "steps": f"{config['train']['steps']} of {quantity(config['train']['batch_size'], 'image')}",
        "backbone": f"{config['model']['backbone']}, from {'pretrained' if pretrained else 'random'} weights",
        "versions": f"{versions}; {environment.get('device', 'unknown device')}",
    }


def _drawn_options(main: RunData, data_root: Path | None) -> dict[str, Any]:
    """Options that embedded images were drawn with; empty for other datasets, and where the images are gone."""
    root = Path(str(main.environment["data_root"])) if data_root is None else data_root
    name = main.spec["dataset"]
    return (read_table(root / f"{DRAWN[name][0]}.json") or {}) if name in DRAWN else {}


def commands(runs: Sequence[RunData], data_root: Path | None) -> list[str]:
    """Commands that make this page again, from the images on."""
    main = runs[0]
    store, root = _recorded_path(main, "cache"), _recorded_path(main, "data_root")
    lines = []
    drawn = _drawn_options(main, data_root)
    if drawn:
        options = [word for key in ("train", "val", "seed") if key in drawn for word in (f"--{key}", str(drawn[key]))]
        lines.append(shell_command("ezsd", "data", str(drawn["dataset"]), "--out", root, *options))
    environment = store_environment(main)
    built = settings_to_build(run_manifest(main.run), environment)
    if isinstance(main.environment.get("teacher"), dict):
        built["teacher"] = main.environment["teacher"]
    # Of a dataset file the place is not recorded.
    dataset = str(main.spec["dataset"]) if main.spec["dataset"] in DATASETS else f"{main.spec['dataset']}.toml"
    build = ["ezsd", "cache", "build", "--dataset", dataset, "--data-root", root, "--out", store]
    limit = environment.get("limit")
    build += ["--limit", str(limit)] if limit else []
    lines.append(shell_command(*build, *_options(built)))
    for run in runs:
        folder = shown_path(run.run.folder)
        # The store has the rest, and `ezsd train` refuses it.
        options = _options({name: table for name, table in run.spec["config"].items() if name not in STAGE_ONE})
        lines.append(shell_command("ezsd", "train", "--cache", _recorded_path(run, "cache"), "--run", folder, *options))
        lines.append(run.command("eval", *(["--crops"] if run is main else [])))
    compared = [word for run in runs[1:] for word in ("--compare", shown_path(run.run.folder))]
    return [*lines, main.command("report", *compared)]


def settings_to_build(manifest: Manifest, environment: Mapping[str, Any]) -> dict[str, Mapping[str, object]]:
    """Settings that make a store again, by table: those of its manifest, with places of files from environment.json."""
    built: dict[str, Mapping[str, object]] = {**built_settings(manifest)}
    # The manifest has the digests of these.
    for section, key in (("proposals", "boxes"), ("proposer", "weights"), ("proposer", "run")):
        place = environment.get("config", {}).get(section, {}).get(key)
        if place and section in built:
            # A run decides the rest of its network.
            kept = {"max_proposals": built[section]["max_proposals"]} if key == "run" else built[section]
            built[section] = {**kept, key: shown_path(Path(place))}
    return built


def _recorded_path(run: RunData, key: str) -> str:
    return shown_path(Path(str(run.environment[key])))


def _options(config: Mapping[str, Mapping[str, object]]) -> list[str]:
    """The nearest preset and the settings that differ from it, as command-line options."""
    wanted = flat_settings(config)
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
