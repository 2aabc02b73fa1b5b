"""Exported detectors: they find what the run finds, in any image and with any vocabulary, and run without ezsd."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.export import Dim

from ezsd.detector.backbone import build_backbone
from ezsd.detector.model import Detections
from ezsd.pipeline.config.schema import load_preset
from ezsd.pipeline.errors import ArgumentError, ConfigError, RunError
from ezsd.pipeline.inference import export as exporting
from ezsd.pipeline.inference.detect import Model
from ezsd.pipeline.inference.export import export, require_packages
from ezsd.pipeline.inference.export_check import (
    LEAST_AGREEING,
    OnnxGraph,
    TorchGraph,
    compare,
    detected,
    require_counted,
    scenes,
)
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.training.train import TrainRequest, train
from tests.commandkit import ezsd
from tests.conftest import QUICK

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/export.md").read_text(encoding="utf-8")
SCRIPT, LOADING = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
ALL = ["eval.max_detections=1000"]
"""Room for all detections: competitors count among them in a graph, and not in the run's own detection."""
NO_EZSD = "import sys\nsys.modules['ezsd'] = None\n"
PLUGIN = "plugin:mynet:Net"
RPN_SIZES = {
    "resnet18": [16, 24, 32, 48, 96],
    "mobilenet_v3_small": [24, 32, 48],
    "timm:test_efficientnet": [24, 32, 48],
    "timm:test_convnext": [24, 32, 48],
    PLUGIN: [24, 40],
}
"""Bodies of all kinds, with anchor sizes."""


@pytest.fixture(scope="module", autouse=True)
def _traced_once():
    """Both formats, and refusals after them, are made of one graph: seconds go into it."""
    with pytest.MonkeyPatch.context() as patch:
        graphs = {}

        def traced(trained, run, make=exporting._traced):
            key = run.folder, trained.config
            if key not in graphs:
                graphs[key] = make(trained, run)
            return graphs[key]

        patch.setattr(exporting, "_traced", traced)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def to_onnx(shapes_run, folder):
    return export(shapes_run.folder, folder / "all.onnx", overrides=ALL)


@pytest.fixture(scope="module")
def to_torch(shapes_run, folder):
    return export(shapes_run.folder, folder / "program.pt2", format="torch", overrides=ALL)


@pytest.fixture(scope="module")
def session(to_onnx):
    return onnxruntime.InferenceSession(to_onnx.out, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def trained(shapes_run):
    return Model(shapes_run, device="cpu", overrides=ALL).trained


def run_script(code, *words, cwd):
    done = subprocess.run(
        [sys.executable, "-I", "-c", NO_EZSD + code, *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def lines_of(found):
    return [f"{one.score:.3f}  {one.name}  {' '.join(f'{v:.1f}' for v in one.box)}" for one in found]


def numbers(line):
    score, *name, x1, y1, x2, y2 = line.split()
    return " ".join(name), [float(v) for v in (score, x1, y1, x2, y2)]


def require_same(printed, expected):
    assert len(printed) == len(expected) > 0
    mine = [numbers(line) for line in printed]
    for name, values in map(numbers, expected):
        # Rounding may swap two of nearly equal scores.
        assert any(name == other and np.allclose(values, found, rtol=0, atol=0.11) for other, found in mine)


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 20, 300), (3, 64, 64)])
@pytest.mark.parametrize("classes", [1, 3, 50])
def test_any_size_batch_and_vocabulary_is_detected_as_by_the_run(session, trained, size, classes):
    batch = scenes(*size, seed=7)
    text = F.normalize(torch.randn(classes, trained.text.shape[1], generator=torch.Generator().manual_seed(1)), dim=1)
    outputs = session.run(None, {"image": batch.numpy(), "text": text.numpy()})
    assert list(outputs[3]) == sorted(outputs[3])
    for place, one in enumerate(detected(trained, batch, text, trained.config.eval.score_threshold)):
        mine = [output[outputs[3] == place] for output in outputs]
        assert list(mine[1]) == sorted(mine[1], reverse=True)
        found = compare(mine, one, floor=trained.config.eval.score_threshold, keep=1000)
        assert found.agreeing >= LEAST_AGREEING * found.detections
        assert found.detections or size == (1, 1, 1)


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_nothing_found_is_no_rows_and_one_is_one(format, request, trained):
    graph = graph_of(request.getfixturevalue(f"to_{format}"), format)
    batch = scenes(1, 75, 90, seed=3)
    best, second = graph(batch, trained.text)[1][:2]
    assert best > second
    for floor, rows in ((2.0, 0), (float(best + second) / 2, 1)):
        outputs = graph.with_floor(floor)(batch, trained.text)
        assert [one.shape for one in outputs] == [(rows, 4), (rows,), (rows,), (rows,)]


