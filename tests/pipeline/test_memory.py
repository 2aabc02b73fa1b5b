"""A step that does not fit the memory: one line with a cure, and the cure is accepted where the run stands."""

import re
from contextlib import contextmanager

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch.nn.modules.module import register_module_forward_pre_hook

from ezsd.detector.backbone import Pyramid
from ezsd.pipeline.config.schema import apply_override, from_tables, to_tables
from ezsd.pipeline.data.images import read_image
from ezsd.pipeline.devices import is_out_of_memory
from ezsd.pipeline.errors import OutOfMemory, RunError
from ezsd.pipeline.inference.predictor import load_trained
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.training.train import TrainRequest, train
from tests.commandkit import ezsd


@contextmanager
def room_for(images, *, from_step=1, parts=1, error=None, training=True):
    """The backbone runs out of memory with more images at a time, from a step on whose batches are counted.

    In training, or else in detection.
    """
    calls = [0]

    def refuse(module, inputs):
        if isinstance(module, Pyramid) and module.training == training:
            calls[0] += 1
            if len(inputs[0]) > images and calls[0] > (from_step - 1) * parts:
                raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def with_advice(config, message):
    """The configuration once what a message says to set is set."""
    tables = to_tables(config)
    options = re.findall(r"`(train\.\S+=\S+)`", message)
    assert options, message
    for option in options:
        apply_override(tables, option)
    return from_tables(tables, where="test")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        state = torchvision.models.resnet18(weights=None, zero_init_residual=True).state_dict()
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(state, path)
    return path


def test_a_run_goes_on_in_smaller_batches_which_learn_the_same(shapes_store, weights, with_settings, tmp_path):
    config = with_settings(
        model={"backbone": "resnet18", "fpn_channels": 16, "rpn_sizes": (16, 24, 32, 48, 64), "rpn_proposals": 60},
        train={"rng": "image", "steps": 4, "checkpoint_every": 1},
    )
    request = {"cache": shapes_store, "run": tmp_path / "run", "backbone_weights": weights}
    with room_for(2, from_step=3), pytest.raises(OutOfMemory) as caught:
        train(TrainRequest(**request, config=config))
    said = str(caught.value)
    assert re.fullmatch(
        r"out of memory in step 3: 4 images of \d+ x \d+ at a time do not fit; run the same command with "
        r"`train.grad_accumulation=2` \(2 at a time; it learns the same\)",
        said,
    )
    with room_for(2):
        run = train(TrainRequest(**request, config=with_advice(config, said)))
    assert (run.began_at, run.finished().step) == (2, 4)
    # Which steps were made how stays on record.
    assert [(start["step"], start["settings"]["grad_accumulation"]) for start in run.starts()] == [(0, 1), (2, 2)]
    assert run.spec["config"]["train"]["grad_accumulation"] == 1


def test_before_the_first_checkpoint_any_cure_is_accepted(shapes_store, quick_config, tmp_path):
    """Batch normalisation sees other batches: it is said, and refused once there is something to lose."""
    request = TrainRequest(cache=shapes_store, run=tmp_path / "run", config=quick_config)
    with room_for(2), pytest.raises(OutOfMemory, match="run the same command with .* learns a little oth") as caught:
        train(request)
    cured = with_advice(quick_config, str(caught.value))
    assert (cured.train.rng, cured.train.grad_accumulation) == ("image", 2)
    with room_for(2):
        run = train(TrainRequest(cache=shapes_store, run=tmp_path / "run", config=cured))
    assert run.finished().step == 6
    assert run.spec["config"]["train"]["grad_accumulation"] == 2
    with pytest.raises(RunError, match=r"another run: config.train.grad_accumulation: 2 there, 1 wanted"):
        train(request)


