"""What does stage one lose beside its encoder? `python benchmarks/stage_one.py --work DIR [--photos DIR]`.

ViT-B/32 at full size with random weights, which cost what trained ones do. Each worker is a process of one thread, as
in `ezsd cache build`, and all workers do the same at the same time, in turns:

- "pipeline": `extract_block` of one image, from the file to the store's journal;
- "encoder": the model alone, on batches of the pipeline's size that are ready in memory;
- "recipe": the way of the method's authors in our own words, on the pipeline's boxes: one image at a time, one Pillow
  crop at a time, batches of a hundred, JSON out. It scores and suppresses nothing, and crops once, not twice.

in fp32 and in bf16. First a gate: the embeddings that the pipeline wrote and those of the recipe must agree to a cosine
of 0.9999 in fp32 and 0.999 in bf16, or there are no figures. The anchors are the method's at every --stride pixels, so
that sizes and shapes are mixed as in the whole grid. One row per number of workers goes to results/stage_one.jsonl;
under other load its ratios of CPU time are the sturdy ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import Manager, get_context
from pathlib import Path
from threading import Barrier
from typing import cast

import driver
import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ezsd.adapt import flatten
from ezsd.cache import Block, StoreWriter
from ezsd.choices import Precision
from ezsd.crops import crop_boxes
from ezsd.pipeline.config.schema import Config, load_preset
from ezsd.pipeline.data.datasets import find_dataset
from ezsd.pipeline.extraction.anchors import image_anchors
from ezsd.pipeline.extraction.build import embed_names, extract_job
from ezsd.pipeline.extraction.provenance import describe
from ezsd.pipeline.extraction.request import BuildRequest, read_annotations
from ezsd.pipeline.extraction.teacher import configured_teacher
from ezsd.pipeline.extraction.worker import ExtractJob, block_rows, extract_block
from ezsd.teacher.open_clip import OpenClipTeacher
from ezsd.vocabulary import COCO_SPLIT

MODEL = "ViT-B-32"
LEAST_COSINE: dict[Precision, float] = {"fp32": 0.9999, "bf16": 0.999}
RECIPE_BATCH = 100
WAYS = ("pipeline", "encoder", "recipe")
MEAN = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
STD = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Seconds of one piece of work, and the crops in it."""

    crops: int
    wall: float
    cpu: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one worker measured."""

    spent: dict[str, list[Spent]]
    """By way and image."""
    peak_mib: float
    """Of its memory in the pipeline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one worker is told."""

    request: BuildRequest
    job: ExtractJob
    images: tuple[int, ...]
    """Positions: the first warms up, the others are measured."""
    encoder_batches: int


def write_weights(path: Path) -> None:
    """Random weights of the model, unless they are there."""
    if path.exists():
        return
    torch.manual_seed(0)
    model = open_clip.create_model(MODEL, pretrained=None)
    unfinished = path.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, unfinished)
    unfinished.rename(path)


def write_photos(root: Path, images: int) -> None:
    """Cloudy JPEG files of COCO's usual size with a few boxes each, in COCO's layout."""
    if root.exists():
        return
    random = np.random.default_rng(0)
    categories = [{"id": number, "name": name} for number, name in enumerate(COCO_SPLIT.names)]
    unfinished = root.with_name(f".{root.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (unfinished / split).mkdir()
        records, boxes = [], []
        for number in range(images):
            clouds = Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((640, 480))
            clouds.save(unfinished / split / f"{number}.jpg", quality=90)
            records.append({"id": number, "file_name": f"{number}.jpg", "width": 640, "height": 480})
            for corner in range(7):
                box = {"id": len(boxes), "image_id": number, "category_id": corner, "iscrowd": 0, "area": 9600}
                boxes.append({**box, "bbox": [60 * corner, 40 * corner, 120, 80]})
        document = {"images": records, "annotations": boxes, "categories": categories}
        (unfinished / f"annotations/instances_{split}.json").write_text(json.dumps(document))
    unfinished.rename(root)


def settings(weights: Path, precision: Precision, stride: int, batch: int) -> Config:
    """The preset `coco` with fewer anchors, one image to a block."""
    thin = [
        "proposals.search=exhaustive",
        f"proposals.stride={stride}",
        "build.block_images=1",
        f"build.batch_size={batch}",
    ]
    config = load_preset("coco", thin)
    named = {"name": MODEL, "weights": str(weights), "activation": "gelu", "precision": precision}
    return dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, **named))


def open_job(request: BuildRequest) -> tuple[StoreWriter, ExtractJob]:
    """An unfinished store, and what its workers are told; the teacher is not re-normalised."""
    annotations = read_annotations(request)
    teacher = configured_teacher(request.config.teacher, request.device)
    manifest = describe(request.dataset, annotations, request.config, teacher.fingerprint())
    writer = StoreWriter.open(
        request.out,
        manifest,
        image_ids=[image.id for image in annotations.images],
        widths=[image.width for image in annotations.images],
        heights=[image.height for image in annotations.images],
        embed_dim=teacher.embed_dim,
        block_images=request.config.build.block_images,
    )
    values, table = flatten(teacher.layer_norms())
    text = embed_names(teacher, request.dataset.split.names)
    return writer, extract_job(request, table, values, text, manifest.digest)


def square(picture: Image.Image, box: list[float]) -> Image.Image:
    """A box enlarged by 1.2, rounded outwards and clamped, in the middle of black."""
    x1, y1, x2, y2 = box
    dx, dy = (x2 - x1) / 10, (y2 - y1) / 10
    left, top = max(math.floor(x1 - dx), 0), max(math.floor(y1 - dy), 0)
    right, bottom = min(math.ceil(x2 + dx), picture.width), min(math.ceil(y2 + dy), picture.height)
    window = picture.crop((left, top, right, bottom))
    side = max(window.size)
    canvas = Image.new("RGB", (side, side))
    canvas.paste(window, ((side - window.width) // 2, (side - window.height) // 2))
    return canvas


class Recipe:
    """The authors' way with the boxes of an image."""

    def __init__(self, teacher: OpenClipTeacher, request: BuildRequest, folder: Path) -> None:
        self.teacher, self.request, self.folder = teacher, request, folder
        self.annotations = read_annotations(request)

    def boxes(self, position: int) -> Tensor:
        """The pipeline's boxes (R, 4): anchors, then base ground truth."""
        image = self.annotations.images[position]
        anchors = image_anchors(self.request.config.proposals, image.width, image.height)
        return torch.cat([anchors, torch.from_numpy(self.annotations.box[self.annotations.rows(position)])])

    def path(self, position: int) -> Path:
        """The image's file."""
        return (
            self.request.dataset.root / self.request.dataset.train_images / self.annotations.images[position].file_name
        )

    def pixels(self, position: int) -> Tensor:
        """The image, (3, H, W) uint8."""
        return self.request.dataset.images("train").read(self.annotations.images[position])

    @torch.no_grad()
    def embed(self, position: int, boxes: Tensor) -> Tensor:
        """Unit embeddings (R, D) of boxes (R, 4)."""
        picture = Image.fromarray(self.pixels(position).permute(1, 2, 0).numpy())
        size, found = (self.teacher.input_size,) * 2, []
        for chunk in boxes.split(RECIPE_BATCH):
            batch = []
            for box in chunk.tolist():
                small = square(picture, box).resize(size, Image.Resampling.BICUBIC)
                pixels = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)
                batch.append((pixels.float().div(255) - MEAN) / STD)
            found.append(encode(self.teacher, torch.stack(batch).to(self.teacher.device)).cpu())
        return torch.cat(found)

    def write(self, position: int) -> int:
        """Embed all boxes of an image, write them down, and say how many there were."""
        boxes = self.boxes(position)
        embedding = self.embed(position, boxes)
        document = {"bbox": boxes.tolist(), "feat": embedding.tolist()}
        (self.folder / f"{position}.json").write_text(json.dumps(document))
        return len(boxes)


