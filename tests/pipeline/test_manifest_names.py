"""Messages about manifests name settings as people type them, whatever manifests call them."""

import dataclasses

import pytest

from ezsd.cache import Difference, differences
from ezsd.pipeline.config.schema import AdaptConfig, ProposalConfig, load_preset, to_tables
from ezsd.pipeline.extraction.manifest_names import as_setting, as_settings, setting_name
from ezsd.pipeline.extraction.provenance import built_settings, describe
from ezsd.pipeline.extraction.request import BuildRequest, read_annotations

MODEL = {"name": "teacher", "template": "a {}", "names": "all", "precision": "fp32"}
GRID = "proposals.search=exhaustive"
PAPER = (GRID, 'proposals.grid="paper"', "proposals.stride=16")
LINES = {
    "adapt.steps=7": "adapt.steps: store has 80, wanted 7",
    "adapt.batch_size=7": "adapt.batch_size: store has 128, wanted 7",
    "adapt.max_grad_norm=0.5": "adapt.max_grad_norm: store has 0.1, wanted 0.5",
    "adapt.flip=0.5": "adapt.flip: store has 0.0, wanted 0.5",
    "adapt.min_crop_size=6": "adapt.min_crop_size: store has 0.0, wanted 6.0",
    "build.seed=9": "build.seed: store has 0, wanted 9",
    "build.batch_size=7": "build.batch_size: store has 64, wanted 7",
    'build.embedding="int8"': 'build.embedding: store has "float16", wanted "int8"',
    "proposals.max_proposals=7": "proposals.max_proposals: store has 1000, wanted 7",
    "proposals.max_regions=7": "proposals.max_regions: store has 10, wanted 7",
    'proposals.padding="black"': 'proposals.padding: store has "context", wanted "black"',
    "proposals.crop_ratio=1.25": "proposals.crop_ratio: store has 1.2, wanted 1.25",
    "proposals.base_iou=0.4": "proposals.base_iou: store has 0.3, wanted 0.4",
    "proposals.drop_background=false": "proposals.drop_background: store has true, wanted false",
    "proposals.sizes=[20, 30]": "proposals.sizes: store has [24.0,34.0,50.0], wanted [20.0,30.0]",
    'teacher.background="none"': 'teacher.background: store has "background", wanted "none"',
}


def lines(dataset, before, after, model=MODEL):
    manifests = []
    for config in (before, after):
        annotations = read_annotations(BuildRequest(dataset=dataset, config=config, out=dataset.root))
        manifests.append(describe(dataset, annotations, config, model if config is after else MODEL))
    return list(dict.fromkeys(map(str, as_settings(manifests[0].differences(manifests[1])))))


@pytest.mark.parametrize("override", LINES)
def test_a_difference_has_the_name_of_its_setting(override, shapes_dataset):
    before, after = load_preset("shapes", (GRID,)), load_preset("shapes", (GRID, override))
    assert lines(shapes_dataset, before, after) == [LINES[override]]


def test_a_search_is_named_by_todays_words_also_where_a_manifest_says_nothing(shapes_dataset):
    before = load_preset("shapes", PAPER)
    after = load_preset("shapes", (*PAPER, 'proposals.search="coarse-to-fine"'))
    found = lines(shapes_dataset, before, after)
    assert 'proposals.search: store has "exhaustive", wanted "coarse-to-fine"' in found
    assert any(line.startswith("proposals.anchor_fraction: store has no such entry") for line in found)


def test_a_store_says_also_of_settings_that_its_manifest_does_not_name_what_it_was_built_with(shapes_dataset):
    config = load_preset("shapes")
    request = BuildRequest(dataset=shapes_dataset, config=config, out=shapes_dataset.root)
    manifest = describe(shapes_dataset, read_annotations(request), config, MODEL)
    assert "flip" not in manifest.products["teacher"].inputs["adapt"]
    assert built_settings(manifest)["adapt"] == to_tables(config)["adapt"]


