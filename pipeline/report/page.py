"""The page: `page.html.j2` filled in for a run, and `write_report`."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from ezsd.cache import Store
from ezsd.data.annotations import Annotations
from ezsd.errors import EzsdError, quantity
from ezsd.pipeline.data.annotation_cache import evaluation_annotations
from ezsd.pipeline.data.datasets import Dataset
from ezsd.pipeline.errors import RunError
from ezsd.pipeline.extraction.annotation_check import checked_annotations
from ezsd.pipeline.files import write_text
from ezsd.pipeline.inference.evaluate import run_dataset
from ezsd.pipeline.inference.evaluation_tables import at_limit
from ezsd.pipeline.inference.visualize import BASE_COLOUR, NOVEL_COLOUR
from ezsd.pipeline.report import tables
from ezsd.pipeline.report.class_charts import HEIGHT, LEAST_SCORE, MOST_CHARTS, WIDTH, class_charts
from ezsd.pipeline.report.curves import training_curves, validation_curves
from ezsd.pipeline.report.differences import difference_table, means_table
from ezsd.pipeline.report.embedding_map import embedding_map
from ezsd.pipeline.report.galleries import (
    SHOWN_DETECTIONS,
    SHOWN_REGIONS,
    detection_figures,
    failure_figures,
    region_figures,
)
from ezsd.pipeline.report.outcomes import (
    SHOWN_SCORE,
    Judged,
    ap50,
    confusion,
    judged,
    judged_alike,
    kind_table,
    threshold_advice,
    threshold_table,
)
from ezsd.pipeline.report.readable import Part, readable
from ezsd.pipeline.report.run_data import RunData, collect, dataset_label, run_store
from ezsd.pipeline.report.side_by_side import SideBySide, side_by_side
from ezsd.pipeline.report.store_figures import store_figures
from ezsd.pipeline.report.svg import RUN_COLOURS
from ezsd.pipeline.runs.run import Run


def write_report(run: Run, *, data_root: Path | None, compare: Sequence[Run] = (), images: int = 12) -> Path:
    """Write RUN/report.html and return its path.

    A section whose detections, images or store are gone or others is replaced by a sentence that says so.

    Args:
        run: an evaluated run.
        data_root: folder of the images now; None takes the place recorded in the run.
        compare: other runs on the same dataset, for example one without distillation.
        images: pictures in each of the galleries: failures, detections, regions, and all compared runs together.

    Raises:
        RunError: the run is not evaluated yet, or a compared one is of another dataset.
        DatasetError: there is no dataset in `data_root`.
    """
    runs = collect([run, *compare])
    if runs[0].evaluation is None:
        raise RunError(f"`run={run.folder}`: not evaluated yet; run `{runs[0].command('eval')}` first")
    if data_root is not None:
        run_dataset(run, data_root)
    path = run.folder / "report.html"
    try:
        page = _page(runs, data_root, max(images, 0))
    except EzsdError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # The files of a run are somebody's JSON, of which a page shows hundreds of values.
        where = ", ".join(str(one.run.folder) for one in runs)
        raise RunError(
            f"{where}: the records of a run do not say what a page shows ({type(error).__name__}: {error}); run "
            f"`{runs[0].command('eval')}` again"
        ) from error
    # Pure ASCII, so that no locale can change it on the way to the disk.
    write_text(path, page.encode("ascii", "xmlcharrefreplace").decode())
    return path


def template(package: str, name: str) -> Template:
    """Template of a page that lies in a package; it may include those of the report."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, ""), PackageLoader("ezsd.pipeline.report", "")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = tables.percent
    environment.filters["csv_address"] = tables.csv_address
    environment.filters["script_digest"] = _script_digest
    environment.filters["quantity"] = quantity
    return environment.get_template(name)


