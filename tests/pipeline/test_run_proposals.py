"""Builds whose boxes come from a run or a file, how regions are ranked among them, and box voting."""

import dataclasses
import json
import logging
import shutil

import numpy as np
import pytest
import torch

from ezsd.boxes import iou
from ezsd.cache import Store, read_environment, verify
from ezsd.cache.format.sealed_json import seal
from ezsd.data.dataset import pad_images
from ezsd.detector.backbone import normalise
from ezsd.pipeline.audit import AuditRequest, audit
from ezsd.pipeline.audit.annotation_file import read_annotation_file
from ezsd.pipeline.audit.store_stages import StoreStages
from ezsd.pipeline.config.relations import load_settings
from ezsd.pipeline.config.schema import load_preset
from ezsd.pipeline.console.defaults import build_config
from ezsd.pipeline.errors import ArgumentError, ConfigError, DamagedFile, RunError
from ezsd.pipeline.extraction import build as build_module
from ezsd.pipeline.extraction.build import build_cache, build_share
from ezsd.pipeline.extraction.commit import commit_cache
from ezsd.pipeline.extraction.forecast import forecast_build
from ezsd.pipeline.extraction.manifest_names import as_settings
from ezsd.pipeline.extraction.provenance import as_built, describe
from ezsd.pipeline.extraction.repair import repair_store
from ezsd.pipeline.extraction.request import BuildRequest, read_annotations
from ezsd.pipeline.extraction.run_proposer import run_proposer, with_run_network
from ezsd.pipeline.inference.predictor import load_trained
from ezsd.pipeline.report.tables import settings_to_build
from ezsd.pipeline.scheduling.job_array import Share
from ezsd.pipeline.scheduling.pool import Schedule
from ezsd.vocabulary import Split
from tests.conftest import QUICK

LOOSE = ("proposals.drop_background=false", "proposals.drop_base_guesses=false")
"""Filters that a network of a few steps passes."""


def settings(run, *overrides):
    return load_preset(
        "shapes",
        (
            *(*QUICK, *LOOSE, "proposals.search=learned", f"proposer.run={run}", "proposer.max_proposals=12"),
            *overrides,
        ),
    )


@pytest.fixture(scope="module")
def run(shapes_run):
    return shapes_run.folder


