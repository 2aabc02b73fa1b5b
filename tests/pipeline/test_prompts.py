"""Prompts in lists and descriptions from a file: in stores, runs and detection; and how base crops are shown."""

import dataclasses
import json
import re
import threading

import numpy as np
import pytest
import torch

from ezsd.cache import Store
from ezsd.crops import crop_boxes, with_least_side
from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.errors import VocabularyError
from ezsd.pipeline.config.relations import load_settings
from ezsd.pipeline.config.schema import load_preset
from ezsd.pipeline.console.defaults import build_config
from ezsd.pipeline.data.datasets import find_dataset, require_prompts
from ezsd.pipeline.errors import ConfigError
from ezsd.pipeline.extraction.adapt import CropSource, adapt_teacher
from ezsd.pipeline.extraction.base_images import BaseImages
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.request import BuildRequest, read_annotations
from ezsd.pipeline.extraction.teacher import configured_teacher
from ezsd.pipeline.inference import evaluate
from ezsd.pipeline.inference.detect import Model
from ezsd.pipeline.inference.evaluate import evaluate_crops
from ezsd.pipeline.inference.predictor import run_teacher
from ezsd.pipeline.report.run_data import flat_settings
from ezsd.pipeline.training.train import TrainRequest, train

SENTENCES = {"bar": ["a red bar", "a striped bar"], "ring": ["a ring"], "background": ["a background", "a plain white"]}
TEMPLATES = ["a {}", "a red {}"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sentences.json"
    path.write_text(json.dumps(SENTENCES))
    return path


def test_descriptions_are_read_from_their_file(file):
    config = load_settings("shapes", [f"teacher.descriptions={file}"])
    assert config.teacher.descriptions == tuple((name, *sentences) for name, sentences in SENTENCES.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ('{"bar": ["a', "is not valid JSON"),
        ('["a bar"]', r"expected {\"NAME\": \[\"SENTENCE\", ...\], ...}, found \['a bar'\]"),
        ("{}", "found {}"),
        ('{"bar": "a red bar"}', "'bar': expected a list of sentences, found 'a red bar'"),
        ('{"bar": {"a": "red bar"}}', "'bar': expected a list of sentences, found {'a': 'red bar'}"),
        ('{"bar": []}', r"'bar': expected a list of sentences, found \[\]"),
        ('{"bar": ["a red bar", 3]}', "'bar': expected a list of sentences"),
        ('{"bar": [" "]}', "'bar': expected a list of sentences"),
        ('{"bar": ["half a \\ud800"]}', "'bar': expected a list of sentences"),
        ('{"bar": ["a bar"], "bar": ["a red bar"]}', "class 'bar' occurs twice"),
    ],
)
def test_a_wrong_file_of_descriptions_is_one_line(tmp_path, text, message):
    path = tmp_path / "wrong.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_preset("shapes", [f"teacher.descriptions={path}"])
    assert str(caught.value).startswith(f"`teacher.descriptions={path}`: ")
    assert "\n" not in str(caught.value)


def test_a_text_that_is_listed_twice_is_left_out_once():
    for key, twice, once in (
        ("template", '["a {}", "a red {}", "a {}"]', '["a red {}", "a {}"]'),
        ("background", '["background", "background"]', '"background"'),
    ):
        with pytest.raises(ConfigError, match=f"teacher.{key}: .* is in the list twice; leave one of them out"):
            load_settings("shapes", [f"teacher.{key}={twice}"])
        load_settings("shapes", [f"teacher.{key}={once}"])


def test_prompts_that_cannot_be_made_are_refused():
    teacher = load_preset("shapes").teacher
    for changes, message in (
        ({"template": ("a {}", "a red one")}, "needs '{}' once, where the name goes; got 'a red one'"),
        ({"descriptions": (("brr", "a bar"),)}, "`teacher.descriptions`: unknown class 'brr'; did you mean 'bar'?"),
    ):
        with pytest.raises(VocabularyError, match=re.escape(message)):
            require_prompts(SHAPES_SPLIT, dataclasses.replace(teacher, **changes))
    require_prompts(SHAPES_SPLIT, dataclasses.replace(teacher, descriptions=(("background", "a white"),)))


