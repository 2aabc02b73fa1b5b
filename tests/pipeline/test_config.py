"""Settings: whole presets, exact types, the nearest name for a wrong one."""

import json

import pytest

from ezsd.pipeline.config.schema import from_tables, load_preset, preset_names, to_tables
from ezsd.pipeline.errors import ConfigError


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_whole_and_survives_a_round_trip(name):
    config = load_preset(name)
    assert from_tables(to_tables(config), where="test") == config


def test_an_override_changes_one_value_alone():
    plain, changed = to_tables(load_preset("shapes")), to_tables(load_preset("shapes", ["train.steps=7"]))
    assert changed["train"].pop("steps") == 7
    plain["train"].pop("steps")
    assert changed == plain


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "unknown key 'stepz'; did you mean 'steps'"),
        ("trian.steps=3", "unknown key 'trian'; did you mean 'train'"),
        ("train.steps=0", "train.steps must be > 0, got 0"),
        ("train.steps=1.5", "expected int, found 1.5"),
        ("train.steps=true", "expected int, found True"),
        ("train.steps", "expected section.key=value"),
        ("steps=3", "expected section.key=value"),
        ("train.steps=3\ntrain.images=2", r"'train.steps=3\\ntrain.images=2': has a line break"),
        ("model.backbone=tiny\nresnet18", "has a line break"),
        ("train.optimizer=adam", "expected one of adamw, sgd, found 'adam'"),
        ("proposals.sizes=3", "expected a list, found 3"),
        ("proposals.sizes=[-3]", "proposals.sizes must be >= 1"),
        (
            "proposals.search=coarse",
            "expected one of exhaustive, grown-stride, coarse-to-fine, learned, found 'coarse'",
        ),
        (
            "proposals.search=grown-stride",
            'search=grown-stride thins out the grid "paper", and proposals.grid is .sliding',
        ),
        ("proposals.anchor_fraction=0", r"proposals.anchor_fraction must lie in \(0, 1\], got 0"),
        ("proposals.anchor_fraction=12", r"proposals.anchor_fraction must lie in \(0, 1\], got 12"),
        ("proposals.growth=0", "proposals.growth must be > 0, got 0"),
        ("model.backbone=vgg", "'vgg' is not one of tiny, resnet18.*, timm:MODEL, plugin:package.module:factory"),
        ("model.backbone=timm:", "'timm:' is not one of"),
        ("proposer.backbone=plugin:module", "proposer.backbone 'plugin:module' is not one of"),
        ("model.frozen_stages=-2", "model.frozen_stages must be >= -1, got -2"),
        ("train.backbone_lr_mult=0", "train.backbone_lr_mult must be > 0, got 0"),
        ("loss.distillation=-1", "loss.distillation must be >= 0"),
        ("train.grad_accumulation=3", "train.batch_size must be a multiple of train.grad_accumulation, got 8 and 3"),
        ("train.grad_accumulation=2", "train.grad_accumulation needs train.rng=image"),
        ("train.ema_decay=1", r"train.ema_decay must lie in \[0, 1\), got 1"),
        ("train.decay_at=[0.5, 8]", r"train.decay_at must lie in \(0, 1\)"),
        ("train.max_size=31", r"0 and 0, or 32 <= min_size <= max_size; got \(0, 31\)"),
        ("train.multiscale_min_size=10", "train.multiscale_min_size must lie between 0 and train.min_size"),
        ("train.scale_jitter=[1.0]", "train.scale_jitter: two factors"),
        ("train.scale_jitter=[0.1, 2.0]", "train.scale_jitter needs train.max_size"),
        ("adapt.learning_rate=-1", "adapt.learning_rate must be > 0, got -1"),
        ("adapt.max_grad_norm=0", "adapt.max_grad_norm must be > 0"),
        ("proposals.max_proposals=0", "proposals.max_proposals must be >= 1, got 0"),
        ("proposals.base_iou=0", "proposals.base_iou must be > 0"),
        ("proposals.stride=1e-9", "proposals.stride must be >= 0.01"),
        ("proposals.sizes=[1e-9]", "proposals.sizes must be >= 1"),
        ("proposals.sizes=[]", r"proposals.sizes must be >= 1, got \(\)"),
        ("adapt.held_out=1", r"adapt.held_out must lie in \(0, 1\), got 1"),
        ("proposals.ratios=[1e300]", r"proposals.ratios must lie in \[0.01, 100\]"),
        ("proposals.crop_ratio=inf", "expected a finite number, found inf"),
        ("loss.rpn=nan", "expected a finite number, found nan"),
        ("loss.box=-1", "loss.box must be >= 0"),
        ("build.seed=99999999999999999999", "expected a whole number of 32 bits"),
        ("train.learning_rate=99999999999999999999", "expected a whole number of 32 bits"),
        ("train.warmup_steps=-1", "train.warmup_steps must be >= 0"),
        ("train.num_workers=-1", "train.num_workers must be >= 0"),
        ("model.fpn_channels=0", "model.fpn_channels must be > 0"),
        ("model.pool_size=17", r"model.pool_size must lie in \(0, 16\], got 17"),
        ("model.rpn_sizes=[0]", "model.rpn_sizes must be > 0"),
        ("model.box_positive_fraction=2", r"model.box_positive_fraction must lie in \[0, 1\]"),
        ("model.tower_depth=-1", "model.tower_depth must be >= 0"),
        ("eval.max_detections=0", "eval.max_detections must be > 0"),
        ("eval.score_threshold=7", r"eval.score_threshold must lie in \[0, 1\)"),
        ("model.head=slow", "expected one of fast, paper, found 'slow'"),
        ("teacher.background=[]", "teacher.background: expected a text or a list of texts, found an empty list"),
        ('teacher.background=["a", "b", "a"]', "teacher.background: 'a' is in the list twice"),
        ('teacher.background=["a", 3]', "teacher.* background: expected str, found 3"),
        ("teacher.background=3", "teacher.* background: expected str, found 3"),
        ('teacher.weights=["a"]', r"teacher.* weights: expected str, found \['a'\]"),
    ],
)
def test_a_wrong_setting_is_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_preset("shapes", [override])


