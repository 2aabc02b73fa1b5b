"""Are novel classes found on real photos? `python benchmarks/voc.py --work DIR --teacher NAME --backbone NAME ...`.

VOC as `ezsd data voc` lays it out, a teacher and a pretrained backbone, two seeds. The store is of the first `--photos`
photos of the training part, and detectors are trained on these. With `--dev` they are evaluated on the last 500 photos
of the training part, with base boxes alone: that is where settings are chosen. Without it, on the validation part. One
row per arm and seed goes to results/voc.jsonl; a row that is there is not made again, and work left in DIR by a kill is
taken up where it was: run the same command. `--table` prints the rows and does nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import driver
import numpy as np
import torch
from ablation_arms import NONE, UNFILTERED, UNSPARED, Arm, StoreSpec, chosen
from ablation_boxes import random_anchors, write_boxes
from scoring import permuted, score
from torchvision.ops import box_iou

from ezsd.cache import Store, canonical_json
from ezsd.cache.files import file_digest
from ezsd.data.annotations import load_evaluation
from ezsd.data.pascal_voc import VOC_SPLITS
from ezsd.metrics.recall import recall_at
from ezsd.pipeline.config.schema import Config, load_preset
from ezsd.pipeline.data.dataset_toml import Places, dataset_toml
from ezsd.pipeline.data.datasets import Dataset, find_dataset
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.files import write_text
from ezsd.pipeline.inference.evaluate import evaluate_crops
from ezsd.pipeline.inference.predictor import load_trained
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.training.train import TrainRequest, train
from ezsd.vocabulary import Split

DEV_PHOTOS = 500
"""The last of the training part, on which settings are chosen."""
SITS = 0.5
"""IoU of a region with a novel object that it sits on."""
FIGURES = (("AP50", "base"), ("AP50", "novel"), ("AP75", "novel"), ("AP50", "all"))
NOVEL_HEADS = ("regions", "recall of novel objects, IoU 0.5", "0.7", "regions on one", "of these, named right")
GRID = ("proposals.search=exhaustive", "proposals.max_proposals=100")
"""The preset's grid, and as many proposals as of the learned proposer."""
STORES = {
    "ours": StoreSpec(overrides=()),
    "grid": StoreSpec(overrides=GRID, reuse="ours"),
    "refined": StoreSpec(overrides=("proposals.refine=vote",), reuse="ours"),
    "random": StoreSpec(overrides=(*GRID, *UNFILTERED), boxes="random", reuse="ours"),
    # No region is kept where every name is a base name: one anchor per photo spares the time of looking.
    "oracle": StoreSpec(
        overrides=(*GRID, "proposals.sizes=[320]", "proposals.ratios=[1]", "proposals.stride=1.0"), oracle=True
    ),
}
ARMS = {
    arm.name: arm
    for arm in (
        Arm(name="ours", against="none"),
        Arm(name="none", train=(NONE,)),
        # Without distillation a novel name that competes with base names is only ever pushed down.
        Arm(name="plain", train=(NONE, UNSPARED, "loss.novel_names=false")),
        Arm(name="grid", store="grid"),
        Arm(name="random boxes", store="random"),
        Arm(name="refined", store="refined"),
        Arm(name="semantic regression", train=("model.semantic_boxes=true",)),
        Arm(name="pseudo-labels", train=("train.pseudo_confidence=0.7",)),
        Arm(name="permuted novel names", permuted=True),
        Arm(name="oracle", store="oracle", train=(NONE,)),
    )
}
"""All arms by name. There is none without re-normalisation: the stand-in teacher has no LayerNorm to tune."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is run, on which photos, and under which settings of all arms."""

    asked: argparse.Namespace
    """The command line."""
    seed: int

    @property
    def folder(self) -> Path:
        """Stores and runs of this split."""
        return self.asked.work / f"{self.asked.split}-{self.asked.photos}"

    def dataset(self, name: Literal["photos", "oracle", "dev"] = "photos") -> Dataset:
        """The photos, with all names as base names for the oracle; "dev" is for choosing settings."""
        return find_dataset(str(self.folder / f"{name}.toml"), self.asked.data_root)

    def config(self, overrides: Sequence[str]) -> Config:
        """The preset with the teacher and the backbone of the command line, and with overrides."""
        given = {"teacher.name": self.asked.teacher, "proposer.weights": str(self.asked.backbone_weights)}
        given |= {f"{section}.backbone": self.asked.backbone for section in ("model", "proposer")}
        return load_preset("photos", [*(f"{key}={json.dumps(value)}" for key, value in given.items()), *overrides])


