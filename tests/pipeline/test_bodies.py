"""Runs and stores with backbones of timm and plug-ins: trained, resumed, remembered, and missed where they are gone."""

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from ezsd.detector.backbone import build_backbone
from ezsd.pipeline.config.relations import load_settings
from ezsd.pipeline.config.schema import load_preset, to_tables
from ezsd.pipeline.console.defaults import build_config, require_known_proposer, train_config
from ezsd.pipeline.console.options import as_options
from ezsd.pipeline.errors import ConfigError, RunError
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.manifest_names import as_settings
from ezsd.pipeline.extraction.provenance import built_settings, describe
from ezsd.pipeline.extraction.request import BuildRequest, read_annotations
from ezsd.pipeline.extraction.run_proposer import run_proposer, with_run_network
from ezsd.pipeline.inference.evaluate import evaluate_run
from ezsd.pipeline.inference.evaluation_tables import headline
from ezsd.pipeline.inference.predictor import load_trained
from ezsd.pipeline.runs.model import build_detector, rate_groups, read_backbone
from ezsd.pipeline.training.train import TrainRequest, train
from ezsd.pipeline.training.trainer import build_optimiser, learning_rate

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/backbones.md"
PLUGIN = "plugin:mynet:Net"
OF_TIMM = {"backbone": "timm:test_efficientnet", "fpn_channels": 16, "rpn_sizes": (24, 32, 48)}
OF_PLUGIN = {"backbone": PLUGIN, "fpn_channels": 16, "rpn_sizes": (24, 40)}
BODY = "backbone.body.body."


@pytest.fixture
def weights(mynet, tmp_path):
    torch.manual_seed(1)
    backbone = build_backbone(PLUGIN, channels=4, weights=None)
    names = {name.removeprefix("body.body."): v for name, v in backbone.state_dict().items() if "body.body." in name}
    save_file(names, tmp_path / "mynet.safetensors")
    return tmp_path / "mynet.safetensors"


def test_a_run_with_a_timm_backbone_is_trained_and_evaluated(shapes_store, with_settings, tmp_path, caplog):
    torch.manual_seed(0)
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "w.pth")
    config = with_settings(model=OF_TIMM, train={"steps": 2})
    request = TrainRequest(cache=shapes_store, run=tmp_path / "run", config=config)
    run = train(dataclasses.replace(request, backbone_weights=tmp_path / "w.pth"))
    assert "random weights" not in caplog.text
    assert run.spec["backbone"]["name"] == "timm:test_efficientnet"
    first = timm.create_model("test_efficientnet")
    first.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True))
    state = run.finished().model()
    # The stem and a stage are as they were, statistics too.
    assert torch.equal(state[f"{BODY}network.conv_stem.weight"], first.conv_stem.weight)
    assert torch.equal(state[f"{BODY}network.blocks.3.0.bn1.running_var"], first.blocks[3][0].bn1.running_var)
    assert not torch.equal(state[f"{BODY}network.blocks.3.0.conv_pw.weight"], first.blocks[3][0].conv_pw.weight)
    assert headline(evaluate_run(run, data_root=None, device="cpu"))["base"] is not None
    train(dataclasses.replace(request, run=tmp_path / "random"))
    said = as_options(caplog.text)
    assert "timm:test_efficientnet starts from random weights" in said
    assert "give --backbone-weights FILE, the state of the whole model, as timm has it" in said


def test_a_run_with_a_plugin_and_a_rate_of_its_own_resumes_bit_for_bit(shapes_store, with_settings, weights, tmp_path):
    config = with_settings(
        model={**OF_PLUGIN, "frozen_stages": 0}, train={"steps": 4, "backbone_lr_mult": 0.1, "schedule": "step"}
    )
    request = TrainRequest(cache=shapes_store, run=tmp_path / "run", config=config, backbone_weights=weights)
    whole = train(request)
    shutil.copytree(whole.folder, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoints/step-00000004")
    resumed = train(dataclasses.replace(request, run=tmp_path / "stopped"))
    for name, value in whole.finished().model().items():
        assert torch.equal(value, resumed.finished().model()[name]), name
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, backbone_lr_mult=0.2))
    with pytest.raises(RunError, match="config.train.backbone_lr_mult: 0.1 there, 0.2 wanted"):
        train(dataclasses.replace(request, config=other))


