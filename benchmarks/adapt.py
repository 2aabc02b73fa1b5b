"""Which loss re-normalises, and how much around a box? `python benchmarks/adapt.py losses|crops --work DIR [--jobs 2]`.

`shapes`, dev seed, shipped teacher. "losses": binary cross-entropy and softmax cross-entropy, each with four rates
and for 80 and 320 steps, all else as the preset has it. "crops": boxes enlarged by 1.0 and by 1.2, with black or the
image's own context beside them, in re-normalisation, scoring and embedding alike.

What decides is accuracy on base crops of the 250 validation images that no step saw, against base names and against
all names; and for "crops" the share of base objects of training images that a proposal covers at IoU 0.5, on the
preset's grid and on that of `coco`. The same figures for novel crops and objects are evaluation: they decide nothing.

Each arm is drawn several times; a draw shuffles and splits the training crops anew. One row per arm goes to
results/adapt.jsonl, with lists over draws; an arm whose row is there is not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import rows
import torch

from ezsd.adapt import crop_accuracy
from ezsd.cache import Block, RaggedRows
from ezsd.data.shapes import DEV_SEED
from ezsd.metrics.recall import recall_at
from ezsd.pipeline.config.schema import Config, load_preset
from ezsd.pipeline.data.annotation_cache import evaluation_annotations
from ezsd.pipeline.data.datasets import Dataset, find_dataset
from ezsd.pipeline.data.shapes import write_shapes
from ezsd.pipeline.extraction.adapt import CropSource
from ezsd.pipeline.extraction.build import adapted, embed_names, extract_job
from ezsd.pipeline.extraction.request import BuildRequest, read_annotations
from ezsd.pipeline.extraction.teacher import configured_teacher
from ezsd.pipeline.extraction.worker import block_rows
from ezsd.teacher.open_clip import Teacher

RATES = {"bce": (3e-3, 1e-2, 3e-2, 1e-1), "softmax_ce": (3e-4, 1e-3, 3e-3, 1e-2)}
"""By loss, around the best one of each."""
RATIOS = (1.0, 1.2)
SURROUNDS = ("black", "context")
GRIDS = {"shapes": 200, "coco": 60}
"""By preset whose anchors they are, the first how many training images are looked at."""
LOOKING = ("grid", "sizes", "ratios", "stride", "search", "growth", "anchor_fraction", "max_regions")
TOP = (10, 50, 300)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One re-normalisation, and what is measured of it."""

    data: Path
    overrides: tuple[str, ...]
    """Of the preset `shapes`."""
    seed: int
    """Of the held-out choice and the shuffling."""
    recall: bool
    """Whether proposals are made too."""


def measure(draw: Draw) -> dict[str, float]:
    """Figures of one draw, on one thread."""
    torch.set_num_threads(1)
    dataset = find_dataset("shapes", draw.data)
    config = load_preset("shapes", (*draw.overrides, f"build.seed={draw.seed}"))
    # No store is written.
    request = BuildRequest(dataset=dataset, config=config, out=draw.data)
    teacher = configured_teacher(config.teacher, "cpu")
    raw = accuracy(teacher, dataset, config)
    values, tuned = adapted(request, teacher, read_annotations(request))
    figures = {f"raw_{group}": value for group, value in raw.items()} | accuracy(teacher, dataset, config)
    figures["held_out"] = float(str(tuned["base_accuracy_after"]))
    text = embed_names(teacher, dataset.split.names)
    for preset, images in GRIDS.items() if draw.recall else ():
        job = extract_job(on_grid(request, preset), tuned["parameters"], values, text, made_from="no store")
        found = block_rows(job, Block(0, 0, images))
        figures |= {f"{preset}_{key}": value for key, value in recall(dataset, found, images).items()}
    return figures


def on_grid(request: BuildRequest, preset: str) -> BuildRequest:
    """The same with the anchors of another preset."""
    looking = {key: getattr(load_preset(preset).proposals, key) for key in LOOKING}
    proposals = dataclasses.replace(request.config.proposals, **looking)
    return dataclasses.replace(request, config=dataclasses.replace(request.config, proposals=proposals))


