"""`ezsd report`: one HTML page about a run, with everything inside it; the same bytes for the same run.

This is evaluation: like `pipeline.evaluate` it may look at novel boxes, and nothing it makes goes back into training.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cache import RegionRows, Store, StoreError, StoreMismatch
from ezsd.data.annotations import AnnotationError, Annotations
from pipeline.build import take_first
from pipeline.config import load_preset, preset_names, to_tables
from pipeline.datasets import Dataset, DatasetError, read_dataset_image
from pipeline.draw import BASE_COLOUR, NOVEL_COLOUR, draw_boxes, fit_scale
from pipeline.evaluate import headline, run_dataset
from pipeline.parsed import evaluation_annotations, training_annotations
from pipeline.runs import Run, RunError, write_text

log = logging.getLogger("ezsd")

SHOWN_SCORE = 0.3
"""Detections below it are not drawn."""
SHOWN_DETECTIONS = 20
"""At most so many are drawn per image, best first."""
SHOWN_REGIONS = 10
"""Regions of the store drawn per image, best first."""

_UNFOLDED = 6
_PANEL_SIDE = 640
_CURVE_POINTS = 80
_RUN_COLOURS = 6
_INK_STAND_IN, _RULE_STAND_IN = "#010203", "#010204"
_DASHES = ("-", "--", ":", "-.")
_GROUPS = {"base": "base", "novel": "novel", "all": "all", "novel_only": "novel names only"}
_LABELS = {
    "shapes": "shapes benchmark, synthetic; not COCO",
    "coco": "a folder in COCO's layout, 48 base and 17 novel classes",
}
_DASH = "\u2013"
_VOID = frozenset({"meta", "img"})


class Html(str):
    """Markup as it stands; text that is not Html is escaped when it enters an element."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str) -> Html:
    """One element; of attributes' names, `class_` means class and `http_equiv` means http-equiv."""
    inside = "".join(child if isinstance(child, Html) else escape(child) for child in children)
    said = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{said}>" if name in _VOID else f"<{name}{said}>{inside}</{name}>")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What one run's folder says."""

    run: Run
    label: str
    card: dict[str, Any]
    environment: dict[str, Any]
    evaluation: dict[str, Any] | None
    """None until `ezsd eval`."""
    crops: dict[str, Any] | None
    """None until `ezsd eval --crops`."""
    metrics: list[dict[str, float]]
    seconds: dict[str, float]

    @property
    def novel(self) -> frozenset[str]:
        """Names without training boxes."""
        return frozenset(self.card["names"][self.card["base_count"] :])

    def command(self, verb: str, *options: str) -> str:
        """A command about this run."""
        return _command("ezsd", verb, "--run", _shown(self.run.folder), *options)


def write_report(run: Run, *, data_root: Path | None, compare: Sequence[Run] = (), images: int = 12) -> Path:
    """Write RUN/report.html and return its path.

    Pictures whose images or store are gone are replaced by a sentence that says so.

    Args:
        run: an evaluated run.
        data_root: where the images lie now; None takes the place recorded in the run.
        compare: other runs on the same dataset, for example one without distillation.
        images: pictures in each of the two galleries.

    Raises:
        RunError: the run is not evaluated yet, or a compared one is of another dataset.
        DatasetError: there is no dataset in `data_root`.
    """
    facts = _collect([run, *compare])
    if facts[0].evaluation is None:
        raise RunError(f"--run {run.folder}: not evaluated yet; run `{facts[0].command('eval')}` first")
    if data_root is not None:
        run_dataset(run, data_root)
    path = run.folder / "report.html"
    # Pure ASCII, so that no locale can change it on the way to the disk.
    write_text(path, _page(facts, data_root, max(images, 0)).encode("ascii", "xmlcharrefreplace").decode())
    return path


def _collect(runs: Sequence[Run]) -> list[_Facts]:
    names = [run.folder.absolute().name for run in runs]
    facts = []
    for run, name in zip(runs, names, strict=True):
        folder, card = run.folder, run.card
        if card["dataset"] != runs[0].card["dataset"]:
            both = f"{card['dataset']}, not on {runs[0].card['dataset']}"
            raise RunError(f"--compare {folder}: trained on {both}; compare runs of one dataset")
        facts.append(
            _Facts(
                run=run,
                label=name if names.count(name) == 1 else _shown(folder),
                card=card,
                environment=run.environment,
                evaluation=_read_table(folder / "eval.json"),
                crops=_read_table(folder / "crops.json"),
                metrics=run.read_metrics(),
                seconds=_read_table(folder / "seconds.json") or {},
            )
        )
    return facts


