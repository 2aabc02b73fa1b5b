"""Do scarce base classes gain? `python benchmarks/long_tail.py --work DIR [--seeds 0 9] [--arms NAME ...] [--set K=V]`.

Draws an LVIS-like set per seed, builds its store with the preset `shapes` and `SETTINGS`, and trains an arm for each
combination of repeat-factor sampling and Seesaw loss, which alone differ. One row per arm and seed goes to
results/long_tail.jsonl: AP and AP50 of frequent, common and scarce base classes (those of 10 images or fewer) and of
novel classes, by LVIS's rules. A row of the tag with the same settings is not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import driver
import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask

from ezsd.data.shapes import IMAGE_SIZE, SHAPES_SPLIT, SceneSplit, scene
from ezsd.pipeline.config.schema import load_preset
from ezsd.pipeline.data.datasets import find_dataset
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.inference.evaluate import evaluate_run
from ezsd.pipeline.inference.evaluation_tables import at_limit
from ezsd.pipeline.training.train import TrainRequest, train

TRAIN_IMAGES, VAL_IMAGES = 500, 250
SETTINGS = (
    "proposals.search=exhaustive",
    "proposals.sizes=[36]",
    "proposals.stride=0.5",
    "train.pseudo_confidence=0",
    "train.steps=400",
)
"""Of all arms: a grid of 36 anchors and half the preset's steps, for the question is about base classes."""
FREQUENT = 4
"""Base classes in as many images as come."""
AT_MOST = (50, 40, 30, 20, 10, 8, 6, 5, 4)
"""Training images of each other base class; those of more than `SCARCE` are the common ones."""
SCARCE = 10
UNVERIFIED, NOT_EXHAUSTIVE = 0.1, 0.1
"""Probability that a class of an image is in none of its lists and has no box there, and that it has not all boxes."""
NEGATIVE = 5
"""Absent classes of an image that are verified to be absent."""
REPEAT, SEESAW = "train.repeat_threshold=0.1", "loss.classification_loss=seesaw"
ARMS: dict[str, tuple[str, ...]] = {
    "cross-entropy": (),
    "repeat factors": (REPEAT,),
    "Seesaw": (SEESAW,),
    "both": (REPEAT, SEESAW),
}


def groups(seed: int) -> dict[str, tuple[str, ...]]:
    """Names by group; which base class is frequent, common or scarce is drawn from the seed."""
    base = np.random.default_rng([seed, 13]).permutation(SHAPES_SPLIT.base).tolist()
    common = FREQUENT + sum(most > SCARCE for most in AT_MOST)
    ends = {"frequent": (0, FREQUENT), "common": (FREQUENT, common), "scarce": (common, len(base))}
    return {group: tuple(base[start:stop]) for group, (start, stop) in ends.items()} | {"novel": SHAPES_SPLIT.novel}


def write_long_tail(root: Path, *, train: int, val: int, seed: int) -> None:
    """Write an LVIS-like folder unless it is there: `--dataset lvis` has a long tail of base classes, and novel ones.

    Scenes are those of `shapes`, in order; of the training scenes, those that show a scarce class once too often are
    passed over. Validation scenes show all classes alike. Frequent base classes have LVIS's letter "f", other base
    classes "c", novel ones "r". A mask is the ellipse in its box.
    """
    if root.exists():
        return
    of_group = groups(seed)
    tail = dict(zip((*of_group["common"], *of_group["scarce"]), AT_MOST, strict=True))
    partial_root = root.with_name(f".{root.name}.partial")
    (partial_root / "annotations").mkdir(parents=True)
    parts: tuple[tuple[SceneSplit, int, Mapping[str, int]], ...] = (("train", train, tail), ("val", val, {}))
    for part, count, most in parts:
        (partial_root / f"{part}2017").mkdir()
        document = _document(partial_root, part, count, most, of_group["frequent"], seed)
        (partial_root / f"annotations/lvis_v1_{part}.json").write_text(json.dumps(document))
    partial_root.rename(root)