def test_box_voting_is_listed_with_its_overlap(shapes_dataset):
    assert lines(shapes_dataset, load_preset("shapes"), load_preset("shapes", ("proposals.refine=vote",))) == [
        'proposals.refine: store has "none", wanted "vote"',
        "proposals.refine_iou: store has no such entry, wanted 0.3",
    ]


def test_between_a_grid_and_a_network_the_search_alone_is_listed(shapes_dataset):
    before, after = load_preset("shapes", (GRID,)), load_preset("shapes", ("build.seed=1",))
    assert lines(shapes_dataset, before, after) == [
        'proposals.search: store has "exhaustive", wanted "learned"',
        "build.seed: store has 0, wanted 1",
    ]
    assert lines(shapes_dataset, after, before)[0] == 'proposals.search: store has "learned", wanted "exhaustive"'


def test_between_anchors_or_a_network_and_a_file_the_file_alone_is_listed(shapes_dataset, tmp_path):
    (tmp_path / "boxes.json").write_text("[]")
    after = load_preset("shapes", (f"proposals.boxes={tmp_path}/boxes.json",))
    for before in (load_preset("shapes"), load_preset("shapes", (GRID,))):
        (found,) = lines(shapes_dataset, before, after)
        assert found.startswith("proposals.boxes_sha256: store has no such entry")


@pytest.mark.parametrize("setting", ["proposer.max_proposals", "proposals.max_proposals"])
def test_of_a_network_the_number_of_boxes_that_are_kept_is_listed(setting, shapes_dataset):
    found = lines(shapes_dataset, load_preset("shapes"), load_preset("shapes", (f"{setting}=50",)))
    assert found == ["proposals.max_proposals: store has 100, wanted 50"]
    more = load_preset("shapes", ("proposals.max_proposals=2000",))
    assert lines(shapes_dataset, load_preset("shapes"), more) == []


def test_the_teachers_settings_are_told_from_its_weights(shapes_dataset):
    config = load_preset("shapes")
    found = lines(shapes_dataset, config, load_preset("shapes"), MODEL | {"template": "{}", "weights_sha256": "f"})
    assert found == [
        'teacher.template: store has "a {}", wanted "{}"',
        'teacher.model.weights_sha256: store has no such entry, wanted "f"',
    ]


def test_every_value_of_a_manifest_is_a_setting_or_known_to_be_none(shapes_dataset):
    unusual = ("proposals.drop_background=false", "proposals.refine=vote", "adapt.flip=0.5", "adapt.min_crop_size=6")
    config = load_preset("shapes", (*PAPER, 'proposals.search="coarse-to-fine"', *unusual))
    annotations = read_annotations(BuildRequest(dataset=shapes_dataset, config=config, out=shapes_dataset.root))
    inputs = {
        name: origin.inputs
        for name, origin in describe(shapes_dataset, annotations, config, MODEL).products.items()
        if name not in ("text", "ground_truth")
    }
    settings = {f"{section}.{key}" for section, table in to_tables(config).items() for key in table}
    # Against empty tables every table of the second level is one difference.
    empty = {
        product: {key: {} for key, value in table.items() if isinstance(value, dict)}
        for product, table in inputs.items()
    }
    others = {one.name for one in differences(inputs, empty)}
    named = {setting_name(name) for name in others} - {None}
    assert named <= settings
    others = {name for name in others if setting_name(name) is None}
    assert {name for name in others if not name.startswith("teacher.dataset.") and not name.endswith("_sha256")} == {
        "teacher.model.name"
    }
    adapt = {f"adapt.{field.name}" for field in dataclasses.fields(AdaptConfig)}
    without = {"proposals.boxes", "proposals.objectness_weight"}
    proposals = {f"proposals.{field.name}" for field in dataclasses.fields(ProposalConfig)} - without
    assert named >= adapt | proposals


def test_what_is_no_setting_stays(shapes_dataset):
    for name in ("text.base_names[0]", "images_sha256", "proposals.algorithm_version", "proposals.boxes_sha256"):
        difference = Difference(name, 1, 2)
        assert as_setting(difference) == difference
    assert str(as_setting(Difference("proposals.grid", "faithful", "dense"))) == (
        'proposals.grid: store has "paper", wanted "dense"'
    )