def prepare_data(plan: Plan) -> None:
    """Write the datasets: with the split's names, the oracle's, and the one that settings are chosen on."""
    asked, split = plan.asked, VOC_SPLITS[plan.asked.split]
    plan.folder.mkdir(parents=True, exist_ok=True)
    train, val = Places("train", "train.json"), Places("val", "val.json")
    judged = {"photos": (split, val), "oracle": (Split(base=split.names, novel=()), val)}
    if asked.dev:
        dev = plan.folder.absolute() / "dev.json"
        _write(dev, json.dumps(dev_annotations(asked.data_root / "train.json", split, trained_on=asked.photos)))
        judged["dev"] = split, Places("train", str(dev))
    for name, (names, places) in judged.items():
        text = dataset_toml(f"{asked.split}-{name}", {"train": train, "val": places}, names)
        _write(plan.folder / f"{name}.toml", text)


def _write(path: Path, text: str) -> None:
    """Write a file unless it is there: arms side by side would write it at the same time."""
    if not path.is_file() or path.read_text() != text:
        write_text(path, text)


def dev_annotations(path: Path, split: Split, *, trained_on: int) -> Mapping[str, object]:
    """The last `DEV_PHOTOS` photos of a training part after those trained on, without a box of a novel class."""
    document = json.loads(path.read_text())
    images = sorted(document["images"], key=lambda image: image["id"])[trained_on:][-DEV_PHOTOS:]
    if not images:
        raise SystemExit(f"--photos {trained_on}: --dev needs photos beside them, and {path} has no more; take fewer")
    base = {category["id"] for category in document["categories"] if category["name"] in split.base}
    photos = {image["id"] for image in images}
    boxes = [box for box in document["annotations"] if box["image_id"] in photos and box["category_id"] in base]
    return {**document, "images": images, "annotations": boxes}


def prepared_store(plan: Plan, name: str) -> Path:
    """A store of `STORES`, built unless it is there; what it needs is made first."""
    spec, out = STORES[name], plan.folder / "stores" / name
    overrides = build_overrides(plan, name)
    if spec.boxes is not None:
        boxes = plan.folder / "boxes" / f"{name}.json"
        if not boxes.is_file():
            grid = plan.config(overrides).proposals
            write_boxes(boxes, random_anchors(Store(prepared_store(plan, "ours")), plan.dataset(), grid, seed=0))
        overrides.append(f"proposals.boxes={json.dumps(str(boxes))}")
    request = BuildRequest(
        dataset=plan.dataset("oracle" if spec.oracle else "photos"),
        config=plan.config(overrides),
        out=out,
        preset="photos",
        limit=plan.asked.photos,
        workers=plan.asked.jobs,
        reuse=None if spec.reuse is None else prepared_store(plan, spec.reuse),
    )
    build_cache(request)
    return out


def build_overrides(plan: Plan, name: str) -> list[str]:
    """Settings of a store of `STORES`, but for the file of its boxes."""
    return [*plan.asked.build_overrides, *STORES[name].overrides]


def train_overrides(plan: Plan, arm: Arm) -> list[str]:
    """Settings of an arm's training."""
    return [*plan.asked.overrides, *arm.train, f"train.seed={plan.seed}"]


def trained_run(plan: Plan, arm: Arm) -> Run:
    """The finished run of an arm, trained or gone on with unless it is there."""
    config = plan.config(train_overrides(plan, arm))
    label = f"{arm.name}, seed {plan.seed}" + f" ({plan.asked.tag})" * (plan.asked.tag != "photos")
    request = TrainRequest(
        cache=prepared_store(plan, arm.store),
        run=plan.folder / "runs" / label,
        config=config,
        data_root=plan.asked.data_root,
        backbone_weights=plan.asked.backbone_weights,
    )
    return train(request)


