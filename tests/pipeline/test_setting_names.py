"""Settings by the field's words: what people type is understood or answered, what earlier versions wrote is read on."""

import json
import shutil

import pytest

from ezsd.cache import Store
from ezsd.pipeline.config.names import ALIASES, FORMER, NO_SETTINGS, with_former_names, with_todays_names
from ezsd.pipeline.config.schema import ConfigError, at_test_time, load_preset, preset_names, to_tables
from ezsd.pipeline.errors import RunError
from ezsd.pipeline.extraction.provenance import as_built
from ezsd.pipeline.inference.predictor import load_trained
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.training.train import TrainRequest, train

TYPED = {
    # Names that are settings.
    "train.batch_size=8": None,
    "train.learning_rate=0.01": None,
    "train.weight_decay=0.01": None,
    "train.num_workers=2": None,
    "train.min_size=640": None,
    "train.max_size=1000": None,
    "train.max_grad_norm=1": None,
    "train.ema_decay=0.99": None,
    "train.optimiser=sgd": None,
    "train.optimizer=sgd": None,
    "model.logit_scale=50": None,
    "model.fpn_channels=128": None,
    "model.box_batch_size_per_image=256": None,
    "eval.score_threshold=0.05": None,
    "eval.max_detections=50": None,
    "adapt.batch_size=64": None,
    "build.batch_size=64": None,
    # Habits, and what they mean here.
    "train.lr=0.01": "train.learning_rate",
    "train.epochs=12": "train.steps",
    "train.ema=true": "train.ema_decay",
    "train.grad_accum=2": "train.grad_accumulation",
    "train.grad_clip=1": "train.max_grad_norm",
    "train.momentum=0.9": "that of SGD is 0.9",
    "train.wandb=true": "train.loggers",
    "train.amp=true": "mixed precision is always on",
    "train.image_size=800": "train.min_size and train.max_size",
    "train.imgsz=800": "train.min_size and train.max_size",
    "model.fc_dim=512": "model.box_hidden",
    "model.freeze_at=2": "model.frozen_stages (one less",
    "train.freeze=2": "model.frozen_stages?",
    "train.frozen_stages=2": "model.frozen_stages?",
    "model.freeze_backbone=true": "model.frozen_stages (4 is the whole body)",
    "model.freeze_bn=true": "of a backbone with pretrained weights is always frozen; leave it out",
    "model.pretrained=true": "the option `backbone_weights` (a file)?",
    "model.backbone_lr_mult=0.1": "train.backbone_lr_mult?",
    "model.trainable_backbone_layers=3": "model.frozen_stages (4 less",
    "proposer.freeze_at=2": "proposer.frozen_stages",
    "train.lr_backbone=1e-5": "train.backbone_lr_mult (a factor",
    "train.backbone_multiplier=0.1": "train.backbone_lr_mult",
    "proposer.lr_mult=0.1": "proposer.backbone_lr_mult",
    "loss.kd_weight=1": "loss.distillation",
    "proposals.top_k=100": "proposals.max_proposals",
    "proposals.topk=100": "proposals.max_proposals",
    "eval.max_dets=100": "eval.max_detections",
    "eval.agnostic_nms=true": "eval.class_agnostic_nms",
    "adapt.lr=0.01": "adapt.learning_rate",
    "adapt.batch=3": "adapt.batch_size",
    "proposals.iou=0.5": "proposals.nms_iou",
    # The reciprocal of what the word means elsewhere.
    "model.temperature=0.01": "model.logit_scale now (it multiplies cosines",
    # Near no setting: nothing is suggested rather than something else.
    "train.colour=1": "known are",
}


@pytest.mark.parametrize("override", TYPED)
def test_what_people_type_is_a_setting_or_leads_to_one(override):
    if TYPED[override] is None:
        load_preset("coco", [override])
        return
    with pytest.raises(ConfigError) as caught:
        load_preset("coco", [override])
    said = str(caught.value)
    assert TYPED[override] in said.partition("; ")[2]
    assert "\n" not in said


@pytest.mark.parametrize(("section", "old"), [(section, old) for section in FORMER for old in FORMER[section]])
def test_a_former_name_is_refused_with_the_new_one(section, old):
    if (section, old) == ("train", "optimiser"):
        return
    with pytest.raises(ConfigError, match=rf"unknown key '{old}'; it is called {section}.{FORMER[section][old]} now"):
        load_preset("coco", [f"{section}.{old}=1"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("proposals.grid=faithful", "'faithful' is called 'paper' now"),
        ("proposals.search=faithful", "'faithful' is called 'exhaustive' now"),
        ("train.rng=stream", "'stream' is called 'step' now"),
    ],
)
def test_a_former_word_of_a_choice_is_refused_with_the_new_one(override, said):
    with pytest.raises(ConfigError, match=said):
        load_preset("coco", [override])


def test_a_search_answers_former_names_and_habits_too(quick_config):
    for override, said in (
        ("eval.keep=3", "it is called eval.max_detections now"),
        ("eval.conf=0.5", "did you mean eval.score_threshold"),
        ("train.lr=1", "did you mean train.learning_rate"),
    ):
        with pytest.raises(ConfigError, match=said):
            at_test_time(quick_config, [override])


