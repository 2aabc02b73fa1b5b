"""Store and run on a pretend GPU: every branch for a GPU is taken, and what the host waits for is bounded."""

import dataclasses
import shutil
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch.nn.modules.module import register_module_forward_hook

from ezsd.cache import Store
from ezsd.crops import crop_boxes
from ezsd.data.dataset import Sample, collate
from ezsd.detector.backbone import Pyramid
from ezsd.detector.model import Totals
from ezsd.kernels import backend
from ezsd.pipeline.config.schema import load_preset
from ezsd.pipeline.errors import ArgumentError, OutOfMemory
from ezsd.pipeline.extraction import build, proposer, worker
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.inference.detect import Model
from ezsd.pipeline.inference.evaluate import evaluate_crops, evaluate_run
from ezsd.pipeline.inference.predictor import TrainedDetector, load_trained
from ezsd.pipeline.runs.model import build_detector
from ezsd.pipeline.training import train as training
from ezsd.pipeline.training.distributed import Distributed, join_process_group, local_device
from ezsd.pipeline.training.train import TrainRequest, build_trainer, train
from ezsd.precision import autocast
from tests.conftest import QUICK
from tests.pipeline.test_learned import LEARNED
from tests.pretend_gpu import GPU, Counts, pretend_gpu

BOUNDS = {
    "re-normalisation of 4 steps": (7, 466_512),
    "an image of the store": (2, 57_284),
    "3 steps of the proposer, of 2 images": (12, 295_256),
    "an image of the store, learned proposals": (14, 164_168),
    "a step of 4 images": (2, 203_244),
    "a first step of 3 images, preset coco": (2, 176_676),
    "an evaluated image": (3.25, 50_477),
    "a detected image": (3.25, 50_477),
}
"""Most waits of the host and bytes that cross, as they are today: whoever needs fewer lowers the numbers."""


BACKWARD_GIB = 8.6
"""Most that 16 images of the preset coco may keep for the backward pass, as it is today; cards of 24 GB hold 11."""


def bounded(what, counts, parts=1):
    waits, moved = BOUNDS[what]
    assert counts.waits.total() / parts <= waits, f"{what}:\n{counts}"
    assert counts.moved.total() / parts <= moved, f"{what}:\n{counts}"


def bounded_but_for_results(what, counts, images, most):
    """A bound on all but the detections themselves, whose number hangs on how a CPU rounds."""
    results = {place: size for place, size in counts.moved.items() if place.endswith(" _on_host")}
    # Four corners, score and class in float64.
    assert 0 < sum(results.values()) <= images * most * 6 * 8
    bounded(what, dataclasses.replace(counts, moved=counts.moved - Counter(results)), parts=images)


def most(counts):
    return max(counts, key=lambda one: one.waits.total()), max(counts, key=lambda one: one.moved.total())


def extraction(gpu, patch):
    """The counts of each block, whose images are worked on in turns; without those of loading the teacher."""
    gpu.calls_of(patch, worker, "_worker")
    return gpu.calls_of(patch, worker, "_extract")


@pytest.fixture(scope="module")
def store(shapes_dataset, quick_config, tmp_path_factory):
    """A store that the pretend GPU made, and the counts of its two parts."""
    out = tmp_path_factory.mktemp("gpu") / "store"
    with pretend_gpu() as gpu, pytest.MonkeyPatch.context() as patch:
        adapted, extracted = gpu.calls_of(patch, build, "adapt_teacher"), extraction(gpu, patch)
        build_cache(BuildRequest(dataset=shapes_dataset, config=quick_config, out=out, device="cuda", scheduler="sync"))
    return out, adapted, extracted