def test_a_class_may_have_the_name_of_the_background():
    teacher = dataclasses.replace(load_preset("shapes").teacher, background="ring")
    require_prompts(SHAPES_SPLIT, teacher)
    require_prompts(SHAPES_SPLIT, dataclasses.replace(teacher, descriptions=(("ring", "a ring"),)))


def test_descriptions_are_given_by_their_file_alone():
    for value in ('[["ring"]]', "[[]]", "3"):
        with pytest.raises(ConfigError, match=r"`teacher.descriptions`: expected the path of a JSON file, found"):
            load_preset("shapes", [f"teacher.descriptions={value}"])


def test_prompts_of_a_dataset_keep_every_character():
    prompts = {"template": ["a \U0001f600 {}", 'a "{}" é'], "background": "\U0001f4a8"}
    found = build_config("shapes", [], teacher=None, weights=None, prompts=prompts).teacher
    assert (list(found.template), found.background) == (prompts["template"], prompts["background"])


def test_a_dataset_of_ones_own_has_descriptions_beside_it(file, shapes_root):
    def dataset(names):
        toml = file.with_suffix(".toml")
        files = [(part, f"annotations/instances_{part}.json") for part in ("train", "val")]
        parts = "".join(f'[{part}]\nimages = "{part}"\nannotations = "{place}"\n' for part, place in files)
        prompts = 'background = "background"\ndescriptions = "sentences.json"'
        toml.write_text(f'name = "own"\n{parts}[classes]\nbase = {names}\nnovel = "others"\n[prompts]\n{prompts}\n')
        (file.parent / "annotations").mkdir(exist_ok=True)
        for _, place in files:
            (file.parent / place).write_bytes((shapes_root / place).read_bytes())
        return find_dataset(str(toml))

    prompts = dataset('["square"]').prompts
    assert prompts["descriptions"] == str(file)
    file.write_text(json.dumps(SENTENCES | {"sqare": ["a square"]}))
    with pytest.raises(VocabularyError, match=r"unknown class 'sqare'; did you mean 'square'\?"):
        dataset('["square"]')


@pytest.fixture
def run(shapes_dataset, with_settings, file, tmp_path):
    """A run of a store with several templates and with descriptions, whose file is gone."""
    described = load_settings("shapes", [f"teacher.descriptions={file}"]).teacher.descriptions
    teacher = {"template": tuple(TEMPLATES), "descriptions": described}
    config = with_settings(teacher=teacher, train={"steps": 1})
    request = BuildRequest(dataset=shapes_dataset, config=config, out=tmp_path / "store", workers=1)
    build_cache(request)
    file.unlink()
    return train(TrainRequest(cache=request.out, run=tmp_path / "run", config=config))


def test_a_run_says_names_as_its_store_did(run, tmp_path):
    """Also names that it does not know, and without the file."""
    teacher, store = run_teacher(run, "cpu", adapted=True), Store(tmp_path / "store")
    with torch.no_grad():
        again = teacher.encode_text(SHAPES_SPLIT.names).numpy()
    np.testing.assert_allclose(again, store.text[1], atol=1e-6)
    assert store.manifest.products["teacher"].inputs["model"]["template"] == TEMPLATES
    assert str(tmp_path) not in json.dumps(store.manifest.products["teacher"].inputs)
    model = Model(run, device="cpu")
    asked = model.search(["striped bar"], alone=True).text[0]
    with torch.no_grad():
        rows = torch.cat([teacher.encode_text_tokens(teacher._tokenizer([t.format("striped bar")])) for t in TEMPLATES])
    torch.testing.assert_close(asked, torch.nn.functional.normalize(rows.mean(0), dim=0), atol=1e-5, rtol=0)
    assert evaluate_crops(run, data_root=None, device="cpu")["crops"]["base"] > 0


def test_a_build_says_which_names_have_no_descriptions(run, shapes_dataset, with_settings, tmp_path, caplog):
    caplog.set_level("INFO", logger="ezsd")
    described = tuple((name, f"a {name}") for name in SHAPES_SPLIT.names[2:])
    config = with_settings(teacher={"descriptions": described})
    build_cache(BuildRequest(dataset=shapes_dataset, config=config, out=tmp_path / "few", workers=1))
    first, second = SHAPES_SPLIT.names[:2]
    counts = f"2 of {len(SHAPES_SPLIT.names)} names have no descriptions"
    line = f"{counts}, and prompts come from the template there: {first!r}, {second!r}"
    assert [r.getMessage() for r in caplog.records].count(line) == 1


