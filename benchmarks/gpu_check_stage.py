"""Stage one on a GPU beside the CPU: crops, embeddings, regions; and its speed beside its encoder's."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gpu_check_step import Differs
from stage_one import MODEL, encode, open_job, write_photos, write_weights
from torch import Tensor
from torch.nn import functional

from ezsd.cache import Block, RaggedRows
from ezsd.choices import Surround
from ezsd.crops import crop_boxes
from ezsd.data.shapes import scene
from ezsd.pipeline.config.schema import Config, load_preset
from ezsd.pipeline.data.datasets import find_dataset
from ezsd.pipeline.data.shapes import write_shapes
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.extraction.teacher import configured_teacher
from ezsd.pipeline.extraction.worker import block_rows, extract_block
from ezsd.teacher.open_clip import OpenClipTeacher

Row = dict[str, Any]
LEVELS = 2
"""Most grey levels between two crops: each device is within one of Pillow's."""
COSINE = 0.9999
"""Least cosine of two embeddings of one crop in float32."""
OWN_CROPS = 0.999
"""The same where each device crops for itself."""
SAME = 0.98
"""Least fraction of the CPU's regions that a GPU finds too: near ties turn in suppression."""
CROPS = 64
ENCODER_BATCHES = 8
SURROUNDS: tuple[Surround, ...] = ("black", "context")


def crops(device: torch.device, *, size: int) -> Row:
    """Grey levels between crops of all kinds of boxes on a device and on the CPU. Differs says what is beyond."""
    pixels = torch.from_numpy(np.ascontiguousarray(scene(seed=0, split="train", index=0).pixels)).permute(2, 0, 1)
    image = functional.interpolate(pixels[None].float(), (480, 640), mode="bilinear")[0]
    random = torch.Generator().manual_seed(0)
    noise = torch.randint(-40, 41, image.shape, generator=random)
    corner = torch.rand(30, 2, generator=random) * torch.tensor([700.0, 540.0]) - 40
    side = 4 + torch.rand(30, 2, generator=random) ** 2 * 500
    boxes = torch.cat([torch.cat([corner, corner + side], 1), torch.tensor([[0.0, 0, 640, 480], [300, 0, 303, 480]])])
    worst = max(
        int(_apart(one, boxes, device, size).max())
        for one in ((image / 2 + 64 + noise / 2).clamp(50, 205), (image + noise).clamp(0, 255))
    )
    if worst > LEVELS:
        raise Differs(f"crops: {worst} grey levels apart, {LEVELS} allowed")
    return {"crops": 4 * len(boxes), "worst_levels": worst}


def _apart(image: Tensor, boxes: Tensor, device: torch.device, size: int) -> Tensor:
    """Grey levels between the two crops of every box, with either surround, (2 R, 3, size, size)."""
    pixels, found = image.to(torch.uint8), []
    for surround in SURROUNDS:
        here, there = (
            crop_boxes(pixels.to(place), boxes.to(place), size=size, ratio=1.2, surround=surround).cpu().int()
            for place in (torch.device("cpu"), device)
        )
        found.append((there - here).abs())
    return torch.cat(found)


def embeddings(device: torch.device) -> Row:
    """Least cosine between embeddings of the packaged teacher on a device and on the CPU. Differs below `COSINE`."""
    config = load_preset("shapes").teacher
    here, there = configured_teacher(config, "cpu"), configured_teacher(config, str(device))
    pictures = np.stack([scene(seed=0, split="val", index=index).pixels for index in range(CROPS)])
    size = (here.input_size, here.input_size)
    pixels = functional.interpolate(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, size, mode="area")
    with torch.no_grad():
        least = _least_cosine(there.encode_image(pixels.to(device)).cpu(), here.encode_image(pixels))
    return {"crops": len(pixels), "least_cosine": require_near(least, "embeddings of the same crops", COSINE)}


def _least_cosine(found: Tensor, expected: Tensor) -> float:
    rows = functional.cosine_similarity(found.float(), expected.float())
    return float(rows.min()) if len(rows) else 1.0


def require_near(cosine: float, what: str, least: float) -> float:
    """The cosine. Differs if it is too small, or NaN."""
    if not cosine >= least:
        raise Differs(f"{what}: least cosine {cosine:.6f}, at least {least} expected")
    return cosine