def test_the_body_moves_by_its_own_rate(shapes_store, with_settings, weights, tmp_path):
    began, moved = load_file(weights), {}
    for factor in (1.0, 0.01):
        config = with_settings(
            model={**OF_PLUGIN, "frozen_stages": 0},
            train={"steps": 1, "warmup_steps": 0, "backbone_lr_mult": factor, "optimizer": "sgd", "weight_decay": 0.0},
        )
        request = TrainRequest(cache=shapes_store, run=tmp_path / str(factor), config=config, backbone_weights=weights)
        state = train(request).finished().model()
        assert torch.equal(state[f"{BODY}stem.0.weight"], began["stem.0.weight"])
        moved[factor] = (
            state[f"{BODY}second.0.weight"] - began["second.0.weight"],
            state["backbone.body.fpn.inner_blocks.0.0.weight"],
        )
    torch.testing.assert_close(moved[0.01][0], moved[1.0][0] * 0.01, rtol=1e-2, atol=1e-7)
    assert moved[1.0][0].abs().max() > 0
    assert torch.equal(moved[0.01][1], moved[1.0][1])


def test_rates_of_groups(with_settings, mynet):
    """With the default all is one group, as in runs that were begun before there was a factor."""
    plain = with_settings(model=OF_PLUGIN)
    detector = build_detector(plain, 8, None)
    assert [group["lr_mult"] for group in build_optimiser(detector, plain.train).param_groups] == [1, 1]
    factor = dataclasses.replace(plain.train, backbone_lr_mult=0.25)
    groups = build_optimiser(detector, factor).param_groups
    assert [group["lr_mult"] for group in groups] == [1, 1, 0.25, 0.25]
    assert sum(len(group["params"]) for group in groups) == len(list(detector.parameters()))
    assert {id(p) for p in detector.backbone.body_parameters()} == {id(p) for g in groups[2:] for p in g["params"]}
    assert learning_rate(3, factor) == learning_rate(3, plain.train)
    detector.backbone.requires_grad_(False)
    assert [factor for _, factor in rate_groups(detector, 0.25)] == [1]


def test_a_body_that_takes_small_images_alone_is_refused_before_a_run_or_store_is_begun(
    shapes_store, shapes_dataset, with_settings, mynet, tmp_path
):
    mynet("fine = self", "assert images.shape[3] < 128, 'too wide'; fine = self")
    config = with_settings(model=OF_PLUGIN)
    with pytest.raises(
        ConfigError, match=r"`model.backbone=plugin:mynet:Net`: fails on an image of 128 x 128 pixels: "
    ):
        train(TrainRequest(cache=shapes_store, run=tmp_path / "run", config=config))
    with pytest.raises(ConfigError, match=r"`proposer.backbone=.*`: fails on an image of 128 x 128 pixels: .*too wide"):
        build_cache(BuildRequest(dataset=shapes_dataset, config=proposer(), out=tmp_path / "store", workers=1))
    assert [path.name for path in tmp_path.iterdir()] == ["plugins"]


def test_a_file_that_is_no_state_is_refused_and_its_tensors_are_taken(tmp_path):
    path, state = tmp_path / "w.pth", {"a": torch.zeros(1)}
    path.write_text("words")
    with pytest.raises(ConfigError, match=r"w.pth`: not a plain state of tensors: .*; give .safetensors, or .pth of"):
        read_backbone(path)
    for wrong, found in (({"model": state, "step": 3}, "'model' that is none"), (torch.zeros(1), "Tensor")):
        torch.save(wrong, path)
        with pytest.raises(ConfigError, match=rf"expected a dictionary of tensors, found {found}; save a network's"):
            read_backbone(path)
    torch.save(state, path)
    assert read_backbone(path) == state


def test_a_run_whose_plugin_is_gone_or_changed_says_so(
    shapes_store, shapes_dataset, with_settings, weights, mynet, tmp_path
):
    config = with_settings(model=OF_PLUGIN, train={"steps": 2})
    request = TrainRequest(cache=shapes_store, run=tmp_path / "run", config=config, backbone_weights=weights)
    run = train(request)
    assert run.spec["backbone"]["fingerprint"] == {"name": "example", "version": 1}
    weights.unlink()
    load_trained(run, "cpu")
    # Its proposal network too.
    of_run = load_preset("shapes", [*QUICK, f"proposer.run={run.folder}"])
    proposing = with_run_network(BuildRequest(dataset=shapes_dataset, config=of_run, out=tmp_path / "store"))
    assert len(run_proposer(proposing.config.proposer)[0])
    mynet('"version": 1', '"version": 2')
    changed = r"the backbone is another one now, and the weights are not for it: fingerprint.version: 1 then, 2 now"
    with pytest.raises(RunError, match=changed):
        load_trained(run, "cpu")
    with pytest.raises(RunError, match=changed):
        run_proposer(proposing.config.proposer)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3))
    with pytest.raises(RunError, match="holds another run"):
        train(dataclasses.replace(request, config=longer, backbone_weights=None))
    (tmp_path / "plugins/mynet.py").unlink()
    sys.modules.pop("mynet")
    with pytest.raises(
        RunError, match=rf"its backbone cannot be made again: `model.backbone={PLUGIN}`: No module"
    ) as e:
        load_trained(run, "cpu")
    assert "\n" not in str(e.value)
    mynet()
    load_trained(run, "cpu")


