"""Stage two as a whole: reproducible, resumable, and deaf to what it must not use."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from contextlib import closing
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

import ezsd.pipeline.training.train
from ezsd.cache import Store, StoreError, StoreIncomplete
from ezsd.cache.format.sealed_json import seal, unseal
from ezsd.data.dataset import collate
from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.errors import AnnotationError
from ezsd.pipeline.config.schema import STAGE_ONE, load_preset, to_tables
from ezsd.pipeline.console.defaults import train_config
from ezsd.pipeline.errors import ConfigError, ImageError, RunError
from ezsd.pipeline.extraction.provenance import as_built
from ezsd.pipeline.files import write_json
from ezsd.pipeline.inference.evaluate import evaluate_run
from ezsd.pipeline.inference.evaluation_tables import at_limit, headline
from ezsd.pipeline.inference.predictor import load_trained
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.runs.schedule import first_other_rate, learning_rate
from ezsd.pipeline.training.dataloader import load_batches
from ezsd.pipeline.training.train import TrainRequest, store_dataset, train, training_samples
from tests.pipeline.stopkit import Talk, begun, descendants, require_gone


def curve(run):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in run.read_metrics()]


def state(run):
    return run.finished().model()


def test_the_same_seed_gives_the_same_curve_and_weights(shapes_run, shapes_store, quick_config, tmp_path):
    again = train(TrainRequest(cache=shapes_store, run=tmp_path / "again", config=quick_config))
    assert curve(again) == curve(shapes_run)
    for name, value in state(again).items():
        assert torch.equal(value, state(shapes_run)[name]), name


def test_another_seed_gives_another_curve(shapes_run, shapes_store, with_settings, tmp_path):
    other = train(TrainRequest(cache=shapes_store, run=tmp_path / "other", config=with_settings(train={"seed": 1})))
    assert curve(other) != curve(shapes_run)


def test_stop_and_resume_is_bit_for_bit_an_unbroken_run(shapes_run, shapes_store, quick_config, tmp_path):
    """Killed after the checkpoint of step 4 of 6 with a torn metrics line, then resumed."""
    folder = tmp_path / "stopped"
    shutil.copytree(shapes_run.folder, folder)
    shutil.rmtree(folder / "checkpoints/step-00000006")
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 7, "lo')
    resumed = train(TrainRequest(cache=shapes_store, run=folder, config=quick_config))
    assert curve(resumed) == curve(shapes_run)
    for name, value in state(resumed).items():
        assert torch.equal(value, state(shapes_run)[name]), name
    for name, value in resumed.finished().optimiser().items():
        assert torch.equal(value, shapes_run.finished().optimiser()[name]), name


def test_all_that_a_step_reads_is_resumed(shapes_store, with_settings, tmp_path):
    """The other optimiser, schedule and way of sampling, and a moving average of the weights."""
    config = with_settings(
        train={
            "optimizer": "sgd",
            "learning_rate": 1e-3,
            "schedule": "step",
            "rng": "image",
            "grad_accumulation": 2,
            "ema_decay": 0.9,
            "steps": 4,
        }
    )
    whole = train(TrainRequest(cache=shapes_store, run=tmp_path / "whole", config=config))
    shutil.copytree(whole.folder, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoints/step-00000004")
    resumed = train(TrainRequest(cache=shapes_store, run=tmp_path / "stopped", config=config))
    assert curve(resumed) == curve(whole)
    for name, value in state(whole).items():
        assert torch.equal(value, state(resumed)[name]), name
        assert torch.equal(whole.finished().trained()[name], resumed.finished().trained()[name]), name
    assert not torch.equal(state(whole)["head.projection.weight"], whole.finished().trained()["head.projection.weight"])


def test_a_run_asked_to_end_saves_and_goes_on_bit_for_bit(
    shapes_run, shapes_store, quick_config, tmp_path, monkeypatch
):
    step, calls = ezsd.pipeline.training.train.Trainer.step, []

    def asking(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    before = signal.getsignal(signal.SIGTERM)
    request = TrainRequest(cache=shapes_store, run=tmp_path / "asked", config=quick_config)
    with monkeypatch.context() as patch:
        patch.setattr(ezsd.pipeline.training.train.Trainer, "step", asking)
        with pytest.raises(SystemExit) as stopped:
            train(request)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    latest = Run.open(request.run).latest()
    assert latest is not None
    # Checkpoints are otherwise made at even steps.
    assert latest.step == 3
    # Who reads and how often a checkpoint is made is no part of what is learned.
    other = dataclasses.replace(quick_config.train, num_workers=1, checkpoint_every=1)
    resumed = train(dataclasses.replace(request, config=dataclasses.replace(quick_config, train=other)))
    assert curve(resumed) == curve(shapes_run)
    for name, value in state(resumed).items():
        assert torch.equal(value, state(shapes_run)[name]), name


def test_a_torn_checkpoint_is_passed_over(shapes_run, tmp_path):
    folder = tmp_path / "torn"
    shutil.copytree(shapes_run.folder, folder)
    weights = folder / "checkpoints/step-00000006/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    run = Run.open(folder)
    latest = run.latest()
    assert latest is not None
    assert latest.step == 4
    with pytest.raises(RunError, match="step 4 of 6"):
        run.finished()


def test_without_distillation_the_cached_regions_do_not_matter(shapes_store, with_settings, tmp_path):
    """Unless they are asked to spare likely objects, which is another setting."""

    def plain(regions):
        changed = with_settings(
            loss={"distillation": 0.0},
            model={"ignore_confidence": 2.0},
            train={"regions_per_image": regions, "steps": 2},
        )
        return train(TrainRequest(cache=shapes_store, run=tmp_path / str(regions), config=changed))

    few, many = plain(1), plain(20)
    assert curve(few) == curve(many)
    assert "distillation" not in curve(few)[0]


def test_distillation_changes_the_detector(shapes_run, shapes_store, with_settings, tmp_path):
    plain = train(
        TrainRequest(cache=shapes_store, run=tmp_path / "plain", config=with_settings(loss={"distillation": 0.0}))
    )
    assert not torch.equal(state(plain)["head.projection.weight"], state(shapes_run)["head.projection.weight"])


def test_a_run_folder_of_another_configuration_is_refused_by_name(shapes_run, shapes_store, with_settings):
    other = with_settings(loss={"distillation": 0.25})
    with pytest.raises(RunError, match=r"config\.loss\.distillation: [0-9.]+ there, 0\.25 wanted"):
        train(TrainRequest(cache=shapes_store, run=shapes_run.folder, config=other))


@pytest.mark.parametrize(
    "override", ["teacher.name=b", "adapt.steps=0", "proposals.max_regions=1", " build.batch_size=2"]
)
def test_what_the_store_was_built_with_is_not_trained_with(shapes_store, override):
    with pytest.raises(ConfigError, match=rf"--set {override}: .*build another store with it: .*--set {override}"):
        train_config(shapes_store, None, ["train.steps=3", override])


def test_a_seed_is_said_once(shapes_store):
    assert train_config(shapes_store, None, ["train.steps=3"], seed=7)[0].train.seed == 7
    assert train_config(shapes_store, None, ["train.seed=5"])[0].train.seed == 5
    with pytest.raises(ConfigError, match="--seed 7 and --set train.seed=5 both say the seed"):
        train_config(shapes_store, None, ["train.seed=5"], seed=7)


def test_a_run_records_stage_one_as_its_store_was_built(shapes_store, quick_config, tmp_path):
    built = {table: value for table, value in to_tables(quick_config).items() if table in STAGE_ONE}
    config, _ = train_config(shapes_store, None, ["train.steps=1"])
    assert to_tables(config)["adapt"] != built["adapt"]
    run = train(TrainRequest(cache=shapes_store, run=tmp_path / "run", config=config))
    assert {table: run.spec["config"][table] for table in STAGE_ONE} == built


def test_without_a_record_of_the_build_the_manifest_says_what_it_can(shapes_store, quick_config):
    config = as_built(load_preset("coco"), Store(shapes_store).manifest, {})
    assert (config.adapt, config.proposals) == (quick_config.adapt, quick_config.proposals)
    assert config.teacher.name == "tiny-shapes"
    assert (config.teacher.template, config.teacher.background) == (
        quick_config.teacher.template,
        quick_config.teacher.background,
    )
    assert config.train == load_preset("coco").train


def test_a_run_that_recorded_other_settings_of_stage_one_goes_on(shapes_run, shapes_store, quick_config, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(shapes_run.folder, folder)
    shutil.rmtree(folder / "checkpoints/step-00000006")
    spec = Run.open(folder).spec
    spec["config"]["adapt"]["steps"] = 80
    write_json(folder / "run.json", spec)
    resumed = train(TrainRequest(cache=shapes_store, run=folder, config=quick_config))
    assert curve(resumed) == curve(shapes_run)


def test_an_unfinished_store_is_refused(shapes_store, quick_config, tmp_path):
    unfinished = tmp_path / "store"
    shutil.copytree(shapes_store, unfinished)
    (unfinished / "COMMIT.json").unlink()
    with pytest.raises((StoreIncomplete, ValueError)):
        train(TrainRequest(cache=unfinished, run=tmp_path / "run", config=quick_config))
    assert not (tmp_path / "run").exists()


def test_a_missing_data_root_is_named(shapes_store, shapes_root, quick_config, tmp_path):
    moved = tmp_path / "store"
    shutil.copytree(shapes_store, moved)
    file = moved / "environment.json"
    file.write_bytes(seal(unseal(file.read_bytes(), str(file)) | {"data_root": "/gone/away"}))
    with pytest.raises(ValueError, match="/gone/away.*`data_root=DIR`"):
        train(TrainRequest(cache=moved, run=tmp_path / "run", config=quick_config))
    assert store_dataset(Store(moved, verify="quick"), shapes_root).root == shapes_root


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"data_root":"elsewhere"}'])
def test_a_damaged_record_of_the_build_is_one_clear_line(shapes_store, quick_config, tmp_path, damage):
    hurt = tmp_path / "store"
    shutil.copytree(shapes_store, hurt)
    (hurt / "environment.json").write_bytes(damage)
    for start in (
        lambda: train_config(hurt, None, []),
        lambda: train(TrainRequest(cache=hurt, run=tmp_path / "run", config=quick_config)),
    ):
        with pytest.raises(StoreError, match=r"environment\.json: .*nothing but this record is lost"):
            start()
    assert not (tmp_path / "run").exists()


def test_backbone_weights_that_run_code_are_refused(shapes_store, with_settings, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    request = TrainRequest(
        cache=shapes_store,
        run=tmp_path / "run",
        config=with_settings(),
        backbone_weights=tmp_path / "evil.pth",
    )
    with pytest.raises(ConfigError, match=r"evil\.pth"):
        train(request)
    assert not (tmp_path / "ran").exists()


def test_a_loss_that_is_not_finite_stops_with_its_parts(shapes_store, with_settings, tmp_path):
    wild = with_settings(train={"learning_rate": 1e30, "max_grad_norm": 1e30, "warmup_steps": 0})
    with pytest.raises(FloatingPointError, match="step .*parts.*classification.*images: ") as caught:
        train(TrainRequest(cache=shapes_store, run=tmp_path / "wild", config=wild))
    named = json.loads(str(caught.value).rpartition("images: ")[2])
    assert len(named) == wild.train.batch_size
    assert set(named) <= {int(i) for i in Store(shapes_store).image_ids}


def test_the_card_says_which_names_text_and_store(shapes_run, shapes_store):
    store = Store(shapes_store)
    spec = shapes_run.spec
    assert tuple(spec["names"]) == store.text[0]
    assert spec["text_sha256"] == hashlib.sha256(store.text[1].tobytes()).hexdigest()
    assert spec["store"]["digest"] == store.manifest.digest


def test_rows_and_checkpoints_of_another_run_are_refused(shapes_run, tmp_path):
    for change in ("text", "checkpoint"):
        folder = tmp_path / change
        shutil.copytree(shapes_run.folder, folder)
        if change == "text":
            tables = load_file(folder / "tables.safetensors")
            save_file(tables | {"text": tables["text"].flip(0).contiguous()}, folder / "tables.safetensors")
            words = "tables.safetensors: holds other text rows than run.json says"
        else:
            path = folder / "checkpoints/step-00000006/state.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"store_digest": "0" * 64}))
            words = "step-00000006: is another run's: store_digest: "
        with pytest.raises(RunError, match=words):
            load_trained(Run.open(folder), "cpu")


def test_training_time_is_recorded(shapes_run):
    spent = sum(line["seconds"] for line in shapes_run.read_metrics())
    assert shapes_run.seconds()["train"] >= spent * 0.9


def test_validation_files_are_not_needed_to_train(shapes_run, shapes_root, shapes_store, quick_config, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(shapes_root, root)
    shutil.rmtree(root / "val")
    (root / "annotations/instances_val.json").unlink()
    run = train(TrainRequest(cache=shapes_store, run=tmp_path / "run", config=quick_config, data_root=root))
    assert curve(run) == curve(shapes_run)


def test_validation_while_training_changes_nothing_and_is_written_down(
    shapes_run, shapes_store, with_settings, tmp_path
):
    looking = with_settings(train={"validate_every": 1, "validate_images": 3})
    run = train(TrainRequest(cache=shapes_store, run=tmp_path / "run", config=looking))
    assert curve(run) == curve(shapes_run)
    lines = [json.loads(line) for line in (run.folder / "validation.jsonl").read_text().splitlines()]
    # Twelve images, four at a time.
    assert [line["step"] for line in lines] == [3, 6]
    assert all(set(line) == {"step", "base", "novel", "all"} for line in lines)
    cut = json.loads((run.folder / "validation_slice.json").read_text())
    assert len(cut["images"]) == 3
    assert {one["image_id"] for one in cut["annotations"]} <= {image["id"] for image in cut["images"]}


def test_a_validation_that_a_stop_left_out_is_made_up_for(shapes_store, with_settings, tmp_path, monkeypatch):
    """Stopped in the last step of an epoch, and killed while it is evaluated: its checkpoint is there before."""
    looking = with_settings(train={"validate_every": 1, "validate_images": 3, "checkpoint_every": 100})
    whole = train(TrainRequest(cache=shapes_store, run=tmp_path / "whole", config=looking))
    step, calls, look = ezsd.pipeline.training.train.Trainer.step, [], ezsd.pipeline.training.train.Validation.look

    def asking(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    def dying(self, at, metrics):
        if at == 6:
            raise KeyboardInterrupt
        look(self, at, metrics)

    request = TrainRequest(cache=shapes_store, run=tmp_path / "asked", config=looking)
    with monkeypatch.context() as patch:
        patch.setattr(ezsd.pipeline.training.train.Trainer, "step", asking)
        with pytest.raises(SystemExit):
            train(request)
    assert Run.open(request.run).read_validation() == []
    with monkeypatch.context() as patch:
        patch.setattr(ezsd.pipeline.training.train.Validation, "look", dying)
        with pytest.raises(KeyboardInterrupt):
            train(request)
    latest = Run.open(request.run).latest()
    assert latest is not None
    assert latest.step == 6
    assert train(request).read_validation() == whole.read_validation() != []


def test_a_network_without_weights_is_said_to_start_from_none(shapes_store, with_settings, tmp_path, caplog):
    small = {"backbone": "resnet18", "fpn_channels": 16, "rpn_sizes": (16, 24, 32, 48, 64)}
    config = with_settings(model=small, train={"steps": 1})
    train(TrainRequest(cache=shapes_store, run=tmp_path / "run", config=config))
    assert "resnet18 starts from random weights" in caplog.text
    assert "give `backbone_weights=FILE`, ImageNet's as torchvision has them" in caplog.text
    caplog.clear()
    file = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), file)
    given = train(TrainRequest(cache=shapes_store, run=tmp_path / "given", config=config, backbone_weights=file))
    assert "random weights" not in caplog.text
    assert given.spec["backbone_weights"] is not None


@pytest.fixture
def own_validation(shapes_root, tmp_path):
    """A copy of the dataset whose validation annotations are what a function makes of the good ones."""

    def make(change):
        root = shutil.copytree(shapes_root, tmp_path / "data")
        path = root / "annotations/instances_val.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
        return root

    return make


def renamed(document):
    return document | {
        "categories": [c | {"name": "circel"} if c["name"] == "circle" else c for c in document["categories"]]
    }


def without_a_box(document):
    first, *others = document["annotations"]
    return document | {"annotations": [{k: v for k, v in first.items() if k != "bbox"}, *others]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed, r"instances_val.json: categories: expected an entry named 'circle'.*'circel'"),
        (without_a_box, r"instances_val.json: annotations\[0\].bbox"),
        (lambda document: document["images"], r"instances_val.json: .*expected an object"),
    ],
)
def test_validation_that_cannot_be_is_refused_before_the_first_step(
    change, words, own_validation, shapes_store, with_settings, tmp_path
):
    looking = with_settings(train={"validate_every": 1})
    root = own_validation(change)
    with pytest.raises(AnnotationError, match=words) as caught:
        train(TrainRequest(cache=shapes_store, run=tmp_path / "run", config=looking, data_root=root))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_annotations_outside_the_split_may_be_anything_in_a_validation_slice(
    own_validation, shapes_store, with_settings, tmp_path
):
    def with_strange_ones(document):
        document["categories"].append({"id": 999, "name": "tree"})
        strange = {"id": 90001, "category_id": 999}
        document["annotations"] += [strange, {**strange, "id": 90002, "image_id": []}]
        return document

    looking = with_settings(train={"validate_every": 1, "validate_images": 3, "steps": 3})
    root = own_validation(with_strange_ones)
    run = train(TrainRequest(cache=shapes_store, run=tmp_path / "run", config=looking, data_root=root))
    assert len((run.folder / "validation.jsonl").read_text().splitlines()) == 1


def test_the_papers_head_trains_and_detects(shapes_store, with_settings, tmp_path):
    paper = with_settings(model={"head": "paper", "tower_depth": 3, "box_hidden": 32}, train={"steps": 2})
    run = train(TrainRequest(cache=shapes_store, run=tmp_path / "paper", config=paper))
    assert "head.branch.layers.0.weight" in state(run)
    assert run.read_metrics()[-1]["distillation"] > 0
    evaluate_run(run, data_root=None, device="cpu")


def readers():
    """Processes that the server of reading processes has started, by id."""
    server = forkserver._forkserver._forkserver_pid
    if server is None:
        return set()
    return {int(child) for child in Path(f"/proc/{server}/task/{server}/children").read_text().split()}


@pytest.fixture
def read_beside(shapes_run, shapes_store, with_settings, tmp_path):
    """A training with a checkpoint and two more steps, of which a process reads the images."""
    run = tmp_path / "run"
    shutil.copytree(shapes_run.folder, run)
    shutil.rmtree(run / "checkpoints/step-00000006")
    return TrainRequest(cache=shapes_store, run=run, config=with_settings(train={"num_workers": 1}))


def require_gone_on(request, unbroken):
    """The same training goes on from its newest checkpoint to what an unbroken one learns."""
    again = train(request)
    assert again.began_at == 4
    for name, value in state(again).items():
        assert torch.equal(value, state(unbroken)[name]), name


def test_a_killed_reader_of_images_is_one_line_that_names_it_and_the_training_goes_on(read_beside, shapes_run):
    known, killed = readers(), []

    def kill():
        while not killed:
            for reader in readers() - known:
                os.kill(reader, signal.SIGKILL)
                killed.append(reader)
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RunError, match=r"DataLoader worker \(pid.*Run the same command to go on from") as caught:
        train(read_beside)
    killer.join()
    assert str(killed[0]) in str(caught.value)
    require_gone_on(read_beside, shapes_run)


def test_a_reader_that_goes_while_it_hands_a_batch_over_is_one_line_and_the_training_goes_on(
    read_beside, shapes_run, monkeypatch
):
    def gone(*_):
        raise EOFError("the other side has gone")

    with monkeypatch.context() as patch:
        # How a batch is taken over from shared memory.
        patch.setattr("torch.multiprocessing.reductions.rebuild_storage_fd", gone)
        with pytest.raises(
            RunError, match=r"handed a batch over \(the other side has gone\)\. Run the same command to go on from"
        ):
            train(read_beside)
    require_gone_on(read_beside, shapes_run)


class Hungry(torch.utils.data.Dataset):
    """Images of which several processes read more than fit the memory."""

    def __init__(self, samples):
        self.samples, self.image_ids, self.size = samples, samples.image_ids, samples.size
        self.repeats, self.epoch_images = samples.repeats, samples.epoch_images

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        reader = torch.utils.data.get_worker_info()
        if reader is not None and reader.num_workers > 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 9 bytes.")
        return self.samples[key]


def test_images_that_do_not_fit_the_memory_are_read_fewer_at_a_time_as_told(
    shapes_store, with_settings, tmp_path, monkeypatch
):
    def start(**settings):
        config = with_settings(train={"steps": 2, "warmup_steps": 0, **settings})
        return train(TrainRequest(cache=shapes_store, run=tmp_path / "run", config=config))

    def limited(samples):
        if len(samples) > 2:
            raise MemoryError
        return collate(samples)

    said = (
        r"read \({}\); give the training more memory, or read fewer images at a time: lower train.num_workers, or "
        r"raise train.grad_accumulation with `train.rng=image`$"
    )
    monkeypatch.setattr(
        "ezsd.pipeline.training.train.training_samples", lambda *given: Hungry(training_samples(*given))
    )
    with pytest.raises(RunError, match=said.format(r"\[enforce fail.* can't allocate memory: 9 bytes\.")) as caught:
        start(num_workers=2)
    assert "Traceback" not in str(caught.value)
    assert start(num_workers=0).finished().step == 2
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr("ezsd.pipeline.training.dataloader.collate", limited)
    with pytest.raises(RunError, match=said.format("MemoryError")):
        start(num_workers=0)
    assert start(num_workers=0, grad_accumulation=2, rng="image").finished().step == 2


def test_readers_end_with_a_training_that_is_killed(shapes_store, tmp_path):
    words = ["train", "--cache", shapes_store, "--run", tmp_path / "run", "--device", "cpu"]
    for setting in ("batch_size=1", "num_workers=1", "steps=100000", "pseudo_confidence=0"):
        words += ["--set", f"train.{setting}"]
    training = begun(*words)
    talk, metrics = Talk(training), tmp_path / "run/metrics.jsonl"
    try:
        talk.wait_for(lambda: metrics.exists() and metrics.stat().st_size)
        family = descendants(training.pid)
    finally:
        training.kill()
        talk.end()
    assert len(family) >= 3, "the server, its tracker and one reader"
    require_gone(family)


def test_readers_of_any_number_give_the_same_curve(shapes_run, shapes_store, with_settings, tmp_path):
    config = with_settings(train={"num_workers": 2})
    assert curve(train(TrainRequest(cache=shapes_store, run=tmp_path / "run", config=config))) == curve(shapes_run)


def test_a_thread_reads_one_batch_ahead_and_ends_with_the_training(shapes_store, quick_config):
    store = Store(shapes_store)
    samples = training_samples(store, store_dataset(store, None), quick_config.train)
    read, threads = [], set()

    def reading(image):
        threads.add(threading.current_thread())
        read.append(image)
        return original(image)

    original, samples.read_image = samples.read_image, reading
    with closing(load_batches(samples, quick_config.train, first_step=0)) as batches:
        keys, _ = next(batches)
        while len(read) < 2 * len(keys):
            time.sleep(0.01)
        assert len(read) == 2 * len(keys)
        assert read[: len(keys)] == [samples.image_ids[position] for _, position in keys]
    (reader,) = threads
    assert reader is not threading.current_thread()
    assert not reader.is_alive()


def test_an_unreadable_image_is_named_by_the_reader_in_one_line(shapes_store, shapes_root, with_settings, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(shapes_root, root)
    for image in (root / "train").iterdir():
        image.write_bytes(image.read_bytes()[:60])
    for workers in (0, 1):
        config = with_settings(train={"num_workers": workers})
        with pytest.raises(ImageError, match=r"data/train/\S+: (is not an image|cannot be read)") as caught:
            train(TrainRequest(cache=shapes_store, run=tmp_path / f"run-{workers}", config=config, data_root=root))
        assert "\n" not in str(caught.value)
    assert readers() == set(), "a reader that lives on keeps the program from ending"


def test_learning_rate_warms_up_and_decays(quick_config):
    rates = [learning_rate(step, quick_config.train) for step in range(quick_config.train.steps)]
    assert rates[0] == pytest.approx(quick_config.train.learning_rate / 2)
    assert max(rates) == pytest.approx(quick_config.train.learning_rate)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_the_step_schedule_falls_twice_and_the_rate_follows_the_images(with_settings):
    config = with_settings(
        train={
            "optimizer": "sgd",
            "schedule": "step",
            "steps": 120,
            "learning_rate": 0.005,
            "reference_batch_size": 1,
            "warmup_steps": 10,
        }
    ).train
    rates = [learning_rate(step, config) for step in range(120)]
    assert rates[10:80] == pytest.approx([0.02] * 70)
    assert rates[80:110] == pytest.approx([0.002] * 30)
    assert rates[110:] == pytest.approx([0.0002] * 10)
    assert rates[:10] == sorted(rates[:10])


def test_evaluation_is_the_same_on_a_re_run(shapes_run):
    before = (shapes_run.folder / "eval.json").read_bytes()
    evaluate_run(shapes_run, data_root=None, device="cpu")
    assert (shapes_run.folder / "eval.json").read_bytes() == before


def test_evaluation_looks_for_all_names_at_once(shapes_run):
    result = json.loads((shapes_run.folder / "eval.json").read_text())
    assert result.keys() == {"annotations", "limit", "generalised"}
    assert set(headline(result)) == {"base", "novel", "all"}
    assert at_limit(result, "generalised")["names"] == list(SHAPES_SPLIT.names)


def test_crop_accuracy_lives_in_the_run(shapes_run):
    crops = json.loads((shapes_run.folder / "crops.json").read_text())
    assert crops["crops"]["novel"] > 0
    # A clean-picture model knows far more than chance (1 in 20) of these crops.
    assert crops["raw"]["base"] > 0.2


@pytest.mark.parametrize("schedule", ["cosine", "step"])
@pytest.mark.parametrize(("steps", "more"), [(12, 13), (12, 24), (30, 31)])
def test_the_first_other_rate_of_a_longer_training_is_found(with_settings, schedule, steps, more):
    one, other = (
        with_settings(train={"schedule": schedule, "steps": count, "warmup_steps": 3}).train for count in (steps, more)
    )
    differ = [step for step in range(steps) if learning_rate(step, one) != learning_rate(step, other)]
    for done in range(1, steps + 1):
        assert first_other_rate(one, other, done) == next((step for step in differ if step < done), None)
    huge = dataclasses.replace(one, steps=10**15), dataclasses.replace(one, steps=2 * 10**15)
    assert first_other_rate(*huge, 10**15) is not None


LEVEL = {"schedule": "step", "decay_at": (), "steps": 4, "checkpoint_every": 4}


def test_a_run_goes_on_to_more_steps_as_if_it_had_been_that_long(shapes_store, with_settings, tmp_path):
    folder = tmp_path / "run"
    request = TrainRequest(cache=shapes_store, run=folder, config=with_settings(train=LEVEL))
    train(request)
    (folder / "eval.json").write_text("{}")
    longer = dataclasses.replace(request, config=with_settings(train=LEVEL | {"steps": 6}))
    before = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    (folder / "stores.json").write_text(json.dumps([{"step": 0, "sha256": "0" * 64}]))
    with pytest.raises(RunError, match="was trained on other bytes"):
        train(longer)
    (folder / "stores.json").write_bytes(before["stores.json"])
    assert {path.name: path.read_bytes() for path in folder.glob("*.json")} == before
    run = train(longer)
    assert (run.began_at, run.finished().step, len(run.read_metrics())) == (4, 6, 6)
    assert "6 of 6" in (folder / "card.md").read_text()
    assert not (folder / "eval.json").exists()
    assert sorted(path.name for path in (folder / "results-00000004").iterdir()) == ["card.md", "eval.json"]
    unbroken = train(dataclasses.replace(longer, run=tmp_path / "unbroken"))
    assert curve(run) == curve(unbroken)
    assert all(torch.equal(value, state(unbroken)[name]) for name, value in state(run).items())
    with pytest.raises(RunError, match="holds another run: config.train.steps: 6 there, 4 wanted"):
        train(request)


def test_a_run_whose_rates_would_have_been_others_does_not_go_on(shapes_run, shapes_store, with_settings, tmp_path):
    run = shutil.copytree(shapes_run.folder, tmp_path / "run")
    before = (run / "run.json").read_bytes()
    request = TrainRequest(cache=shapes_store, run=run, config=with_settings(train={"steps": 7}))
    said = "6 steps are done, and with the cosine schedule of 7 steps .* from step 4 on; choose another `run` folder"
    with pytest.raises(RunError, match=said):
        train(request)
    assert (run / "run.json").read_bytes() == before
    assert (run / "eval.json").exists()
    assert train(dataclasses.replace(request, run=tmp_path / "other")).finished().step == 7


def test_a_checkpoint_of_a_shorter_run_with_other_rates_is_another_runs(shapes_run, with_settings, tmp_path):
    run = Run.open(shutil.copytree(shapes_run.folder, tmp_path / "run"))
    spec = json.loads((run.folder / "run.json").read_text())
    spec["config"]["train"]["steps"] = 7
    (run.folder / "run.json").write_text(json.dumps(spec))
    with pytest.raises(RunError, match="is another run's: config.train.steps: 6 there, 7 wanted"):
        run.latest()
