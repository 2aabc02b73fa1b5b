"""Stage two as a whole: reproducible, resumable, and deaf to what it must not use."""

import json
import shutil

import pytest
import torch

from cache import StoreIncomplete
from ezsd.data.shapes import SHAPES_SPLIT
from pipeline.config import ConfigError
from pipeline.evaluate import evaluate_run
from pipeline.figures import at_limit, headline
from pipeline.runs import Run, RunError
from pipeline.step import learning_rate
from pipeline.train import TrainRequest, train


def curve(run):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in run.read_metrics()]


def state(run):
    return run.finished().model()


def test_the_same_seed_gives_the_same_curve_and_weights(shapes_run, shapes_store, quick_config, tmp_path):
    again = train(TrainRequest(cache=shapes_store, run=tmp_path / "again", config=quick_config))
    assert curve(again) == curve(shapes_run)
    for name, value in state(again).items():
        assert torch.equal(value, state(shapes_run)[name]), name


def test_another_seed_gives_another_curve(shapes_run, shapes_store, with_settings, tmp_path):
    other = train(TrainRequest(cache=shapes_store, run=tmp_path / "other", config=with_settings(train={"seed": 1})))
    assert curve(other) != curve(shapes_run)


def test_stop_and_resume_is_bit_for_bit_an_unbroken_run(shapes_run, shapes_store, quick_config, tmp_path):
    """Killed after the checkpoint of step 4 of 6 with a torn metrics line, then resumed."""
    folder = tmp_path / "stopped"
    shutil.copytree(shapes_run.folder, folder)
    shutil.rmtree(folder / "checkpoints/step-00000006")
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 7, "lo')
    resumed = train(TrainRequest(cache=shapes_store, run=folder, config=quick_config))
    assert curve(resumed) == curve(shapes_run)
    for name, value in state(resumed).items():
        assert torch.equal(value, state(shapes_run)[name]), name
    for name, value in resumed.finished().optimiser().items():
        assert torch.equal(value, shapes_run.finished().optimiser()[name]), name


def test_a_torn_checkpoint_is_passed_over(shapes_run, tmp_path):
    folder = tmp_path / "torn"
    shutil.copytree(shapes_run.folder, folder)
    weights = folder / "checkpoints/step-00000006/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    run = Run.open(folder)
    latest = run.latest()
    assert latest is not None
    assert latest.step == 4
    with pytest.raises(RunError, match="step 4 of 6"):
        run.finished()


def test_without_distillation_the_cached_regions_do_not_matter(shapes_store, with_settings, tmp_path):
    """Unless they are asked to spare likely objects, which is another setting."""

    def plain(regions):
        changed = with_settings(
            loss={"distillation": 0.0}, model={"spare_confidence": 2.0}, train={"regions": regions, "steps": 2}
        )
        return train(TrainRequest(cache=shapes_store, run=tmp_path / str(regions), config=changed))

    few, many = plain(1), plain(20)
    assert curve(few) == curve(many)
    assert "distillation" not in curve(few)[0]


def test_distillation_changes_the_detector(shapes_run, shapes_store, with_settings, tmp_path):
    plain = train(
        TrainRequest(cache=shapes_store, run=tmp_path / "plain", config=with_settings(loss={"distillation": 0.0}))
    )
    assert not torch.equal(state(plain)["head.projection.weight"], state(shapes_run)["head.projection.weight"])


def test_a_run_folder_of_another_configuration_is_refused_by_name(shapes_run, shapes_store, with_settings):
    other = with_settings(loss={"distillation": 0.25})
    with pytest.raises(RunError, match=r"config\.loss\.distillation: [0-9.]+ there, 0\.25 wanted"):
        train(TrainRequest(cache=shapes_store, run=shapes_run.folder, config=other))


def test_an_unfinished_store_is_refused(shapes_store, quick_config, tmp_path):
    unfinished = tmp_path / "store"
    shutil.copytree(shapes_store, unfinished)
    (unfinished / "COMMIT.json").unlink()
    with pytest.raises((StoreIncomplete, ValueError)):
        train(TrainRequest(cache=unfinished, run=tmp_path / "run", config=quick_config))
    assert not (tmp_path / "run").exists()


def test_a_missing_data_root_is_named(shapes_store, quick_config, tmp_path):
    moved = tmp_path / "store"
    shutil.copytree(shapes_store, moved)
    environment = json.loads((moved / "environment.json").read_text())
    (moved / "environment.json").write_text(json.dumps(environment | {"data_root": "/gone/away"}))
    with pytest.raises(ValueError, match="/gone/away.*--data-root"):
        train(TrainRequest(cache=moved, run=tmp_path / "run", config=quick_config))


def test_backbone_weights_that_run_code_are_refused(shapes_store, with_settings, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    request = TrainRequest(
        cache=shapes_store,
        run=tmp_path / "run",
        config=with_settings(),
        backbone_weights=tmp_path / "evil.pth",
    )
    with pytest.raises(ConfigError, match=r"evil\.pth"):
        train(request)
    assert not (tmp_path / "ran").exists()


def test_a_loss_that_is_not_finite_stops_with_its_parts(shapes_store, with_settings, tmp_path):
    wild = with_settings(train={"learning_rate": 1e30, "clip_norm": 1e30, "warmup": 0})
    with pytest.raises(FloatingPointError, match="step .*parts.*classification"):
        train(TrainRequest(cache=shapes_store, run=tmp_path / "wild", config=wild))


def test_learning_rate_warms_up_and_decays(quick_config):
    rates = [learning_rate(step, quick_config.train) for step in range(quick_config.train.steps)]
    assert rates[0] == pytest.approx(quick_config.train.learning_rate / 2)
    assert max(rates) == pytest.approx(quick_config.train.learning_rate)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_evaluation_is_the_same_on_a_re_run(shapes_run):
    before = (shapes_run.folder / "eval.json").read_bytes()
    evaluate_run(shapes_run, data_root=None, device="cpu")
    assert (shapes_run.folder / "eval.json").read_bytes() == before


def test_evaluation_reports_both_label_spaces(shapes_run):
    result = json.loads((shapes_run.folder / "eval.json").read_text())
    scores = headline(result)
    assert set(scores) == {"base", "novel", "all", "novel_only"}
    assert at_limit(result, "novel_only")["names"] == list(SHAPES_SPLIT.novel)


def test_crop_accuracy_lives_in_the_run(shapes_run):
    crops = json.loads((shapes_run.folder / "crops.json").read_text())
    assert crops["crops"]["novel"] > 0
    # A clean-picture model knows far more than chance (1 in 20) of these crops.
    assert crops["raw"]["base"] > 0.2