def test_a_report_names_the_file_instead_of_its_sentences(run):
    assert flat_settings(run.spec["config"])["teacher.descriptions"] == "FILE"
    assert "teacher.descriptions" in flat_settings({"teacher": {"descriptions": []}})


@pytest.fixture
def images(shapes_dataset, quick_config, tmp_path):
    request = BuildRequest(dataset=shapes_dataset, config=quick_config, out=tmp_path)
    return BaseImages(annotations=read_annotations(request), source=shapes_dataset.images("train"), reader="a test")


def source(images, config, least=0.0):
    return CropSource(images, size=16, crops=config.proposals, least=least, device=torch.device("cpu"))


def test_crops_are_mirrored_as_often_as_asked(images, quick_config):
    def batch(flip, seed=0):
        positions = images.split(0.1, seed=0)[0]
        return next(source(images, quick_config).endless(positions, crops=64, flip=flip, seed=seed))

    (plain, label), (mirrored, same_label) = batch(0.0), batch(1.0)
    assert torch.equal(mirrored, plain.flip(3))
    assert torch.equal(label, same_label)
    some, _ = batch(0.5)
    turned = (some == plain.flip(3)).flatten(1).all(1)
    assert ((some == plain).flatten(1).all(1) | turned).all()
    assert 16 < turned.sum() < 48
    assert torch.equal(batch(0.5)[0], some)


def test_small_boxes_are_cropped_with_what_lies_around_them(images, quick_config):
    crops, _ = next(source(images, quick_config, least=60).crops([0]))
    settings = quick_config.proposals
    boxes = with_least_side(images.boxes(0), 60)
    options = {"size": 16, "ratio": settings.crop_ratio, "surround": settings.padding}
    assert torch.equal(crops, crop_boxes(images.read(0), boxes, **options))


def test_the_least_side_of_a_crop_counts_for_ground_truth_too(shapes_dataset, shapes_store, with_settings, tmp_path):
    config = with_settings(adapt={"min_crop_size": 60.0})
    build_cache(BuildRequest(dataset=shapes_dataset, config=config, out=tmp_path / "wide", workers=1))
    wide, own = Store(tmp_path / "wide").ground_truth, Store(shapes_store).ground_truth
    image_id = next(i for i in own if len(own[i].box))
    np.testing.assert_array_equal(wide[image_id].box, own[image_id].box)
    cosine = (wide[image_id].embedding.astype("f4") * own[image_id].embedding.astype("f4")).sum(1)
    assert cosine.max() < 0.999


def test_the_presets_of_the_method_show_crops_as_the_authors_do():
    for name in ("coco", "paper"):
        adapt = load_preset(name).adapt
        assert (adapt.flip, adapt.min_crop_size) == (0.5, 6)


def test_no_image_is_read_once_the_teacher_has_failed(images, quick_config, monkeypatch):
    teacher = configured_teacher(quick_config.teacher, "cpu")

    def broken(pixels):
        raise ValueError("broken")

    monkeypatch.setattr(teacher, "encode_image", broken)
    # The first crop fails, with images still to come.
    config = dataclasses.replace(quick_config.adapt, batch_size=1)
    with pytest.raises(ValueError, match="broken") as failed:
        adapt_teacher(teacher, images, config=config, crops=quick_config.proposals, seed=0)
    # The error's traceback keeps all that was going on.
    assert failed.traceback
    assert not [one for one in threading.enumerate() if one.name.startswith("read-ahead")]


def test_no_image_is_read_once_the_crop_accuracy_has_failed(run, monkeypatch):
    def broken(teacher, batches, names):
        next(batches)
        raise ValueError("broken")

    config = evaluate.crop_settings(run)
    one = dataclasses.replace(config, build=dataclasses.replace(config.build, batch_size=1))
    monkeypatch.setattr(evaluate, "crop_settings", lambda run: one)
    monkeypatch.setattr(evaluate, "crop_accuracy", broken)
    with pytest.raises(ValueError, match="broken") as failed:
        evaluate.evaluate_crops(run, data_root=None, device="cpu")
    assert failed.traceback
    assert not [one for one in threading.enumerate() if one.name.startswith("read-ahead")]
