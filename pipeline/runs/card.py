"""Run card: card.md in a run's folder, which says to others what the model is, as model cards do.

Written when a training ends, and anew by `ezsd eval` and `ezsd audit`. Everything in it comes from files of the run's
folder; of files elsewhere it has the names alone.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, cast

import yaml

from ezsd.cache import JSON, short_json
from ezsd.data.stream import is_finite
from ezsd.errors import quantity
from ezsd.pipeline.config.schema import PRESET_ALIASES, load_preset, preset_names, to_tables
from ezsd.pipeline.data.datasets import DRAWN
from ezsd.pipeline.files import as_json, read_object, reading, write_text
from ezsd.pipeline.runs.run import Checkpoint, Run
from ezsd.pipeline.runs.store_digests import read_stores
from ezsd.pipeline.runs.training_boxes import read_boxes

AUDITS = ("audit.json", "audit-ovd-strict.json")
"""Results of `ezsd audit` in a run's folder."""
_FILE = "card.md"
_NAMED = 80
"""Most class names in a list."""
_UNKNOWN = "not recorded"
_PLACES = frozenset(("teacher.weights", "proposals.boxes", "proposer.weights", "proposer.run"))
"""Settings that may name a file or a folder."""
_EVALUATE = "remove it and run `ezsd eval` again"
_MEASURE_CROPS = "remove it and run `ezsd eval --crops` again"
_AUDIT = "remove it and run `ezsd audit` again"
_RECORD = "run the same `ezsd train` again to write it"
_TRAIN = "train again in another `run` folder"


def has_card(run: Run) -> bool:
    """True if the run's folder has a card."""
    return (run.folder / _FILE).is_file()


def write_card(run: Run) -> Path:
    """Write the card of a run anew from what its folder holds now; returns its path.

    Raises:
        DamagedFile: a file of the run holds something else.
        ConfigError: run.json has a setting that is none.
        OSError: the folder cannot be written to.
    """
    path = run.folder / _FILE
    # Half of a surrogate pair can stand in JSON and in no text file.
    write_text(path, _Card(run).text().encode("utf-8", "backslashreplace").decode())
    return path


