"""Reading processes that die, lose a batch or have no shared memory: one line, and soon."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commandkit import ezsd
from tests.faults.faultkit import small_disk

ROOT = Path(__file__).resolve().parents[2]


# A reader loads torch for seconds, and is started only where nothing was seen.
@pytest.mark.parametrize(("seen", "readers"), [("seen", 2), ("unseen", 1)])
def test_too_little_shared_memory_is_one_line_and_its_advice_trains(seen, readers, shapes_store, tmp_path):
    """Looked at before the first step; and where that was too hopeful, no batch is lost and waited for."""
    words = ["train", "--cache", shapes_store, "--run", tmp_path / "run", "--device", "cpu"]
    for setting in ("steps=2", "batch_size=4", "min_size=512", "max_size=512", f"num_workers={readers}"):
        words += ["--set", f"train.{setting}"]
    with small_disk(Path("/dev/shm"), "2m") as disk:
        faults = [*disk.faults, *([["no_look_at_shared_memory"]] if seen == "unseen" else [])]
        done = ezsd(*words, faults=faults)
        assert done.returncode == 2, done.stderr
        said = done.stderr.strip().splitlines()[-1]
        assert said.startswith("ezsd: /dev/shm: "), done.stderr
        assert ("5 batches of 3 MB are under way at once" if seen == "seen" else "has no room") in said
        assert "docker run --shm-size=SIZE" in said
        assert "Traceback" not in done.stderr
        (cure,) = re.findall(r"(train\.num_workers=0) ", said)
        done = ezsd(*words, "--set", cure, faults=faults)
        assert done.returncode == 0, done.stderr


ODD = """
import sys, threading, time
import dataclasses
import torch
import ezsd.pipeline.training.dataloader
from ezsd.cache import Store
from ezsd.pipeline.training.dataloader import load_batches
from ezsd.pipeline.config.schema import load_preset
from ezsd.pipeline.runs.run import RunError
from ezsd.pipeline.training.train import store_dataset, training_samples

class Odd(torch.utils.data.Dataset):
    def __init__(self, samples, kind):
        self.samples, self.kind, self.size, self.repeats = samples, kind, samples.size, samples.repeats
    def __len__(self):
        return len(self.samples)
    def __getitem__(self, key):
        if self.kind == "slow":
            time.sleep(1000)
        # No queue can hand this over.
        return dataclasses.replace(self.samples[key], seed=threading.Lock())

if __name__ == "__main__":
    ezsd.pipeline.training.dataloader.LOOK_SECONDS = 0.2
    store = Store(sys.argv[1])
    config = load_preset("shapes", ["train.batch_size=2", "train.num_workers=1"]).train
    for kind in ("slow", "lost"):
        asked = []
        def stopping():
            asked.append(True)
            return kind == "slow" and len(asked) == 3
        samples = Odd(training_samples(store, store_dataset(store, None), config), kind)
        for stream in (sys.stdout, sys.stderr):
            print(f"{kind}:", file=stream, flush=True)
        try:
            print(list(load_batches(samples, config, first_step=0, stopping=stopping)), len(asked))
        except RunError as error:
            print(error)
"""


@pytest.fixture(scope="module")
def odd(shapes_store, tmp_path_factory):
    """What is printed on both streams with a reader that is slow, and with one that loses its batch."""
    script = tmp_path_factory.mktemp("odd") / "odd.py"
    script.write_text(ODD)
    done = subprocess.run(
        [sys.executable, str(script), str(shapes_store)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    slow, lost = zip(
        *(text.removeprefix("slow:\n").split("lost:\n") for text in (done.stdout, done.stderr)), strict=True
    )
    return {"slow": slow, "lost": lost}


def test_a_batch_that_cannot_be_handed_over_ends_its_reader_and_the_run(odd):
    printed, told = odd["lost"]
    said = r"DataLoader worker \(pid\(s\) \d+\) exited unexpectedly\. Run the same command to go on .*\n"
    assert re.fullmatch(said, printed), told
    assert "a reading process cannot hand a batch over: " in told


def test_a_slow_reader_is_waited_for_until_the_training_is_to_stop(odd):
    assert odd["slow"] == ("[] 3\n", "")