def test_the_script_of_the_page_prints_what_the_run_detects(to_onnx, shapes_run, shapes_root, folder):
    assert len(SCRIPT.splitlines()) <= 30
    image = shapes_root / "val/000001.png"
    printed = run_script(SCRIPT, to_onnx.out.name, to_onnx.vocabulary.name, image, 0.02, cwd=folder).splitlines()
    require_same(printed, lines_of(Model(shapes_run, device="cpu", overrides=ALL)(str(image), threshold=0.02)))


def test_the_script_resizes_as_the_run_does(to_onnx, trained, shapes_root, folder):
    import onnx

    model = onnx.load(to_onnx.out)
    (entry,) = (one for one in model.metadata_props if one.key == "resize")
    assert entry.value == "null"
    entry.value = json.dumps({"min_size": 90, "max_size": 160})
    onnx.save(model, folder / "small.onnx")
    image = shapes_root / "val/000001.png"
    printed = run_script(SCRIPT, "small.onnx", to_onnx.vocabulary.name, image, 0.02, cwd=folder).splitlines()
    with Image.open(image) as opened:
        small = opened.convert("RGB").resize((90, 90), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]
    (one,) = detected(trained, pixels, trained.text, 0.02)
    expected = [
        f"{score:.3f}  {trained.names[label]}  {' '.join(f'{v * 128 / 90:.1f}' for v in box)}"
        for box, score, label in zip(one.boxes.tolist(), one.scores.tolist(), one.labels.tolist(), strict=True)
    ]
    require_same(printed, expected)


def test_names_that_are_asked_for_come_with_their_competitors(shapes_run, shapes_root, to_onnx, folder):
    image = shapes_root / "val/000001.png"
    # The two surest, for a run of few steps finds hardly any of most names.
    names = list(
        dict.fromkeys(one.name for one in Model(shapes_run, device="cpu", overrides=ALL)(str(image), threshold=0.02))
    )[:2]
    made = export(shapes_run.folder, folder / "two.pt2", format="torch", classes=names, overrides=ALL)
    known = np.load(made.vocabulary)
    assert list(known["names"][:2]) == names
    assert list(known["asked"]) == [True, True] + [False] * (len(known["names"]) - 2)
    assert set(known["names"]) == set(np.load(to_onnx.vocabulary)["names"])
    printed = run_script(SCRIPT, to_onnx.out.name, made.vocabulary.name, image, 0.02, cwd=folder).splitlines()
    require_same(printed, lines_of(Model(shapes_run, device="cpu", overrides=ALL)(str(image), names, threshold=0.02)))


def test_a_program_of_torch_loads_without_ezsd(to_torch, trained, folder):
    assert to_torch.agreement.agreeing >= LEAST_AGREEING * to_torch.agreement.detections > 0
    batch = scenes(1, 75, 90, seed=3)
    torch.save((batch, trained.text), folder / "inputs.pt")
    code = LOADING.replace("detector.pt2", to_torch.out.name).replace(
        "boxes, scores", "image, text = torch.load('inputs.pt', weights_only=True)\nboxes, scores", 1
    )
    code += "torch.save((boxes, scores, classes, images), 'outputs.pt')\n"
    printed = run_script(code, cwd=folder)
    assert json.loads(printed) == list(trained.names)
    outputs = [one.detach().numpy() for one in torch.load(folder / "outputs.pt", weights_only=True)]
    (one,) = detected(trained, batch, trained.text, trained.config.eval.score_threshold)
    found = compare(outputs, one, floor=trained.config.eval.score_threshold, keep=1000)
    assert found.agreeing >= LEAST_AGREEING * found.detections > 0


def test_a_file_says_what_it_is_and_no_place_of_this_machine(to_onnx, to_torch, session, shapes_run, trained):
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == list(trained.names)
    assert about["run_digest"].removeprefix("sha256 ") in (shapes_run.folder / "card.md").read_text()
    assert json.loads(about["text_embeddings"])["teacher"]["template"] == "a {}"
    assert json.loads(about["normalisation"])["mean"] == list(trained.detector.backbone.mean)
    for file in (to_onnx.out, to_torch.out, to_onnx.vocabulary):
        assert str(ROOT).encode() not in file.read_bytes()


def test_an_export_that_detects_otherwise_is_refused_and_leaves_no_file(shapes_run, tmp_path, monkeypatch):
    # The detector's boxes are moved after the graph was made of it.
    def moved(graph, trained, check=exporting.check_export):
        bias = trained.detector.head.regressor.deltas.bias.data
        bias += 0.2
        try:
            return check(graph, trained)
        finally:
            bias -= 0.2

    monkeypatch.setattr(exporting, "check_export", moved)
    with pytest.raises(RunError, match=r"detects otherwise than the run: \d+ of \d+ detections agree"):
        export(shapes_run.folder, tmp_path / "a.pt2", format="torch", overrides=ALL)
    assert list(tmp_path.iterdir()) == []