def measure(plan: Plan, arm: Arm) -> driver.Row:
    """The row of an arm, but for what names it."""
    run = trained_run(plan, ARMS["ours"] if arm.permuted else arm)
    trained = load_trained(run, "cpu")
    store = Store(prepared_store(plan, arm.store))
    counts = [len(store.regions[i].box) for i in store.image_ids.tolist()]
    crops = arm.name == "ours" and not plan.asked.dev
    return {
        **score(permuted(trained) if arm.permuted else trained, plan.dataset("dev" if plan.asked.dev else "photos")),
        "regions_per_image": round(sum(counts) / len(counts), 2),
        "regions": None if plan.asked.dev else quality(store, plan.dataset()),
        "crops": evaluate_crops(run, data_root=plan.asked.data_root, device="cpu") if crops else None,
        "store": store.digest,
        "seconds": run.seconds(),
    }


def name_of(plan: Plan, arm: Arm) -> driver.Row:
    """What tells a row from all others: a row that has it already is not made again."""
    spec, asked = STORES[arm.store], plan.asked
    config = plan.config([*train_overrides(plan, arm), *build_overrides(plan, arm.store)])
    return {
        "tag": asked.tag,
        "arm": arm.name,
        "against": arm.against,
        "dataset": asked.split,
        "part": "dev" if asked.dev else "val",
        "seed": plan.seed,
        "photos": asked.photos,
        "teacher": asked.teacher,
        "backbone": asked.backbone,
        "backbone_weights": file_digest(asked.backbone_weights).sha256,
        "settings": list(arm.train),
        "built": {"settings": build_overrides(plan, arm.store), "boxes": spec.boxes},
        "overrides": list(asked.overrides),
        # The same overrides of another preset are other settings.
        "settings_sha256": hashlib.sha256(canonical_json(driver.settings(config)).encode()).hexdigest(),
    }


def is_done(plan: Plan, arm: Arm) -> bool:
    """Whether the row is there."""
    return driver.is_there("voc", name_of(plan, arm), plan.asked.results)


def quality(store: Store, dataset: Dataset) -> driver.Row:
    """How good a store's regions are: the recall of the novel objects of its photos, and what their regions are called.

    Evaluation: it reads novel boxes of training photos.
    """
    truth = load_evaluation(dataset.annotations("train"), dataset.split)
    known = set(store.image_ids.tolist())
    rows = [truth.rows(place) for place, image in enumerate(truth.images) if image.id in known]
    ids = [image.id for image in truth.images if image.id in known]
    wanted = [(truth.class_index[row] >= len(dataset.split.base)) & ~truth.crowd[row] for row in rows]
    objects = [truth.box[row][novel] for row, novel in zip(rows, wanted, strict=True)]
    regions = [store.regions[image].box for image in ids]
    on_objects, right, count = 0, 0, 0
    for image, row, novel in zip(ids, rows, wanted, strict=True):
        found = store.regions[image]
        count += len(found.box)
        if len(found.box) and novel.any():
            overlaps = box_iou(torch.from_numpy(found.box.copy()), torch.from_numpy(truth.box[row][novel])).numpy()
            sits = overlaps.max(1) >= SITS
            on_objects += int(sits.sum())
            named = truth.class_index[row][novel][overlaps.argmax(1)]
            right += int((sits & (named == np.asarray(found.class_index))).sum())
    return {
        "novel_objects": sum(map(len, objects)),
        "recall": {str(iou): recall_at(regions, objects, iou=iou, top=(10, 1000)) for iou in (SITS, 0.7)},
        "on_novel_objects": on_objects / count if count else None,
        "named_right": right / on_objects if on_objects else None,
    }


def run_here(plan: Plan, arm: Arm) -> None:
    """An arm in this process."""
    row = {**name_of(plan, arm), **measure(plan, arm)}
    # What a killed start left running may have been quicker.
    if not is_done(plan, arm):
        driver.append("voc", row, plan.asked.results)
    print(f"{plan.asked.split}, seed {plan.seed}, {arm.name}: done", flush=True)