def _read_table(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None if there is no such file."""
    if not path.is_file():
        return None
    table: dict[str, Any] = json.loads(path.read_text())
    return table


def _shown(path: Path) -> str:
    """A path as one would type it here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _command(*words: str) -> str:
    return " ".join(shlex.quote(word) for word in words)


# The page -------------------------------------------------------------------------------------------------------------


def _page(facts: Sequence[_Facts], data_root: Path | None, images: int) -> str:
    main = facts[0]
    sections = [
        _header(main),
        _results(facts),
        _pictures(
            "What the detector sees",
            f"Validation images, chosen by number and those with novel objects first, never by result. Drawn are "
            f"detections with a score of {SHOWN_SCORE} or more.",
            lambda: _detection_gallery(main, run_dataset(main.run, data_root), images),
        ),
        _pictures(
            "What the teacher proposed",
            f"Training images with the {SHOWN_REGIONS} surest regions of the store and the teacher's guess. From such "
            f"regions the detector learns novel classes; the novel boxes of the ground truth it has never met.",
            lambda: _region_gallery(main, run_dataset(main.run, data_root), images),
        ),
        _renormalisation(main),
        _classes(facts),
        _curves(facts),
        _times(facts),
        _provenance(facts, data_root),
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; img-src data:; style-src 'unsafe-inline'",
        ),
        element("title", f"ezsd: {main.label}"),
        element("style", Html(_style())),
    )
    body = element("body", element("main", *sections))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _section(title: str, lead: str | Html, *body: str) -> Html:
    return element("section", element("h2", title), element("p", lead, class_="lead"), *body)


def _note(text: str, command: str | None = None) -> Html:
    said = [element("span", text)] + ([Html(" "), element("code", command)] if command else [])
    return element("p", *said, class_="note")


def _header(main: _Facts) -> Html:
    base, novel = main.card["base_count"], len(main.novel)
    sentence = (
        f"An object detector that was shown boxes of {base} base classes and is asked to find {novel} novel classes by "
        f"their names alone, with what it learned from the features of a vision-language teacher."
    )
    return element(
        "header",
        element("p", "ezsd report", class_="eyebrow"),
        element("h1", main.label),
        element("p", sentence, class_="lead"),
        element("p", element("span", _dataset_label(main), class_="badge"), " ", _legend()),
    )


def _dataset_label(main: _Facts) -> str:
    name = str(main.card["dataset"])
    return _LABELS.get(name, name)


def _legend() -> Html:
    keys = [
        element("span", element("i", class_=f"key {group}"), f"{group} class", class_="legend")
        for group in ("base", "novel")
    ]
    return element("span", *keys)


# Numbers --------------------------------------------------------------------------------------------------------------


def _results(facts: Sequence[_Facts]) -> Html:
    head = element("tr", element("th", "run"), *(element("th", said) for said in _GROUPS.values()))
    rows = [_result_row(fact, facts[0]) for fact in facts]
    table = element("table", element("thead", head), element("tbody", *rows), class_="results")
    missing = [fact for fact in facts if fact.evaluation is None]
    notes = [_note(f"{fact.label} is not evaluated yet:", fact.command("eval")) for fact in missing]
    return _section("Results", _conditions(facts[0]), _wide(table), *notes)


def _conditions(main: _Facts) -> Html:
    assert main.evaluation is not None
    general = main.evaluation["generalised"]
    counts = [f"{general[g]['boxes']} objects of {general[g]['classes']} {g} classes" for g in ("base", "novel")]
    text = (
        f" AP50 in percent on {general['images']} validation images with {' and '.join(counts)}. In the first three "
        f"columns all {len(general['names'])} names are looked for at once; in the last one the novel names alone. "
        f"Each row is one run with one seed."
    )
    return Html(element("strong", f"{_dataset_label(main)}.") + escape(text))