def test_with_a_checkpoint_a_cure_that_changes_the_run_names_another_folder(shapes_store, quick_config, tmp_path):
    with (
        room_for(2, from_step=4),
        pytest.raises(OutOfMemory, match="step 4: .*start another `run` with `t") as said,
    ):
        train(TrainRequest(cache=shapes_store, run=tmp_path / "run", config=quick_config))
    cured = with_advice(quick_config, str(said.value))
    with room_for(2):
        assert train(TrainRequest(cache=shapes_store, run=tmp_path / "other", config=cured)).finished().step == 6


def test_one_image_that_does_not_fit_is_told_what_else(shapes_store, with_settings, tmp_path):
    config = with_settings(train={"rng": "image", "grad_accumulation": 4})
    with room_for(0), pytest.raises(OutOfMemory, match=r"1 image of .* fewer are not possible; .*train.min_size"):
        train(TrainRequest(cache=shapes_store, run=tmp_path / "run", config=config))


def test_a_validation_that_does_not_fit_is_left_out(shapes_store, with_settings, tmp_path):
    config = with_settings(train={"validate_every": 1, "validate_images": 3})

    request = {"cache": shapes_store, "run": tmp_path / "run"}
    with (
        room_for(0, training=False),
        pytest.raises(OutOfMemory, match="validation after step 3, whose checkpoint is saved") as caught,
    ):
        train(TrainRequest(**request, config=config))
    assert train(TrainRequest(**request, config=with_advice(config, str(caught.value)))).began_at == 3


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory: you tried to al"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a primitive"),
        MemoryError(),
    ],
)
def test_all_words_for_it_are_known(error, shapes_store, quick_config, tmp_path):
    # Other words than these are passed on: they may mean something else.
    said = "" if "memory" in str(error) or not str(error) else f" ({error})".replace("`", "'")
    with room_for(2, error=error), pytest.raises(OutOfMemory, match=re.escape(f"in step 1{said}: 4 images")):
        train(TrainRequest(cache=shapes_store, run=tmp_path / "run", config=quick_config))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_detection_goes_on_with_fewer_images_at_a_time(shapes_run, shapes_root, caplog):
    trained = load_trained(shapes_run, "cpu")
    images = [read_image(path) for path in sorted((shapes_root / "val").glob("*.png"))[:5]]
    search = trained.search(trained.text)
    wanted = trained.detect(images, search)
    with room_for(2, training=False):
        found = trained.detect(images, search)
    assert [record.message for record in caplog.records] == ["out of memory: going on with 2 images at once"]
    # It is remembered.
    with room_for(2, training=False):
        trained.detect(images, search)
    assert len(caplog.records) == 1
    for one, right in zip(found, wanted, strict=True):
        assert torch.equal(one.labels, right.labels)
        torch.testing.assert_close(one.boxes, right.boxes)
    with (
        room_for(0, training=False),
        pytest.raises(OutOfMemory, match=r"one image of 128 x 128; use a machine with more mem"),
    ):
        trained.detect(images, search)


def test_a_command_without_memory_is_one_line_and_its_advice_trains(shapes_store, tmp_path):
    words = ["train", "--cache", shapes_store, "--run", tmp_path / "run", "--device", "cpu"]
    for setting in ("steps=1", "batch_size=12", "min_size=640", "max_size=640"):
        words += ["--set", f"train.{setting}"]
    tries = 0
    while True:
        # Enough for 4 images, which need 350 MiB, not for 12.
        done = ezsd(*words, faults=[["little_memory_for_a_step", 600 * 2**20]])
        if done.returncode == 0:
            break
        assert done.returncode == 2, done.stderr
        said = done.stderr.strip().splitlines()[-1]
        assert re.match(r"ezsd: out of memory in step 1( \(.*\))?: ", said), done.stderr
        assert "Traceback" not in done.stderr
        for option in re.findall(r"--set (train\.\S+=\S+)", said):
            words += ["--set", option]
        tries += 1
        assert tries < 4, said
    assert tries > 0, "there was room enough"
    assert Run.open(tmp_path / "run").finished().step == 1