@pytest.mark.parametrize("config", [5, None, {"teacher": 5}])
def test_a_record_without_tables_is_one_line(config, shapes_store, quick_config):
    store = Store(shapes_store)
    with pytest.raises(ConfigError, match="config: expected tables of settings, found"):
        as_built(quick_config, store.manifest, {**store.environment, "config": config})


def test_hints_name_settings_and_settings_have_no_hint():
    tables = to_tables(load_preset("coco"))
    settings = {f"{section}.{key}" for section, table in tables.items() for key in table}
    for section, names in FORMER.items():
        assert {f"{section}.{new}" for new in names.values()} <= settings
        assert not names.keys() & tables[section].keys()
    for habit, meant in ALIASES.items():
        first = meant.split()[0]
        assert first in settings or meant.startswith("the option `"), habit
    assert not ALIASES.keys() & NO_SETTINGS.keys()


@pytest.mark.parametrize("preset", preset_names())
def test_former_names_and_back(preset):
    tables = to_tables(load_preset(preset))
    former = {section: with_former_names(section, table) for section, table in tables.items()}
    assert former["train"]["images"] == tables["train"]["batch_size"]
    assert former["proposals"]["mode"] == tables["proposals"]["search"].replace("exhaustive", "faithful")
    assert with_todays_names(former) == tables == with_todays_names(tables)


def as_an_earlier_version(path):
    """Give a record's settings the names that they had."""
    record = json.loads(path.read_text())
    tables = record["config"]
    record["config"] = {section: with_former_names(section, table) for section, table in tables.items()}
    assert record["config"] != tables
    path.write_text(json.dumps(record))


def test_a_run_of_an_earlier_version_is_evaluated_and_gone_on_with(shapes_run, shapes_store, quick_config, tmp_path):
    folder = shutil.copytree(shapes_run.folder, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints/step-00000006")
    for path in (folder / "run.json", *folder.glob("checkpoints/*/state.json")):
        as_an_earlier_version(path)
    run = train(TrainRequest(cache=shapes_store, run=folder, config=quick_config))
    assert (run.began_at, run.finished().step) == (4, 6)
    assert load_trained(run, "cpu").config == load_trained(shapes_run, "cpu").config
    assert Run.open(folder).spec["config"] == shapes_run.spec["config"]


def test_a_run_of_a_version_with_fewer_settings_is_gone_on_with(shapes_run, shapes_store, with_settings, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(shapes_run.folder, folder)
    shutil.rmtree(folder / "checkpoints/step-00000006")
    for path in (folder / "run.json", folder / "checkpoints/step-00000004/state.json"):
        record = json.loads(path.read_text())
        for section, key in (("loss", "classification_loss"), ("train", "repeat_threshold"), ("eval", "objectness")):
            del record["config"][section][key]
        path.write_text(json.dumps(record))
    other = with_settings(loss={"classification_loss": "seesaw"})
    with pytest.raises(RunError, match='config.loss.classification_loss: "cross_entropy" there, "seesaw" wanted'):
        train(TrainRequest(cache=shapes_store, run=folder, config=other))
    resumed = train(TrainRequest(cache=shapes_store, run=folder, config=with_settings()))
    assert [line["loss"] for line in resumed.read_metrics()] == [line["loss"] for line in shapes_run.read_metrics()]


def test_a_store_of_an_earlier_version_says_with_what_it_was_built(shapes_store, quick_config, tmp_path):
    store = Store(shapes_store)
    record = store.environment
    former = {section: with_former_names(section, table) for section, table in record["config"].items()}
    assert as_built(quick_config, store.manifest, {**record, "config": former}) == as_built(
        quick_config, store.manifest, record
    )


def test_a_manifest_has_the_names_that_fingerprints_are_made_of(shapes_store):
    products = Store(shapes_store).manifest.products
    assert {"grid", "keep", "nms_iou", "ratios", "score", "sizes", "stride"} <= products["proposals"].inputs.keys()
    assert products["proposals"].inputs["grid"] == "sliding"
    assert {"base_iou", "drop_base_guesses", "regions"} <= products["regions"].inputs.keys()
    assert {"crops", "clip_norm"} <= products["teacher"].inputs["adapt"].keys()


def test_a_run_from_before_a_setting_is_gone_on_with(shapes_run, shapes_store, quick_config, tmp_path):
    folder = shutil.copytree(shapes_run.folder, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints/step-00000006")
    later = ("objectness", "class_agnostic_nms", "teacher_weight_base", "teacher_weight_novel")
    for path in (folder / "run.json", *folder.glob("checkpoints/*/state.json")):
        record = json.loads(path.read_text())
        for key in later:
            del record["config"]["eval"][key]
        path.write_text(json.dumps(record))
    run = train(TrainRequest(cache=shapes_store, run=folder, config=quick_config))
    assert (run.began_at, run.finished().step) == (4, 6)