@pytest.fixture(scope="module")
def run_store(run, shapes_dataset, shapes_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "store"
    request = BuildRequest(dataset=shapes_dataset, config=settings(run), out=out, reuse=shapes_store, workers=1)
    report = build_cache(request)
    assert report.computed == ("proposer", "proposals", "regions")
    return out


@pytest.fixture
def build(shapes_dataset, tmp_path):
    def run(config, name, **options):
        request = BuildRequest(dataset=shapes_dataset, config=config, out=tmp_path / name, **({"workers": 1} | options))
        return build_cache(request)

    return run


def committed(store):
    """Every committed file's bytes."""
    places = (
        path for path in store.rglob("*") if path.is_file() and path.name not in ("environment.json", "build.log")
    )
    return {str(path.relative_to(store)): path.read_bytes() for path in places}


def all_regions(store):
    return [store.regions[i] for i in store.image_ids.tolist()]


def test_proposals_are_the_best_boxes_of_the_runs_proposal_network(shapes_run, run_store, shapes_dataset):
    detector = load_trained(shapes_run, "cpu").detector
    detector.rpn.proposals = 12
    images, store = shapes_dataset.images("train"), Store(run_store)
    record = read_annotations(BuildRequest(dataset=shapes_dataset, config=settings(""), out=run_store)).images[0]
    padded, sizes = pad_images([images.read(record)])
    with torch.no_grad():
        maps = detector.backbone(normalise(padded, sizes))
        found = detector.rpn.propose(detector.rpn(maps, padded.shape[2:]), sizes)
    np.testing.assert_allclose(store.proposals[record.id].box, found.boxes[0].numpy(), atol=1e-4)
    np.testing.assert_allclose(store.proposals[record.id].score, found.scores[0].numpy(), atol=1e-6)


def test_an_audit_knows_what_the_run_had_learned_from(run_store, shapes_dataset, tmp_path):
    result = audit(AuditRequest(target=str(run_store)))
    (found,) = [one for one in result.findings if one.subject == "proposer"]
    assert (result.verdict, found.level) == ("passed", "ok")
    assert found.digest == Store(run_store).manifest.products["regions"].inputs["base_boxes_sha256"]
    store = shutil.copytree(run_store, tmp_path / "store")
    record = read_environment(store)
    strict = audit(AuditRequest(target=str(store), setting="ovd-strict"))
    assert [one.level for one in strict.findings if one.subject == "names in proposer"] == ["violation"]
    assert record["proposer_run"]["proposals_from"] == "build"
    for changed, level, said in (
        ({"proposals_from": "file"}, "unproven", "its own store came from a file; audit that run too"),
        ({"proposals_from": None}, "unproven", "not recorded; audit that run too"),
        ({"boxes": [{**record["proposer_run"]["boxes"][0], "step": 4}]}, "unproven", "before step 4"),
        ({"base_names": ["circle", "star"]}, "violation", "learned from boxes of star, novel here"),
        ({"boxes": []}, "unproven", "not recorded which boxes"),
        ({"boxes": [{**record["proposer_run"]["boxes"][0], "sha256": "ab"}]}, "unproven", "learned from other boxes"),
        (None, "unproven", "not recorded which classes and boxes"),
    ):
        taught = changed and {**record["proposer_run"], **changed}
        (store / "environment.json").write_bytes(seal({**record, "proposer_run": taught}))
        (found,) = [one for one in audit(AuditRequest(target=str(store))).findings if one.subject == "proposer"]
        assert (found.level, said in found.text) == (level, True), found.text
    # Its store had an image that could not be read.
    (store / "environment.json").write_bytes(seal(record))
    opened = Store(store)
    words = opened.manifest.products["text"].inputs
    file = read_annotation_file(
        shapes_dataset.annotations("train"), Split(base=tuple(words["base_names"]), novel=tuple(words["novel_names"]))
    )
    stages = StoreStages(opened, file)
    stages.trained_images = opened.image_ids[1:]
    entry = {**record["proposer_run"]["boxes"][0], "sha256": file.base_digest(opened.image_ids[1:])}
    assert stages._of_entry(entry).level == "ok"
    for odd in ({}, {"base_names": 3}, {"base_names": [], "boxes": [3], "dataset": "x"}):
        (store / "environment.json").write_bytes(seal({**record, "proposer_run": odd}))
        with pytest.raises(DamagedFile, match="environment.json: is damaged"):
            audit(AuditRequest(target=str(store)))


def test_a_report_asks_for_as_many_proposals_of_the_run_as_the_store_has(run, run_store):
    built = settings_to_build(Store(run_store).manifest, read_environment(run_store))
    assert built["proposer"] == {"run": str(run), "max_proposals": 12}


def test_a_store_knows_the_network_and_no_place(run, run_store):
    store = Store(run_store)
    assert str(run) not in json.dumps(dict(store.manifest.fields))
    built = as_built(load_preset("shapes"), store.manifest, {})
    assert (built.proposals.search, built.proposer.backbone) == ("learned", "tiny")
    assert built.proposer.run == f"sha256:{store.manifest.products['proposer'].inputs['run_sha256']}"
    assert store.read_per_store("proposer")[1]["steps"] == 6


@pytest.mark.usefixtures("warm_workers")
def test_parts_of_two_workers_make_the_same_bytes_and_need_no_run_to_be_repaired(
    run, run_store, shapes_dataset, shapes_root, shapes_store, tmp_path
):
    copied = shutil.copytree(run, tmp_path / "run")
    out = tmp_path / "store"
    request = BuildRequest(dataset=shapes_dataset, config=settings(copied), out=out, reuse=shapes_store, workers=2)
    for number in (1, 2):
        build_share(request, Share(number, 2))
    shutil.rmtree(copied)
    commit_cache(out, Schedule(workers=1))
    assert committed(out) == committed(run_store)
    shard = next(path for path in (out / "proposals/box/c").rglob("*") if path.is_file())
    shard.unlink()
    assert not repair_store(out, shapes_root, weights=None, device="cpu").left
    assert not verify(out)
    assert committed(out) == committed(run_store)


def test_lost_weights_are_read_from_the_run_again(run, run_store, shapes_root, tmp_path):
    store = shutil.copytree(run_store, tmp_path / "store")
    next(path for path in (store / "proposer/values/c").rglob("*") if path.is_file()).unlink()
    record = run / "run.json"
    text = record.read_text()
    try:
        # What is damaged is gone.
        record.write_text("{")
        with pytest.raises(ConfigError, match=r"the run .* is gone, or has another one now; put it back where"):
            repair_store(store, shapes_root, weights=None, device="cpu")
    finally:
        record.write_text(text)
    assert not repair_store(store, shapes_root, weights=None, device="cpu").left
    assert committed(store) == committed(run_store)


def test_a_run_that_learned_novel_boxes_is_refused_before_anything_is_written(run, build, tmp_path):
    oracle = shutil.copytree(run, tmp_path / "oracle")
    spec = json.loads((oracle / "run.json").read_text())
    (oracle / "run.json").write_text(json.dumps({**spec, "base_count": len(spec["names"])}))
    with pytest.raises(ConfigError, match=r"has learned from boxes of cross, ring, .* and 2 more, novel in this split"):
        build(settings(oracle), "store")
    assert not (tmp_path / "store").exists()


def test_a_run_with_names_of_another_dataset_is_said(run, shapes_dataset, caplog):
    own = shapes_dataset.split
    fewer = dataclasses.replace(shapes_dataset, split=Split(base=own.base[2:], novel=own.novel))
    with caplog.at_level(logging.WARNING):
        with_run_network(BuildRequest(dataset=fewer, config=settings(run), out=None))
    assert f"has learned from boxes of {', '.join(own.base[:2])}, which are not among the names" in caplog.text
    caplog.clear()
    with_run_network(BuildRequest(dataset=shapes_dataset, config=settings(run), out=None))
    assert not caplog.records


def test_what_is_no_finished_run_is_refused(run, build, shapes_dataset, tmp_path):
    with pytest.raises(ConfigError, match=r"`proposer\.run=.*nowhere`: no run here .*; give the folder of a finished"):
        build(settings(tmp_path / "nowhere"), "store")
    begun = shutil.copytree(run, tmp_path / "begun")
    shutil.rmtree(begun / "checkpoints")
    with pytest.raises(RunError, match="training is not finished"):
        build(settings(begun), "store")
    strange = dataclasses.replace(settings(run).proposer, fpn_channels=8)
    with pytest.raises(RunError, match=r"its checkpoint has no network of its settings .*; give another run"):
        run_proposer(strange)
    assert run_proposer(
        with_run_network(BuildRequest(dataset=shapes_dataset, config=settings(run), out=None)).config.proposer
    )


def test_between_a_trained_network_and_a_runs_the_runs_weights_alone_are_listed(run, shapes_dataset):
    def manifest(config):
        request = with_run_network(BuildRequest(dataset=shapes_dataset, config=config, out=None))
        return describe(shapes_dataset, read_annotations(request), request.config, {"name": "t"})

    own = dataclasses.replace(settings(run), proposer=dataclasses.replace(settings(run).proposer, run=None))
    found = as_settings(manifest(own).differences(manifest(settings(run))))
    assert [one.name for one in found] == ["proposer.run_sha256"]
    other = as_settings(manifest(settings(run)).differences(manifest(settings(run, "proposals.nms_iou=0.5"))))
    assert [(one.name, one.stored, one.wanted) for one in other] == [("proposals.nms_iou", 0.7, 0.5)]


def test_embeddings_of_the_same_boxes_are_reused_whatever_proposed_them(run, run_store, build, tmp_path):
    fewer = settings(run, "proposer.max_proposals=8")
    reusing, fresh = build(fewer, "reusing", reuse=run_store), build(fewer, "fresh")
    assert "proposals" in reusing.computed
    assert reusing.crops < fresh.crops - 12
    assert committed(tmp_path / "reusing") == committed(tmp_path / "fresh")


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_regions_are_ranked_by_objectness_and_certainty(weight, run, run_store, build, tmp_path):
    build(settings(run, f"proposals.objectness_weight={weight}"), "ranked", reuse=run_store)
    own, ranked = Store(run_store), Store(tmp_path / "ranked")
    moved = 0
    for image in own.image_ids.tolist():
        objectness = {box.tobytes(): score for box, score in zip(*boxes_of(own, image), strict=True)}
        rows = ranked.regions[image]
        wanted = [objectness[box.tobytes()] ** weight for box in rows.box] * rows.confidence ** (1 - weight)
        np.testing.assert_allclose(rows.score, wanted, rtol=1e-5)
        assert (np.diff(rows.score) <= 0).all()
        moved += not np.array_equal(rows.box, own.regions[image].box[: len(rows.box)])
    assert moved > 6
    build(settings(run, f"proposals.objectness_weight={weight}"), "fresh")
    assert committed(tmp_path / "ranked") == committed(tmp_path / "fresh")


def boxes_of(store, image_id):
    return store.proposals[image_id].box, store.proposals[image_id].score


def test_a_file_with_scores_below_zero_keeps_its_order_alone(build, tmp_path):
    (tmp_path / "boxes.json").write_text(json.dumps([{"image_id": 1, "bbox": [0, 0, 40, 40], "score": -2}]))
    given = (*QUICK, *LOOSE, f"proposals.boxes={tmp_path / 'boxes.json'}")
    with pytest.raises(ConfigError, match=r"a score is -2, .* take `proposals.objectness_weight=1`"):
        build(load_preset("shapes", (*given, "proposals.objectness_weight=0.5")), "store")
    build(load_preset("shapes", (*given, "proposals.objectness_weight=1")), "store")
    assert Store(tmp_path / "store").regions[1].score.tolist() in ([], [-2])


def test_voted_proposals_are_suppressed_filtered_and_embedded(
    shapes_store, shapes_dataset, with_settings, build, tmp_path
):
    # Windows of the quick grid overlap a little less than by default.
    config = with_settings(proposals={"refine": "vote", "refine_iou": 0.2})
    build(config, "voted", reuse=shapes_store)
    plain, voted = Store(shapes_store), Store(tmp_path / "voted")
    assert voted.manifest.fingerprints["proposals"] == plain.manifest.fingerprints["proposals"]
    regions = moved = 0
    for image in plain.image_ids.tolist():
        box, base = voted.regions[image].box, voted.ground_truth[image].box
        regions += len(box)
        grid = {row.tobytes() for row in plain.proposals[image].box}
        moved += sum(row.tobytes() not in grid for row in box)
        if len(box):
            assert len(base) == 0 or iou(torch.from_numpy(box), torch.from_numpy(base)).max() < 0.3
            assert iou(torch.from_numpy(box), torch.from_numpy(box)).fill_diagonal_(0).max() <= 0.7
    assert regions >= moved > 12
    fresh = build(config, "fresh")
    assert committed(tmp_path / "voted") == committed(tmp_path / "fresh")
    forecast = forecast_build(
        BuildRequest(dataset=shapes_dataset, config=config, out=tmp_path / "none"), probe_seconds=0.1
    )
    assert forecast.passes >= fresh.crops


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["proposals.objectness_weight=0.5"], "without proposals.search=learned or proposals.boxes"),
        (["proposals.refine_iou=0.5"], "without proposals.refine=vote"),
        (["proposer.run=somewhere"], "without proposals.search=learned"),
        (["proposals.search=learned", "proposer.run=somewhere", "proposer.steps=3"], "and proposer.run"),
        (["proposals.search=learned", "proposals.max_proposals=500"], "or as many proposer.max_proposals"),
        (["proposals.search=learned", "proposer.max_proposals=2000"], "and at least as many proposals.max_proposals"),
    ],
)
def test_a_setting_without_an_effect_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_settings("paper", overrides)


