"""Bodies of torchvision, timm and plug-ins: their maps, weights, what of them is trained, and what is refused."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ezsd.detector.backbone import body_fingerprint, build_backbone, normalise, try_size
from ezsd.detector.bodies import freeze_norms
from ezsd.detector.norms import FrozenNorm
from ezsd.detector.requirements import require_backbone, timm_models
from ezsd.detector.timm_body import TimmBody
from ezsd.errors import BackboneError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "docs/backbones.md").read_text(), re.DOTALL)[1]
SMALL = "timm:test_efficientnet"


def state_of(model, **options):
    torch.manual_seed(0)
    network = timm.create_model(model, **options)
    for name, value in network.named_buffers():
        # As if trained: frozen statistics that are not read would show.
        if name.endswith("running_mean"):
            value.normal_()
    return network.state_dict()


def build(name, weights=None, **options):
    return build_backbone(name, channels=8, weights=weights, **options)


def frozen_stages(backbone, prefix):
    """First components below a prefix of the parameters that are not trained."""
    names = [name.removeprefix(prefix) for name, p in backbone.named_parameters() if not p.requires_grad]
    return sorted(
        {".".join(name.split(".")[:2]) if name.startswith("blocks") else name.split(".")[0] for name in names}
    )


# timm


@pytest.mark.parametrize("model", ["test_efficientnet", "test_resnet", "test_convnext", "test_mambaout"])
def test_a_timm_body_gives_the_maps_of_the_whole_model_with_its_weights(model):
    state = state_of(model, num_classes=3)
    backbone = build(f"timm:{model}", state)
    assert backbone.strides == (8, 16, 32)
    config = timm.get_pretrained_cfg(model)
    images = torch.rand(2, 3, 64, 96)
    whole = timm.create_model(model, num_classes=3)
    whole.load_state_dict(state)
    inputs = normalise(images, [(64, 96)] * 2, config.mean, config.std)
    with torch.no_grad():
        expected = whole.eval().forward_intermediates(inputs, intermediates_only=True)[-3:]
        # In training mode too: all statistics are frozen.
        found = backbone.body.body(inputs)
        maps = backbone.maps(images, [(64, 96)] * 2)
    for own, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, theirs)
    assert [m.shape for m in maps] == [(2, 8, 64 // s, 96 // s) for s in (8, 16, 32)]
    torch.testing.assert_close(maps[0], list(backbone.body(inputs).values())[0])
    assert not any(isinstance(module, _BatchNorm) for module in backbone.modules())
    assert backbone.fingerprint["mean"] == list(config.mean)


@pytest.mark.parametrize(
    ("stages", "frozen"),
    [
        (-1, []),
        (0, ["blocks.0", "bn1", "conv_stem"]),
        (2, ["blocks.0", "blocks.1", "blocks.2", "bn1", "conv_stem"]),
        (4, ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4", "bn1", "conv_stem"]),
    ],
)
def test_the_first_stages_of_a_timm_body_are_not_trained(stages, frozen):
    backbone = build(SMALL, state_of("test_efficientnet"), frozen_stages=stages)
    found = {name for name in frozen_stages(backbone, "body.body.network.")}
    assert found == {name for name in frozen if name != "bn1"}
    assert all(p.requires_grad for p in build(SMALL, frozen_stages=stages).parameters())
    own = {id(parameter) for parameter in backbone.body_parameters()}
    assert {name.split(".")[1] for name, p in backbone.named_parameters() if id(p) not in own} == {"fpn"}


def test_a_trained_state_fits_a_timm_body_that_is_built_without_the_file():
    trained = build(SMALL, state_of("test_efficientnet"))
    empty = build(SMALL, frozen_norms=True)
    empty.load_state_dict(trained.state_dict())
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(empty(image)[2], trained(image)[2])


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        (lambda state: state.pop("blocks.1.0.bn1.weight"), 'Missing key.* "blocks.1.0.bn1.weight"'),
        (lambda state: state.update({"blob.weight": torch.zeros(1)}), 'Unexpected key.* "blob.weight"'),
        (lambda state: state.update({"conv_stem.weight": torch.zeros(2)}), "size mismatch for conv_stem.weight"),
        (lambda state: state.clear(), "it holds no tensors"),
    ],
)
def test_a_state_of_another_timm_model_is_refused_in_one_line(change, tensor):
    state = state_of("test_efficientnet")
    change(state)
    with pytest.raises(BackboneError, match=rf"not a state of {SMALL}: {tensor}") as caught:
        build(SMALL, state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:test_vit", "gives maps of the strides 16, 16, 16, expected 8, 16 and 32 .* such as timm:resnet18"),
        ("timm:test_maxvit", "fails on an image of 64 x 96 pixels"),
        ("timm:resnet10t.a9", "no weights of resnet10t are tagged 'a9'; known are c3_in1k"),
        ("timm:resnet10x", "no such timm model; did you mean 'resnet10t'"),
    ],
)
def test_a_timm_model_that_is_no_body_is_refused_in_one_line(name, message):
    with pytest.raises(BackboneError, match=rf"^`proposer.backbone={name}`: {message}") as caught:
        build(name, section="proposer")
    assert "\n" not in str(caught.value)


def test_the_model_that_a_refusal_offers_is_taken():
    with pytest.raises(BackboneError) as said:
        build("timm:test_vit")
    assert build(str(said.value).rpartition(" ")[2]).strides == (8, 16, 32)


def test_a_timm_model_without_feature_maps_is_refused(monkeypatch):
    def entry(**options):
        raise RuntimeError("features_only not implemented for it")

    monkeypatch.setitem(timm.models._registry._model_entrypoints, "without_maps", entry)
    with pytest.raises(BackboneError, match=r"gives no feature maps .*: features_only not implemented for it$"):
        TimmBody("timm:without_maps", None, "model")


def test_where_published_weights_differ_in_the_pixels_the_tag_has_to_be_said():
    state = state_of("mobilenetv3_large_100")
    with pytest.raises(BackboneError, match="differ in the mean and deviation of pixels; say whose") as caught:
        build("timm:mobilenetv3_large_100", state)
    named = re.search(r"such as `model.backbone=(.*)`$", str(caught.value))[1]
    means = {tuple(build(name, state).fingerprint["mean"]) for name in (named, "timm:mobilenetv3_large_100.ra_in1k")}
    assert len(means) == 2


def test_a_model_whose_stages_timm_does_not_say_is_trained_whole():
    state = state_of("hrnet_w18_small")
    with pytest.raises(BackboneError, match=r"which of its stages; set `model.frozen_stages=-1`"):
        build("timm:hrnet_w18_small", state)
    assert build("timm:hrnet_w18_small", state, frozen_stages=-1).body.body.network.conv1.weight.requires_grad


def test_the_names_of_timms_models_are_known_without_it(monkeypatch):
    assert set(timm_models()) == set(timm.list_models())
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BackboneError, match="timm is not installed; pip install timm"):
        require_backbone("timm:resnet18")


# torchvision


@pytest.mark.parametrize(
    ("name", "layers"), [("mobilenet_v2", 18), ("mobilenet_v3_large", 17), ("mobilenet_v3_small", 13)]
)
def test_a_mobilenet_takes_torchvisions_state_and_freezes_its_early_part(name, layers):
    torch.manual_seed(0)
    network = getattr(torchvision.models, name)(weights=None).eval()
    backbone = build(name, network.state_dict())
    assert backbone.fingerprint is None
    images = torch.rand(1, 3, 64, 96)
    found = backbone.body.body(images)
    assert [m.shape[2:] for m in found] == [(64 // s, 96 // s) for s in (8, 16, 32)]
    # Of MobileNetV2 all but its last convolution, which is the classifier's.
    network.features = network.features[:layers]
    torch.testing.assert_close(found[-1], network.features(images))
    stride, frozen = images.shape[2], 0
    last = images
    for layer in network.features:
        last = layer(last)
        frozen += last.shape[2] >= stride // 4
    numbers = {int(name.split(".")[3]) for name, p in backbone.named_parameters() if not p.requires_grad}
    assert numbers == set(range(frozen))
    assert not any(isinstance(module, _BatchNorm) for module in backbone.modules())
    with pytest.raises(ValueError, match=f"not an ImageNet state of {name}: .*does not match"):
        build(name, network.state_dict() | {"features.99.weight": torch.zeros(1)})


def trained_state(name):
    """A state of torchvision's network as if it were trained: statistics, scales and shifts are no ones and zeros."""
    torch.manual_seed(0)
    network = getattr(torchvision.models, name)(weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low in (
                (module.weight, 0.5),
                (module.running_var, 0.5),
                (module.bias, -1),
                (module.running_mean, -1),
            ):
                nn.init.uniform_(value, low, 1.0)
    return network.state_dict()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small"])
def test_frozen_norms_are_folded_into_convolutions_with_the_same_results_gradients_and_names(name):
    state = trained_state(name)
    folded = build(name, state, frozen_stages=0)
    assert not any(type(module) is FrozenNorm for module in folded.modules())
    plain = build(name, None)
    freeze_norms(plain, name)
    assert plain.state_dict().keys() == folded.state_dict().keys()
    plain.load_state_dict(folded.state_dict())
    images, results = torch.rand(2, 3, 64, 96), []
    for backbone in (plain.double(), folded.double()):
        backbone.zero_grad()
        maps = backbone(images.double())
        sum(one.square().mean() for one in maps).backward()
        results.append((maps, {key: value.grad for key, value in backbone.named_parameters() if value.requires_grad}))
    (maps, gradients), (wanted, wanted_gradients) = results[1], results[0]
    for one, other in zip(maps, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert len(gradients) > 20
    for key, value in gradients.items():
        torch.testing.assert_close(value, wanted_gradients[key], msg=key)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "plugin"])
