"""The page put together, and `write_report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ezsd.pipeline.errors import RunError
from ezsd.pipeline.files import write_text
from ezsd.pipeline.inference.evaluate import run_dataset
from ezsd.pipeline.report.curves import curves_section
from ezsd.pipeline.report.galleries import (
    SHOWN_REGIONS,
    SHOWN_SCORE,
    detection_gallery,
    pictures_section,
    region_gallery,
)
from ezsd.pipeline.report.html import Html, element
from ezsd.pipeline.report.provenance import provenance_section
from ezsd.pipeline.report.run_data import Facts, collect, dataset_label
from ezsd.pipeline.report.style import style_sheet
from ezsd.pipeline.report.tables import (
    classes_section,
    renormalisation_section,
    results_section,
    times_section,
)
from ezsd.pipeline.runs.run import Run


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
    facts = collect([run, *compare])
    if facts[0].evaluation is None:
        raise RunError(f"--run {run.folder}: not evaluated yet; run `{facts[0].command('eval')}` first")
    if data_root is not None:
        run_dataset(run, data_root)
    path = run.folder / "report.html"
    # Pure ASCII, so that no locale can change it on the way to the disk.
    write_text(path, _page(facts, data_root, max(images, 0)).encode("ascii", "xmlcharrefreplace").decode())
    return path


def _page(facts: Sequence[Facts], data_root: Path | None, images: int) -> str:
    main = facts[0]
    sections = [
        _header(main),
        results_section(facts),
        pictures_section(
            "What the detector sees",
            f"Validation images, chosen by number and those with novel objects first, never by result. Drawn are "
            f"detections with a score of {SHOWN_SCORE} or more.",
            lambda: detection_gallery(main, run_dataset(main.run, data_root), images),
        ),
        pictures_section(
            "What the teacher proposed",
            f"Training images with the {SHOWN_REGIONS} surest regions of the store and the teacher's guess. From such "
            f"regions the detector learns novel classes; the novel boxes of the ground truth it has never met.",
            lambda: region_gallery(main, run_dataset(main.run, data_root), images),
        ),
        renormalisation_section(main),
        classes_section(facts),
        curves_section(facts),
        times_section(facts),
        provenance_section(facts, data_root),
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
        element("style", Html(style_sheet())),
    )
    body = element("body", element("main", *sections))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _header(main: Facts) -> Html:
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
        element("p", element("span", dataset_label(main), class_="badge"), " ", _legend()),
    )


def _legend() -> Html:
    keys = [
        element("span", element("i", class_=f"key {group}"), f"{group} class", class_="legend")
        for group in ("base", "novel")
    ]
    return element("span", *keys)
