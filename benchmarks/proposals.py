"""How many encoder passes do proposals need? `python benchmarks/proposals.py scenes|mosaics|photos --work DIR`.

Share of NOVEL objects with a proposal at IoU 0.5 among the best 50, 200 and 300, against crops encoded per image, for
the whole of the method's grid, for the cheaper modes of `proposals.search`, and for two controls: as many anchors drawn
at random as "coarse-to-fine" looks at, scored as usual; and anchors in random order, which nobody scored.

"scenes" are training images of `shapes` (128 px), "mosaics" six of them side by side (384 x 256 px, so that objects
are as small as COCO's), "photos" are those COCO photos of --data-root that show most novel objects, seen by --teacher.
The whole grid is embedded once per image and kept in DIR: a stopped benchmark goes on where it was, and every mode
reads from there. Before that counts, anchors of every image are encoded again by themselves and have to come out bit
for bit. With --train, "scenes" builds a store per mode and trains a detector on each. With --network it measures one
more control: what a detector's proposal network hands on that was trained on base boxes, without CLIP.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import driver
import numpy as np
import torch
from torch import Tensor

from ezsd.adapt import restore
from ezsd.cache import Store, info
from ezsd.crops import distinct_crops
from ezsd.data.annotations import Annotations, load_evaluation
from ezsd.data.dataset import pad_images
from ezsd.detector.model import Detector
from ezsd.metrics.recall import recall_at
from ezsd.pipeline.config.schema import Config, load_preset
from ezsd.pipeline.data.datasets import Dataset, find_dataset
from ezsd.pipeline.data.shapes import write_shapes
from ezsd.pipeline.extraction.anchors import image_anchors, look_at_anchors
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.encoder import CropEncoder
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.extraction.teacher import configured_teacher
from ezsd.pipeline.inference.evaluate import evaluate_run
from ezsd.pipeline.inference.evaluation_tables import headline
from ezsd.pipeline.inference.predictor import load_trained
from ezsd.pipeline.training.train import TrainRequest, train
from ezsd.proposals.select import anchor_scores, guesses, select_regions
from ezsd.teacher.open_clip import Teacher

TOP = (50, 200, 300)
GRID = ("grid", "sizes", "ratios", "stride")
ARMS: dict[str, dict[str, object]] = {
    "faithful": {"search": "exhaustive"},
    **{f"grown-stride {growth}": {"search": "grown-stride", "growth": growth} for growth in (0.25, 0.5, 1.0)},
    **{
        f"coarse-to-fine {growth}, {passes}": {"search": "coarse-to-fine", "growth": growth, "anchor_fraction": passes}
        for growth in (0.25, 0.375, 0.5)
        for passes in (0.05, 0.08, 0.1, 0.2)
    },
}
DRAWS = 5
"""Random controls are means of as many draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One image, and the novel objects in it: read for the evaluation alone."""

    name: str
    pixels: Tensor
    """(3, H, W) uint8."""
    novel: np.ndarray
    """(N, 4) xyxy pixels."""

    @property
    def extent(self) -> tuple[int, int]:
        """Width and height, pixels."""
        return self.pixels.shape[2], self.pixels.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all arms of one set of images share."""

    config: Config
    """With the faithful grid; arms change its mode."""
    teacher: Teacher
    text: Tensor
    background: Tensor | None
    base_count: int
    folder: Path
    """Where embeddings of whole grids are kept."""

    def score(self, embedding: Tensor) -> Tensor:
        """Scores (R,) of embeddings (R, D)."""
        scale = self.teacher.logit_scale
        names, foreground = guesses(embedding, self.text, self.background, logit_scale=scale)
        return anchor_scores(names, foreground, base_count=self.base_count, score=self.config.proposals.score)

    def proposals(self, boxes: Tensor, embedding: Tensor) -> Tensor:
        """Boxes (P, 4) that scoring and suppression leave of looked-at ones, best first."""
        settings = self.config.proposals
        found = select_regions(
            boxes,
            embedding,
            self.text,
            torch.zeros(0, 4),
            base_count=self.base_count,
            background=self.background,
            logit_scale=self.teacher.logit_scale,
            score=settings.score,
            nms_iou=settings.nms_iou,
            keep_proposals=settings.max_proposals,
            base_iou=settings.base_iou,
            drop_base_guesses=False,
            keep_regions=settings.max_proposals,
        )
        return boxes[found.proposal]

    def grid(self, picture: Picture) -> tuple[Tensor, Tensor]:
        """All anchors of an image (A, 4) and their embeddings (A, D), kept and checked."""
        anchors = image_anchors(self.config.proposals, *picture.extent)
        kept = self.folder / f"{picture.name}.npy"
        if not kept.exists():
            embedding, _ = CropEncoder(self.teacher, self.config).encode(picture.pixels, anchors)
            unfinished = kept.with_suffix(".partial.npy")
            np.save(unfinished, embedding.numpy())
            unfinished.rename(kept)
            print(f"{kept}: {len(anchors)} anchors", flush=True)
        embedding = torch.from_numpy(np.load(kept))
        some = torch.randperm(len(anchors), generator=torch.Generator().manual_seed(0))[:16]
        again, _ = CropEncoder(self.teacher, self.config).encode(picture.pixels, anchors[some])
        if not torch.equal(again, embedding[some]):
            raise SystemExit(f"{kept}: anchors encoded by themselves come out differently; no figures. Remove it?")
        return anchors, embedding

    def passes(self, boxes: Tensor, picture: Picture) -> int:
        """Crops that have to be encoded for boxes of an image."""
        settings, (width, height) = self.config.proposals, picture.extent
        ratio, surround = settings.crop_ratio, settings.padding
        first, _ = distinct_crops(boxes, ratio=ratio, surround=surround, width=width, height=height)
        return len(first)


