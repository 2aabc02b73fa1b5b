"""Real photos: COCO's own files, a plug-in teacher, and CLIP's own architecture at full size."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from ezsd.cache import Store
from ezsd.pipeline.config.schema import load_preset, to_tables
from ezsd.pipeline.data.datasets import find_dataset
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.provenance import model_inputs
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.inference.evaluate import evaluate_run
from ezsd.pipeline.inference.evaluation_tables import headline
from ezsd.pipeline.look import LookRequest, look_at_store
from ezsd.pipeline.training.train import TrainRequest, train
from ezsd.vocabulary import COCO_SPLIT

PLUGINS = Path(__file__).resolve().parent.parent / "plugins"
BENCHMARKS = PLUGINS.parents[1] / "benchmarks"


@pytest.fixture(scope="session")
def photo_store(photos, conse_tools, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(PLUGINS))
    config = load_preset("photos", ["proposer.steps=2", "proposer.max_proposals=12", "build.block_images=2"])
    teacher = dataclasses.replace(config.teacher, name="plugin:conse_plugin:factory")
    request = BuildRequest(
        dataset=find_dataset("coco", photos),
        config=dataclasses.replace(config, teacher=teacher),
        out=tmp_path_factory.mktemp("cache") / "photos",
        limit=6,
        workers=1,
    )
    build_cache(request)
    yield request.out
    patch.undo()


def test_photos_give_a_store_of_base_objects_and_unseen_regions(photo_store, photos):
    store = Store(photo_store)
    assert store.text[0] == COCO_SPLIT.names
    document = json.loads((photos / "annotations/instances_train2017.json").read_text())
    base = {c["id"] for c in document["categories"] if c["name"] in COCO_SPLIT.base}
    for image_id in store.image_ids:
        wanted = [
            a["id"]
            for a in document["annotations"]
            if a["image_id"] == image_id and a["category_id"] in base and not a["iscrowd"]
        ]
        assert sorted(store.ground_truth[int(image_id)].annotation_id) == sorted(wanted)
        regions = store.regions[int(image_id)]
        assert (regions.class_index >= len(COCO_SPLIT.base)).all()
        np.testing.assert_allclose(np.linalg.norm(regions.embedding.astype(np.float32), axis=1), 1, atol=1e-3)


def test_a_detector_trains_and_is_evaluated_on_photos(photo_store, photos, tmp_path, monkeypatch):
    config = load_preset("photos", ["train.steps=2", "train.batch_size=2", "train.min_size=160", "train.max_size=240"])
    run = train(TrainRequest(cache=photo_store, run=tmp_path / "run", config=config))
    assert [line["step"] for line in run.read_metrics()] == [1, 2]
    scores = headline(evaluate_run(run, data_root=photos, device="cpu"))
    assert scores["base"] is not None
    assert scores["novel"] is not None
    monkeypatch.syspath_prepend(BENCHMARKS)
    words = ["photos.py", "--cache", str(photo_store), "--data-root", str(photos), "--run", str(run.folder)]
    monkeypatch.setattr(sys, "argv", [*words, "--results", str(tmp_path)])
    runpy.run_path(str(BENCHMARKS / "photos.py"), run_name="__main__")
    row = json.loads((tmp_path / "photos.jsonl").read_text())
    assert row["images"] == 6
    assert row["novel_objects"] > 0
    assert row["trained"]["AP50"] == scores
    assert row["trained"]["validation_objects"] == {"base": 387, "novel": 77}
    assert (row["trained"]["settings"]["loss"], row["trained"]["steps"]) == (to_tables(config)["loss"], 2)


def test_regions_of_photos_are_looked_at(photo_store, photos, tmp_path):
    document, page = look_at_store(LookRequest(store=photo_store, out=tmp_path / "out", images=2, data_root=photos))
    # The proposal network was trained on the others.
    assert (document["images"]["unseen"], document["images"]["looked_at"]) == (1, 2)
    assert document["held_out"]["objects"]["all"] > 0
    assert set(document["held_out"]["recall"]) == {"regions", "named_regions", "proposals", "random_boxes"}
    assert page.read_text().count("<img ") == 2


SMALL = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3},
}


def test_clip_from_a_local_file(photos, tmp_path):
    (tmp_path / "clip-of-photos.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(tmp_path / "clip-of-photos.json")
    # Two for each layer, and one or two about them.
    require_a_store(photos, tmp_path, "clip-of-photos", vision=(6, 32), text=(7, 16), embed_dim=24)


@pytest.mark.slow
def test_clip_at_full_size_from_a_local_file(photos, tmp_path):
    """ViT-B/32 with QuickGELU as OpenAI's is; only the quality of the weights is missing."""
    require_a_store(photos, tmp_path, "ViT-B-32-quickgelu", vision=(26, 768), text=(25, 512), embed_dim=512)


def require_a_store(photos, folder, name, *, vision, text, embed_dim):
    """A store of two photos whose teacher is a random CLIP; its LayerNorms are given by tower as count and width."""
    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained=None)
    save_file(model.state_dict(), folder / "clip.safetensors")
    grid = ["proposals.search=exhaustive", "proposals.sizes=[400]", "proposals.ratios=[1]"]
    config = load_preset("photos", ["adapt.steps=1", "adapt.batch_size=4", *grid])
    teacher = dataclasses.replace(
        config.teacher,
        name=name,
        weights=str(folder / "clip.safetensors"),
        template="a photo of a {}",
        activation="quickgelu",
    )
    request = BuildRequest(
        dataset=find_dataset("coco", photos),
        config=dataclasses.replace(config, teacher=teacher),
        out=folder / "store",
        limit=2,
        workers=1,
    )
    build_cache(request)
    store = Store(folder / "store")
    assert store.embed_dim == embed_dim
    values, attributes = store.teacher
    # Weight and bias of each.
    assert len(attributes["parameters"]) == 2 * (vision[0] + text[0])
    assert len(values) == 2 * (vision[0] * vision[1] + text[0] * text[1])
    fields = model_inputs(store.manifest)
    assert fields["activation"] == "quick_gelu"
