"""The tables: results, re-normalisation, classes, times."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import product
from typing import Any

from ezsd.pipeline.inference.evaluation_tables import (
    COLUMNS,
    GROUPS,
    SHAPES,
    at_limit,
    evaluated,
    headline,
    headline_columns,
)
from ezsd.pipeline.report.html import DASH, Html, element, note, percent, section, wide_table
from ezsd.pipeline.report.run_data import Facts, dataset_label, flat_settings, store_environment


def results_section(facts: Sequence[Facts]) -> Html:
    """AP50 of all runs, and all figures of the main one."""
    scores = [{} if fact.evaluation is None else headline(fact.evaluation) for fact in facts]
    columns = headline_columns(scores)
    head = element("tr", element("th", "run"), *(element("th", said) for said in columns.values()))
    rows = [_result_row(fact, facts[0], one, columns) for fact, one in zip(facts, scores, strict=True)]
    table = element("table", element("thead", head), element("tbody", *rows), class_="results")
    missing = [fact for fact in facts if fact.evaluation is None]
    notes = [note(f"{fact.label} is not evaluated yet:", fact.command("eval")) for fact in missing]
    lead = _conditions(facts[0], alone="novel_alone" in columns)
    return section("Results", lead, wide_table(table), *notes, _all_figures(facts[0]))


def _all_figures(main: Facts) -> Html:
    """The main run at every limit, folded away."""
    assert main.evaluation is not None
    tables = []
    for (space, table), figures in product(evaluated(main.evaluation).items(), ("at", "masks_at")):
        for found in table.get(figures, {}).values():
            rows = {group: found[group] for group in GROUPS if found.get(group, {}).get("boxes")}
            title = (
                f"{space.replace('_', ' ')}, {SHAPES[found['iou_type']]}, at most {found['max_detections']} detections "
                f"per {found['counted_per']}"
            )
            tables.append(element("div", element("h3", title), _figures("classes", rows)))
    lead = f"All figures of {main.label} in percent: AP and AR are means over IoU 0.50 to 0.95"
    return element("details", element("summary", lead), *tables)


def _conditions(main: Facts, *, alone: bool) -> Html:
    assert main.evaluation is not None
    general = at_limit(main.evaluation, "generalised")
    counts = [f"{general[g]['boxes']} objects of {general[g]['classes']} {g} classes" for g in ("base", "novel")]
    text = (
        f" AP50 in percent on {general['images']} validation images with {' and '.join(counts)}. All "
        f"{len(general['names'])} names are looked for at once"
        f"{'; in the last column the novel names, and no base name competes' if alone else ''}. At "
        f"most {general['max_detections']} detections per {general['counted_per']} count. Each row is one run with one "
        f"seed."
    )
    return Html(element("strong", f"{dataset_label(main)}.") + escape(text))


def _result_row(fact: Facts, main: Facts, scores: Mapping[str, float | None], columns: Iterable[str]) -> Html:
    differs = "this run" if fact is main else "; ".join(_differences(main, fact)) or "the same settings"
    name = element("th", fact.label, element("small", differs), scope="row")
    return element("tr", name, *(_bar_cell(scores.get(key), key) for key in columns))


def _bar_cell(value: float | None, group: str) -> Html:
    width = 0 if value is None else 100 * value
    return element("td", percent(value), class_=group, style=f"--part:{width:.1f}%")


def _differences(main: Facts, other: Facts) -> list[str]:
    """In which settings another run differs, a few of them."""
    mine, theirs = flat_settings(main.card["config"]), flat_settings(other.card["config"])
    found = [f"{key} = {json.dumps(theirs[key])}" for key in sorted(theirs) if theirs[key] != mine.get(key)]
    if other.card["store"]["digest"] != main.card["store"]["digest"]:
        found.insert(0, "another store")
    return found if len(found) <= 4 else [*found[:3], f"and {len(found) - 3} more"]


def renormalisation_section(main: Facts) -> Html:
    """The teacher's crop accuracy before and after."""
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
    missing = note("Accuracy on validation objects is measured by", main.command("eval", "--crops"))
    return section("Re-normalisation of the teacher", lead, wide_table(table), *([] if main.crops else [missing]))