def on_grid(config: Config) -> Config:
    """A configuration with the anchors of the preset `coco`."""
    faithful = load_preset("coco", ["proposals.search=exhaustive"]).proposals
    grid = {key: getattr(faithful, key) for key in GRID}
    return dataclasses.replace(
        config, proposals=dataclasses.replace(config.proposals, **grid, max_proposals=faithful.max_proposals)
    )


def with_arm(config: Config, arm: dict[str, object]) -> Config:
    """A configuration with an arm's mode."""
    return dataclasses.replace(config, proposals=dataclasses.replace(config.proposals, **arm))


def novel_boxes(truth: Annotations, position: int, base_count: int) -> np.ndarray:
    """Boxes (N, 4) of the novel objects of an image that are no crowds."""
    of = truth.rows(position)
    novel = (truth.class_index[of] >= base_count) & ~truth.crowd[of]
    return np.asarray(truth.box[of][novel], np.float32)


def read_picture(dataset: Dataset, truth: Annotations, position: int) -> Picture:
    """One training image."""
    image = truth.images[position]
    pixels = dataset.images("train").read(image)
    return Picture(name=str(image.id), pixels=pixels, novel=novel_boxes(truth, position, len(dataset.split.base)))


def mosaic(tiles: list[Picture], number: int) -> Picture:
    """Six pictures of one size in two rows."""
    width, height = tiles[0].extent
    pixels = torch.cat([torch.cat([tile.pixels for tile in tiles[row : row + 3]], 2) for row in (0, 3)], 1)
    corners = [np.array([width * (n % 3), height * (n // 3)] * 2, np.float32) for n in range(6)]
    novel = np.concatenate([tile.novel + corner for tile, corner in zip(tiles, corners, strict=True)])
    return Picture(name=str(number), pixels=pixels, novel=novel)


def shapes_bench(kind: str, work: Path, seed: int, images: int) -> tuple[Bench, list[Picture]]:
    """Scenes or mosaics of a seed, and the re-normalised teacher of its cache."""
    data, cache = work / f"data-{seed}", work / f"cache-{seed}"
    write_shapes(data, seed=seed)
    dataset, config = find_dataset("shapes", data), load_preset("shapes")
    build_cache(BuildRequest(dataset=dataset, config=config, out=cache, preset="shapes", workers=1))
    teacher, (values, tuned) = configured_teacher(config.teacher, "cpu"), Store(cache).teacher
    restore(teacher.layer_norms(), values, tuned["parameters"])
    truth = load_evaluation(dataset.root / dataset.train_annotations, dataset.split)
    if kind == "mosaics":
        scenes = [read_picture(dataset, truth, position) for position in range(6 * images)]
        pictures = [mosaic(scenes[6 * number : 6 * number + 6], number) for number in range(images)]
    else:
        pictures = [read_picture(dataset, truth, position) for position in range(images)]
    return make_bench(on_grid(config), teacher, dataset, work / f"{kind}-{seed}"), pictures


def photos_bench(data_root: Path, teacher_name: str, work: Path, images: int) -> tuple[Bench, list[Picture]]:
    """The photos with most novel objects, as a plug-in teacher sees them."""
    dataset = find_dataset("coco", data_root)
    config = load_preset("coco", ["build.batch_size=16"])
    config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, name=teacher_name, weights=None))
    truth = load_evaluation(dataset.root / dataset.train_annotations, dataset.split)
    base = len(dataset.split.base)
    order = sorted(
        range(len(truth.images)), key=lambda place: (-len(novel_boxes(truth, place, base)), truth.images[place].id)
    )
    pictures = [read_picture(dataset, truth, place) for place in order[:images]]
    return make_bench(on_grid(config), configured_teacher(config.teacher, "cpu"), dataset, work / "photos"), pictures


@torch.no_grad()
def make_bench(config: Config, teacher: Teacher, dataset: Dataset, folder: Path) -> Bench:
    """A bench whose names are embedded."""
    folder.mkdir(parents=True, exist_ok=True)
    backgrounds = config.teacher.backgrounds
    return Bench(
        config=config,
        teacher=teacher,
        text=teacher.encode_text(list(dataset.split.names)).float(),
        background=teacher.encode_text(backgrounds) if backgrounds else None,
        base_count=len(dataset.split.base),
        folder=folder,
    )


@torch.no_grad()
def measure(bench: Bench, pictures: list[Picture]) -> list[driver.Row]:
    """Recall and passes of every arm and control: one row each."""
    grids = [bench.grid(picture) for picture in pictures]
    novel = [picture.novel for picture in pictures]
    shared: driver.Row = {"images": len(pictures), "novel_objects": sum(map(len, novel))}
    result: list[driver.Row] = []
    for name, arm in ARMS.items():
        config = with_arm(bench.config, arm).proposals
        found, passes = [], []
        for picture, (anchors, embedding) in zip(pictures, grids, strict=True):
            row_of = {box.numpy().tobytes(): row for row, box in enumerate(anchors)}

            def known(boxes: Tensor, rows_of: dict[bytes, int] = row_of, table: Tensor = embedding) -> Tensor:
                return table[[rows_of[box.numpy().tobytes()] for box in boxes]]

            boxes, vectors = look_at_anchors(config, *picture.extent, known, bench.score)
            found.append(bench.proposals(boxes, vectors))
            passes.append(bench.passes(boxes, picture))
        result.append({**shared, "arm": name, **recall_row(found, novel, passes)})
    result += [{**shared, **row} for row in controls(bench, pictures, grids)]
    return result


def controls(bench: Bench, pictures: list[Picture], grids: list[tuple[Tensor, Tensor]]) -> Iterable[driver.Row]:
    """A tenth of the anchors drawn at random and scored; and anchors in random order, which cost nothing."""
    novel = [picture.novel for picture in pictures]
    scored, unscored = [], []
    for draw in range(DRAWS):
        found, passes, blind = [], [], []
        for number, (picture, (anchors, embedding)) in enumerate(zip(pictures, grids, strict=True)):
            order = torch.randperm(len(anchors), generator=torch.Generator().manual_seed(1000 * draw + number))
            some = order[: round(0.1 * len(anchors))].sort().values
            found.append(bench.proposals(anchors[some], embedding[some]))
            passes.append(bench.passes(anchors[some], picture))
            blind.append(anchors[order])
        scored.append(recall_row(found, novel, passes))
        unscored.append(recall_row(blind, novel, [0]))
    yield {"arm": "a tenth drawn at random, scored", **mean_row(scored)}
    yield {"arm": "anchors in random order, not scored", **mean_row(unscored)}


def recall_row(found: list[Tensor], novel: list[np.ndarray], passes: list[int]) -> dict[str, float]:
    """Recall by number of proposals, and passes per image."""
    recall = recall_at(found, novel, top=TOP)
    return {"passes": float(np.mean(passes)), **{f"recall@{k}": float(recall[k] or 0.0) for k in TOP}}


def mean_row(draws: list[dict[str, float]]) -> dict[str, float]:
    """The mean of several rows."""
    return {key: float(np.mean([draw[key] for draw in draws])) for key in draws[0]}


def train_modes(work: Path, seed: int, images: int, arms: list[str], *, train_seed: int) -> Iterable[driver.Row]:
    """AP50 of a detector per arm, trained on the first training images alone."""
    dataset = find_dataset("shapes", work / f"data-{seed}")
    for name in arms:
        config = with_arm(on_grid(load_preset("shapes", ["train.pseudo_confidence=0"])), ARMS[name])
        store = work / f"train-{seed}-{name.replace(' ', '-').replace(',', '')}"
        reuse = work / f"cache-{seed}"
        build_cache(BuildRequest(dataset=dataset, config=config, out=store, limit=images, workers=1, reuse=reuse))
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=train_seed))
        folder = store.with_name(f"run-{train_seed}-{store.name}")
        run = train(TrainRequest(cache=store, run=folder, config=config))
        encoded = (info(store).environment or {})["encoded"]
        yield {
            "arm": name,
            "images": images,
            "train_seed": train_seed,
            "encoded": encoded,
            "AP50": headline(evaluate_run(run, data_root=None, device="cpu")),
        }


