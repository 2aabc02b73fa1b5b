"""Builds in shares, as a job array does them: several processes on one store, any of them killed."""

import os
import signal

import pytest

from ezsd.cache import Block, StoreIncomplete
from ezsd.cache.format.sealed_json import unseal
from ezsd.pipeline.console.arguments import parse_share, require_scheduler
from ezsd.pipeline.console.options import as_options
from ezsd.pipeline.errors import ArgumentError
from ezsd.pipeline.extraction.build import build_share
from ezsd.pipeline.extraction.commit import commit_cache
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.scheduling.job_array import Share
from ezsd.pipeline.scheduling.pool import Schedule
from tests.pipeline.forkkit import Fork
from tests.pipeline.test_build import ROOT, build_command, files

SYNC = Schedule(scheduler="sync")


def start_share(dataset, config, out, share, **environment):
    """A job, and the file with what it says."""
    words = [*build_command(dataset, config, out, workers=0)[2:], "--scheduler", "sync", "--blocks", share]
    said = out.parent / f"{share.replace('/', '-of-')}.txt"
    own = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return Fork(words, out.parent, own, output=said), said


def test_shares_at_once_with_one_killed_make_the_same_bytes(shapes_dataset, quick_config, shapes_store, tmp_path):
    out = tmp_path / "store"
    killing = {"2/3": {"EZSD_FAILPOINT": "block.before_rename"}}
    jobs = {
        share: start_share(shapes_dataset, quick_config, out, share, **killing.get(share, {}))
        for share in ("1/3", "2/3", "3/3")
    }
    codes = {share: job.wait() for share, (job, _) in jobs.items()}
    assert codes == {"1/3": 0, "2/3": -signal.SIGKILL, "3/3": 0}
    assert "share 1/3 is done, 1 block; other shares'" in jobs["1/3"][1].read_text()
    # One of them prepared the store for all.
    assert (out / "build.log").read_text().count("re-normalised") == 1
    with pytest.raises(StoreIncomplete, match=r"1 of 3 blocks is missing \(1\); .* with `blocks=2/3`$") as said:
        commit_cache(out, SYNC)
    missing = as_options(str(said.value)).rpartition(" ")[2]
    request = BuildRequest(dataset=shapes_dataset, config=quick_config, out=out, scheduler="sync")
    again = build_share(request, Share(*parse_share(missing)))
    assert (again.blocks, again.missing) == (1, 0)
    assert commit_cache(out, SYNC) is not None
    assert files(out) == files(shapes_store)
    record = unseal((out / "environment.json").read_bytes(), "environment.json")
    assert (record["scheduler"], record["shares"]) == ("sync", 3)
    assert record["started"] <= record["finished"]
    assert "commit" in record["seconds"]
    assert commit_cache(out, SYNC) is None
    assert build_share(request, Share(1, 3)).already_complete


def test_a_share_killed_while_it_prepares_is_taken_over(shapes_dataset, quick_config, shapes_store, tmp_path):
    out = tmp_path / "store"
    killed, _ = start_share(shapes_dataset, quick_config, out, "1/2", EZSD_FAILPOINT="whole.after_rename")
    assert killed.wait() == -signal.SIGKILL
    request = BuildRequest(dataset=shapes_dataset, config=quick_config, out=out, workers=1)
    assert build_share(request, Share(2, 2)).missing == 2
    assert build_share(request, Share(1, 2)).missing == 0
    commit_cache(out, SYNC)
    assert files(out) == files(shapes_store)


def test_a_commit_that_knows_no_shares_asks_for_the_whole_build(shapes_dataset, quick_config, tmp_path):
    out = tmp_path / "store"
    build_share(BuildRequest(dataset=shapes_dataset, config=quick_config, out=out, scheduler="sync"), Share(1, 2))
    (out / "environment.json").unlink()
    with pytest.raises(StoreIncomplete, match=r"1 of 3 blocks is missing \(1\); run the same .* command again$"):
        commit_cache(out, SYNC)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_each_block_is_in_one_share(count):
    blocks = [Block(index, 4 * index, 4 * index + 4) for index in range(13)]
    owners = [[number for number in range(1, count + 1) if Share(number, count).has(block)] for block in blocks]
    assert all(len(owner) == 1 for owner in owners)
    sizes = [owners.count([number]) for number in range(1, count + 1)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("text", ["0/3", "4/3", "1/0", "3", "1/3/5", "-1/3", "a/b", ""])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(ArgumentError, match="expected I/N with I from 1 to N"):
        parse_share(text)


def test_a_share_is_counted_from_one():
    assert parse_share("8/8") == (8, 8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheduler": "locale"}, "expected local, sync"),
        ({"scheduler": "tcp://host"}, "expected local, sync"),
        ({"scheduler": "http://host:80"}, "expected local, sync"),
        ({"scheduler": "tcp://host:8786", "workers": 2}, "--workers goes with --scheduler local"),
        ({"scheduler": "sync", "workers": 2}, "--workers goes with --scheduler local"),
        ({"scheduler": "sync", "dashboard": True}, "no Dask to look at"),
        ({"scheduler": "tls://host:8786", "share": (1, 2)}, "--blocks is for jobs without a scheduler"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(ArgumentError, match=words):
        require_scheduler(**{"scheduler": "local", "workers": 0, "dashboard": False} | options)