def test_under_autocast_no_map_of_a_frozen_body_is_float32(name):
    if name == "plugin":
        # A norm that is folded into nothing.
        body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8))
        freeze_norms(body, name)
    else:
        body = build(name, trained_state(name)).body
    seen = set()
    for module in body.modules():
        module.register_forward_hook(
            lambda _, __, made: seen.add(made.dtype) if isinstance(made, torch.Tensor) else None
        )
    with torch.autocast("cpu", torch.bfloat16):
        body(torch.rand(1, 3, 64, 96).bfloat16())
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize(
    ("stages", "frozen"), [(-1, set()), (0, {"conv1"}), (3, {"conv1", "layer1", "layer2", "layer3"})]
)
def test_as_many_stages_of_a_resnet_are_frozen_as_asked_for(stages, frozen):
    state = torchvision.models.resnet18(weights=None).state_dict()
    backbone = build("resnet18", state, frozen_stages=stages)
    assert {n.split(".")[2] for n, p in backbone.named_parameters() if not p.requires_grad} == frozen
    with pytest.raises(BackboneError, match="`model.frozen_stages=5`: resnet18 has 4 stages after its stem"):
        build("resnet18", state, frozen_stages=5)


# Plug-ins


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The name of a plug-in of some code, as in a module of its own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(code, factory="Net", name="body_for_tests"):
        (tmp_path / f"{name}.py").write_text(code)
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, name, raising=False)
        return f"plugin:{name}:{factory}"

    return write


