"""The page: `look.html.j2` filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ezsd.pipeline.inference.visualize import BASE_COLOUR, NOVEL_COLOUR
from ezsd.pipeline.look import verdict
from ezsd.pipeline.look.pictures import COLOURS, Picture, tiers
from ezsd.pipeline.report.page import template
from ezsd.pipeline.report.run_data import shell_command


def page(document: Mapping[str, Any], pictures: Sequence[Picture], top: int) -> str:
    """The page of a look at a store; the same text for the same store, images and options."""
    return template("ezsd.pipeline.look", "look.html.j2").render(
        base_colour=BASE_COLOUR,
        novel_colour=NOVEL_COLOUR,
        colours=COLOURS,
        tiers=tiers(top),
        pictures=pictures,
        document=document,
        store=document["store"],
        images=document["images"],
        looked_at=verdict.looked_at(document),
        file_name=file_name(document),
        survey=document["survey"],
        evaluated=document["evaluation"] is not None,
        measurements=_measurements(document),
        caveats=list(verdict.caveats(document)),
        regions=verdict.region_table(document["survey"]),
        guesses=verdict.guess_shares(document["survey"]),
        names=verdict.name_table(document["base_objects"]),
        command=_command(document),
    )


def file_name(document: Mapping[str, Any]) -> str:
    """Name of the page and of its figures, without suffix: with novel boxes one of its own."""
    return "look" if document["evaluation"] is None else "look-evaluated"


def _measurements(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Verdict and tables of base objects and, evaluated, of novel ones."""
    found = {"base": (document["held_out"], verdict.objects_of(document))}
    if document["evaluation"] is not None:
        found["novel"] = (document["evaluation"], "novel objects")
    return {
        group: {
            "verdict": verdict.verdict(measured, objects),
            "placed": verdict.placed(measured),
            "recall": verdict.recall_table(measured),
            "sizes": verdict.size_table(measured),
            "images": measured["images"],
            "objects": measured["objects"]["all"],
        }
        for group, (measured, objects) in found.items()
    }


def _command(document: Mapping[str, Any]) -> str:
    """The command that makes this page again."""
    options = document["options"]
    words = ["ezsd", "cache", "look", options["store"], "--out", options["out"]]
    words += ["--images", str(options["images"]), "--top", str(options["top"]), "--seed", str(options["seed"])]
    words += [] if options["teacher"] else ["--no-teacher"]
    words += [] if document["evaluation"] is None else ["--evaluate"]
    for name in ("weights", "data_root"):
        words += [] if options[name] is None else [f"--{name.replace('_', '-')}", options[name]]
    return shell_command(*words)