def _script_digest(script: str) -> str:
    """Digest by which a content security policy allows a script, to the byte, and no other one."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("ascii")).digest()).decode()


def _page(runs: Sequence[RunData], data_root: Path | None, images: int) -> str:
    main = runs[0]
    assert main.evaluation is not None
    results = tables.results(runs)
    return template("ezsd.pipeline.report", "page.html.j2").render(
        base_colour=BASE_COLOUR,
        novel_colour=NOVEL_COLOUR,
        run_colours=RUN_COLOURS,
        script=Markup(files("ezsd.pipeline.report").joinpath("classes.js").read_text(encoding="ascii")),
        runs=runs,
        main=main,
        dataset=dataset_label(main),
        general=at_limit(main.evaluation, "generalised"),
        results=results,
        differences=difference_table(runs, results["columns"]),
        means=means_table(runs, results["columns"]),
        all_figures=tables.all_figures(runs),
        accuracies=tables.accuracies(main),
        classes=tables.classes(runs),
        curves=training_curves(runs),
        validations=validation_curves(runs),
        times=tables.times(runs),
        provenance=tables.provenance(main, data_root),
        commands=tables.commands(runs, data_root),
        **_validation_parts(runs, data_root, images),
        **_store_parts(main, data_root, images),
    )


def _validation_parts(runs: Sequence[RunData], data_root: Path | None, images: int) -> dict[str, object]:
    """Sections about single detections, or the reason why there are none."""
    main = runs[0]
    dataset = readable(lambda: run_dataset(main.run, data_root))
    found = dataset.then(lambda one: (judged(main, one), one))
    return {
        "shown_score": SHOWN_SCORE,
        "shown_detections": SHOWN_DETECTIONS,
        "least_score": LEAST_SCORE,
        "most_charts": MOST_CHARTS,
        "chart_size": (WIDTH, HEIGHT),
        "errors": found.then(lambda one: _errors(one[0])),
        "thresholds": found.then(lambda one: _thresholds(main, one[0])),
        "failures": found.then(lambda one: failure_figures(*one, images)),
        "compared": found.then(lambda one: _compared(runs, *one, images)),
        "detections": found.then(lambda one: detection_figures(*one, images)),
    }


def _compared(runs: Sequence[RunData], found: Judged, dataset: Dataset, images: int) -> dict[str, Part[SideBySide]]:
    """Pictures beside those of each compared run, by its label. All runs together have as many as another gallery."""
    main, *others = runs
    shares = [images // len(others) + (place < images % len(others)) for place in range(len(others))]

    def pictures(other: RunData, count: int) -> SideBySide:
        return side_by_side((found, judged_alike(other, found)), (main.label, other.label), dataset, count)

    return {
        other.label: readable(partial(pictures, other, count))
        for other, count in zip(others, shares, strict=True)
        # Without a picture the detections need not be read.
        if count
    }


def _errors(found: Judged) -> dict[str, object]:
    return {
        "kinds": kind_table(found),
        "by_threshold": threshold_table(found),
        "confusion": confusion(found),
        "worst": len(found.worst_images()),
        "images": len(found.truth.image_ids),
        "detections": len(found.shown.row),
    }


def _thresholds(main: RunData, found: Judged) -> dict[str, object]:
    return {
        "charts": class_charts(found.curves, ap50(main), found.base_count),
        "classes": sum(1 for curve in found.curves.values() if curve.objects),
        "advice": threshold_advice(found.curves),
    }


def _store_parts(main: RunData, data_root: Path | None, images: int) -> dict[str, object]:
    """Sections about the store and its teacher, or the reason why there are none."""

    def opened(store: Store) -> tuple[Store, Annotations, Dataset]:
        dataset = run_dataset(main.run, data_root)
        checked_annotations(store, dataset)
        return store, evaluation_annotations(dataset.annotations("train"), dataset.split), dataset

    store = readable(lambda: run_store(main))
    found = store.then(opened)
    return {
        "shown_regions": SHOWN_REGIONS,
        "regions": found.then(lambda one: region_figures(*one, main.novel, images)),
        "store": found.then(lambda one: store_figures(one[0], one[1], main.novel)),
        "map": store.then(lambda one: embedding_map(one, main.novel)),
    }