@pytest.fixture(scope="module")
def request_(store, quick_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu") / "run"
    return TrainRequest(cache=store[0], run=folder, config=quick_config, device="cuda")


@pytest.fixture(scope="module")
def trained(request_):
    """A run that the pretend GPU trained, and the counts of its steps."""
    with pretend_gpu() as gpu, pytest.MonkeyPatch.context() as patch:
        steps = gpu.calls_of(patch, training._Training, "_make_step")
        return train(request_), steps


def test_a_store_is_built(store):
    _, adapted, extracted = store
    bounded("re-normalisation of 4 steps", adapted[0])
    bounded("an image of the store", sum(extracted, Counts()), parts=len(Store(store[0]).image_ids))


def test_a_run_is_trained(trained):
    run, steps = trained
    assert run.finished().step == len(steps) == 6
    for counts in most(steps):
        bounded("a step of 4 images", counts)


def test_a_run_goes_on_from_a_checkpoint_and_learns_the_same(trained, request_, tmp_path):
    run, _ = trained
    again = tmp_path / "run"
    shutil.copytree(run.folder, again)
    shutil.rmtree(again / "checkpoints/step-00000006")
    with pretend_gpu():
        resumed = train(dataclasses.replace(request_, run=again))
    assert resumed.began_at == 4
    wanted, found = run.finished().trained(), resumed.finished().trained()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_gpu_without_a_first_kernel_is_said_when_a_run_is_loaded(trained, caplog):
    def launch(*_):
        raise OSError("no compiler")

    with pretend_gpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("ezsd.kernels.triton_distance.distance_forward", launch)
        backend._tried_on.cache_clear()
        load_trained(trained[0], "cuda")
    assert [record.levelname for record in caplog.records if "took eager" in record.message] == ["WARNING"]


def test_a_gpu_without_room_for_a_first_kernel_is_said_with_a_cure(trained, request_, tmp_path):
    def launch(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    with pretend_gpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("ezsd.kernels.triton_distance.distance_forward", launch)
        for call in (
            lambda: train(dataclasses.replace(request_, run=tmp_path / "run")),
            lambda: load_trained(trained[0], "cuda"),
        ):
            backend._tried_on.cache_clear()
            with pytest.raises(OutOfMemory, match="not even a first kernel .* or `device=cpu`"):
                call()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wanted", "here", "elsewhere", "chosen"),
    [
        ("auto", False, 0, "triton"),
        ("auto", False, 1, "eager"),
        ("auto", True, 0, "eager"),
        ("auto", True, 1, "eager"),
        ("eager", False, 1, "eager"),
        ("triton", False, 1, "triton"),
    ],
)
def test_all_processes_take_one_backend(wanted, here, elsewhere, chosen, monkeypatch, caplog):
    def launch(*_):
        raise OSError("no compiler")

    # The other process' part of the sum.
    monkeypatch.setattr(dist, "all_reduce", lambda values: values.add_(elsewhere))
    with pretend_gpu(), pytest.MonkeyPatch.context() as patch:
        if here:
            patch.setattr("ezsd.kernels.triton_distance.distance_forward", launch)
            backend._tried_on.cache_clear()
        assert Distributed(rank=1, world_size=2, local_world_size=2).agree(wanted, torch.device("cuda", 0)) == chosen
        assert Distributed().agree(wanted, torch.device("cuda", 0)) == wanted
    differ = wanted == "auto" and int(here) + elsewhere == 1
    assert ("Triton cannot run in 1 of 2 processes" in caplog.text) == differ
    assert ("in this one: " in caplog.text) == (differ and here)


def test_a_store_is_built_with_learned_proposals(shapes_dataset, tmp_path, monkeypatch):
    config = load_preset("shapes", LEARNED)
    with pretend_gpu() as gpu:
        trained = gpu.calls_of(monkeypatch, proposer, "_train")
        extracted = extraction(gpu, monkeypatch)
        build_cache(
            BuildRequest(dataset=shapes_dataset, config=config, out=tmp_path / "store", device="cuda", scheduler="sync")
        )
    bounded("3 steps of the proposer, of 2 images", trained[0])
    images = len(Store(tmp_path / "store").image_ids)
    bounded("an image of the store, learned proposals", sum(extracted, Counts()), parts=images)


@pytest.mark.parametrize(
    "settings",
    [
        ("model.masks=true", "train.rng=image", "train.grad_accumulation=2"),
        ("model.head=paper", "train.channels_last=true", "loss.metric=l1", "model.ignore_confidence=0.5"),
        ("loss.classification_loss=seesaw", "train.ema_decay=0.9", "train.optimizer=sgd", "train.backend=eager"),
    ],
)
def test_other_settings_train_and_detect_too(store, settings, outlined_root, tmp_path):
    config = load_preset("shapes", [*QUICK, "train.steps=1", *settings])
    with pretend_gpu():
        request = {"cache": store[0], "run": tmp_path / "run", "device": "cuda", "data_root": outlined_root}
        run = train(TrainRequest(**request, config=config))
        found = Model(run, device="cuda")(outlined_root / "val/000001.png", "bar", threshold=0.0)
    assert run.finished().step == 1
    assert len(found)


def test_a_run_is_evaluated(trained, monkeypatch):
    run, _ = trained
    with pretend_gpu() as gpu:
        found = gpu.calls_of(monkeypatch, TrainedDetector, "detect_each")
        evaluate_run(run, data_root=None, device="cuda")
        evaluate_crops(run, data_root=None, device="cuda")
    bounded_but_for_results("an evaluated image", sum(found, Counts()), images=8, most=300)


def test_any_names_are_detected(trained, shapes_root, monkeypatch):
    run, _ = trained
    images = sorted((shapes_root / "val").glob("*.png"))
    with pretend_gpu() as gpu:
        model = Model(run, device="cuda")
        model.search(["red ring", "bar"])
        found = gpu.calls_of(monkeypatch, TrainedDetector, "detect_each")
        detected = model(images, ["red ring", "bar"], threshold=0.0)
    assert len(detected) == len(images) == 8
    bounded_but_for_results("a detected image", sum(found, Counts()), images=len(images), most=100)


def test_a_step_of_the_preset_for_coco():
    """All of its sizes but those of the images and their boxes, and the number of images; weights are random."""
    # A CPU without instructions for bfloat16 takes minutes for 8,192 boxes, and half a minute for 16 small images.
    config, images = load_preset("coco", ["model.box_batch_size_per_image=8"]), 3
    text = torch.nn.functional.normalize(torch.randn(65, 512), dim=1)
    torch.manual_seed(0)
    with pretend_gpu() as gpu:
        detector = build_detector(config, 512, torchvision.models.resnet50(weights=None).state_dict())
        trainer = build_trainer(detector.to("cuda").train(), config, text, 48, Distributed())
        batch = collate([sample(number, height=48, width=64) for number in range(images)])
        with gpu.counting() as counts:
            ready = training._prepare(batch, torch.device("cuda"), channels_last=config.train.channels_last)
            found = trainer.step([ready], 0)
    assert {"classification", "box", "distillation"} < found.keys()
    assert all(one.grad.is_cuda for one in detector.parameters() if one.requires_grad)
    bounded("a first step of 3 images, preset coco", counts)


def kept_for_backward(trainer, images, height, width):
    """Bytes that a step's forward pass keeps for its backward pass, beside parameters."""
    detector, kept = trainer.detector, {}
    own = {value.inner.untyped_storage()._cdata for value in (*detector.parameters(), *detector.buffers())}
    batch = collate([sample(number, height, width, regions=200) for number in range(images)])

    def keep(value):
        storage = getattr(value, "inner", value).untyped_storage()
        # Held on to, so that its number is given to no other.
        kept[storage._cdata] = storage
        return value

    ready = training._prepare(batch, GPU, channels_last=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), autocast(GPU, training=True):
        detector.losses(ready, trainer.objective.text, distill="cosine", totals=Totals(images=16, regions=3200))
    return sum(storage.nbytes() for number, storage in kept.items() if number not in own)


def test_what_a_step_of_the_preset_for_coco_keeps_leaves_room_on_cards_of_24_gb():
    """Counted on small images: a part for the weights, one for each image's regions, one for each pixel."""
    config = load_preset("coco")
    torch.manual_seed(0)
    with pretend_gpu():
        detector = build_detector(config, 512, torchvision.models.resnet50(weights=None).state_dict())
        text = torch.nn.functional.normalize(torch.randn(65, 512), dim=1)
        trainer = build_trainer(detector.to("cuda").train(), config, text, 48, Distributed())
        small, large, two = (
            kept_for_backward(trainer, images, *size)
            for images, size in ((1, (64, 128)), (1, (128, 128)), (2, (64, 128)))
        )
    pixel = (large - small) / (64 * 128)
    image = two - small
    assert config.train.batch_size == 16
    # Padded to whole cells.
    pixels = config.train.min_size * -(-config.train.max_size // 32) * 32
    whole = small - image + 16 * (image + pixel * (pixels - 64 * 128))
    assert whole <= BACKWARD_GIB * 2**30


def sample(number, height=64, width=96, regions=None):
    """Noise, boxes anywhere: every third image without objects, every third without regions."""
    random = torch.Generator().manual_seed(number)

    def boxes(count):
        corner = torch.rand(count, 2, generator=random) * torch.tensor([width, height]) * 0.6
        side = 20 + torch.rand(count, 2, generator=random) * torch.tensor([width, height]) * 0.35
        return torch.cat([corner, torch.minimum(corner + side, torch.tensor([width, height]))], 1)

    objects, regions = boxes((3, 0, 7)[number % 3]), boxes((60, 60, 0)[number % 3] if regions is None else regions)
    cached = torch.cat([objects, regions])
    confidence = torch.cat([torch.ones(len(objects)), torch.rand(len(regions), generator=random)])
    return Sample(
        image=torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=random),
        boxes=objects,
        labels=torch.randint(0, 48, (len(objects),), generator=random),
        region_boxes=cached,
        region_target=torch.randn(len(cached), 512, generator=random).half(),
        region_confidence=confidence,
        cached_boxes=cached,
        cached_confidence=confidence,
        canvas=(0, 0),
        seed=number,
    )


def test_a_gpu_without_bfloat16_trains_in_float32_and_detects_in_float16(
    trained, request_, tmp_path, shapes_root, caplog
):
    seen = set()

    def look(module, inputs, output):
        if isinstance(module, Pyramid):
            seen.add((module.training, output[0].dtype))

    config = dataclasses.replace(request_.config, train=dataclasses.replace(request_.config.train, steps=1))
    handle = register_module_forward_hook(look)
    try:
        with pretend_gpu(capability=(7, 5)), caplog.at_level("DEBUG"):
            train(dataclasses.replace(request_, run=tmp_path / "run", config=config))
            Model(trained[0], device="cuda")(shapes_root / "val/000001.png", "bar")
    finally:
        handle.remove()
    assert seen == {(True, torch.float32), (False, torch.float16)}
    assert "took eager, because the GPU has compute capability 7.5" in caplog.text


def test_what_float16_does_not_hold_is_detected_in_float32(trained, shapes_root, caplog):
    def detected(device, factor):
        model = Model(trained[0], device=device)
        weights = model._trained.detector.state_dict()
        # The next layer takes the factor out again: nothing changes but the numbers between the two.
        for name, by in (("stem.0.1.weight", factor), ("stem.0.1.bias", factor), ("stem.1.0.weight", 1 / factor)):
            weights[f"backbone.body.{name}"].mul_(by)
        return model(shapes_root / "val/000001.png", "bar", threshold=0.0)

    with pretend_gpu(capability=(7, 5)), caplog.at_level("WARNING"):
        assert len(detected("cuda", 1.0))
        assert "float16" not in caplog.text
        found = detected("cuda", 1e6)
    assert caplog.text.count("beyond float16's range") == 1
    expected = detected("cpu", 1.0)
    assert len(found) == len(expected) > 0
    assert found.scores == pytest.approx(expected.scores, abs=1e-4)


@pytest.mark.parametrize("capability", [(9, 0), (7, 5)])
def test_a_wide_crop_is_the_same_by_a_kernel_and_without_one(capability):
    random = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 40, 800), generator=random, dtype=torch.uint8)
    boxes, options = torch.tensor([[0.0, 0, 800, 40]]), {"size": 16, "ratio": 1.0, "surround": "black"}
    with pretend_gpu(capability=capability):
        found = crop_boxes(image.to("cuda"), boxes.to("cuda"), **options).cpu()
    assert (found.int() - crop_boxes(image, boxes, **options).int()).abs().max() <= 1


