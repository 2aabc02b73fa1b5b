"""What a run learns does not depend on how its steps are shared out to processes and accumulated batches."""

import dataclasses
import json
import math
import os
import socket
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from ezsd.data.dataset import DetectionDataset, epoch_order
from ezsd.pipeline.config.schema import to_tables
from ezsd.pipeline.errors import ConfigError
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.training.dataloader import load_batches
from ezsd.pipeline.training.distributed import Distributed
from ezsd.pipeline.training.train import TrainRequest, train
from tests.pipeline.forkkit import Fork

ROOT = Path(__file__).resolve().parents[2]
# Statistics frozen by the presence of weights: those of a batch would depend on who is in it.
MODEL = {
    "backbone": "resnet18",
    "fpn_channels": 16,
    "rpn_sizes": (16, 24, 32, 48, 64),
    "pool_size": 3,
    "box_hidden": 32,
    "rpn_proposals": 60,
    "box_batch_size_per_image": 32,
}
TRAIN = {
    "batch_size": 4,
    "rng": "image",
    "optimizer": "sgd",
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "warmup_steps": 5,
    "checkpoint_every": 100,
}
STEPS = {"four": 4, "masked": 1, "sized": 1, "hot": 2, "tail": 3, "open": 1}
"""Of each run; one goes on into a second epoch, one has masks, one images of many sizes, one a temperature that starts
at its bound, one Seesaw loss and repeat factors, one a backbone of timm."""
OPEN = {"backbone": "timm:resnet18.tv_in1k", "rpn_sizes": (16, 24, 48)}
"""Timm's name for the same network, with the same names of tensors."""
SIZED = {"multiscale_min_size": 40, "min_size": 200, "max_size": 200, "seed": 2}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network that knows nothing, in the form that ImageNet weights have."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        state = torchvision.models.resnet18(weights=None, zero_init_residual=True).state_dict()
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def settings(quick_config):
    def of(name, **changes):
        model = dataclasses.replace(quick_config.model, **MODEL, masks=name == "masked")
        if name == "hot":
            model = dataclasses.replace(model, logit_scale=100.0)
        if name == "open":
            model = dataclasses.replace(model, **OPEN)
            changes |= {"backbone_lr_mult": 0.5}
        changes |= SIZED if name == "sized" else {}
        changes |= {"repeat_threshold": 1.0} if name == "tail" else {}
        loop = dataclasses.replace(quick_config.train, **TRAIN, steps=STEPS[name], **changes)
        form = "seesaw" if name == "tail" else "cross_entropy"
        loss = dataclasses.replace(quick_config.loss, classification_loss=form)
        return dataclasses.replace(quick_config, model=model, loss=loss, train=loop)

    return of


@pytest.fixture(scope="module")
def alone(shapes_store, outlined_root, weights, settings, tmp_path_factory):
    """Runs of one process with the whole batch at once."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        name: train(
            TrainRequest(
                cache=shapes_store,
                run=folder / name,
                config=settings(name),
                data_root=outlined_root,
                backbone_weights=weights,
            )
        )
        for name in STEPS
    }


def first_gradients(run):
    """SGD's momentum after one step is the gradient, clipped."""
    return {name: value for name, value in run.finished().optimiser().items() if name.endswith("momentum_buffer")}


def require_equal(runs, expected):
    for run in ("masked", "sized", "open"):
        ours, theirs = first_gradients(runs[run]), first_gradients(expected[run])
        for name, gradient in theirs.items():
            assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name
    assert len(first_gradients(expected["masked"])) > len(first_gradients(expected["sized"]))
    masks = [r["masked"].read_metrics()[0]["mask"] for r in (runs, expected)]
    assert masks[0] == pytest.approx(masks[1], rel=1e-5)
    hot = [r["hot"].finished().trained()["head.classifier.log_temperature"].item() for r in (runs, expected)]
    assert hot[0] == pytest.approx(hot[1], abs=1e-5)
    assert all(value < math.log(100) - 1e-5 for value in hot)
    counts = [r["tail"].finished().class_counts() for r in (runs, expected)]
    assert torch.equal(*counts)
    assert counts[0].sum() > 0
    ours, theirs = ([line for name in ("four", "tail") for line in r[name].read_metrics()] for r in (runs, expected))
    assert len(ours) == len(theirs) == 7
    for mine, other in zip(ours, theirs, strict=True):
        for part in ("loss", "rpn_objectness", "rpn_box", "classification", "box", "distillation"):
            assert mine[part] == pytest.approx(other[part], rel=1e-3, abs=1e-5), (mine["step"], part)


def test_two_processes_learn_what_one_does(alone, shapes_store, outlined_root, weights, settings, tmp_path):
    # One of them with accumulated batches too: gradients are exchanged once a step.
    tables = {name: to_tables(settings(name, grad_accumulation=2 if name == "masked" else 1)) for name in STEPS}
    (tmp_path / "settings.json").write_text(json.dumps(tables))
    script = Path(__file__).with_name("torchrun_train.py")
    words = [script, shapes_store, outlined_root, weights, tmp_path, tmp_path / "settings.json"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # As torchrun sets them.
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    # A folder of their own: both read the annotations and outlines at once, and one of them keeps them.
    common |= {"EZSD_CACHE_DIR": tmp_path / "parsed"}
    processes = []
    for rank in range(2):
        own = {name: str(value) for name, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        processes.append(Fork(words, ROOT, os.environ | own, output=tmp_path / f"{rank}.txt"))
    try:
        codes = [process.wait(280) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = "".join((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert codes == [0, 0], said
    assert "FutureWarning" not in said
    runs = {name: Run.open(tmp_path / name) for name in STEPS}
    assert runs["four"].spec == alone["four"].spec
    require_equal(runs, alone)


def test_accumulated_batches_learn_what_one_does(alone, shapes_store, outlined_root, weights, settings, tmp_path):
    runs = {
        name: train(
            TrainRequest(
                cache=shapes_store,
                run=tmp_path / name,
                config=settings(name, grad_accumulation=2),
                data_root=outlined_root,
                backbone_weights=weights,
            )
        )
        for name in STEPS
    }
    require_equal(runs, alone)


def test_every_image_of_a_step_goes_to_one_process(quick_config):
    config = dataclasses.replace(quick_config.train, batch_size=12, grad_accumulation=2, rng="image", steps=4)

    class Positions(DetectionDataset):
        def __getitem__(self, key):
            return key

    samples = Positions(
        range(30), None, lambda i: (90 + i, 100), {}, {}, regions_per_image=1, short_side=0, long_side=0, seed=0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ezsd.pipeline.training.dataloader.collate", list)
        shared = [list(load_batches(samples, config, first_step=1, distributed=Distributed(r, 3))) for r in range(3)]
    expected = list(epoch_order(30, per_step=12, first_step=1, steps=4, seed=config.seed))
    for step, keys in enumerate(expected):
        parts = [parts for one in shared for parts in one[step][1]]
        assert all(one[step][0] == keys for one in shared)
        assert [len(part) for part in parts] == [2] * 6
        assert sorted(key[:2] for part in parts for key in part) == sorted(keys)
        # All are padded to what the step's largest image needs.
        assert {key.canvas for part in parts for key in part} == {(128 if max(p for _, p in keys) > 6 else 96, 128)}


def test_images_that_cannot_be_shared_out_are_refused(quick_config):
    with pytest.raises(ConfigError, match="train.batch_size=4 cannot be shared out to 3 processes"):
        next(load_batches(None, quick_config.train, first_step=0, distributed=Distributed(0, 3)))
