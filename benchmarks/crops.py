"""What does a crop cost on the CPU? `python benchmarks/crops.py --photos DIR [--images 4]`.

The faithful grid's anchors of real photos, as tensors ready for a ViT-B/32, in one run and on one thread: our
`crop_boxes` and a normalisation per batch, in fresh memory ("ours") and in memory that is reused ("reused"), against
the recipe of the method's authors in our own words ("recipe": one box at a time, array, Pillow image, black square,
bicubic resize, float tensor, normalise); and both up to bytes alone. Gate: crops within 1/255 of the recipe's, mean
over each crop, and both normalisations the same. CPU seconds, best of the rounds, ways in turn.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rows
import torch
from PIL import Image
from torch import Tensor

from ezsd.boxes import clip
from ezsd.crops import crop_boxes
from ezsd.pipeline.data.images import read_image
from ezsd.proposals.select import faithful_anchors

SIZE = 224
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]
BATCH = 32
SIDES = (32, 64, 128, 256, 512)
BUFFER = torch.empty((BATCH, 3, SIZE, SIZE), memory_format=torch.channels_last)


def bytes_alone(image: Tensor, boxes: Tensor) -> None:
    """Crops as `crop_boxes` gives them, uint8."""
    for chunk in boxes.split(BATCH):
        crop_boxes(image, chunk, size=SIZE, ratio=1.2, surround="black")


def ours(image: Tensor, boxes: Tensor) -> None:
    """Batches of normalised crops, each in fresh memory, as extraction and teacher make them."""
    for chunk in boxes.split(BATCH):
        crops = crop_boxes(image, chunk, size=SIZE, ratio=1.2, surround="black")
        _ = (crops.float() / 255 - MEAN) / STD


def reused(image: Tensor, boxes: Tensor) -> None:
    """The same numbers, in memory that is there already."""
    scale, shift = (1 / (255 * STD)).flatten().repeat(SIZE), (-MEAN / STD).flatten().repeat(SIZE)
    for chunk in boxes.split(BATCH):
        crops = crop_boxes(image, chunk, size=SIZE, ratio=1.2, surround="black")
        ready = BUFFER[: len(chunk)].copy_(crops).permute(0, 2, 3, 1).view(len(chunk), SIZE, SIZE * 3)
        torch.addcmul(shift, ready, scale, out=ready)


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


def recipe(image: Tensor, boxes: Tensor) -> None:
    """One box at a time, from tensor to Pillow and back, in batches of a hundred."""
    for chunk in boxes.split(100):
        batch = []
        for box in chunk.tolist():
            picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            small = square(picture, box).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            pixels = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).contiguous()
            batch.append((pixels.float().div(255) - MEAN) / STD)
        torch.stack(batch)


def recipe_bytes(image: Tensor, boxes: Tensor) -> None:
    """The recipe up to the resized picture, the image turned into Pillow's only once."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    for box in boxes.tolist():
        square(picture, box).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def gate(image: Tensor, boxes: Tensor) -> float:
    """The largest mean difference of a crop, in 1/255."""
    found = crop_boxes(image, boxes, size=SIZE, ratio=1.2, surround="black").permute(0, 2, 3, 1).int()
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    worst = 0.0
    for box, crop in zip(boxes.tolist(), found, strict=True):
        expected = np.asarray(square(picture, box).resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(np.int32)
        worst = max(worst, float(np.abs(crop.numpy() - expected).mean()))
    reused(image, boxes[:BATCH])
    first = crop_boxes(image, boxes[:BATCH], size=SIZE, ratio=1.2, surround="black")
    torch.testing.assert_close(BUFFER[: len(first)], (first.float() / 255 - MEAN) / STD)
    assert worst <= 1, f"a crop differs from Pillow's by {worst} / 255 on average"
    return worst


def seconds(way: Callable[[Tensor, Tensor], object], image: Tensor, boxes: Tensor) -> float:
    """CPU time of one round."""
    began = time.process_time()
    way(image, boxes)
    return time.process_time() - began


def main() -> None:
    """Gate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder in COCO's layout")
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--boxes", type=int, default=200, help="of each side and image")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    ways = {"bytes": bytes_alone, "ours": ours, "reused": reused, "recipe bytes": recipe_bytes, "recipe": recipe}
    spent = {way: dict.fromkeys(SIDES, 0.0) for way in ways}
    worst = 0.0
    for path in sorted((arguments.photos / "val2017").glob("*.jpg"))[: arguments.images]:
        image = read_image(path)
        height, width = image.shape[1:]
        for side in SIDES:
            anchors = faithful_anchors(width, height, sizes=(side,), ratios=(0.5, 1.0, 2.0), stride=32)
            anchors = clip(anchors, width, height)
            anchors = anchors[((anchors[:, 2:] - anchors[:, :2]) >= 1).all(1)]
            boxes = anchors[torch.from_numpy(rng.permutation(len(anchors))[: arguments.boxes])]
            worst = max(worst, gate(image, boxes[:50]))
            rounds = [{way: seconds(call, image, boxes) for way, call in ways.items()} for _ in range(arguments.rounds)]
            for way in ways:
                spent[way][side] += min(one[way] for one in rounds) / len(boxes) / arguments.images * 1e3
    mean = {way: float(np.mean(list(by_side.values()))) for way, by_side in spent.items()}
    for way, by_side in spent.items():
        print(f"{way:<20}", "  ".join(f"{side}: {ms:.3f}" for side, ms in by_side.items()), f" mean {mean[way]:.3f} ms")
    ratios = {way: mean["recipe"] / mean[way] for way in ("ours", "reused")}
    ratios["bytes"] = mean["recipe bytes"] / mean["bytes"]
    print(f"recipe over ours: {ratios}; worst mean difference {worst:.3f} / 255")
    rows.append(
        "crops",
        {
            "size": SIZE,
            "images": arguments.images,
            "boxes": arguments.boxes,
            "rounds": arguments.rounds,
            "threads": 1,
            "cpu_ms_per_crop": spent,
            "mean_cpu_ms_per_crop": mean,
            "recipe_over_ours": ratios,
            "worst_mean_difference_255": worst,
        },
    )


if __name__ == "__main__":
    main()