QUICK = ("adapt.steps=2", "adapt.batch_size=32", "build.block_images=6", "proposer.steps=2", "proposer.batch_size=2")


def proposer(weights=None, **changes):
    config = load_preset("shapes", QUICK)
    settings = {"backbone": PLUGIN, "fpn_channels": 16, "rpn_sizes": (24, 40), "weights": weights and str(weights)}
    return dataclasses.replace(config, proposer=dataclasses.replace(config.proposer, **settings | changes))


def test_a_store_whose_proposer_has_a_plugin_remembers_it(shapes_dataset, weights, mynet, tmp_path):
    config = proposer(weights, frozen_stages=0, backbone_lr_mult=0.5)
    request = BuildRequest(dataset=shapes_dataset, config=config, out=tmp_path / "store", workers=1)
    assert not build_cache(request).already_complete
    assert build_cache(request).already_complete
    mynet('"version": 1', '"version": 2')
    with pytest.raises(ValueError, match=r"proposer.body.fingerprint.version: store has 1, wanted 2"):
        build_cache(request)


def test_manifests_name_of_the_proposer_what_is_not_as_ever(shapes_dataset, mynet):
    def manifest(config):
        annotations = read_annotations(BuildRequest(dataset=shapes_dataset, config=config, out=shapes_dataset.root))
        return describe(shapes_dataset, annotations, config, {"name": "t"})

    plain, changed = manifest(load_preset("shapes")), manifest(proposer(backbone_lr_mult=0.5))
    before = {"backbone", "batch_size", "fpn_channels", "learning_rate", "max_size", "min_size", "rpn_sizes", "steps"}
    inputs = plain.products["proposer"].inputs
    assert inputs["network"].keys() == before | {"weight_decay", "weights"}
    assert "body" not in inputs
    assert built_settings(plain)["proposer"] == to_tables(load_preset("shapes"))["proposer"] | {"run": None}
    assert built_settings(changed)["proposer"]["backbone_lr_mult"] == 0.5
    found = [str(one) for one in as_settings(plain.differences(changed))]
    assert "proposer.backbone_lr_mult: store has 1.0, wanted 0.5" in found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.backbone=timm:resnet10x", "--set model.backbone=timm:resnet10x: no such timm model; did you mean"),
        ("model.backbone=plugin:nobody_has:it", "--set model.backbone=plugin:nobody_has:it: no module named"),
        ("model.frozen_stages=2", "give --backbone-weights, or leave it out"),
    ],
)
def test_the_command_line_refuses_before_anything_is_loaded(override, message, shapes_store, tmp_path):
    with pytest.raises(ValueError, match=".") as caught:
        train_config(shapes_store, "shapes", [override])
    assert message in as_options(str(caught.value))
    if "frozen" in override:
        config, _ = train_config(shapes_store, "shapes", [override], backbone_weights=tmp_path)
        assert config.model.frozen_stages == 2
        assert train_config(shapes_store, "shapes", [])[0].model.frozen_stages == 1


def test_the_proposers_settings_are_checked_where_it_is_trained():
    named = ["proposer.backbone=timm:resnet10x"]
    config = build_config("shapes", named, teacher=None, weights=None)
    with pytest.raises(ValueError, match="`proposer.backbone=timm:resnet10x`: no such timm model"):
        require_known_proposer(config)
    require_known_proposer(load_preset("shapes", [*named, "proposals.search=exhaustive"]))
    with pytest.raises(ConfigError, match=r"`proposer.frozen_stages`: changes nothing without .* and proposer.weights"):
        load_settings("shapes", ["proposer.frozen_stages=2"])
    load_settings("shapes", ["proposer.frozen_stages=2", "proposer.weights=a.pth", "proposer.backbone=resnet18"])