def _result_row(fact: _Facts, main: _Facts) -> Html:
    scores: Mapping[str, float | None] = {} if fact.evaluation is None else headline(fact.evaluation)
    differs = "this run" if fact is main else "; ".join(_differences(main, fact)) or "the same settings"
    name = element("th", fact.label, element("small", differs), scope="row")
    return element("tr", name, *(_bar_cell(scores.get(group), group) for group in _GROUPS))


def _bar_cell(value: float | None, group: str) -> Html:
    width = 0 if value is None else 100 * value
    return element("td", _percent(value), class_=group, style=f"--part:{width:.1f}%")


def _percent(value: float | None) -> str:
    return _DASH if value is None else f"{100 * value:.1f}"


def _differences(main: _Facts, other: _Facts) -> list[str]:
    """In which settings another run differs, a few of them."""
    mine, theirs = _flat(main.card["config"]), _flat(other.card["config"])
    found = [f"{key} = {json.dumps(theirs[key])}" for key in sorted(theirs) if theirs[key] != mine.get(key)]
    if other.card["store"]["digest"] != main.card["store"]["digest"]:
        found.insert(0, "another store")
    return found if len(found) <= 4 else [*found[:3], f"and {len(found) - 3} more"]


def _flat(tables: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    return {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}


def _renormalisation(main: _Facts) -> Html:
    head = [element("th", text) for text in ("objects", "before", "after", "crops")]
    body = [
        element("tr", element("th", name, scope="row"), *(element("td", value) for value in values))
        for name, values in _accuracies(main).items()
    ]
    table = element("table", element("thead", element("tr", *head)), element("tbody", *body))
    lead = (
        "How many crops of single objects the teacher names rightly, in percent, before and after its LayerNorms were "
        "tuned on base objects. Held-out crops are compared with the base names, validation crops with all names."
    )
    missing = _note("Accuracy on validation objects is measured by", main.command("eval", "--crops"))
    return _section("Re-normalisation of the teacher", lead, _wide(table), *([] if main.crops else [missing]))


def _accuracies(main: _Facts) -> dict[str, tuple[str, str, str]]:
    """Before, after and number of crops, by kind of objects."""
    card, crops = main.card["re_normalisation"], main.crops
    before, after = card["base_accuracy_before"], card["base_accuracy_after"]
    rows = {"base, held out of the tuning": (_percent(before), _percent(after), str(card["held_out_crops"]))}
    for group in ("base", "novel"):
        rows[f"{group}, validation"] = (_DASH, _DASH, _DASH)
        if crops is not None:
            raw, tuned, count = (crops[key][group] for key in ("raw", "re_normalised", "crops"))
            rows[f"{group}, validation"] = (_percent(raw), _percent(tuned), str(count))
    return rows


def _classes(facts: Sequence[_Facts]) -> Html:
    """Bars of AP50 per class; marks show the first compared run that is evaluated."""
    evaluated = [fact for fact in facts if fact.evaluation is not None]
    tables = [fact.evaluation["generalised"]["AP50_per_class"] for fact in evaluated if fact.evaluation]
    other = tables[1] if len(tables) > 1 else {}
    # The table itself comes out of JSON in alphabetical order.
    names = [name for name in facts[0].card["names"] if name in tables[0]]
    groups = []
    for title, chosen in (
        ("novel", [name for name in names if name in facts[0].novel]),
        ("base", [name for name in names if name not in facts[0].novel]),
    ):
        best_first = sorted(chosen, key=lambda name: -(tables[0][name] or 0))
        rows = [_class_row(name, tables[0][name], other.get(name), title) for name in best_first]
        groups.append(element("div", element("h3", f"{title} classes"), *rows))
    lead = "AP50 in percent when all names are looked for at once."
    if other:
        lead += f" The upright mark is {evaluated[1].label}."
    return _section("Class by class", lead, element("div", *groups, class_="columns"))


def _class_row(name: str, value: float | None, other: float | None, group: str) -> Html:
    bar = element("i", class_=f"fill {group}", style=f"width:{100 * (value or 0):.1f}%")
    mark = element("i", class_="mark", style=f"left:{100 * other:.1f}%") if other is not None else Html("")
    return element(
        "div",
        element("span", name, class_="name"),
        element("span", bar, mark, class_="track"),
        element("span", _percent(value), class_="value"),
        class_="class",
    )


def _times(facts: Sequence[_Facts]) -> Html:
    recorded = _store_environment(facts[0]).get("seconds")
    build = facts[0].environment.get("build_seconds") or (recorded if isinstance(recorded, dict) else {})
    columns = [_stages(fact) for fact in facts]
    columns[0] = {f"cache: {stage}": float(spent) for stage, spent in build.items()} | columns[0]
    stages = list(dict.fromkeys(stage for column in columns for stage in column))
    head = element("tr", element("th", "stage"), *(element("th", fact.label) for fact in facts))
    body = [
        element("tr", element("th", stage, scope="row"), *(element("td", _duration(c.get(stage))) for c in columns))
        for stage in stages
    ]
    table = element("table", element("thead", head), element("tbody", *body))
    where = facts[0].environment.get("device", "unknown device")
    lead = f"Wall-clock time of each stage as recorded, on {where}; training is the sum of its steps."
    return _section("Time", lead, _wide(table) if body else _note("No times were recorded."))


def _stages(fact: _Facts) -> dict[str, float]:
    steps = [line["seconds"] for line in fact.metrics if "seconds" in line]
    return ({"train": math.fsum(steps)} if steps and "train" not in fact.seconds else {}) | dict(fact.seconds)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return _DASH
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.1f} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _wide(table: Html) -> Html:
    """A table that scrolls by itself where it is wider than the screen."""
    return element("div", table, class_="wide")