def _accuracies(main: Facts) -> dict[str, tuple[str, str, str]]:
    """Before, after and number of crops, by kind of objects."""
    card, crops = main.card["re_normalisation"], main.crops
    before, after = card["base_accuracy_before"], card["base_accuracy_after"]
    rows = {"base, held out of the tuning": (percent(before), percent(after), str(card["held_out_crops"]))}
    for group in ("base", "novel"):
        rows[f"{group}, validation"] = (DASH, DASH, DASH)
        if crops is not None:
            raw, tuned, count = (crops[key][group] for key in ("raw", "re_normalised", "crops"))
            rows[f"{group}, validation"] = (percent(raw), percent(tuned), str(count))
    return rows


def classes_section(facts: Sequence[Facts]) -> Html:
    """Bars of AP50 per class, marks for the first compared run that is evaluated, and a table of all figures."""
    evaluated = [fact for fact in facts if fact.evaluation is not None]
    tables = [at_limit(fact.evaluation, "generalised")["per_class"] for fact in evaluated if fact.evaluation]
    main = {name: scores["AP50"] for name, scores in tables[0].items()}
    other = {name: scores["AP50"] for name, scores in tables[1].items()} if len(tables) > 1 else {}
    # The table itself comes out of JSON in alphabetical order.
    names = [name for name in facts[0].card["names"] if name in main]
    groups = []
    for title, chosen in (
        ("novel", [name for name in names if name in facts[0].novel]),
        ("base", [name for name in names if name not in facts[0].novel]),
    ):
        best_first = sorted(chosen, key=lambda name: -(main[name] or 0))
        rows = [_class_row(name, main[name], other.get(name), title) for name in best_first]
        groups.append(element("div", element("h3", f"{title} classes"), *rows))
    lead = "AP50 in percent when all names are looked for at once."
    if other:
        lead += f" The upright mark is {evaluated[1].label}."
    every = _figures("class", {name: tables[0][name] for name in names})
    folded = element("details", element("summary", "all figures"), every)
    return section("Class by class", lead, element("div", *groups, class_="columns"), folded)


def _figures(what: str, rows: Mapping[str, Mapping[str, Any]]) -> Html:
    """A table of AP, AP50, AP75, AR and boxes."""
    head = [element("th", text) for text in (what, *COLUMNS.values(), "objects")]
    body = [
        element(
            "tr",
            element("th", name, scope="row"),
            *(element("td", percent(scores.get(key))) for key in COLUMNS),
            element("td", str(scores["boxes"])),
        )
        for name, scores in rows.items()
    ]
    return wide_table(element("table", element("thead", element("tr", *head)), element("tbody", *body)))


def _class_row(name: str, value: float | None, other: float | None, group: str) -> Html:
    bar = element("i", class_=f"fill {group}", style=f"width:{100 * (value or 0):.1f}%")
    mark = element("i", class_="mark", style=f"left:{100 * other:.1f}%") if other is not None else Html("")
    return element(
        "div",
        element("span", name, class_="name"),
        element("span", bar, mark, class_="track"),
        element("span", percent(value), class_="value"),
        class_="class",
    )


def times_section(facts: Sequence[Facts]) -> Html:
    """Wall-clock time of each stage."""
    recorded = store_environment(facts[0]).get("seconds")
    build = facts[0].environment.get("build_seconds") or (recorded if isinstance(recorded, dict) else {})
    columns = [fact.seconds for fact in facts]
    columns[0] = {f"cache: {stage}": float(spent) for stage, spent in build.items()} | columns[0]
    stages = list(dict.fromkeys(stage for column in columns for stage in column))
    head = element("tr", element("th", "stage"), *(element("th", fact.label) for fact in facts))
    body = [
        element("tr", element("th", stage, scope="row"), *(element("td", _duration(c.get(stage))) for c in columns))
        for stage in stages
    ]
    table = element("table", element("thead", head), element("tbody", *body))
    where = facts[0].environment.get("device", "unknown device")
    lead = f"Wall-clock time of each stage as recorded, on {where}; training is all of its starts together."
    return section("Time", lead, wide_table(table) if body else note("No times were recorded."))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.1f} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
