"""What do CLIP proposals cover on photos? `python benchmarks/photos.py --cache cache/photos [--run RUN] [--draw DIR]`.

Share of NOVEL objects of the training photos with a proposal at IoU 0.5 among the best 100 and 300, against as many
anchors drawn at random from the same grid (mean of ten draws). Evaluation: the only place that reads novel boxes of a
training split. With --run, the AP50 of an evaluated run that was trained on the store goes into the row, with its
settings. With --draw, the best proposals are drawn over the photos for a person to look at.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import driver
import numpy as np
import torch

from ezsd.cache import Store
from ezsd.data.annotations import load_evaluation
from ezsd.metrics.recall import recall_at
from ezsd.pipeline.config.schema import from_tables, load_preset, to_tables
from ezsd.pipeline.data.datasets import Dataset
from ezsd.pipeline.extraction.anchors import image_anchors
from ezsd.pipeline.extraction.provenance import model_inputs, proposal_settings
from ezsd.pipeline.inference.evaluation_tables import headline
from ezsd.pipeline.inference.visualize import draw_boxes
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.training.train import store_dataset

TOP = (100, 300)


def coverage(store: Store, dataset: Dataset) -> driver.Row:
    """Recall of novel objects by proposals, kept regions and random anchors."""
    truth = load_evaluation(dataset.root / dataset.train_annotations, dataset.split)
    known = {int(i): row for row, i in enumerate(store.image_ids)}
    positions = [p for p, image in enumerate(truth.images) if image.id in known]
    novel = truth.class_index >= len(dataset.split.base)
    objects = [truth.box[truth.rows(p)][novel[truth.rows(p)] & ~truth.crowd[truth.rows(p)]] for p in positions]
    ids = [truth.images[p].id for p in positions]
    settings = to_tables(load_preset("photos"))
    # A store with proposals of a network has no grid: the preset's then.
    settings["proposals"] |= proposal_settings(store.manifest)
    grid = from_tables(settings, where="store").proposals
    anchors = [image_anchors(grid, truth.images[p].width, truth.images[p].height).numpy() for p in positions]
    draws = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        draws.append(recall_at([rng.permutation(a) for a in anchors], objects, top=TOP))
    return {
        "images": len(ids),
        "novel_objects": sum(map(len, objects)),
        "anchors_per_image": float(np.mean([len(a) for a in anchors])),
        "all_anchors": recall_at(anchors, objects, top=(10**6,))[10**6],
        "proposals": recall_at([store.proposals[i].box for i in ids], objects, top=TOP),
        "regions": recall_at([store.regions[i].box for i in ids], objects, top=TOP),
        "random_anchors": {k: float(np.mean([d[k] for d in draws])) for k in TOP},
    }


def draw(store: Store, dataset: Dataset, out: Path) -> None:
    """Draw the ten best regions of every photo, with the teacher's guesses."""
    names, _ = store.text
    out.mkdir(parents=True, exist_ok=True)
    truth = load_evaluation(dataset.root / dataset.train_annotations, dataset.split)
    for image in truth.images:
        if image.id not in set(store.image_ids.tolist()):
            continue
        pixels = dataset.images("train").read(image)
        regions = store.regions[image.id]
        captions = [f"{names[c]} {v:.2f}" for c, v in zip(regions.class_index[:10], regions.confidence, strict=False)]
        draw_boxes(pixels, torch.from_numpy(regions.box[:10].copy()), captions).save(out / f"{image.id}.png")


def judged(run: Run, dataset: Dataset) -> driver.Row:
    """What a run is and was evaluated to: its AP50, the objects it had to find, and its settings."""
    truth = load_evaluation(dataset.annotations("val"), dataset.split)
    novel = truth.class_index[~truth.crowd] >= len(dataset.split.base)
    return {
        "AP50": headline(json.loads((run.folder / "eval.json").read_text())),
        "validation_images": len(truth.images),
        "validation_objects": {"base": int((~novel).sum()), "novel": int(novel.sum())},
        "steps": run.read_metrics()[-1]["step"],
        "settings": driver.settings(run.config),
    }


def measure(arguments: argparse.Namespace) -> Iterator[driver.Row]:
    """The row of a store, and the drawn photos."""
    store = Store(arguments.cache)
    dataset = store_dataset(store, arguments.data_root)
    result = coverage(store, dataset)
    if arguments.run:
        result["trained"] = judged(Run.open(arguments.run), dataset)
    teacher = dict(model_inputs(store.manifest))
    yield {**result, "teacher": teacher, "proposal_settings": proposal_settings(store.manifest)}
    if arguments.draw:
        draw(store, dataset, arguments.draw)


if __name__ == "__main__":
    drawn = driver.option("--draw", type=Path, help="folder of the photos with their best regions")
    trained = driver.option(
        "--run", type=Path, help="an evaluated run trained on the cache: its AP50 goes into the row"
    )
    driver.run("photos", measure, __doc__, "--cache", "--data-root", drawn, trained)
