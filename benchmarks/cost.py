"""What would COCO and LVIS cost on a GPU? `python benchmarks/cost.py`, or `--count --photos DIR` to count anew.

Arithmetic and no measurement: no GPU ran any of it. "--count" counts floating-point operations with torch's counter, on
tensors without memory, and the crops that the presets look at in images of the sizes of a folder in COCO's layout; one
row goes to results/cost.jsonl. Without it the newest row becomes the tables of docs/cost.md, by the model of
cost_model.py, whose assumptions are a table of their own; and bytes by `ezsd.cache.journal.disk_room`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import driver
import numpy as np
import open_clip
import torch
import torchvision
from cost_model import ENDS, GPUS, Assumed, Gpu, Host, assumptions, looking_ms, training_ms, tuning_ms
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ezsd.cache import EmbeddingType, forecast, region_schema
from ezsd.crops import distinct_crops
from ezsd.detector.model import Detector
from ezsd.losses import distillation_loss
from ezsd.pipeline.config.names import FORMER_VALUES
from ezsd.pipeline.config.schema import Config, load_preset
from ezsd.pipeline.data.annotation_cache import training_annotations
from ezsd.pipeline.data.datasets import find_dataset
from ezsd.pipeline.extraction.anchors import look_at_anchors
from ezsd.pipeline.extraction.forecast import proposer_rows
from ezsd.pipeline.runs.model import build_detector
from ezsd.vocabulary import COCO_SPLIT

Row = driver.Row
ASSUMED = Assumed()
IMAGES = {"COCO": 118_287, "LVIS": 100_170}
"""Training images."""
BASE_NAMES = {"COCO": 48, "LVIS": 866}
TEACHERS = ("ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "RN50-quickgelu")
PRESETS = ("coco", "paper")
"""Their detectors differ in the head."""
CROP = 224
"""Side of a teacher's crops."""
EMBED_DIM = 512
"""Of ViT-B/32 and ViT-B/16."""
IMAGE = (800, 1344)
"""Height and width of a training image, padded to whole cells."""


def fused(boxes: int, projection: int, products: int) -> Callable[..., int]:
    """Operations of the linear layer in one of our operators, by the places of boxes and weight (D, P * P * C)."""

    def operations(*shapes: tuple[int, ...] | None, **_: object) -> int:
        regions, weight = shapes[boxes], shapes[projection]
        return 0 if regions is None or weight is None else 2 * products * regions[0] * weight[0] * weight[1]

    return operations


OPERATORS = {
    torch.ops.ezsd.roi_embed_cosine: fused(1, 5, 1),
    torch.ops.ezsd.roi_align_cosine: fused(1, 5, 1),
    torch.ops.ezsd.regions_backward: fused(2, 4, 2),
}


class Count:
    """What was done in a `counting` block."""

    gflop = 0.0
    kept_gb = 0.0
    """Activations in float32 that the backward pass needs."""


@contextmanager
def counting(module: nn.Module) -> Iterator[Count]:
    """Count operations, and what is kept for the backward pass beside the module's own tensors."""
    own = {value.untyped_storage()._cdata for value in (*module.parameters(), *module.buffers())}
    count, kept = Count(), {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        # Held on to, so that its number is given to no other.
        kept[storage._cdata] = storage
        return value

    counter = FlopCounterMode(display=False, custom_mapping=OPERATORS)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), counter:
        yield count
    count.gflop = counter.get_total_flops() / 1e9
    count.kept_gb = sum(storage.nbytes() for number, storage in kept.items() if number not in own) / 1e9


