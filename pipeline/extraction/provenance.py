"""Inputs of each product of a store: content and settings, never a path, a host or a version of a library."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ezsd.cache import JSON, Manifest, Origin, file_digest, images_digest
from ezsd.data.annotations import Annotations, ImageRecord
from ezsd.detector.backbone import body_fingerprint
from ezsd.errors import AnnotationError
from ezsd.pipeline.config.names import with_former_names, with_todays_names
from ezsd.pipeline.config.schema import (
    STAGE_ONE,
    Config,
    ProposalConfig,
    ProposerConfig,
    from_tables,
    to_tables,
)
from ezsd.pipeline.data.datasets import Dataset
from ezsd.pipeline.data.image_source import ImageSource
from ezsd.pipeline.data.images import look, reads_as_before
from ezsd.pipeline.errors import ConfigError, ImageError
from ezsd.pipeline.extraction.external_proposals import boxes_digest
from ezsd.pipeline.extraction.manifest_names import unsaid
from ezsd.pipeline.extraction.run_proposer import DIGEST, NETWORK, run_digest
from ezsd.pipeline.files import as_json

VERSIONS = {"teacher": 1, "text": 1, "proposer": 2, "proposals": 1, "regions": 1, "ground_truth": 1}
"""Raised when the way a product is computed changes: stores made the old way are then another product."""

_ANCHORS = ("grid", "sizes", "ratios", "stride", "score", "nms_iou", "keep")
_MODES = {
    "faithful": (),
    "grown-stride": ("mode", "growth"),
    "coarse-to-fine": ("mode", "growth", "passes"),
    "learned": (),
}
"""Settings that a mode reads. The faithful mode names none: stores made before there were others stay as they are."""
_LEARNED = ("mode", "keep")
"""Settings of [proposals] that the boxes of a learned proposer depend on: no grid, no score."""
_FILTERS = ("base_iou", "drop_base_guesses", "regions")
_NAMED_IF_CHANGED = ("drop_background", "objectness_weight", "refine")
"""Settings that regions depend on and that manifests name only where they are not `unsaid`: stores made before there
was such a setting stay what they are."""

_READERS = 8
_LOOKED_AT_ONCE = 256
"""Images: a dataset of which the first is turned is not looked through."""


def describe(dataset: Dataset, annotations: Annotations, config: Config, model: Mapping[str, object]) -> Manifest:
    """The manifest of the store that these make; `model` is the published teacher's fingerprint.

    Looks at the start of image files, see `images_read`.
    """
    learned = config.proposals.learned
    asked = to_tables(config)["proposals"] | {"max_proposals": config.max_proposals}
    digests, proposals = annotations.digest(), with_former_names("proposals", asked)
    # Named only where they are not as ever: stores made before they were settings stay what they are.
    adapt = {key: value for key, value in dataclasses.asdict(config.adapt).items() if unsaid("adapt").get(key) != value}
    nms_iou = (
        {"nms_iou": config.proposals.nms_iou} if config.proposals.nms_iou != unsaid("proposals")["nms_iou"] else {}
    )
    data = {"image_list_sha256": digests["images"], "base_boxes_sha256": digests["boxes"]}
    crop = {"ratio": config.proposals.crop_ratio, "surround": config.proposals.padding}
    read = images_read(dataset, annotations)
    inputs: dict[str, dict[str, object]] = {
        "teacher": {
            "model": model,
            "adapt": with_former_names("adapt", adapt),
            "seed": config.build.seed,
            "crop": crop,
            "dataset": {**data, "base_names": dataset.split.base},
            # Named only where it matters. All other products need this one.
            **read,
        },
        "text": {"base_names": dataset.split.base, "novel_names": dataset.split.novel},
        "proposals": {
            **{key: proposals[key] for key in (_LEARNED if learned else (*_ANCHORS, *_MODES[str(proposals["mode"])]))},
            **(nms_iou if learned else {}),
            **({"boxes_sha256": boxes_digest(config.proposals.boxes)} if config.proposals.boxes else {}),
            "background": config.teacher.background,
            "batch": config.build.batch_size,
            "image_list_sha256": digests["images"],
        },
        "regions": {
            **{key: proposals[key] for key in _FILTERS},
            **_named(config.proposals),
            "base_boxes_sha256": digests["boxes"],
        },
        "ground_truth": {
            "dataset": {"name": dataset.name, **data, "base_names": dataset.split.base},
            "batch": config.build.batch_size,
        },
    }
    if learned:
        inputs["proposer"] = _proposer_inputs(config, {"dataset": data, **read})
    needs = {
        "text": ("teacher",),
        "proposals": ("teacher", "text", "proposer") if learned else ("teacher", "text"),
        "regions": ("teacher", "text", "proposals"),
        "ground_truth": ("teacher",),
    }
    products = {name: Origin(VERSIONS[name], as_json(table), needs.get(name, ())) for name, table in inputs.items()}
    images = annotations.images
    listed = images_digest(images.id, images.width, images.height)
    return Manifest(products, listed, config.build.embedding)


def _named(proposals: ProposalConfig) -> dict[str, object]:
    """Settings of regions that are not as stores without them have them, as far as they have an effect."""
    found = {key: getattr(proposals, key) for key in _NAMED_IF_CHANGED}
    values = {key: value for key, value in found.items() if value != unsaid("proposals")[key]}
    if not proposals.has_objectness:
        values.pop("objectness_weight", None)
    return values | ({"refine_iou": proposals.refine_iou} if "refine" in values else {})


def _proposer_inputs(config: Config, images: Mapping[str, object]) -> dict[str, object]:
    """Inputs of a proposer's weights: a run's weights themselves, or what they are trained with."""
    settings = dataclasses.asdict(config.proposer) | {"weights": _weights_digest(config.proposer)}
    # Named only where they are not as ever: stores made before they were settings stay what they are.
    network = {key: value for key, value in settings.items() if (key, value) not in unsaid("proposer").items()}
    # An input of the proposals that the boxes become; the network does not depend on it.
    del network["max_proposals"]
    run = network.pop("run")
    body = body_fingerprint(config.proposer.backbone, "proposer")
    of_body = {"body": body} if body else {}
    if run is not None:
        digest = run.removeprefix(DIGEST) if run.startswith(DIGEST) else run_digest(config.proposer)
        return {"run_sha256": digest, "network": {key: network[key] for key in NETWORK}, **of_body}
    return {"network": network, **of_body, "seed": config.build.seed, "held_out": config.adapt.held_out, **images}


def _weights_digest(proposer: ProposerConfig) -> str | None:
    """Sha256 of the file of a backbone's weights; ConfigError where it is gone."""
    if proposer.weights is None or proposer.weights.startswith(DIGEST):
        return proposer.weights and proposer.weights.removeprefix(DIGEST)
    if not Path(proposer.weights).is_file():
        raise ConfigError(f"`proposer.weights={proposer.weights}`: no such file")
    return file_digest(Path(proposer.weights)).sha256