class _Card:
    """Contents of a run's folder, as a card shows them."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.name = run.folder.absolute().name
        self.spec = cast("Mapping[str, Any]", run.spec)
        self.environment = run.environment
        self.base: list[str] = self.spec["names"][: self.spec["base_count"]]
        self.novel: list[str] = self.spec["names"][self.spec["base_count"] :]
        # Refuses settings that are none.
        self.config = run.config
        with reading(run.folder / "eval.json", _EVALUATE):
            self.figures = _figures(_table(run, "eval.json"))
        self.has_leak = self._has_leak()

    def text(self) -> str:
        """The whole card, Markdown with YAML in front."""
        with reading(self.run.folder / "run.json", _TRAIN):
            parts = [self._summary(), self._use(), self._classes()]
        with reading(self.run.folder / "eval.json", _EVALUATE):
            front = yaml.safe_dump(self._front(), sort_keys=False, allow_unicode=True, width=1000)
            parts.append([*self._results(), *self._crops()])
        parts += [self._training(), self._settings(), self._audit(), self._limits()]
        return f"---\n{front}---\n\n" + "\n\n".join("\n".join(lines) for lines in parts) + "\n"

    def _front(self) -> dict[str, object]:
        found: dict[str, object] = {
            "library_name": "ezsd",
            "pipeline_tag": "zero-shot-object-detection",
            "tags": ["ezsd", "object-detection", "zero-shot-object-detection", "open-vocabulary-detection"],
        }
        if self.figures:
            dataset = str(self.spec["dataset"])
            metrics = [
                {"type": "ap50", "name": f"AP50, {group} classes", "value": round(100 * value, 1)}
                for group, value in ((group, row["AP50"]) for group, row in self.figures.items())
                if value is not None
            ]
            result = {
                "task": {"type": "object-detection"},
                "dataset": {"name": dataset, "type": dataset},
                "metrics": metrics,
            }
            found["model-index"] = [{"name": self.name, "results": [result]}]
        return found

    def _summary(self) -> list[str]:
        model, novel = self.config.model, quantity(len(self.novel), "novel class", "novel classes")
        if self.has_leak:
            given = (
                f"; that it was given no more than the names of {novel} is not claimed, for an audit found a violation "
            )
            given += "(see below). It"
        else:
            given = f" and the names alone of {novel}, and"
        return [
            f"# {_plain(self.name)}",
            "",
            f"An object detector made with ezsd: backbone `{model.backbone}`, head `{model.head}`. It was given "
            f"boxes of {quantity(len(self.base), 'base class', 'base classes')}{given} can be asked for other names "
            f"too. What it knows of {'those' if self.has_leak else 'them'} it has from the teacher "
            f"{_code(self._model()['name'])}.",
        ]

    def _use(self) -> list[str]:
        run = shlex.quote(self.name)
        return [
            "## How to use it",
            "",
            "```sh",
            f'ezsd detect photo.jpg --run {run} --classes "cat,red umbrella" --out found.png',
            f"ezsd eval --run {run} --data-root DIR",
            f"ezsd audit {run} --data-root DIR --cache STORE",
            "```",
        ]

    def _classes(self) -> list[str]:
        novel = _listed(self.novel) if self.novel else "none"
        return [
            "## Classes",
            "",
            f"**Base**, with boxes: {_listed(self.base)}",
            "",
            f"**Novel**{'' if self.has_leak else ', by name alone'}: {novel}",
        ]

    def _results(self) -> list[str]:
        lines = ["## Evaluation", ""]
        evaluation = _table(self.run, "eval.json")
        if evaluation is None or not self.figures:
            return [*lines, "None yet."]
        source = evaluation["annotations"]
        lines += ["| | AP | AP50 | AP75 |", "|---|---|---|---|"]
        lines += [
            f"| {group} | {' | '.join(_percent(row.get(key)) for key in ('AP', 'AP50', 'AP75'))} |"
            for group, row in self.figures.items()
        ]
        lines += ["", f"All classes at once, limit {evaluation['limit']}, on {_code(source['file'])} (sha256 "]
        lines[-1] += f"{source['sha256'][:12]})."
        return lines

    def _crops(self) -> list[str]:
        crops = _table(self.run, "crops.json")
        if not self.figures or crops is None or not {"raw", "re_normalised"} <= crops.keys():
            return []
        raw, tuned = crops["raw"], crops["re_normalised"]
        with reading(self.run.folder / "crops.json", _MEASURE_CROPS):
            line = "Accuracy of the teacher on crops of these objects, before and after re-normalisation: base "
            line += f"{_percent(raw['base'])} and {_percent(tuned['base'])}, novel {_percent(raw['novel'])} and "
            return ["", f"{line}{_percent(tuned['novel'])}."]

    def _training(self) -> list[str]:
        with reading(self.run.folder / "run.json", _TRAIN):
            rows = {
                "dataset": _plain(str(self.spec["dataset"])),
                "boxes": self._boxes(),
                "teacher": self._teacher(),
                "store": self._store(),
                "backbone's first weights": self._digest(self.spec.get("backbone_weights"), "random"),
                **self._progress(),
            }
        with reading(self.run.folder / "environment.json", _RECORD):
            stages = _numbers(self.environment.get("build_seconds"))
            rows |= {"time": "", "machine": self._machine()}
            rows["versions"] = ", ".join(f"{name} {version}" for name, version in self._versions().items()) or _UNKNOWN
        with reading(self.run.folder / "seconds.json", "remove it"):
            stages |= _numbers(self.run.seconds())
        rows["time"] = ", ".join(f"{stage} {spent:,.0f} s" for stage, spent in stages.items()) or _UNKNOWN
        return ["## Training", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]

    def _boxes(self) -> str:
        known = read_boxes(self.run)
        if not known:
            return _UNKNOWN
        return "; ".join(
            f"{one['boxes']:,} of base classes in {quantity(one['images'], 'image')} (digest {one['sha256'][:12]})"
            for one in known
        )

    def _model(self) -> Mapping[str, Any]:
        found = self.spec["store"].get("manifest", {}).get("products", {}).get("teacher", {}).get("inputs", {})
        model: Mapping[str, Any] = found.get("model", {})
        return {**model, "name": str(model.get("name", "unknown"))}

    def _teacher(self) -> str:
        model = self._model()
        return f"{_code(model['name'])}, weights {self._digest(model.get('weights_sha256'), _UNKNOWN)}"

    def _store(self) -> str:
        known = read_stores(self.run)
        if not known:
            return f"manifest {self.spec['store']['digest'][:12]}; bytes {_UNKNOWN}"
        return ", then ".join(f"sha256 {one['sha256']}" for one in known)

    def _digest(self, digest: object, without: str) -> str:
        return f"sha256 {digest}" if digest else without

    def _progress(self) -> dict[str, str]:
        train = self.config.train
        checkpoint = self.run.latest()
        done = 0 if checkpoint is None else checkpoint.step
        rows = {
            "steps": f"{done:,} of {train.steps:,}, {quantity(train.batch_size, 'image')} each",
            "seed": str(train.seed),
        }
        return rows if checkpoint is None else {**rows, "weights": f"sha256 {weights_digest(checkpoint)}"}

    def _machine(self) -> str:
        machine = self.environment.get("machine")
        if not isinstance(machine, Mapping):
            return _UNKNOWN
        words = [machine[key] for key in ("gpu", "processor", "system") if key in machine]
        return _plain(", ".join(map(str, words)))

    def _versions(self) -> dict[str, str]:
        found, machine = self.environment.get("versions"), self.environment.get("machine")
        return (dict(found) if isinstance(found, Mapping) else {}) | (
            {"Python": machine["python"]} if isinstance(machine, Mapping) else {}
        )

    def _settings(self) -> list[str]:
        preset = self.environment.get("preset")
        lines = ["## Settings", ""]
        if not isinstance(preset, str) or PRESET_ALIASES.get(preset, preset) not in preset_names():
            return [*lines, f"The preset that they came from was {_UNKNOWN}; `run.json` has all of them."]
        usual, own = as_json(to_tables(load_preset(preset))), self.spec["config"]
        changed = [
            f"| `{section}.{key}` | {_setting(f'{section}.{key}', value)} | "
            f"{_setting(f'{section}.{key}', usual[section].get(key))} |"
            for section, table in own.items()
            for key, value in table.items()
            if section in usual and value != usual[section].get(key)
        ]
        if not changed:
            return [*lines, f"Those of the preset `{preset}`."]
        return [
            *lines,
            f"Those of the preset `{preset}`, but for:",
            "",
            "| setting | here | preset |",
            "|---|---|---|",
            *changed,
        ]

    def _audit(self) -> list[str]:
        lines = ["## Audit", ""]
        for name in AUDITS:
            with reading(self.run.folder / name, _AUDIT):
                one = _table(self.run, name)
                if one is not None:
                    file = one["annotations"]
                    said = (
                        f"- `{one['setting']}`: {_plain(one['summary'])} ({one['date'][:10]}, at step {one['step']:,}, "
                    )
                    said += f"compared with {_code(file['file'])}, sha256 {file['sha256'][:12]})"
                    lines.append(f"{said}; outdated: the run has changed since" if self._is_outdated(one) else said)
        return lines if len(lines) > 2 else [*lines, "None yet: `ezsd audit` looks for novel boxes in every stage."]

    def _is_outdated(self, result: Mapping[str, Any]) -> bool:
        """True for an audit of another step, or of other bytes of the store, than the run's now."""
        checkpoint, stores = self.run.latest(), read_stores(self.run)
        step = 0 if checkpoint is None else checkpoint.step
        return result["step"] != step or bool(stores) and result["store"]["sha256"] != stores[-1]["sha256"]

    def _has_leak(self) -> bool:
        """True if a last audit found boxes that must not have entered; of names alone, they are what is claimed."""
        for name in AUDITS:
            with reading(self.run.folder / name, _AUDIT):
                found = (_table(self.run, name) or {"findings": []})["findings"]
                if any(one["level"] == "violation" and not one["subject"].startswith("names ") for one in found):
                    return True
        return False

    def _limits(self) -> list[str]:
        lines = ["## Limits", ""]
        if self.figures:
            lines.append(
                "- The figures of novel classes are for the names above, on that file and with all classes competing; "
                "for other names, images or prompts nothing was measured."
            )
        else:
            lines.append("- Nothing was measured: neither the names above nor others.")
        if self.spec["dataset"] in DRAWN:
            lines.append("- The images are drawn: nothing is said about photos.")
        return [
            *lines,
            f"- One training, seed {self.config.train.seed}: another seed gives other figures.",
            "- What the teacher and a pretrained backbone were trained on was not examined; they may have seen "
            "objects, names or images of the novel classes.",
            "- Scores are for ranking and thresholds; they are not calibrated probabilities.",
        ]