@torch.no_grad()
def encode(teacher: OpenClipTeacher, normalised: Tensor) -> Tensor:
    """The model alone: unit embeddings (B, D) float32 of ready crops (B, 3, S, S)."""
    pixels = normalised.bfloat16() if teacher.precision == "bf16" else normalised
    return torch.nn.functional.normalize(teacher.model.encode_image(pixels).float(), dim=1)


def ready_batch(recipe: Recipe, position: int, batch: int) -> Tensor:
    """One batch as the pipeline hands it to the model."""
    boxes = recipe.boxes(position)[:batch]
    rule, size = recipe.request.config.proposals, recipe.teacher.input_size
    crops = crop_boxes(recipe.pixels(position), boxes, size=size, ratio=rule.crop_ratio, surround=rule.padding)
    ready = (crops.float() / 255 - MEAN) / STD
    return (ready.bfloat16() if recipe.teacher.precision == "bf16" else ready).to(recipe.teacher.device)


def agreement(job: ExtractJob, block: Block, recipe: Recipe) -> float:
    """The least cosine between what the pipeline keeps of a block's image and the recipe's embeddings of its boxes."""
    kept = block_rows(job, block)
    least = 1.0
    for product in ("regions", "ground_truth"):
        box, embedding = (torch.from_numpy(np.array(kept[product].fields[name])) for name in ("box", "embedding"))
        if len(box):
            expected = recipe.embed(block.start, box.float())
            least = min(least, float((torch.nn.functional.normalize(embedding.float(), dim=1) * expected).sum(1).min()))
    return least