def test_a_faithful_grid_has_a_stride_of_whole_pixels():
    with pytest.raises(ConfigError, match="proposals.stride must be >= 1, got 0.4"):
        load_preset("coco", ["proposals.stride=0.4"])


def test_a_search_of_the_grid_needs_neighbours_in_order():
    options = ["proposals.search=coarse-to-fine", "proposals.sizes=[64, 32]"]
    with pytest.raises(
        ConfigError, match=r"proposals.sizes must ascend for .*search=coarse-to-fine, got \(64.0, 32.0\)"
    ):
        load_preset("coco", options)


def test_a_text_or_a_list_of_texts_comes_back_from_its_record():
    config = load_preset("shapes", ['teacher.background=["background", "sky"]'])
    assert config.teacher.backgrounds == ("background", "sky")
    assert from_tables(json.loads(json.dumps(to_tables(config))), where="run.json") == config
    assert load_preset("shapes", ['teacher.background=["background"]']) == load_preset("shapes")
    assert load_preset("coco").teacher.backgrounds == ()


def test_a_missing_key_is_named():
    tables = to_tables(load_preset("shapes"))
    del tables["train"]["learning_rate"]
    with pytest.raises(ConfigError, match=r"\[train\]: learning_rate is missing"):
        from_tables(tables, where="mine.toml")


def test_a_bare_word_is_text_and_a_whole_number_serves_as_a_float():
    config = load_preset("shapes", ["model.backbone=resnet18", "loss.distillation=1"])
    assert config.model.backbone == "resnet18"
    assert config.loss.distillation == 1.0


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"'voc'; .* coco, lvis, paper, photos, shapes, or fast \(the same as coco\)"):
        load_preset("voc")


def test_fast_is_the_default_preset():
    assert load_preset("fast", ["train.steps=7"]) == load_preset("coco", ["train.steps=7"])
