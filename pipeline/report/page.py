"""The page: `page.html.j2` filled in for a run, and `write_report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template

from ezsd.errors import EzsdError
from ezsd.pipeline.errors import RunError
from ezsd.pipeline.files import write_text
from ezsd.pipeline.inference.evaluate import run_dataset
from ezsd.pipeline.inference.evaluation_tables import at_limit
from ezsd.pipeline.inference.visualize import BASE_COLOUR, NOVEL_COLOUR
from ezsd.pipeline.report import tables
from ezsd.pipeline.report.curves import RUN_COLOURS, training_curves
from ezsd.pipeline.report.galleries import (
    SHOWN_REGIONS,
    SHOWN_SCORE,
    detection_figures,
    readable_gallery,
    region_figures,
)
from ezsd.pipeline.report.run_data import RunData, collect, dataset_label
from ezsd.pipeline.runs.run import Run


def write_report(run: Run, *, data_root: Path | None, compare: Sequence[Run] = (), images: int = 12) -> Path:
    """Write RUN/report.html and return its path.

    Pictures whose images or store are gone are replaced by a sentence that says so.

    Args:
        run: an evaluated run.
        data_root: folder of the images now; None takes the place recorded in the run.
        compare: other runs on the same dataset, for example one without distillation.
        images: pictures in each of the two galleries.

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
    return environment.get_template(name)


def _page(runs: Sequence[RunData], data_root: Path | None, images: int) -> str:
    main = runs[0]
    assert main.evaluation is not None
    return template("ezsd.pipeline.report", "page.html.j2").render(
        base_colour=BASE_COLOUR,
        novel_colour=NOVEL_COLOUR,
        run_colours=RUN_COLOURS,
        shown_score=SHOWN_SCORE,
        shown_regions=SHOWN_REGIONS,
        runs=runs,
        main=main,
        dataset=dataset_label(main),
        general=at_limit(main.evaluation, "generalised"),
        results=tables.results(runs),
        all_figures=tables.all_figures(main.evaluation),
        detections=readable_gallery(lambda: detection_figures(main, run_dataset(main.run, data_root), images)),
        regions=readable_gallery(lambda: region_figures(main, run_dataset(main.run, data_root), images)),
        accuracies=tables.accuracies(main),
        classes=tables.classes(runs),
        curves=training_curves(runs),
        times=tables.times(runs),
        provenance=tables.provenance(main, data_root),
        commands=tables.commands(runs, data_root),
    )