def run_all(plans: Sequence[Plan], arms: Sequence[Arm], words: Sequence[str]) -> list[str]:
    """All wanted rows; returns those that failed."""
    waiting = [(plan, arm) for arm in arms for plan in plans if not is_done(plan, arm)]
    if waiting:
        prepare_data(plans[0])
    # Before two processes may want the same one.
    for name in dict.fromkeys(arm.store for _, arm in waiting):
        prepared_store(plans[0], name)
    if plans[0].asked.jobs == 1:
        for plan, arm in waiting:
            run_here(plan, arm)
        return []
    commands = {
        f"{arm.name}, seed {plan.seed}": [sys.executable, __file__, *words, "--jobs", "1"]
        + ["--arms", arm.name, "--seeds", str(plan.seed)]
        for plan, arm in waiting
        if not arm.permuted
    }
    failed = driver.beside(commands, plans[0].asked.jobs, plans[0].folder / "logs")
    # It takes the run of another arm, which is locked while it is looked at.
    for plan, arm in waiting:
        if arm.permuted and f"ours, seed {plan.seed}" not in failed:
            run_here(plan, arm)
    return failed


def table(rows: Sequence[driver.Row], arms: Sequence[Arm]) -> str:
    """Rows as a table in Markdown: mean and range over seeds, percent."""
    heads = ["arm", "seeds", *(f"{metric}, {group}" for metric, group in FIGURES), *NOVEL_HEADS]
    lines = [heads, ["---"] * len(heads)]
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm.name]
        if own:
            cells = [
                [100 * row[metric][group] for row in own if row[metric][group] is not None] for metric, group in FIGURES
            ]
            lines.append([arm.name, str(len(own)), *map(driver.spread, cells), *_of_regions(own[0])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _of_regions(row: driver.Row) -> list[str]:
    count, found = f"{row['regions_per_image']:.0f}", row["regions"]
    if not found:
        return [count, "", "", "", ""]
    recalls = [found["recall"][iou]["1000"] for iou in (str(SITS), "0.7")]
    shares = (*recalls, found["on_novel_objects"], found["named_right"])
    return [count, *("-" if share is None else f"{100 * share:.0f}" for share in shares)]


def main(words: Sequence[str] | None = None) -> None:
    """Parse, run, print."""
    parser = driver.parser(
        __doc__,
        driver.option("--work", required=False),
        driver.option("--data-root", default=Path("data/voc"), help="folder that `ezsd data voc` wrote"),
        driver.option("--split", choices=[*VOC_SPLITS], default="voc-16-4"),
        driver.option("--photos", type=int, default=1500, help="of the training part"),
        driver.option(
            "--teacher", default="", help='"plugin:MODULE:FACTORY", or a model with its weights by --build-set'
        ),
        driver.option("--backbone", default="", help="of detector and proposer"),
        driver.option("--backbone-weights", type=Path),
        driver.option("--arms", nargs="*", default=[], help="names; all by default"),
        driver.option("--seeds", default=[0, 1], help="of the training"),
        "--jobs",
        driver.option("--dev", action="store_true", help="evaluate on training photos that are not trained on"),
        driver.option("--set", help="of all runs"),
        driver.option("--build-set", dest="build_overrides", action="append", default=[], help="of all stores"),
        driver.option("--tag", default="photos", help="name of a group of rows"),
        driver.option("--list", action="store_true", help="name the arms and stop"),
        driver.option(
            "--table", action="store_true", help="print the rows of the tag, split, part, photos and settings, and stop"
        ),
    )
    asked = parser.parse_args(words)
    try:
        arms = chosen(asked.arms, ARMS)
    except ValueError as error:
        parser.error(str(error))
    if asked.list:
        print("\n".join(arm.name for arm in arms))
        return
    if asked.table:
        wanted = {
            "tag": asked.tag,
            "dataset": asked.split,
            "part": "dev" if asked.dev else "val",
            "photos": asked.photos,
            "overrides": asked.overrides,
        }
        found = driver.read("voc", asked.results)
        print(table([row for row in found if {key: row[key] for key in wanted} == wanted], arms))
        return
    for needed in ("work", "teacher", "backbone", "backbone_weights"):
        if not getattr(asked, needed):
            parser.error(f"--{needed.replace('_', '-')} is needed")
    torch.set_num_threads(1)
    plans = [Plan(asked=asked, seed=seed) for seed in asked.seeds]
    failed = run_all(plans, arms, words if words is not None else sys.argv[1:])
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; the same command goes on with them")


if __name__ == "__main__":
    main()