def test_the_documented_plugin_is_a_body(plugin):
    name = plugin(EXAMPLE)
    bare = build(name)
    state = {key.removeprefix("body.body."): v for key, v in bare.state_dict().items() if ".body." in key}
    state["stem.1.running_mean"] = torch.full((16,), 0.5)
    backbone = build(name, state, frozen_stages=0)
    assert backbone.strides == (8, 16)
    assert backbone.fingerprint == {
        "name": name,
        "strides": [8, 16],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "fingerprint": {"name": "example", "version": 1},
    }
    assert {n.split(".")[2] for n, p in backbone.named_parameters() if not p.requires_grad} == {"stem"}
    assert not any(isinstance(module, _BatchNorm) for module in backbone.modules())
    assert any(isinstance(module, _BatchNorm) for module in bare.modules())
    images = torch.rand(1, 3, 32, 64)
    seen = []
    backbone.body.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert [m.shape for m in backbone.maps(images, [(32, 48)])] == [(1, 8, 4, 8), (1, 8, 2, 4)]
    torch.testing.assert_close(seen[0][..., :48], (images[..., :48] - 0.5) / 0.25)
    assert (seen[0][..., 48:] == 0).all()


BROKEN = {
    "lacks fingerprint": ("    def fingerprint", "    def other", "is no Body, it lacks fingerprint"),
    "strides of no pyramid": (
        "(8, 16), (0.5",
        "(8, 32), (0.5",
        r"its strides are \(8, 32\), expected a tuple of powers",
    ),
    "coarse strides": ("(8, 16), (0.5", "(32, 64), (0.5", r"its strides are \(32, 64\), expected"),
    "strides of text": ("(8, 16), (0.5", "'8, 16', (0.5", "its strides are '8, 16', expected a tuple of powers of two"),
    "one stride": ("(8, 16), (0.5", "8, (0.5", "its strides are 8, expected"),
    "no strides": ("(8, 16), (0.5", "None, (0.5", "its strides are None, expected"),
    "strides of 0": ("(8, 16), (0.5", "(0, 0), (0.5", r"its strides are \(0, 0\), expected"),
    "nested strides": ("(8, 16), (0.5", "[[8, 16]], (0.5", r"its strides are \[\[8, 16\]\], expected"),
    "other strides than its maps": (
        "(8, 16), (0.5",
        "(16, 32), (0.5",
        r"gives maps .* of \[\(1, 12, 8\), \(1, 6, 4\)\] for",
    ),
    "more strides than maps": ("(8, 16), (0.5", "(8, 16, 32), (0.5", r"\(1, 3, 2\)\] by its strides \(8, 16, 32\)"),
    "mean of a tensor": (
        "(0.5, 0.5, 0.5)",
        "__import__('torch').ones(3)",
        r"its mean is tensor\(.*, expected a tuple of",
    ),
    "one mean": ("(0.5, 0.5, 0.5)", "0.5", "its mean is 0.5, expected a tuple of three numbers, for red"),
    "mean of texts": (
        "(0.5, 0.5, 0.5)",
        "list('rgb')",
        r"its mean is \['r', 'g', 'b'\], expected a tuple of three numbers",
    ),
    "nested deviation": (
        "(0.25, 0.25, 0.25)",
        "[(0.25,)] * 3",
        r"its std is \[\(0.25,\), .*\], expected a tuple of three",
    ),
    "infinite deviation": (
        "(0.25, 0.25, 0.25)",
        "(0.25, 0.25, 1e999)",
        "its std is .*inf.*, expected a tuple of three",
    ),
    "texts as a map": (
        "return [fine, self",
        "return ['fine', self",
        r"gives a list of str, \(1, 32, 6, 4\), expected a list",
    ),
    "maps of halves": (
        "return [fine, self",
        "return [fine.half(), self",
        "maps of torch.float16 for an image of torch.float32",
    ),
    "several images": (
        "return [fine, self",
        "return [fine.expand(2, -1, -1, -1), self",
        r"of \[\(2, 12, 8\), \(1, 6, 4\)\] for",
    ),
    "no stages": (
        "return [part",
        "return None or [][0] or [part",
        r"its stages\(\) fails: IndexError: .*tests.py, line 20\)$",
    ),
    "stages of another kind": (
        "def stages(self)",
        "stages = 3\n\n    def other(self)",
        "its stages is 3, expected a method",
    ),
    "a list for a fingerprint": (
        '{"name": "example", "version": 1}',
        "[1]",
        r"is \[1\], expected a JSON object, such as",
    ),
    "no number": ('"version": 1', '"version": float("nan")', "its fingerprint is no JSON object: Out of range"),
    "a factory that fails": (
        "nn.BatchNorm2d(outputs)",
        "nn.BatchNorm4d(outputs)",
        r"fails: AttributeError: .*, line 5\)$",
    ),
    "no Python": ("from torch", "from from torch", r"body_for_tests cannot be imported: SyntaxError: .*, line 1\)$"),
    "a module that fails": ("from torch", "1 / 0\nfrom torch", r"ZeroDivisionError: .*body_for_tests.py, line 1\)$"),
    "a script": ("from torch", "raise SystemExit(3)\nfrom torch", r"cannot be imported: SystemExit: 3 \(.*, line 1\)$"),
    "one map": ("return [fine, self.second(fine)]", "return fine", "gives Tensor, expected a list of maps"),
    "a pass that fails": ("return [fine", "fine = fine @ fine; return [fine", "fails on an image of 64 x 96 pixels"),
    "pixels up to 255": ("(0.25, 0.25, 0.25)", "(58.4, 57.1, 57.4)", r"expected that of pixels in \[0, 1\]; divide"),
    "no deviation": ("(0.25, 0.25, 0.25)", "(0.25, 0, 0.25)", r"its std is \(0.25, 0, 0.25\), expected above 0"),
    "a forgotten stage": ("(self.stem, self.first, self.second)]", "(self.stem,)]", "first.0.weight is 0 times"),
    "a stage twice": ("(self.stem, self.first,", "(self.stem, self.stem, self.first,", "stem.0.weight is 2 times"),
    "no JSON": ('"version": 1', '"version": {1}', "its fingerprint is no JSON object"),
    "an argument": ("__init__(self)", "__init__(self, size)", "missing 1 required positional argument: 'size'"),
    "no module": ("class Net(nn.Module)", "def Net(): return 3\nclass Other(nn.Module)", "made 3, expected a torch.nn"),
    "no factory": ("class Net(nn.Module)", "Net = 3\nclass Other(nn.Module)", "expected a factory, found Net = 3"),
    "nothing": ("class Net", "class Other", "body_for_tests.py has no attribute 'Net'$"),
    "needs more": (
        "from torch",
        "import a_package_that_nobody_has\nfrom torch",
        "No module named 'a_package_.*; install it",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_plugin_that_makes_no_body_is_refused_in_one_line(fault, plugin):
    old, new, message = BROKEN[fault]
    assert old in EXAMPLE
    with pytest.raises(BackboneError, match=rf"^`model.backbone=plugin:body_for_tests:Net`: .*{message}") as caught:
        build(plugin(EXAMPLE.replace(old, new)))
    assert "\n" not in str(caught.value)
    build(plugin(EXAMPLE))


def test_a_body_that_takes_small_images_alone_is_refused_by_the_size_of_a_training(plugin):
    name = plugin(EXAMPLE.replace("fine = self", "assert images.shape[3] < 300, 'too wide'; fine = self"))
    backbone = build(name)
    try_size(backbone, name, (320, 288))
    with pytest.raises(BackboneError, match=r"Net`: fails on an image of 320 x 288 pixels: AssertionError: too wide"):
        try_size(backbone, name, (288, 320))
    cut = plugin(EXAMPLE.replace("return [fine", "fine = fine[..., :30]; return [fine"))
    with pytest.raises(
        BackboneError,
        match=r"of \[\(1, 36, 30\), \(1, 18, 15\)\] for an image of 320 x 288 .*, expected \[\(1, 36, 40\)",
    ):
        try_size(build(cut), cut, (288, 320))


def test_a_fingerprint_is_the_same_without_a_pass_or_a_network(plugin, monkeypatch):
    names = [plugin(EXAMPLE), SMALL, "timm:mobilenetv3_large_100.ra_in1k", "mobilenet_v3_small", "tiny"]
    expected = [build(name).fingerprint for name in names]
    with pytest.raises(BackboneError, match="no such timm model"):
        body_fingerprint("timm:resnet10x")
    monkeypatch.setattr(nn.Conv2d, "forward", None)
    monkeypatch.setattr(timm, "create_model", None)
    assert [body_fingerprint(name) for name in names] == expected


def test_an_error_of_ours_in_a_plugin_says_what_it_says(plugin):
    for where in ("", "super().__init__()"):
        raising = f"{where or 'from torch'}; import ezsd.errors; raise ezsd.errors.BackboneError('give FILE')"
        old = where or "from torch import nn"
        with pytest.raises(BackboneError, match="^give FILE$"):
            build(plugin(EXAMPLE.replace(old, raising if where else f"{old}; {raising.partition('; ')[2]}", 1)))


def test_parameters_that_no_map_depends_on_are_not_trained(plugin):
    """Several processes would wait for their gradients."""
    name = plugin(
        EXAMPLE.replace("return [fine, self.second(fine)]", "self.second(fine); return [fine, fine[..., ::2, ::2]]")
    )
    trained = {n.split(".")[2] for n, p in build(name).named_parameters() if p.requires_grad and "fpn" not in n}
    assert trained == {"stem", "first"}


def test_a_plugin_refuses_weights_and_norms_that_are_not_its_own(plugin):
    name = plugin(EXAMPLE)
    with pytest.raises(
        BackboneError, match=rf'not a state of {name}: Missing key.* "stem.0.weight"; give a file of the same network$'
    ):
        build(name, {})
    own = {key.removeprefix("body.body."): v for key, v in build(name).state_dict().items() if ".body." in key}
    name = plugin(EXAMPLE.replace("nn.BatchNorm2d(outputs)", "nn.BatchNorm2d(outputs, affine=False)"))
    state = {key.removeprefix("body.body."): v for key, v in build(name).state_dict().items() if ".body." in key}
    with pytest.raises(BackboneError, match=r"stem.1 is BatchNorm2d, which has no frozen form"):
        build(name, state)
    build(plugin(EXAMPLE), own)


def test_weights_that_a_plugin_takes_though_some_are_missing_are_refused(plugin):
    lax = "    def load_state_dict(self, state):\n        return super().load_state_dict(state, strict=False)\n\n"
    name = plugin(EXAMPLE.replace("    def stages", f"{lax}    def stages"))
    with pytest.raises(BackboneError, match=rf"not a state of {name}: it has no stem.0.weight; give"):
        build(name, {})


def test_a_norm_that_two_paths_lead_to_is_frozen_on_both(plugin):
    name = plugin(EXAMPLE.replace("layer(24, 32, 2)\n", "layer(24, 32, 2)\n        self.alias = self.stem[:2]\n"))
    state = {key.removeprefix("body.body."): v for key, v in build(name).state_dict().items() if ".body." in key}
    frozen = build(name, state)
    assert not any(isinstance(one, nn.BatchNorm2d) for one in frozen.modules())
    assert frozen.body.body.alias[1] is frozen.body.body.stem[1]


def test_a_plugin_of_a_package_that_is_not_there_is_refused_before_anything_is_loaded():
    with pytest.raises(BackboneError, match=r"no module named 'nobody_has_it'; is its folder on PYTHONPATH\?"):
        require_backbone("plugin:nobody_has_it.sub:factory")


def test_the_stand_ins_network_is_a_plugin_with_its_weights(conse_tools, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests/plugins"))
    monkeypatch.syspath_prepend(str(conse_tools))
    teacher = importlib.import_module("conse_teacher").ConseTeacher()
    state = load_file(conse_tools.parent / "data/conse/mobilenet_v2_fp16.safetensors")
    backbone = build("plugin:conse_body:MobileNetV2", state, frozen_stages=3)
    images = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    inputs = []
    backbone.body.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        backbone.maps(images, [(96, 64)] * 2)
        last = backbone.body.body(inputs[0])[-1]
        logits = teacher._conv(nn.functional.relu6(teacher._conv(last, 51)).mean((2, 3), keepdim=True), 52).flatten(1)
        torch.testing.assert_close(logits, teacher._logits(images), rtol=1e-4, atol=1e-4)
    numbers = {
        int(name.split(".")[2]) for name, p in backbone.named_parameters() if p.requires_grad and "fpn" not in name
    }
    # Three blocks of 160 channels and one of 320, three convolutions each.
    assert numbers == set(range(39, 51))