def regions(device: torch.device, work: Path, *, images: int) -> Row:
    """Rows of a block of the shapes on a device, twice, and on the CPU, by a teacher as published.

    Args:
        device: where the other half runs.
        work: folder for the data and unfinished stores.
        images: of the block.

    Raises:
        Differs: too few regions are the same, an embedding of one is another, or the second time has other bytes.
    """
    write_shapes(work / "shapes", train=images, val=1, workers=1)
    dataset = find_dataset("shapes", work / "shapes")
    config = load_preset("shapes", ("proposals.search=exhaustive", "train.pseudo_confidence=0"))
    made = {}
    for name, place in (("cpu", "cpu"), ("first", str(device)), ("second", str(device))):
        writer, job = open_job(BuildRequest(dataset=dataset, config=config, out=work / name, device=place))
        with writer:
            # Each by a worker of its own: a teacher loaded anew.
            made[name] = block_rows(dataclasses.replace(job, made_from=name), Block(0, 0, images))
    require_same_bytes(made["first"], made["second"])
    found, expected = by_box(made["first"]["regions"]), by_box(made["cpu"]["regions"])
    both = [box for box in expected if box in found]
    share = len(both) / max(len(expected), 1)
    if share < SAME:
        raise Differs(f"regions: {share:.1%} of the CPU's are there, at least {SAME:.0%} expected")
    of_regions = _least_cosine(*(torch.from_numpy(np.stack([one[box] for box in both])) for one in (found, expected)))
    truth, right = (
        torch.from_numpy(np.asarray(made[name]["ground_truth"].fields["embedding"])) for name in ("first", "cpu")
    )
    return {
        "images": images,
        "regions": len(expected),
        "same": share,
        "least_cosine": require_near(of_regions, "regions", OWN_CROPS),
        "least_cosine_of_base_objects": require_near(_least_cosine(truth, right), "base objects", OWN_CROPS),
        "twice_the_same_bytes": True,
    }


def require_same_bytes(first: Mapping[str, RaggedRows], second: Mapping[str, RaggedRows]) -> None:
    """Differs names the first array of a block's rows that has other bytes than before."""
    for product, rows in first.items():
        for name, values in rows.fields.items():
            if values.tobytes() != second[product].fields[name].tobytes():
                raise Differs(f"{product}: two runs on one GPU gave two arrays {name!r}")


def by_box(rows: RaggedRows) -> dict[tuple[int, bytes], np.ndarray]:
    """Embedding of each region by its image's position and the bytes of its box."""
    image = np.repeat(np.arange(len(rows.counts)), rows.counts)
    boxes, embedding = np.asarray(rows.fields["box"]), np.asarray(rows.fields["embedding"])
    return {(int(n), box.tobytes()): row for n, box, row in zip(image, boxes, embedding, strict=True)}


def speed(device: torch.device, work: Path, *, images: int, settings: tuple[str, ...]) -> Row:
    """Crops per second of stage one, from file to journal, beside those of its encoder alone; ViT-B/32, random weights.

    Args:
        device: of the teacher.
        work: folder for weights, photos and unfinished stores.
        images: that are measured, in one block, as in a build: several are in flight. The first warms up.
        settings: of the preset `coco`, such as its search.
    """
    write_weights(work / "vit.safetensors")
    write_photos(work / "photos", images)
    config = load_preset("coco", (*settings, f"build.block_images={images}"))
    named = {"name": MODEL, "weights": str(work / "vit.safetensors"), "activation": "gelu"}
    config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, **named))
    dataset = find_dataset("coco", work / "photos")
    writer, job = open_job(BuildRequest(dataset=dataset, config=config, out=work / "speed", device=str(device)))
    with writer:
        block_rows(job, Block(0, 0, 1))
        crops_, spent = timed(device, lambda: extract_block(job, Block(0, 0, images)))
    encoder = encoder_speed(config, device)
    pipeline = crops_ / spent
    return {
        "model": MODEL,
        "images": images,
        "crops": crops_,
        "crops_per_s": pipeline,
        "encoder_crops_per_s": encoder,
        "over_encoder": pipeline / encoder,
    }


def encoder_speed(config: Config, device: torch.device) -> float:
    """Crops per second of the model alone, on batches of the pipeline's size that are ready on the device."""
    teacher = cast("OpenClipTeacher", configured_teacher(config.teacher, str(device)))
    ready = torch.randn(config.build.batch_size, 3, teacher.input_size, teacher.input_size, device=device)

    def passes(count: int) -> int:
        for _ in range(count):
            encode(teacher, ready)
        return count * len(ready)

    passes(2)
    count, spent = timed(device, lambda: passes(ENCODER_BATCHES))
    return count / spent


def timed(device: torch.device, call: Callable[[], int]) -> tuple[int, float]:
    """A call's result, and wall seconds until the device has done what it was told."""
    settle(device)
    began = time.perf_counter()
    result = call()
    settle(device)
    return result, time.perf_counter() - began


def settle(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