def _table(run: Run, name: str) -> dict[str, Any] | None:
    path = run.folder / name
    return read_object(path) if path.is_file() else None


def _figures(evaluation: Mapping[str, Any] | None) -> dict[str, Mapping[str, float | None]]:
    """AP, AP50 and AP75 of groups of classes in an eval.json, as today's version writes it."""
    if evaluation is None or not {"generalised", "limit", "annotations"} <= evaluation.keys():
        return {}
    at: Mapping[str, Any] = evaluation["generalised"]["at"][evaluation["limit"]]
    return {group: at[group] for group in ("base", "novel", "all") if group in at}


def weights_digest(checkpoint: Checkpoint) -> str:
    """Sha256 of the file of weights to detect with."""
    digests: Mapping[str, str] = read_object(checkpoint.folder / "state.json")["sha256"]
    return digests.get("average.safetensors", digests["model.safetensors"])


def _numbers(table: object) -> dict[str, float]:
    """Numbers of a table that are not 0. TypeError for what is none."""
    if not isinstance(table, Mapping):
        return {}
    if not all(value is None or is_finite(value) for value in table.values()):
        raise TypeError("expected numbers of seconds")
    return {key: value for key, value in table.items() if value}


def _setting(name: str, value: JSON) -> str:
    """A setting's value; of sentences from a file, and of places, the name alone."""
    if name == "teacher.descriptions" and value:
        return "`FILE`"
    if isinstance(value, str):
        place = PureWindowsPath(value)
        # Of whichever system it is a place; without a drive or a root only where a place is meant.
        if name in _PLACES or place.is_absolute() or PurePosixPath(value).is_absolute():
            value = place.name
    return _code(short_json(value))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return _plain(", ".join(names[:_NAMED])) + (f" and {more:,} more (`run.json`)" if more > 0 else "")


def _code(text: str) -> str:
    """Text as code, in a table too."""
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _plain(text: str) -> str:
    """Text that Markdown takes for nothing else."""
    escaped = "".join(f"\\{letter}" if letter in "\\`*[]<>|#" else letter for letter in text)
    return " ".join(escaped.split())