class Untranslatable(torch.nn.Module):
    """What torch.export takes and ONNX has no operator for."""

    def forward(self, image, text):
        return torch.linalg.eigvals(text @ text.T)


@pytest.mark.parametrize("part", ["translated", "loaded"])
def test_what_cannot_be_translated_or_loaded_is_one_line_and_leaves_no_file(part, shapes_run, tmp_path, monkeypatch):
    inputs = torch.zeros(1, 3, 8, 8), torch.zeros(2, 4)
    monkeypatch.setattr(exporting, "_traced", lambda *_: torch.export.export(Untranslatable(), inputs))
    if part == "loaded":
        monkeypatch.setattr(exporting, "_onnx_file", lambda *_: OnnxGraph(b"no graph"))
    with pytest.raises(RunError, match=r"its backbone \S+ cannot be exported: .+") as said:
        export(shapes_run.folder, tmp_path / "a.onnx")
    assert "\n" not in str(said.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def run_with(shapes_store, tmp_path):
    """Trains a run of one step with a body."""

    def make(body):
        model = [f"model.backbone={body}", f"model.rpn_sizes={RPN_SIZES[body]}", "model.fpn_channels=16"]
        config = load_preset("shapes", [*QUICK, *model, "train.steps=1", "train.warmup_steps=0"])
        return train(TrainRequest(cache=shapes_store, run=tmp_path / "run", config=config))

    return make


def graph_of(made, format):
    return {"onnx": OnnxGraph, "torch": TorchGraph}[format](made.out.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("body", RPN_SIZES)
def test_a_run_with_any_body_is_exported(body, run_with, mynet, tmp_path):
    run = run_with(body)
    trained = Model(run, device="cpu", overrides=["train.backend=eager"]).trained
    least = exporting.least_side(trained)
    batch, floor = scenes(2, least, least + 1, seed=1), trained.config.eval.score_threshold
    expected = detected(trained, batch, trained.text, floor)
    for format, ending in exporting.ENDINGS.items():
        # Which compares it with the run.
        made = export(run.folder, tmp_path / f"a{ending}", format=format)
        outputs = graph_of(made, format)(batch, trained.text)
        for place, one in enumerate(expected):
            mine = [output[outputs[3] == place] for output in outputs]
            found = compare(mine, one, floor=floor, keep=trained.config.eval.max_detections)
            assert found.agreeing >= LEAST_AGREEING * found.detections > 0
        made.vocabulary.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_masks_are_exported(format, masked_run, tmp_path):
    made = export(masked_run.folder, tmp_path / f"a{exporting.ENDINGS[format]}", format=format)
    trained = Model(masked_run, device="cpu", overrides=["train.backend=eager"]).trained
    outputs = graph_of(made, format)(scenes(1, 75, 90, seed=3), trained.text)
    assert len(outputs) == 5
    assert outputs[4].shape == (len(outputs[0]), 28, 28)
    assert len(outputs[0])
    (one,) = detected(trained, scenes(1, 75, 90, seed=3), trained.text, trained.config.eval.score_threshold)
    found = compare(outputs, one, floor=trained.config.eval.score_threshold, keep=trained.config.eval.max_detections)
    assert found.agreeing >= LEAST_AGREEING * found.detections > 0


@pytest.mark.parametrize(
    "body",
    ["resnet18", PLUGIN, *(pytest.param(one, marks=pytest.mark.slow) for one in RPN_SIZES if one[0] in "mt")],
)
def test_maps_of_a_traced_body_are_its_own_in_any_size(body, mynet):
    """In short what `test_a_run_with_any_body_is_exported` holds: bodies differ in nothing else."""
    torch.manual_seed(0)
    backbone = build_backbone(body, channels=4, weights=None, frozen_norms=True).eval()
    sides = {axis: 32 * Dim(f"side{axis}", min=3) for axis in (2, 3)}
    shapes = {"images": {0: Dim("batch"), **sides}}
    with torch.no_grad():
        program = torch.export.export(backbone, (torch.zeros(2, 3, 96, 128),), dynamic_shapes=shapes, strict=False)
        images = torch.rand(1, 3, 160, 96)
        for mine, expected in zip(program.module()(images), backbone(images), strict=True):
            torch.testing.assert_close(mine, expected)


def test_a_body_that_no_graph_holds_is_one_line_and_leaves_no_file(run_with, mynet, tmp_path):
    mynet("return [fine,", "fine = fine if fine.sum() > 0 else -fine\n        return [fine,")
    run = run_with(PLUGIN)
    with pytest.raises(RunError, match=rf"its backbone {PLUGIN} cannot be exported: .+") as said:
        export(run.folder, tmp_path / "a.pt2", format="torch")
    assert "\n" not in str(said.value)
    assert not list(tmp_path.glob("a.*"))


def detections(*scores):
    boxes = torch.tensor([[10.0 * i, 0, 10 * i + 9, 9] for i in range(len(scores))]).reshape(-1, 4)
    return Detections(boxes=boxes, scores=torch.tensor(scores), labels=torch.zeros(len(scores), dtype=torch.int64))


def outputs_of(found, shift=0.0):
    return [(found.boxes + shift).numpy(), found.scores.numpy(), found.labels.numpy(), found.labels.numpy()]


@pytest.mark.parametrize(
    ("graph", "shift", "expected", "agreeing", "counted"),
    [
        ((0.9, 0.5), 0.0, (0.9, 0.5), 4, 4),
        ((0.9, 0.5), 0.5, (0.9, 0.5), 0, 4),
        ((0.9, 0.5), 0.0, (0.9, 0.6), 2, 4),
        ((0.9,), 0.0, (0.9, 0.5), 2, 3),
        ((), 0.0, (0.9,), 0, 1),
        # A thousandth is much of a small score.
        ((0.9, 0.02), 0.0, (0.9, 0.0205), 2, 4),
        # Beside the threshold one side may have what the other has not.
        ((0.9,), 0.0, (0.9, 0.01005), 2, 2),
        # Beside the last of three that there is room for, likewise.
        ((0.9, 0.5, 0.3), 0.0, (0.9, 0.5, 0.4), 4, 5),
    ],
)
def test_detections_without_a_counterpart_are_counted(graph, shift, expected, agreeing, counted):
    found = compare(outputs_of(detections(*graph), shift), detections(*expected), floor=0.01, keep=3)
    assert (found.agreeing, found.detections) == (agreeing, counted)
    assert found.found == len(graph) + len(expected)


@pytest.mark.parametrize(
    ("scores", "shift", "keep", "said"),
    [
        ((0.5,) * 4, 0.5, 4, "0 of 8 detections can be compared, expected at least 50%"),
        ((0.5,), 0.5, 1, "0 of 2 detections can be compared"),
        ((0.9, 0.5, 0.5, 0.5, 0.5), 0.5, 5, "2 of 10 detections"),
        ((), 0.0, 3, "detects nothing"),
    ],
)
def test_an_agreement_of_a_few_detections_is_no_check(scores, shift, keep, said):
    with pytest.raises(RunError, match=f"cannot be checked: .*{said}"):
        require_counted(compare(outputs_of(detections(*scores), shift), detections(*scores), floor=0.01, keep=keep))
    require_counted(compare(outputs_of(detections(0.9, 0.5)), detections(0.9, 0.5), floor=0.01, keep=2))


@pytest.mark.parametrize(
    ("name", "format", "said"),
    [
        ("there.onnx", "onnx", r"there.onnx is there already; remove it or choose another name"),
        ("beside.onnx", "onnx", r"beside.classes.npz is there already"),
        ("a.pt2", "onnx", r"`out=.*a.pt2`: expected a file that ends in .onnx for `format=onnx`"),
        ("no/a.onnx", "onnx", r"there is no folder .*no; make it first"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused(name, format, said, shapes_run, tmp_path):
    for file in ("there.onnx", "beside.classes.npz"):
        (tmp_path / file).write_text("mine")
    with pytest.raises(ArgumentError, match=said):
        export(shapes_run.folder, tmp_path / name, format=format)
    assert {file.read_text() for file in tmp_path.iterdir()} == {"mine"}


def test_what_no_graph_can_hold_is_refused_before_any_work(shapes_run, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"give `model.box_class=foreground`"):
        export(shapes_run.folder, tmp_path / "a.onnx", overrides=["model.box_class=topk"])
    with pytest.raises(ConfigError, match=r"`eval.teacher_weight_base=0` and `eval.teacher_weight_novel=0`"):
        export(shapes_run.folder, tmp_path / "a.onnx", overrides=["eval.teacher_weight_novel=0.3"])
    monkeypatch.setattr(Run, "latest", lambda run: None)
    with pytest.raises(RunError, match="training is not finished"):
        export(shapes_run.folder, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    installed = exporting.find_spec

    def find(name):
        return None if name == "onnxruntime" else installed(name)

    monkeypatch.setattr(exporting, "find_spec", find)
    require_packages("torch")
    with pytest.raises(ArgumentError, match=r"`format=onnx`: needs onnxruntime; pip install 'ezsd\[export\]'"):
        require_packages("onnx")
    monkeypatch.undo()
    require_packages("onnx")


def test_the_command_refuses_in_one_line(shapes_run, tmp_path):
    done = ezsd("export", shapes_run.folder, "--out", tmp_path / "a.pt2")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"ezsd: --out {tmp_path / 'a.pt2'}: expected a file that ends in .onnx for --format onnx"
    ]