@torch.no_grad()
def network_boxes(detector: Detector, pixels: Tensor) -> Tensor:
    """What the proposal network hands on of one image (3, H, W) uint8: boxes (K, 4) in its pixels, best first."""
    batch, sizes = pad_images([pixels])
    predicted = detector.rpn(detector.backbone.maps(batch, sizes), batch.shape[2:])
    return detector.rpn.propose(predicted, sizes).boxes[0]


def network_row(work: Path, seed: int, images: int) -> driver.Row:
    """Recall of the proposal network of a detector that learned from all training scenes' base boxes and no CLIP."""
    _, pictures = shapes_bench("scenes", work, seed, images)
    config = load_preset("shapes", ["loss.distillation=0", "model.ignore_confidence=2.0", "train.pseudo_confidence=0"])
    run = train(TrainRequest(cache=work / f"cache-{seed}", run=work / f"network-{seed}", config=config))
    detector = load_trained(run, "cpu").detector
    found = [network_boxes(detector, picture.pixels) for picture in pictures]
    novel = [picture.novel for picture in pictures]
    boxes = float(np.mean([len(one) for one in found]))
    row = {
        "images": images,
        "novel_objects": sum(map(len, novel)),
        "arm": "proposal network, base boxes",
        "boxes": boxes,
    }
    return {**row, **recall_row(found, novel, [0])}