def count_teacher(name: str) -> dict[str, float]:
    """GFLOP of a pass; of a step of re-normalisation per crop, and of its text tower per name; GB kept of each."""
    model = open_clip.create_model(name, pretrained=None).to("meta").eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            module.requires_grad_(True)
    size = model.visual.image_size
    crop = torch.zeros(1, 3, *(size if isinstance(size, tuple) else (size, size)), device="meta")
    with counting(model) as forward, torch.no_grad():
        model.encode_image(crop)
    with counting(model) as image:
        model.encode_image(crop).sum().backward()
    with counting(model) as text:
        model.encode_text(torch.zeros(1, model.context_length, dtype=torch.int64, device="meta")).sum().backward()
    return {
        "pass_gflop": forward.gflop,
        "tuned_crop_gflop": image.gflop,
        "tuned_crop_gb": image.kept_gb,
        "tuned_name_gflop": text.gflop,
        "tuned_name_gb": text.kept_gb,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def count_step(config: Config) -> dict[str, float]:
    """GFLOP of an optimiser step per image, what is kept of an image for its backward pass, and parameters.

    Matching, sampling and suppression count as nothing; a quarter of the regions are on objects, which is the most.
    """
    state = torchvision.models.resnet50(weights=None).state_dict()
    detector = build_detector(config, EMBED_DIM, state).train()
    with counting(detector) as step:
        step_losses(detector, config).backward()
    parameters = list(detector.parameters())
    return {
        "image_gflop": step.gflop,
        "image_gb": step.kept_gb,
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
    }


def step_losses(detector: Detector, config: Config) -> Tensor:
    """A sum over all that a step computes for one image, on the device that is set."""
    model, head = config.model, detector.head
    maps = detector.backbone(torch.zeros(1, 3, *IMAGE))
    scores, deltas = detector.rpn.head(maps)
    features = head.features(maps[: head.pooling.levels])
    count, regions = model.box_batch_size_per_image, config.train.regions_per_image
    text = torch.zeros(len(COCO_SPLIT.base), EMBED_DIM)
    seen = head.embed(features, torch.zeros(count + regions, 4), torch.zeros(count + regions, dtype=torch.int64))
    logits = head.classifier(seen.embedding[:count], text)
    on_objects = slice(round(count * model.box_positive_fraction))
    moved = head.regressor(seen.pooled[on_objects], torch.zeros(on_objects.stop, EMBED_DIM))
    targets, weights = torch.zeros(regions, EMBED_DIM), torch.ones(regions)
    distance = distillation_loss(seen.embedding[count:], targets, weights, config.loss.metric)
    return torch.stack([part.sum() for part in (*scores, *deltas, logits, moved, distance)]).sum()


def count_passes(config: Config, sizes: list[tuple[int, int]]) -> float:
    """Mean crops that a preset looks at in an image, with scores drawn at random where it follows scores."""
    torch.manual_seed(0)
    rule, counts = config.proposals, []
    for width, height in sizes:
        boxes, _ = look_at_anchors(
            rule, width, height, lambda boxes: torch.zeros(len(boxes), 1), lambda vectors: torch.rand(len(vectors))
        )
        crops, _ = distinct_crops(boxes, ratio=rule.crop_ratio, surround=rule.padding, width=width, height=height)
        counts.append(len(crops))
    return float(np.mean(counts))


def count(photos: Path) -> Row:
    """The row that the tables are made of."""
    dataset = find_dataset("coco", photos)
    files = (dataset.train_annotations, dataset.val_annotations)
    records = [training_annotations(dataset.root / file, dataset.split) for file in files]
    sizes = [(image.width, image.height) for record in records for image in record.images]
    presets = {name: load_preset(name) for name in PRESETS}
    grids = (presets["paper"], load_preset("coco", ("proposals.search=coarse-to-fine",)))
    passes = {config.proposals.search: count_passes(config, sizes) for config in grids}
    teachers = {name: count_teacher(name) for name in TEACHERS}
    # The detector asks for a device that can compute; tensors without memory pretend to have one.
    with FakeTensorMode():
        steps = {name: count_step(config) for name, config in presets.items()}
    boxes = sum(len(record.box) for record in records) / len(sizes)
    return {"images": len(sizes), "base_boxes": boxes, "passes": passes, "teachers": teachers, "steps": steps}


def hours(times: float, milliseconds: Callable[[Gpu, Host], float]) -> list[str]:
    """Cells of a table: hours on each GPU, with what the host does hidden, to in turn."""
    ends = ([times * milliseconds(gpu, host) / 3.6e6 for host in ENDS] for gpu in GPUS.values())
    return [f"{low:.1f} to {high:.1f}" for low, high in ends]


def tuning_table(row: Row, assumed: Assumed) -> list[list[str]]:
    """Re-normalisation by the data's own preset; names count only where their tower is tuned; memory in float32."""
    lines = []
    for name, counted in row["teachers"].items():
        for data, of_data in BASE_NAMES.items():
            settings = load_preset(data.lower()).adapt
            names = 0 if settings.towers == "vision" else of_data
            step = settings.batch_size * counted["tuned_crop_gflop"] + names * counted["tuned_name_gflop"]
            kept = settings.batch_size * counted["tuned_crop_gb"] + names * counted["tuned_name_gb"]
            total = settings.steps * step
            size = {"crops": settings.batch_size, "gflop": step, "kept_gb": kept, "side": CROP}
            spent = hours(settings.steps, lambda gpu, host, size=size: tuning_ms(gpu, assumed, host, **size))
            lines.append([data, name, f"{total / 1e9:.2f}", *spent, f"{kept:.0f}"])
    return [["data", "teacher", "EFLOP", *GPUS, "GB"], *lines]


def looking_table(row: Row, assumed: Assumed) -> list[list[str]]:
    """Proposals, regions and ground truth; of a learned proposer all boxes are counted, of which filters drop some."""
    lines, learned = [], {"learned": load_preset("coco").max_proposals}
    for data, images in IMAGES.items():
        for name, counted in row["teachers"].items():
            for mode, passes in (learned | row["passes"]).items():
                each = passes + row["base_boxes"]
                crops = images * each
                total = crops * counted["pass_gflop"]
                size = {"crops": each, "gflop": counted["pass_gflop"], "kept_gb": counted["tuned_crop_gb"]}
                spent = hours(images, lambda gpu, host, size=size: looking_ms(gpu, assumed, host, **size))
                # Rows of before have the former word.
                search = FORMER_VALUES["proposals", "search"].get(mode, mode)
                cells = [data, name, search, f"{crops / 1e6:,.0f}", f"{total / 1e9:.2f}"]
                lines.append([*cells, *spent])
    return [["data", "teacher", "`proposals.search`", "million crops", "EFLOP", *GPUS], *lines]


def store_table(row: Row) -> list[list[str]]:
    """Disk of a store of the data's own preset, with as many proposals and regions as are kept at most."""
    lines = []
    for data, images in IMAGES.items():
        config = load_preset(data.lower())
        counts = {
            "proposals": images * config.max_proposals,
            "regions": images * min(config.max_proposals, config.proposals.max_regions),
            "ground_truth": round(images * row["base_boxes"]),
            # Less than a megabyte.
            "teacher/values": 0,
            "text/embedding": 0,
            **proposer_rows(config),
        }
        products = {array.partition("/")[0] for array in counts}
        for embedding in get_args(EmbeddingType):
            size = forecast(counts, images=images, schema=region_schema(EMBED_DIM, embedding, products))
            lines.append([data, f"`{embedding}`", f"{size.final / 1e9:.0f}", f"{size.peak / 1e9:.0f}"])
    return [["data", "`build.embedding`", "GB", "GB while it is built"], *lines]


def training_table(row: Row, assumed: Assumed) -> list[list[str]]:
    """All steps of a preset; memory where one GPU takes a whole step, in float32 and without workspace."""
    lines = []
    for preset, counted in row["steps"].items():
        settings = load_preset(preset).train
        seen = settings.steps * settings.batch_size
        total = seen * counted["image_gflop"]
        # Weight, gradient and momentum of what is trained.
        gb = 4e-9 * (counted["parameters"] + 2 * counted["trained_parameters"])
        gb += settings.batch_size * counted["image_gb"]
        size = {
            "images": settings.batch_size,
            "gflop": counted["image_gflop"],
            "kept_gb": counted["image_gb"],
            "trained": counted["trained_parameters"],
            "pixels": IMAGE[0] * IMAGE[1],
        }
        spent = hours(settings.steps, lambda gpu, host, size=size: training_ms(gpu, assumed, host, **size))
        for data, images in IMAGES.items():
            cells = [data, f"`{preset}`", f"{seen / images:.1f}", f"{total / 1e9:.2f}"]
            lines.append([*cells, *spent, f"{gb:.0f}"])
    return [["data", "preset", "epochs", "EFLOP", *GPUS, "GB"], *lines]


def markdown(cells: list[list[str]]) -> str:
    """A table, its head first."""
    head, *lines = ("| " + " | ".join(line) + " |" for line in cells)
    return "\n".join([head, "|---" * len(cells[0]) + "|", *lines])


def tables(row: Row, assumed: Assumed = ASSUMED) -> dict[str, str]:
    """The tables of docs/cost.md, by what they are about."""
    return {
        "What is assumed": markdown(assumptions(assumed)),
        "Re-normalisation, hours": markdown(tuning_table(row, assumed)),
        "Proposals, regions and ground truth, hours": markdown(looking_table(row, assumed)),
        "The store": markdown(store_table(row)),
        "Training, hours": markdown(training_table(row, assumed)),
    }


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """The row of a count; then print the tables of the newest row."""
    if arguments.count:
        if arguments.photos is None:
            raise driver.UsageError("--count needs --photos")
        yield count(arguments.photos)
    assumed = Assumed(utilisation=arguments.utilisation)
    for title, table in tables(driver.read("cost", arguments.results)[-1], assumed).items():
        print(f"## {title}\n\n{table}\n")


if __name__ == "__main__":
    counting_anew = driver.option("--count", action="store_true", help="count anew")
    utilisation = driver.option(
        "--utilisation", type=float, default=ASSUMED.utilisation, help="of the published products, assumed"
    )
    driver.run("cost", measure, __doc__, counting_anew, "--photos", utilisation)