def measured(piece: Callable[[], int], barrier: Barrier) -> Spent:
    """Do a piece of work when all workers are ready for it."""
    barrier.wait()
    crops, spent = driver.timed(piece)
    return Spent(crops=crops, wall=spent.wall, cpu=spent.cpu)


def work(task: Task, barrier: Barrier) -> Found:
    """One worker: warm up, then every way for each image."""
    torch.set_num_threads(1)
    first, *others = task.images
    extract_block(task.job, Block(first, first, first + 1))
    # Before the model is loaded once more for the other ways.
    peak = driver.peak_mib()
    teacher = cast("OpenClipTeacher", configured_teacher(task.request.config.teacher, task.request.device))
    recipe = Recipe(teacher, task.request, task.request.out)
    ready = ready_batch(recipe, first, task.request.config.build.batch_size)
    encode(teacher, ready)

    def bare() -> int:
        for _ in range(task.encoder_batches):
            encode(teacher, ready)
        if teacher.device.type != "cpu":
            torch.cuda.synchronize(teacher.device)
        return task.encoder_batches * len(ready)

    spent: dict[str, list[Spent]] = {way: [] for way in WAYS}
    for image in others:
        block = Block(image, image, image + 1)
        pieces = (partial(extract_block, task.job, block), bare, partial(recipe.write, image))
        for way, piece in zip(WAYS, pieces, strict=True):
            spent[way].append(measured(piece, barrier))
    return Found(spent=spent, peak_mib=peak)


def measure(request: BuildRequest, workers: int, rounds: int, encoder_batches: int) -> dict[str, dict[str, float]]:
    """What all workers together do in one precision, by way; and the peak of a worker's memory."""
    writer, job = open_job(request)
    with writer, Manager() as manager, ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        barrier = manager.Barrier(workers)
        shares = [tuple(range(worker, (rounds + 1) * workers, workers)) for worker in range(workers)]
        tasks = [Task(request=request, job=job, images=share, encoder_batches=encoder_batches) for share in shares]
        found = [future.result() for future in [pool.submit(work, task, barrier) for task in tasks]]
    figures = {way: summary([one.spent[way] for one in found]) for way in WAYS}
    return {**figures, "worker": {"peak_mib": round(max(one.peak_mib for one in found), 1)}}


def summary(by_worker: list[list[Spent]]) -> dict[str, float]:
    """Rates and CPU time of one way; of wall times the median over rounds."""
    rounds = list(zip(*by_worker, strict=True))
    everything = [spent for one in rounds for spent in one]
    crops, cpu = sum(spent.crops for spent in everything), sum(spent.cpu for spent in everything)
    # All workers begin a round together, and the slowest ends it.
    walls = [max(spent.wall for spent in one) for one in rounds]
    return {
        "crops": crops,
        "crops_per_s": statistics.median(
            sum(s.crops for s in one) / wall for one, wall in zip(rounds, walls, strict=True)
        ),
        "images_per_s": statistics.median(len(by_worker) / wall for wall in walls),
        "cpu_ms_per_crop": 1e3 * cpu / crops,
        "cpu_s_per_image": cpu / len(everything),
    }