# Curves ---------------------------------------------------------------------------------------------------------------


def _curves(facts: Sequence[_Facts]) -> Html:
    parts = list(dict.fromkeys(key for fact in facts for line in fact.metrics for key in line))
    parts = [part for part in parts if part not in ("step", "seconds", "learning_rate")]
    lead = "Training loss over steps, averaged in short spans: the weighted sum, then its parts without their weights."
    if not parts:
        return _section("Training", lead, _note("No metrics were recorded."))
    charts = [
        element("figure", element("figcaption", part.replace("_", " ")), _curve(part, facts, number), class_="chart")
        for number, part in enumerate(parts)
    ]
    keys = [_run_key(i, fact.label) for i, fact in enumerate(facts)]
    return _section("Training", lead, element("p", *keys), element("div", *charts, class_="charts"))


def _run_key(number: int, label: str) -> Html:
    swatch = element("i", class_="key", style=f"background:var(--run-{number % _RUN_COLOURS})")
    return element("span", swatch, label, class_="legend")


def _curve(part: str, facts: Sequence[_Facts], number: int) -> Html:
    """One small chart, coloured by the page's own style so that it follows light and dark."""
    # The salt makes the same ids on every run; text stays text in the page's own font.
    with matplotlib.rc_context({"svg.hashsalt": "ezsd", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(3.5, 1.9), layout="constrained")
        axes = figure.add_subplot()
        highest = 0.0
        for i, fact in enumerate(facts):
            steps, values = _averaged(fact.metrics, part)
            axes.plot(steps, values, _DASHES[i % len(_DASHES)], color=_run_stand_in(i % _RUN_COLOURS), linewidth=1.4)
            # The first spans are often far above all others and would flatten them.
            highest = max([highest, *values[len(values) // 20 :].tolist()])
        axes.set_ylim(0, 1.08 * highest or 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_RULE_STAND_IN)
        axes.tick_params(color=_RULE_STAND_IN, labelcolor=_INK_STAND_IN, length=3)
        axes.grid(axis="y", color=_RULE_STAND_IN, linewidth=0.5)
        document = io.StringIO()
        figure.savefig(document, format="svg", transparent=True, metadata={"Date": None})
    return _inline_svg(document.getvalue(), f"curve-{number}", f"{part.replace('_', ' ')} over training steps")


def _run_stand_in(number: int) -> str:
    """The colour that Matplotlib draws a run in, which the page's style then replaces."""
    return f"#0102{10 + number:02d}"


def _averaged(metrics: Sequence[Mapping[str, float]], part: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values, means over equal spans, at most `_CURVE_POINTS` of each."""
    points = np.array([(line["step"], line[part]) for line in metrics if part in line], np.float64).reshape(-1, 2)
    spans = np.array_split(points, min(len(points), _CURVE_POINTS)) if len(points) else []
    means = np.array([span.mean(0) for span in spans]).reshape(-1, 2)
    return means[:, 0], means[:, 1]


def _inline_svg(document: str, prefix: str, label: str) -> Html:
    """The svg element of a document, without addresses, with ids of its own and the page's colours."""
    svg = document[document.index("<svg") :].strip()
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    opening = re.match(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', svg)
    assert opening is not None
    svg = f'<svg {opening[1]} role="img" aria-label="{escape(label)}">{svg[opening.end() :]}'
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    colours = {_run_stand_in(i): f"var(--run-{i})" for i in range(_RUN_COLOURS)}
    colours |= {_INK_STAND_IN: "currentColor", _RULE_STAND_IN: "var(--rule)"}
    for colour, variable in colours.items():
        svg = svg.replace(colour, variable)
    return Html(svg)


# Pictures -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Panel:
    """One drawn image and what it shows."""

    title: str
    picture: Image.Image
    names: Sequence[str]


def _pictures(title: str, lead: str, make: Callable[[], Html]) -> Html:
    try:
        body = make()
    except (AnnotationError, DatasetError, RunError, StoreError, OSError) as error:
        log.warning("report: no pictures: %s", error)
        body = _note(f"No pictures: {error}")
    return _section(title, lead, body)


def _detection_gallery(main: _Facts, dataset: Dataset, count: int) -> Html:
    found = _detections_by_image(main)
    annotations = evaluation_annotations(dataset.root / dataset.val_annotations, dataset.split)
    figures = []
    for position in _choose(annotations, range(len(annotations.images)), main.novel, count):
        record = annotations.images[position]
        pixels = read_dataset_image(dataset.root / dataset.val_images, record.file_name, record.width, record.height)
        best = sorted(found.get(record.id, []), key=lambda one: -one["score"])[:SHOWN_DETECTIONS]
        xywh = np.array([one["bbox"] for one in best], np.float32).reshape(-1, 4)
        boxes = torch.from_numpy(np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1))
        captions = [f"{one['name']} {one['score']:.2f}" for one in best]
        names = [str(one["name"]) for one in best]
        detected = _panel("detections", pixels, boxes, names, main.novel, captions)
        figures.append(_figure(record.file_name, _truth_panel(pixels, annotations, position, main.novel), detected))
    return _gallery(figures)


def _detections_by_image(main: _Facts) -> dict[int, list[dict[str, Any]]]:
    """What is drawn, by image id, in COCO's form with the class by its name."""
    path = main.run.folder / "detections.json"
    if not path.is_file():
        raise RunError(f"{path}: missing; `{main.command('eval')}` makes it")
    by_image: dict[int, list[dict[str, Any]]] = {}
    for one in json.loads(path.read_text()):
        if one["score"] >= SHOWN_SCORE:
            by_image.setdefault(one["image_id"], []).append(one)
    return by_image


def _region_gallery(main: _Facts, dataset: Dataset, count: int) -> Html:
    store = _store(main)
    _require_same_boxes(store, dataset)
    annotations = evaluation_annotations(dataset.root / dataset.train_annotations, dataset.split)
    regions, (table, _) = store.regions, store.text
    positions = [position for position, record in enumerate(annotations.images) if record.id in regions]
    figures = []
    for position in _choose(annotations, positions, main.novel, count):
        record = annotations.images[position]
        pixels = read_dataset_image(dataset.root / dataset.train_images, record.file_name, record.width, record.height)
        boxes, names = _best_regions(regions[record.id], table)
        proposed = _panel("teacher's regions", pixels, boxes, names, main.novel)
        figures.append(_figure(record.file_name, _truth_panel(pixels, annotations, position, main.novel), proposed))
    return _gallery(figures)


def _best_regions(rows: RegionRows, table: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Boxes (n, 4) of the surest regions, best first, and their guessed names."""
    order = np.argsort(-rows.score, kind="stable")[:SHOWN_REGIONS]
    return torch.from_numpy(rows.box[order]), [table[index] for index in rows.class_index[order]]


def _store(main: _Facts) -> Store:
    """The run's store, where it was when the run was trained."""
    store = Store(str(main.environment["cache"]))
    if store.manifest.digest != main.card["store"]["digest"]:
        raise StoreMismatch(f"{store.path}: holds another store now than the one this run was trained from")
    return store


def _store_environment(main: _Facts) -> dict[str, Any]:
    """What the store's environment.json says, if it is still there."""
    return _read_table(Path(str(main.environment["cache"])) / "environment.json") or {}


def _require_same_boxes(store: Store, dataset: Dataset) -> None:
    path = dataset.root / dataset.train_annotations
    digest = take_first(training_annotations(path, dataset.split), len(store.image_ids)).digest()
    fields = store.manifest.fields["dataset"]
    assert isinstance(fields, dict)
    if digest["boxes"] != fields["base_boxes_sha256"]:
        raise StoreMismatch(f"{store.path}: made from other annotations than {path}; give the right --data-root")


def _choose(annotations: Annotations, positions: Iterable[int], novel: frozenset[str], count: int) -> list[int]:
    """The first images that show a novel object; the first others where those are too few."""
    novel_boxes = np.array([name in novel for name in annotations.names])[annotations.class_index]
    shows_novel = set(annotations.image_index[novel_boxes].tolist())
    return sorted(positions, key=lambda position: (position not in shows_novel, position))[:count]


def _truth_panel(pixels: Tensor, annotations: Annotations, position: int, novel: frozenset[str]) -> _Panel:
    rows = annotations.rows(position)
    names = [annotations.names[index] for index in annotations.class_index[rows]]
    pairs = zip(names, annotations.crowd[rows], strict=True)
    captions = [f"{name} (group)" if crowd else name for name, crowd in pairs]
    return _panel("ground truth", pixels, torch.from_numpy(annotations.box[rows]), names, novel, captions)


def _panel(
    title: str,
    pixels: Tensor,
    boxes: Tensor,
    names: Sequence[str],
    novel: frozenset[str],
    captions: Sequence[str] | None = None,
) -> _Panel:
    """Draw boxes coloured by base and novel; captions are the names unless given."""
    height, width = pixels.shape[1:]
    scale = min(fit_scale(width, height), _PANEL_SIDE / max(width, height))
    colours = [NOVEL_COLOUR if name in novel else BASE_COLOUR for name in names]
    picture = draw_boxes(pixels, boxes, names if captions is None else captions, colours, scale=scale)
    return _Panel(title, picture, names)


def _figure(file_name: str, *panels: _Panel) -> Html:
    shown = [
        element(
            "div",
            element("img", src=_data_address(panel.picture), alt=_describe(panel, file_name), **_size(panel.picture)),
            element("p", panel.title),
        )
        for panel in panels
    ]
    return element("figure", element("figcaption", file_name), element("div", *shown, class_="panels"), class_="pair")


def _describe(panel: _Panel, file_name: str) -> str:
    return f"{panel.title} in {file_name}: {', '.join(panel.names) or 'nothing'}"


def _size(picture: Image.Image) -> dict[str, str]:
    return {"width": str(picture.width), "height": str(picture.height)}


def _data_address(picture: Image.Image) -> str:
    data = io.BytesIO()
    # Full colour resolution: thin coloured lines would smear.
    picture.save(data, "JPEG", quality=85, subsampling=0, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _gallery(figures: Sequence[Html]) -> Html:
    """All figures, those after the first few folded away."""
    if not figures:
        return _note("No pictures were asked for.")
    shown = element("div", *figures[:_UNFOLDED], class_="gallery")
    rest = figures[_UNFOLDED:]
    if not rest:
        return shown
    summary = element("summary", f"{len(rest)} more")
    return Html(shown + element("details", summary, element("div", *rest, class_="gallery")))


# Provenance -----------------------------------------------------------------------------------------------------------


def _provenance(facts: Sequence[_Facts], data_root: Path | None) -> Html:
    main = facts[0]
    drawn = _shapes_card(main, data_root)
    config, environment = main.card["config"], main.environment
    manifest = main.card["store"]["manifest"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(environment.get("versions", {}).items()))
    teacher = environment.get("teacher") or {}
    entries = {
        "dataset": f"{main.card['dataset']}: {_dataset_label(main)}",
        "teacher": " ".join(str(teacher[key]) for key in ("name", "weights") if teacher.get(key)) or "not recorded",
        "store": main.card["store"]["digest"],
        "seeds": f"data {drawn.get('seed', 'not recorded')}, "
        f"store {manifest.get('build', {}).get('seed', 'unknown')}, training {config['train']['seed']}",
        "steps": f"{config['train']['steps']} of {config['train']['images']} images",
        "backbone": "ImageNet weights" if main.card.get("backbone_weights") else "from random weights",
        "versions": f"{versions}; {environment.get('device', 'unknown device')}",
    }
    rows = [Html(element("dt", key) + element("dd", value)) for key, value in entries.items()]
    commands = element("pre", element("code", "\n".join([*_drawing(main, drawn), *_commands(facts)])))
    return element("footer", element("h2", "Where it comes from"), element("dl", *rows), commands)


def _shapes_card(main: _Facts, data_root: Path | None) -> dict[str, Any]:
    """What `shapes` images were drawn from; empty for other datasets, and where the images are gone."""
    root = Path(str(main.environment["data_root"])) if data_root is None else data_root
    return (_read_table(root / "shapes.json") or {}) if main.card["dataset"] == "shapes" else {}


def _drawing(main: _Facts, card: Mapping[str, Any]) -> list[str]:
    options = [word for key in ("train", "val", "seed") if key in card for word in (f"--{key}", str(card[key]))]
    return [_command("ezsd", "data", "shapes", "--out", _shown_place(main, "data_root"), *options)] if card else []


def _commands(facts: Sequence[_Facts]) -> list[str]:
    """What makes this page again, from the images on."""
    main = facts[0]
    dataset, store, root = str(main.card["dataset"]), _shown_place(main, "cache"), _shown_place(main, "data_root")
    manifest, limit = main.card["store"]["manifest"], _store_environment(main).get("limit")
    built = {section: manifest[section] for section in ("adapt", "proposals", "build") if section in manifest}
    if isinstance(main.environment.get("teacher"), dict):
        built["teacher"] = main.environment["teacher"]
    build = ["ezsd", "cache", "build", "--dataset", dataset, "--data-root", root, "--out", store]
    build += ["--limit", str(limit)] if limit else []
    lines = [_command(*build, *_options(built, dataset))]
    for fact in facts:
        folder = _shown(fact.run.folder)
        options = _options(fact.card["config"], dataset)
        lines.append(_command("ezsd", "train", "--cache", _shown_place(fact, "cache"), "--run", folder, *options))
        lines.append(fact.command("eval", "--crops") if fact is main else fact.command("eval"))
    others = [word for fact in facts[1:] for word in ("--compare", _shown(fact.run.folder))]
    return [*lines, main.command("report", *others)]


def _shown_place(fact: _Facts, key: str) -> str:
    return _shown(Path(str(fact.environment[key])))


def _options(tables: Mapping[str, Mapping[str, object]], dataset: str) -> list[str]:
    """The nearest preset and the settings that differ from it, as command-line options."""
    wanted = _flat(tables)
    choices = {}
    for name in preset_names():
        preset = _flat(to_tables(load_preset(name)))
        # TOML knows no null; where a preset has a value and the run none, no option can say so.
        choices[name] = {k: v for k, v in wanted.items() if v is not None and v != preset.get(k)}
    best = min(choices, key=lambda name: (len(choices[name]), name != dataset))
    options = [] if best == dataset else ["--preset", best]
    for key, value in sorted(choices[best].items()):
        options += ["--set", f"{key}={json.dumps(value)}"]
    return options


# Style ----------------------------------------------------------------------------------------------------------------


def _style() -> str:
    return _STYLE.replace("BASE_COLOUR", BASE_COLOUR).replace("NOVEL_COLOUR", NOVEL_COLOUR)


_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--sheet:#f6f7f9;--ink:#1a1d21;--soft:#5d6672;--rule:#d9dde3;
--base:BASE_COLOUR;--novel:NOVEL_COLOUR;--base-tint:#d8efe0;--novel-tint:#f9dbeb;--all-tint:#e4e8ee;
--run-0:#1f5fd0;--run-1:#d06a00;--run-2:#6d7580;--run-3:#7a3fc4;--run-4:#00857a;--run-5:#a8322a}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--sheet:#1d2127;--ink:#e8ebef;--soft:#9aa4b1;--rule:#363d47;
--base-tint:#173a28;--novel-tint:#4a1a36;--all-tint:#2a3038;
--run-0:#7aa8ff;--run-1:#ffad5c;--run-2:#a5aeba;--run-3:#c09bff;--run-4:#4fd1c5;--run-5:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:1160px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:2.2rem;line-height:1.15;margin:.1rem 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.35rem;margin:0 0 .25rem}
h3{font-size:.95rem;margin:0 0 .5rem}
section,footer{margin-top:3rem}
.eyebrow{margin:0;color:var(--soft);font-size:.85rem;letter-spacing:.06em;text-transform:uppercase}
.lead{max-width:46rem;margin:0 0 1rem;color:var(--soft)}
header .lead{font-size:1.1rem;color:var(--ink)}
.badge{display:inline-block;margin:0 .6rem .3rem 0;padding:.15rem .65rem;border-radius:1rem;
background:var(--all-tint);font-size:.85rem}
.legend{display:inline-block;margin-right:1rem;font-size:.85rem;color:var(--soft)}
.key{display:inline-block;width:.8em;height:.8em;margin-right:.4em;border-radius:2px}
.key.base,.fill.base{background:var(--base)}
.key.novel,.fill.novel{background:var(--novel)}
.note{padding:.6rem .9rem;border-left:3px solid var(--soft);background:var(--sheet);overflow-wrap:anywhere}
code{font:.87em ui-monospace,monospace}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.45rem .9rem;border-bottom:1px solid var(--rule);text-align:right;font-weight:400;vertical-align:top}
thead th{color:var(--soft);font-size:.85rem}
th:first-child{padding-left:0;text-align:left}
tbody th{overflow-wrap:anywhere}
small{display:block;color:var(--soft);font-size:.8rem}
.results{width:100%}
.results tbody td{width:17%;font-size:1.45rem;
background:linear-gradient(var(--tint),var(--tint)) left bottom/var(--part) 100% no-repeat}
.results td.base{--tint:var(--base-tint)}
.results td.novel,.results td.novel_only{--tint:var(--novel-tint)}
.results td.all{--tint:var(--all-tint)}
.columns,.charts{display:grid;gap:1.5rem 2.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,290px),1fr))}
.class{display:grid;grid-template-columns:7.5rem 1fr 3rem;gap:.6rem;align-items:center;font-size:.88rem}
.class .name{overflow-wrap:anywhere}
.class .value{text-align:right;font-variant-numeric:tabular-nums}
.track{position:relative;height:.8rem;background:var(--sheet)}
.fill{position:absolute;inset:0 auto 0 0}
.mark{position:absolute;top:-2px;bottom:-2px;width:2px;background:var(--ink)}
figure{margin:0}
.chart svg{display:block;width:100%;height:auto;stroke-linejoin:round}
.chart svg text{font-family:inherit!important}
figcaption{color:var(--soft);font-size:.85rem;overflow-wrap:anywhere}
.chart figcaption{text-align:center}
.gallery{display:grid;gap:1.5rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,500px),1fr))}
.pair figcaption{margin-bottom:.4rem}
.pair{padding:.75rem;border:1px solid var(--rule);border-radius:8px;background:var(--sheet)}
.panels{display:grid;gap:.75rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,220px),1fr))}
.panels img{display:block;width:100%;height:auto;border-radius:4px}
.panels p{margin:.25rem 0 0;font-size:.85rem;text-align:center}
details{margin-top:1.5rem}
summary{margin-bottom:1rem;cursor:pointer;color:var(--soft)}
footer{padding-top:1.5rem;border-top:1px solid var(--rule);font-size:.9rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.25rem;margin:1rem 0}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
pre{padding:.9rem;background:var(--sheet);border-radius:8px;white-space:pre-wrap;overflow-wrap:anywhere}
@media(max-width:560px){main{padding:1.5rem 1rem 3rem}h1{font-size:1.7rem}th,td{padding:.4rem .5rem}
.results tbody td{font-size:1.1rem}dl{grid-template-columns:1fr}dt{margin-top:.4rem}}
"""