def show(row: driver.Row) -> str:
    """One line per row."""
    if "AP50" in row:
        return str(row)
    recall = "".join(f"{f'top {k}':>9}{100 * row[f'recall@{k}']:>6.1f} %" for k in TOP)
    return f"{row['arm']:<38}{row['passes']:>7.0f} passes{recall}"


def rows(arguments: argparse.Namespace) -> Iterator[driver.Row]:
    """The rows of one set of images."""
    # Contended cores make multi-threaded torch collapse.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    kind, work, seed, images = arguments.kind, arguments.work, arguments.seed, arguments.images
    if kind == "photos" and not (arguments.data_root and arguments.teacher):
        raise driver.UsageError("photos needs --data-root and --teacher")
    if kind != "scenes" and (arguments.network or arguments.train is not None):
        raise driver.UsageError("--network and --train go with scenes")
    if not set(arguments.train or ()) <= set(ARMS):
        raise driver.UsageError(f"--train: expected some of {'; '.join(ARMS)}")
    common = {"data": kind} if kind == "photos" else {"data": kind, "seed": seed}
    if arguments.network:
        found: Iterable[driver.Row] = [network_row(work, seed, images)]
    elif arguments.train is not None:
        found = train_modes(work, seed, images, arguments.train or list(ARMS), train_seed=arguments.train_seed)
    else:
        if kind == "photos":
            bench, pictures = photos_bench(arguments.data_root, arguments.teacher, work, images)
        else:
            bench, pictures = shapes_bench(kind, work, seed, images)
        common["teacher"] = bench.teacher.fingerprint()["name"]
        found = measure(bench, pictures)
    yield from ({**common, **row} for row in found)


if __name__ == "__main__":
    driver.run(
        "proposals",
        rows,
        __doc__,
        driver.option("kind", choices=("scenes", "mosaics", "photos")),
        "--work",
        driver.option("--images", default=20),
        driver.option("--seed", type=int, default=0, help="of shapes; 0 is the one to choose on"),
        driver.option("--data-root", help="COCO's folder, for photos"),
        driver.option("--teacher", help="plugin:package.module:factory, for photos"),
        driver.option("--train", nargs="*", metavar="ARM", help="train on these arms instead; none means all"),
        driver.option("--network", action="store_true", help="measure a detector's proposal network instead"),
        driver.option("--train-seed", type=int, default=0),
        show=show,
    )