def over_encoder(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    """The pipeline's speed as a share of the encoder's."""
    pipeline, encoder = figures["pipeline"], figures["encoder"]
    return {
        "wall": round(pipeline["crops_per_s"] / encoder["crops_per_s"], 3),
        "cpu": round(encoder["cpu_ms_per_crop"] / pipeline["cpu_ms_per_crop"], 3),
    }


def over_recipe(way: dict[str, float], recipe: dict[str, float]) -> dict[str, float]:
    """How many times as many images as the recipe."""
    return {
        "wall": round(way["images_per_s"] / recipe["images_per_s"], 2),
        "cpu": round(recipe["cpu_s_per_image"] / way["cpu_s_per_image"], 2),
    }


def gate(request: BuildRequest, precision: Precision) -> float:
    """The least cosine, see `agreement`; no figures below the bound."""
    writer, job = open_job(request)
    teacher = cast("OpenClipTeacher", configured_teacher(request.config.teacher, request.device))
    with writer:
        least = agreement(job, writer.blocks[0], Recipe(teacher, request, request.out))
    if not least >= LEAST_COSINE[precision]:
        raise SystemExit(f"{precision}: pipeline and recipe agree to a cosine of {least:.6f} only; no figures")
    return least


def rows(arguments: argparse.Namespace) -> Iterator[driver.Row]:
    """Gate, then one row per number of workers."""
    torch.set_num_threads(1)
    weights, photos = arguments.work / "vit-b-32.safetensors", arguments.photos or arguments.work / "photos"
    write_weights(weights)
    if arguments.photos is None:
        write_photos(photos, (arguments.rounds + 1) * max(arguments.workers))

    def request(precision: Precision, folder: str) -> BuildRequest:
        config = settings(weights, precision, arguments.stride, arguments.batch)
        out, device = Path(folder) / precision, arguments.device
        return BuildRequest(dataset=find_dataset("coco", photos), config=config, out=out, device=device)

    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        cosines = {precision: gate(request(precision, folder), precision) for precision in LEAST_COSINE}
    for workers in arguments.workers:
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            fp32, bf16 = (
                measure(request(precision, folder), workers, arguments.rounds, arguments.encoder_batches)
                for precision in LEAST_COSINE
            )
        yield {
            "model": MODEL,
            "device": torch.cuda.get_device_name(arguments.device) if arguments.device != "cpu" else "cpu",
            "workers": workers,
            "photos": "real" if arguments.photos else "synthetic",
            "rounds": arguments.rounds,
            "stride": arguments.stride,
            "batch": arguments.batch,
            "least_cosine": cosines,
            "bf16_hardware": driver.bf16_instructions(),
            "pipeline_over_encoder": {"fp32": over_encoder(fp32), "bf16": over_encoder(bf16)},
            "over_recipe_in_fp32": {
                "pipeline in bf16": over_recipe(bf16["pipeline"], fp32["recipe"]),
                "pipeline in fp32": over_recipe(fp32["pipeline"], fp32["recipe"]),
                "recipe in bf16": over_recipe(bf16["recipe"], fp32["recipe"]),
            },
            "fp32": fp32,
            "bf16": bf16,
            "note": arguments.note,
        }


if __name__ == "__main__":
    driver.run(
        "stage_one",
        rows,
        __doc__,
        "--work",
        driver.option("--photos", help="folder in COCO's layout; synthetic ones are written without it"),
        driver.option("--workers", type=int, nargs="+", default=[1, 2]),
        driver.option("--rounds", default=1, help="images per worker, after one to warm up"),
        driver.option("--stride", type=int, default=192, help="of the anchors, pixels of the resized image"),
        driver.option("--batch", type=int, default=32),
        driver.option("--device", default="cpu", help="cpu, cuda or cuda:N; no GPU has been measured yet"),
        driver.option("--encoder-batches", type=int, default=4, help="of a round, for the encoder alone"),
        "--note",
    )
