"""Settings that hang on each other: all of them known, scaled, refused or warned of, and listed for people."""

import dataclasses
import logging
import typing
from pathlib import Path

import pytest

from ezsd.pipeline.config.relations import ALONE, RELATIONS, changed_alone, load_settings, require_fit
from ezsd.pipeline.config.schema import Config, load_preset, preset_names
from ezsd.pipeline.console.options import as_options
from ezsd.pipeline.errors import ConfigError

DOCS = Path(__file__).resolve().parents[2] / "docs/settings.md"


def all_settings():
    sections = typing.get_type_hints(Config).items()
    return {f"{name}.{entry.name}" for name, section in sections for entry in dataclasses.fields(section)}


def test_every_setting_is_in_a_relation_or_stands_alone():
    related = {name for one in RELATIONS for name in (one.setting, *one.neighbours)}
    assert related | ALONE == all_settings()
    assert not related & ALONE
    assert len({one.setting for one in RELATIONS}) == len(RELATIONS)


def test_the_documented_table_is_the_programs():
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    assert rows == [
        f"| `{one.setting}` | {', '.join(f'`{name}`' for name in one.neighbours)} | {one.how} | {one.effect} |"
        for one in RELATIONS
    ]


@pytest.mark.parametrize("name", preset_names())
def test_presets_fit_and_say_nothing(name, caplog):
    assert load_settings(name) == load_preset(name)
    assert not caplog.records


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("coco", ["model.logit_scale=500"], "model.logit_scale must be at most 100, where it is held.*got 500"),
        (
            "shapes",
            ["model.box_batch_size_per_image=3"],
            "model.box_batch_size_per_image=3 times model.box_positive_fraction=0.25 leaves no",
        ),
        ("coco", ["train.min_size=32", "train.max_size=33", "model.rpn_sizes=[64, 64, 128, 256, 512]"], "all above"),
        (
            "shapes",
            ["proposals.search=exhaustive", "proposals.stride=32"],
            "proposals.stride=32 is a share of the window's side",
        ),
        ("coco", ["proposals.grid=sliding", "proposals.search=exhaustive"], "proposals.stride=32 is a share"),
        (
            "paper",
            ["proposals.max_proposals=100"],
            "proposals.max_regions=300 are chosen among proposals.max_proposals=100",
        ),
        ("coco", ["train.decay_at=[0.5]"], "`train.decay_at`: changes nothing without train.schedule=step"),
        ("shapes", ["train.validate_images=5"], "changes nothing without train.validate_every above 0"),
        (
            "coco",
            ["model.ignore_rpn=true"],
            "`model.ignore_rpn`: changes nothing without model.ignore_confidence of at most 1",
        ),
        ("coco", ["model.box_top_k=3"], "changes nothing without model.box_class=topk"),
        ("coco", ["model.box_class=topk"], "without model.semantic_boxes=true"),
        ("coco", ["loss.mask=2"], "changes nothing without model.masks=true"),
        ("shapes", ["proposals.growth=0.5"], "changes nothing without proposals.search=grown-stride or coarse-to-fine"),
        ("shapes", ["proposals.anchor_fraction=0.5"], "changes nothing without proposals.search=coarse-to-fine"),
        ("shapes", ["proposer.frozen_stages=2"], "changes nothing without .* and proposer.weights"),
        ("coco", ["proposals.drop_background=false"], "changes nothing without a teacher.background"),
    ],
)
def test_settings_that_cannot_be_meant_together_are_refused_in_one_line(preset, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings(preset, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("paper", ["train.decay_at=[0.5]"]),
        ("coco", ["train.schedule=step", "train.decay_at=[0.5]"]),
        ("shapes", ["model.ignore_rpn=true"]),
        ("shapes", ["train.validate_every=1", "train.validate_images=5"]),
        ("paper", ["model.box_class=topk", "model.box_top_k=3"]),
        ("coco", ["model.masks=true", "loss.mask=2"]),
        ("coco", ["proposals.search=grown-stride", "proposals.growth=0.5"]),
        ("coco", ["proposals.drop_background=true"]),
        ("shapes", ["proposals.drop_background=false"]),
        ("shapes", ["proposals.max_regions=1000"]),
        ("shapes", ["loss.metric=cosine", "loss.distillation=0"]),
    ],
)
def test_what_the_refusals_ask_for_is_accepted(preset, overrides):
    assert load_settings(preset, overrides) == load_preset(preset, overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["train.batch_size=4"],
            "--set train.batch_size alone, without train.steps: the learning rate scales with it, the number of epochs",
        ),
        (["train.batch_size=4", "train.steps=1600"], None),
        (["train.optimizer=sgd"], "--set train.optimizer alone"),
        (["train.optimizer=sgd", "train.learning_rate=0.02"], None),
        (["train.min_size=64", "train.max_size=96"], None),
        (["model.head=paper"], "--set model.head alone, without model.tower_depth or model.box_hidden"),
        (["adapt.batch_size=64"], "--set adapt.batch_size alone"),
        (["adapt.loss=bce"], "--set adapt.loss alone"),
        (
            ["train.steps=20"],
            "train.warmup_steps=50 is not below train.steps=20: the learning rate never reaches its height",
        ),
        (["train.steps=400"], None),
        (["train.seed=3"], None),
    ],
)
def test_a_setting_changed_without_its_neighbours_is_warned_of_in_one_line(overrides, said, caplog):
    caplog.set_level(logging.WARNING, logger="ezsd")
    load_settings("shapes", overrides)
    found = [as_options(record.getMessage()) for record in caplog.records]
    assert len(found) == (said is not None)
    assert all(line.startswith(said) and "\n" not in line and "`" not in line for line in found)


def test_the_command_line_warns_and_refuses(shapes_store, caplog):
    from ezsd.pipeline.console.defaults import build_config, train_config

    caplog.set_level(logging.WARNING, logger="ezsd")
    train_config(shapes_store, "shapes", ["train.batch_size=4"])
    build_config("shapes", ["adapt.batch_size=64"], teacher=None, weights=None)
    assert [as_options(record.getMessage()).split(" alone")[0] for record in caplog.records] == [
        "--set train.batch_size",
        "--set adapt.batch_size",
    ]
    with pytest.raises(ConfigError, match="model.logit_scale must be at most 100"):
        train_config(shapes_store, "shapes", ["model.logit_scale=101"])


def test_an_old_runs_settings_stay_readable():
    """What is refused when it is asked for is no fault of a spec that holds it: its run can be evaluated."""
    config = load_preset("shapes", ["model.logit_scale=500"])
    assert changed_alone(config, set()) == []
    with pytest.raises(ConfigError):
        require_fit(config)