def test_a_launcher_that_numbers_no_process_is_refused(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert local_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ArgumentError, match="WORLD_SIZE=2 .* without LOCAL_RANK"):
        local_device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "one")
    with pytest.raises(ArgumentError, match="LOCAL_RANK=one: expected the number"):
        local_device("cuda")
    # As `torchrun` sets it.
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ArgumentError, match="process 1 of this machine finds no GPU; use `device=cpu`"):
        local_device("cuda")
    assert local_device("cpu") == torch.device("cpu")


def test_each_process_joins_with_a_gpu_of_its_own(monkeypatch):
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    joined = []

    def join(*args, **options):
        # The GPU is chosen before the first collective.
        joined.append((args, options, list(gpu.current)))

    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    with pretend_gpu() as gpu, pytest.MonkeyPatch.context() as patch:
        with pytest.raises(ArgumentError, match="process 1 .* has no GPU of its own, for there are 1"):
            local_device("cuda")
        # A launcher that shows each process one GPU.
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
        assert local_device("cuda") == torch.device("cuda", 0)
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        mine = local_device("cuda")
        with join_process_group(mine) as distributed:
            assert (distributed.rank, distributed.world_size, distributed.local_world_size) == (3, 4, 2)
        assert mine == torch.device("cuda", 1)
        assert gpu.current == [mine]
        assert joined == [(("nccl",), {"device_id": mine}, [mine])]
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(ArgumentError, match="process 2 .* has no GPU of its own, for there are 2"):
            local_device("cuda")