def test_the_number_of_a_networks_boxes_is_the_smaller_of_two():
    for key in ("proposals", "proposer"):
        assert load_settings("shapes", [f"{key}.max_proposals=50"]).max_proposals == 50
    both = ["proposals.max_proposals=2000", "proposer.max_proposals=2000"]
    assert load_settings("shapes", both).max_proposals == 2000


def test_proposals_from_is_a_run_or_a_file(run, tmp_path):
    def made(place, *overrides):
        return build_config("shapes", overrides, teacher=None, weights=None, proposals_from=place)

    found = made(run)
    assert (found.proposals.search, found.proposer.run, found.proposals.boxes) == ("learned", str(run), "")
    (tmp_path / "boxes.json").write_text("[]")
    assert made(tmp_path / "boxes.json").proposals.boxes == str(tmp_path / "boxes.json")
    with pytest.raises(ArgumentError, match="neither a run nor a file; give the folder of a finished `ezsd train`"):
        made(tmp_path)
    with pytest.raises(ConfigError, match="both say where proposals come from; leave one of them out"):
        made(run, "proposals.search=exhaustive")


def test_nothing_is_trained_for_a_run(run, build, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a proposer was trained")

    monkeypatch.setattr(build_module, "train_proposer", never)
    assert build(settings(run), "store").images == 12