def images_read(dataset: Dataset, annotations: Annotations) -> dict[str, dict[str, str]]:
    """Find where the rule for reading images makes other pixels than in stores made before there was a rule.

    Empty where it makes the same ones: those stores stay what they are. Only whether there are such images counts, not
    which: a build takes in images that can be read later. Stops at the first of each sort.
    """
    if dataset.exif == "legacy":
        return {}
    found: dict[str, str] = {}
    source = dataset.images("train")
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(annotations.images), _LOOKED_AT_ONCE):
            records = annotations.images[start : start + _LOOKED_AT_ONCE]
            for turned, converted in pool.map(partial(_image_read, source), records):
                found |= {"exif": "turn"} if turned else {}
                found |= {"modes": "converted"} if converted else {}
            if len(found) == 2:
                break
    return {"images": found} if found else {}


def _image_read(source: ImageSource, record: ImageRecord) -> tuple[bool, bool]:
    """True for an image that is turned, and for one whose mode is read otherwise than before there was a rule."""
    try:
        path = source.find(record.file_name)
        reading = look(path, (record.width, record.height), source.exif)
        return reading.turned, not reads_as_before(path, reading)
    except (AnnotationError, ImageError):
        # It has no rows; whether it may be left out is decided where they would be made.
        return False, False


def dataset_inputs(manifest: Manifest) -> Mapping[str, JSON]:
    """Identity of a store's dataset: its name, the digests of image list and base boxes, the base names."""
    table = manifest.products["ground_truth"].inputs["dataset"]
    assert isinstance(table, dict)
    return table


def model_inputs(manifest: Manifest) -> Mapping[str, JSON]:
    """The fingerprint of the published teacher that a store was made with."""
    table = manifest.products["teacher"].inputs["model"]
    assert isinstance(table, dict)
    return table


