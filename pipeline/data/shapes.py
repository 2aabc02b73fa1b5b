"""Write `shapes` or `clutter` as a COCO-format folder."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from PIL import Image

from ezsd.choices import Benchmark
from ezsd.data.coco_document import LabelledBox, LabelledImage, coco_document
from ezsd.data.shapes import IMAGE_SIZE, SHAPES_SPLIT, Scene, SceneSplit, scene
from ezsd.pipeline.errors import DatasetError
from ezsd.pipeline.files import new_folder, read_object
from ezsd.pipeline.interrupts import shielded
from ezsd.pipeline.progress import Progress

TRAIN_IMAGES = 500
VAL_IMAGES = 250


def write_shapes(
    out: Path,
    *,
    train: int = TRAIN_IMAGES,
    val: int = VAL_IMAGES,
    seed: int = 0,
    workers: int = 0,
    benchmark: Benchmark = "shapes",
) -> None:
    """Draw both splits and write images and annotations; the same bytes for the same seed.

    The folder appears whole or not at all. An existing one with the same contents is left alone.

    Args:
        out: the folder to make.
        train: training images.
        val: validation images.
        seed: of the benchmark; 0 is for choosing, `ezsd.data.shapes.TEST_SEEDS` for reporting.
        workers: processes that draw; 0 takes one per core.
        benchmark: scenes without or with distractors. All splits of base and novel names have the same files.

    Raises:
        DatasetError: `out` is something else already.
        DamagedFile: it was one, and its shapes.json or clutter.json is not valid JSON.
    """
    options = {"dataset": benchmark, "version": 1, "train": train, "val": val, "seed": seed}
    if out.exists():
        found = out / f"{benchmark}.json"
        if found.is_file() and read_object(found) == options:
            return
        raise DatasetError(f"`out={out}`: exists and is not this very dataset; choose another folder or remove it")
    splits: tuple[tuple[SceneSplit, int], ...] = (("train", train), ("val", val))
    with (
        new_folder(out) as draft,
        Progress(benchmark, train + val, unit="image") as progress,
        ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool,
    ):
        (draft / "annotations").mkdir()
        for split, count in splits:
            folder = draft / split
            folder.mkdir()
            records = []
            with shielded():
                drawn = pool.map(partial(_write_scene, folder, benchmark, seed, split), range(count), chunksize=16)
            try:
                for record in drawn:
                    records.append(record)
                    progress.advance()
            except BaseException:
                # Leaving the pool would wait until all are drawn.
                pool.shutdown(cancel_futures=True)
                raise
            document = _document(records)
            (draft / f"annotations/instances_{split}.json").write_text(json.dumps(document, indent=1))
        (draft / f"{benchmark}.json").write_text(json.dumps(options, indent=1) + "\n")


def _write_scene(
    folder: Path, benchmark: Benchmark, seed: int, split: SceneSplit, index: int
) -> tuple[list[list[float]], list[str]]:
    drawn: Scene = scene(seed=seed, split=split, index=index, benchmark=benchmark)
    Image.fromarray(drawn.pixels).save(folder / f"{index + 1:06d}.png", compress_level=1)
    return [[round(float(v), 2) for v in box] for box in drawn.boxes], list(drawn.names)


def _document(records: list[tuple[list[list[float]], list[str]]]) -> dict[str, object]:
    """The COCO tables. Category ids have gaps and another order than the split, as COCO's do."""
    category = {name: 3 * i + 2 for i, name in enumerate(sorted(SHAPES_SPLIT.names))}
    images = [
        LabelledImage(
            id=number,
            file_name=f"{number:06d}.png",
            width=IMAGE_SIZE,
            height=IMAGE_SIZE,
            boxes=[
                LabelledBox(name=name, xywh=(x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)))
                for (x1, y1, x2, y2), name in zip(boxes, names, strict=True)
            ],
        )
        for number, (boxes, names) in enumerate(records, start=1)
    ]
    return coco_document(images, category)
