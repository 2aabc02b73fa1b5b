"""A run knows which bytes it was trained on, and takes no damaged ones."""

import json
import shutil

import pytest

from ezsd.cache import Store, StoreError, StoreMismatch
from ezsd.cache.files import file_digest
from ezsd.cache.format.commit_mark import CommitMark, read_mark
from ezsd.pipeline.errors import RunError
from ezsd.pipeline.report.run_data import collect, run_store
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.runs.store_digests import read_stores
from ezsd.pipeline.training.train import TrainRequest, train


@pytest.fixture
def copy(shapes_store, tmp_path):
    return shutil.copytree(shapes_store, tmp_path / "store")


@pytest.fixture
def stopped(shapes_run, tmp_path):
    """A run whose newest checkpoint is that of step 4 of 6."""
    folder = shutil.copytree(shapes_run.folder, tmp_path / "stopped")
    shutil.rmtree(folder / "checkpoints/step-00000006")
    return folder


def change_bytes(store):
    """Other regions under the same manifest, with all digests made anew."""
    file = next((store / "regions/score/c").iterdir())
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    mark = read_mark(store)
    files = {**mark.files, file.relative_to(store).as_posix(): file_digest(file)}
    (store / "COMMIT.json").write_bytes(
        CommitMark(mark.manifest_digest, mark.embed_dim, mark.embedding, files).to_bytes()
    )


def test_a_run_records_the_digest_of_its_bytes(shapes_run, shapes_store):
    digest = json.loads((shapes_store / "COMMIT.json").read_text())["sha256"]
    assert Store(shapes_store).digest == digest
    assert read_stores(shapes_run) == [{"step": 0, "sha256": digest}]


def test_other_bytes_of_equal_settings_are_refused_until_they_are_accepted(stopped, copy, quick_config):
    before = Store(copy).digest
    change_bytes(copy)
    after = Store(copy).digest
    assert Store(copy).manifest.digest == json.loads((stopped / "run.json").read_text())["store"]["digest"]
    request = TrainRequest(cache=copy, run=stopped, config=quick_config, verify="quick")
    files = sorted(stopped.rglob("*"))
    refusal = f"trained on other bytes than {copy} .*{before[:12]}.*{after[:12]}.*`accept_store`"
    with pytest.raises(RunError, match=refusal):
        train(request)
    assert sorted(stopped.rglob("*")) == files
    run = train(TrainRequest(cache=copy, run=stopped, config=quick_config, verify="quick", accept_store=True))
    assert read_stores(run) == [{"step": 0, "sha256": before}, {"step": 4, "sha256": after}]


def test_a_report_shows_no_regions_of_other_bytes(shapes_run, copy, tmp_path):
    run = Run.open(shutil.copytree(shapes_run.folder, tmp_path / "run"))
    run.write_environment({**run.environment, "cache": str(copy)})
    assert run_store(collect([run])[0]).path == copy
    change_bytes(copy)
    with pytest.raises(StoreMismatch, match="holds other bytes now than those this run was trained on"):
        run_store(collect([run])[0])


def test_a_run_of_before_goes_on_says_so_and_records_from_there(stopped, shapes_store, quick_config, caplog):
    (stopped / "stores.json").unlink()
    run = train(TrainRequest(cache=shapes_store, run=stopped, config=quick_config))
    (said,) = [text for text in caplog.messages if text.startswith(f"`run={stopped}`: ")]
    assert said.endswith(f"which bytes it is trained on; from step 4 on they are those of {shapes_store}")
    assert read_stores(run) == [{"step": 4, "sha256": Store(shapes_store).digest}]


@pytest.mark.parametrize("earlier", [False, True])
def test_a_finished_run_is_not_recorded_as_trained_on_what_it_is_only_shown(
    shapes_run, copy, quick_config, tmp_path, earlier
):
    folder = shutil.copytree(shapes_run.folder, tmp_path / "finished")
    if earlier:
        (folder / "stores.json").unlink()
    known = read_stores(Run.open(folder))
    change_bytes(copy)
    run = train(TrainRequest(cache=copy, run=folder, config=quick_config, verify="quick", accept_store=True))
    assert read_stores(run) == known


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_row_ends_a_training_with_one_line(copy, with_settings, tmp_path, workers):
    file = next((copy / "regions/confidence/c").iterdir())
    data = bytearray(file.read_bytes())
    data[1] ^= 1
    file.write_bytes(data)
    config = with_settings(train={"num_workers": workers})
    request = TrainRequest(cache=copy, run=tmp_path / "run", config=config)
    damage = f"^{file}: rows 0 to .* of the images .*`repair\\(\\)` mends it$"
    with pytest.raises(StoreError, match=damage) as caught:
        train(request)
    assert "\n" not in str(caught.value)
    train(TrainRequest(cache=copy, run=tmp_path / "quick", config=config, verify="quick"))