@torch.no_grad()
def accuracy(teacher: Teacher, dataset: Dataset, config: Config) -> dict[str, float]:
    """Shares of validation crops whose nearest name is the right one: base against base names, and both against all."""
    truth = evaluation_annotations(dataset.root / dataset.val_annotations, dataset.split)
    folder = dataset.root / dataset.val_images
    source = CropSource(truth, folder, exif=dataset.exif, size=teacher.input_size, crops=config.proposals)
    is_base = truth.class_index < len(dataset.split.base)

    def right(names: tuple[str, ...]) -> np.ndarray:
        batches = source.batches(range(len(truth.images)), crops=config.build.batch_size)
        return crop_accuracy(teacher, batches, names).numpy()

    among_base, among_all = right(dataset.split.base), right(dataset.split.names)
    return {
        "base": float(among_base[is_base].mean()),
        "base_of_all": float(among_all[is_base].mean()),
        "novel_of_all": float(among_all[~is_base].mean()),
    }


def recall(dataset: Dataset, found: dict[str, RaggedRows], images: int) -> dict[str, float]:
    """Share of base and of novel objects that proposals cover, and of novel ones that regions cover."""
    truth = evaluation_annotations(dataset.root / dataset.train_annotations, dataset.split)
    objects = [truth.box[truth.rows(position)] for position in range(images)]
    novel = [truth.class_index[truth.rows(position)] >= len(dataset.split.base) for position in range(images)]
    boxes = {
        product: np.split(found[product].fields["box"], np.cumsum(found[product].counts)[:-1])
        for product in ("proposals", "regions")
    }
    figures = {}
    for product, group in (("proposals", "base"), ("proposals", "novel"), ("regions", "novel")):
        wanted = [box[is_novel == (group == "novel")] for box, is_novel in zip(objects, novel, strict=True)]
        covered = recall_at(boxes[product], wanted, top=TOP)
        figures |= {f"{product}_{group}@{k}": float(covered[k] or 0.0) for k in TOP}
    return figures


def losses(lengths: list[int]) -> list[dict[str, object]]:
    """Settings of the arms that differ in loss, rate and steps."""
    return [
        {"adapt.loss": loss, "adapt.learning_rate": rate, "adapt.steps": steps}
        for steps, (loss, rates) in itertools.product(lengths, RATES.items())
        for rate in rates
    ]


def crops() -> list[dict[str, object]]:
    """Settings of the arms that differ in the crop."""
    return [
        {"proposals.crop_ratio": ratio, "proposals.padding": surround}
        for surround, ratio in itertools.product(SURROUNDS, RATIOS)
    ]


def measured_already(kind: str, arm: dict[str, object], overrides: list[str]) -> bool:
    """Whether there is a row of this arm."""
    wanted = (kind, arm, overrides)
    return any((row["kind"], row["arm"], row["overrides"]) == wanted for row in rows.read("adapt"))


def main() -> None:
    """Parse, measure, keep and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("losses", "crops"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[80, 320], help="of losses")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="of all arms")
    arguments = parser.parse_args()
    data = arguments.work / f"data-{DEV_SEED}"
    write_shapes(data, seed=DEV_SEED)
    arms = losses(arguments.steps) if arguments.kind == "losses" else crops()
    arms = [arm for arm in arms if not measured_already(arguments.kind, arm, arguments.overrides)]
    draws = [
        Draw(
            data=data,
            overrides=(*arguments.overrides, *(f"{key}={value}" for key, value in arm.items())),
            seed=seed,
            recall=arguments.kind == "crops",
        )
        for arm in arms
        for seed in range(arguments.draws)
    ]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        measured = pool.map(measure, draws)
        for arm in arms:
            figures = list(itertools.islice(measured, arguments.draws))
            row = {key: [round(one[key], 4) for one in figures] for key in figures[0]}
            rows.append("adapt", {"kind": arguments.kind, "arm": arm, "overrides": arguments.overrides, **row})
            print(arm, {key: round(statistics.mean(values), 3) for key, values in row.items()}, flush=True)


if __name__ == "__main__":
    main()