def proposal_settings(manifest: Manifest) -> dict[str, JSON]:
    """The [proposals] table that a store was made with."""
    teacher, anchors, filters = (manifest.products[name].inputs for name in ("teacher", "proposals", "regions"))
    crop = teacher["crop"]
    assert isinstance(crop, dict)
    table = {
        **{key: anchors[key] for key in _ANCHORS if key in anchors},
        **{key: anchors[key] for key in ("mode", "growth", "passes") if key in anchors},
        **{key: filters[key] for key in (*_FILTERS, *_NAMED_IF_CHANGED, "refine_iou") if key in filters},
        "crop_ratio": crop["ratio"],
        "surround": crop["surround"],
    }
    return {**unsaid("proposals"), **with_todays_names({"proposals": table})["proposals"]}


def scored_by_objectness(manifest: Manifest) -> bool:
    """True if the scores of a store's regions are a proposal network's objectness alone."""
    return "proposer" in manifest.products and proposal_settings(manifest)["objectness_weight"] == 1


def built_settings(manifest: Manifest) -> dict[str, dict[str, JSON]]:
    """Tables [adapt], [proposer], [proposals] and [build] of a store's build, but for the size of its blocks."""
    teacher = manifest.products["teacher"].inputs
    adapt = teacher["adapt"]
    assert isinstance(adapt, dict)
    build: dict[str, JSON] = {
        "seed": teacher["seed"],
        "batch": manifest.products["proposals"].inputs["batch"],
        "embedding": manifest.embedding,
    }
    tables = {"adapt": {**unsaid("adapt"), **adapt}, "proposals": proposal_settings(manifest), "build": build}
    if "proposer" in manifest.products:
        network = manifest.products["proposer"].inputs["network"]
        assert isinstance(network, dict)
        # The place of the file is in environment.json.
        weights = network["weights"] and f"{DIGEST}{network['weights']}"
        kept = tables["proposals"].pop("max_proposals")
        run = manifest.products["proposer"].inputs.get("run_sha256")
        tables["proposer"] = {
            **unsaid("proposer"),
            **network,
            "weights": weights,
            "run": run and f"{DIGEST}{run}",
            "max_proposals": kept,
        }
    return with_todays_names(tables)


def recorded_config(store: Path, record: Mapping[str, Any]) -> Config:
    """The configuration that a build recorded of itself (environment.json).

    Raises:
        ConfigError: the record has none, or one with a setting that is none.
    """
    if "config" not in record:
        raise ConfigError(f"{store}: environment.json does not say how it was built; build it anew in another folder")
    return from_tables(with_todays_names(record["config"]), where=f"{store}/environment.json")


def as_built(config: Config, manifest: Manifest, record: Mapping[str, Any]) -> Config:
    """A configuration with the tables of `STAGE_ONE` as a store was built with them.

    Args:
        config: of a training, whose own such tables nobody reads.
        manifest: the store's; what it decides is its word.
        record: what the build recorded of itself (environment.json), for all else; may be empty.

    Raises:
        ConfigError: the record has a setting that is none.
    """
    recorded = with_todays_names(record.get("config", {}))
    built = built_settings(manifest)
    built["teacher"] = record.get("teacher") or _known_of_teacher(manifest)
    boxes = manifest.products["proposals"].inputs.get("boxes_sha256")
    if boxes is not None and "proposals" not in recorded:
        built["proposals"]["boxes"] = f"sha256:{boxes}"
    # What neither says decides nothing in the store: the grid of a learned proposer, the proposer of a grid.
    tables = to_tables(config)
    silent = {
        "proposer": tables["proposer"],
        "proposals": {key: tables["proposals"][key] for key in ("grid", "sizes", "ratios", "stride", "score")},
    }
    stage_one = {name: {**silent.get(name, {}), **recorded.get(name, {}), **built.get(name, {})} for name in STAGE_ONE}
    return from_tables(to_tables(config) | stage_one, where="the store's environment.json")


def _known_of_teacher(manifest: Manifest) -> dict[str, JSON]:
    """Values of the table [teacher] in a manifest; a plug-in goes by the name that it gives itself."""
    model = model_inputs(manifest)
    settings = ("template", "names", "precision")
    known = {key: model[key] for key in settings} if model.keys() >= set(settings) else {}
    return {
        "name": str(model.get("name", "unknown")),
        **known,
        "background": manifest.products["proposals"].inputs["background"],
    }