def _document(
    root: Path, part: SceneSplit, count: int, most: Mapping[str, int], frequent: Sequence[str], seed: int
) -> dict[str, object]:
    """Draw the images of a part, and make its LVIS tables."""
    rng = np.random.default_rng([seed, 14, part == "val"])
    names = sorted(SHAPES_SPLIT.names)
    letter = {name: "r" if name in SHAPES_SPLIT.novel else "f" if name in frequent else "c" for name in names}
    category = {name: 3 * place + 2 for place, name in enumerate(names)}
    shown: Counter[str] = Counter()
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    index = -1
    while len(images) < count:
        index += 1
        drawn = scene(seed=seed, split=part, index=index)
        present = sorted(set(drawn.names))
        if any(shown[name] >= most.get(name, shown[name] + 1) for name in present):
            continue
        shown.update(present)
        number = len(images) + 1
        place = f"{part}2017/{number:012d}.png"
        Image.fromarray(drawn.pixels).save(root / place, compress_level=1)
        verified = [name for name in present if name not in most or rng.random() >= UNVERIFIED]
        partly = [name for name in verified if drawn.names.count(name) > 1 and rng.random() < NOT_EXHAUSTIVE]
        absent = [name for name in names if name not in present]
        images.append(
            {
                "id": number,
                "coco_url": f"http://images.cocodataset.org/{place}",
                "width": IMAGE_SIZE,
                "height": IMAGE_SIZE,
                "neg_category_ids": [category[name] for name in rng.permutation(absent)[:NEGATIVE]],
                "not_exhaustive_category_ids": [category[name] for name in partly],
            }
        )
        left_out = {name: 1 for name in partly}
        for box, name in zip(drawn.boxes.tolist(), drawn.names, strict=True):
            left_out[name] = left_out.get(name, 0) - 1
            if name in verified and left_out[name] < 0:
                known = {"id": len(annotations) + 1, "image_id": number, "category_id": category[name]}
                annotations.append(known | _object(box))
    classes = [{"id": category[name], "name": name, "frequency": letter[name]} for name in names]
    return {"images": images, "annotations": annotations, "categories": classes}


def _object(box: list[float]) -> dict[str, object]:
    x1, y1, x2, y2 = (round(side, 2) for side in box)
    canvas = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    ImageDraw.Draw(canvas).ellipse((x1, y1, x2, y2), fill=1)
    runs = mask.encode(np.asfortranarray(canvas))
    outline = {"size": [IMAGE_SIZE, IMAGE_SIZE], "counts": runs["counts"].decode()}
    bbox = [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)]
    return {"bbox": bbox, "area": int(mask.area(runs)), "segmentation": outline}


def measure(arguments: argparse.Namespace) -> Iterator[driver.Row]:
    """The rows of every seed; then print the summary of all rows of the tag with these settings."""
    overrides = [*SETTINGS, *arguments.overrides]
    known = {(row["arm"], row["seed"]) for row in _kept(arguments, overrides)}
    for seed in arguments.seeds:
        work = arguments.work / f"seed-{seed}"
        work.mkdir(parents=True, exist_ok=True)
        write_long_tail(work / "data", train=TRAIN_IMAGES, val=VAL_IMAGES, seed=seed)
        dataset = find_dataset("lvis", work / "data")
        config = load_preset("shapes", overrides)
        build_cache(BuildRequest(dataset=dataset, config=config, out=work / "store", preset="shapes", workers=1))
        for arm in arguments.arms:
            if (arm, seed) in known:
                continue
            config = load_preset("shapes", [f"train.seed={seed}", *overrides, *ARMS[arm]])
            run = train(TrainRequest(cache=work / "store", run=work / "runs" / arm.replace(" ", "-"), config=config))
            found = at_limit(evaluate_run(run, data_root=None, device="cpu"), "generalised")["per_class"]
            yield {
                "tag": arguments.tag,
                "arm": arm,
                "seed": seed,
                "overrides": overrides,
                "images": f"{TRAIN_IMAGES} train, {VAL_IMAGES} val",
                **{group: _mean(found, names) for group, names in groups(seed).items()},
                "all": _mean(found, SHAPES_SPLIT.names),
                "seconds": run.seconds(),
            }
    print(summary(_kept(arguments, overrides)))


def _kept(arguments: argparse.Namespace, overrides: Sequence[str]) -> list[driver.Row]:
    rows = driver.read("long_tail", arguments.results)
    return [row for row in rows if row["tag"] == arguments.tag and row["overrides"] == list(overrides)]


def _mean(found: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    return {figure: statistics.mean(found[name][figure] for name in names) for figure in ("AP", "AP50")}


def summary(rows: Sequence[driver.Row]) -> str:
    """Mean and range over the seeds per arm, and differences from the first arm paired over seeds; in percent."""
    columns = ("frequent", "common", "scarce", "novel", "all")
    of = {arm: {row["seed"]: row for row in rows if row["arm"] == arm} for arm in ARMS}
    lines = []
    for figure in ("AP50", "AP"):
        lines.append(f"{figure:<30}" + "".join(f"{column:>24}" for column in columns))
        for arm, by_seed in of.items():
            cells = [driver.spread([100 * row[c][figure] for row in by_seed.values()]) for c in columns]
            lines.append(f"{arm:<30}" + "".join(f"{cell:>24}" for cell in cells))
        plain = of["cross-entropy"]
        for arm, by_seed in list(of.items())[1:]:
            both = [seed for seed in by_seed if seed in plain]
            gains = [[100 * (by_seed[s][c][figure] - plain[s][c][figure]) for s in both] for c in columns]
            name = f"{arm} - cross-entropy"
            lines.append(f"{name:<30}" + "".join(f"{driver.spread(gain):>24}" for gain in gains))
    return "\n".join(lines)


if __name__ == "__main__":
    arms = driver.option("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    seeds = driver.option("--seeds", default=[0, 9])
    driver.run("long_tail", measure, __doc__, "--work", seeds, arms, "--tag", "--set", show=json.dumps)
