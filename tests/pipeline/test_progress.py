"""What long work says where there is no terminal."""

import logging
import re
from types import SimpleNamespace

import pytest

from ezsd.pipeline import progress
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.progress import Progress, duration


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5940, "99 min"), (7260, "2 h 1 min")]
)
def test_times_are_said_as_one_says_them(seconds, said):
    assert duration(seconds) == said


def test_lines_tell_what_is_done_how_fast_and_what_is_left(monkeypatch, caplog):
    """Ten images were done earlier; two of the other ninety take ten seconds."""
    clock = iter([100.0, 100.0, *[110.0] * 9])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 5.0)
    with caplog.at_level(logging.INFO, logger="ezsd"), Progress("extract", 100, unit="image", done=10) as bar:
        next(clock)
        bar.advance(2)
        assert caplog.messages == ["extract: 12/100 images, 12.0/min, 7 min left"]


def test_time_left_forgets_that_the_process_was_suspended(monkeypatch, caplog):
    """A step takes two seconds, and one an hour more."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    with caplog.at_level(logging.INFO, logger="ezsd"), Progress("extract", 1000, unit="image") as bar:
        for step in range(1000):
            clock.now += 3602 if step == 3 else 2
            bar.advance()
    said = "\n".join(caplog.messages)
    left = dict(re.findall(r"extract: (\d+)/1000 images, .*, (.*) left", said))
    assert left["4"] == duration(996 * 3608 / 4)
    assert left["148"] != duration(2 * 852)
    assert left["164"] == duration(2 * 836)
    assert caplog.messages[-1] == f"extract: 1000/1000 images, {60 * 1000 / 5600:.1f}/min"


def test_blocks_that_come_together_are_no_burst(monkeypatch, caplog):
    """Two workers end a block of 100 images each every 20 minutes, a second apart."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.5)
    with caplog.at_level(logging.INFO, logger="ezsd"), Progress("extract", 10_000, unit="image") as bar:
        for _ in range(20):
            for seconds in (1199, 1):
                clock.now += seconds
                bar.advance(100)
    rates = [float(rate) for rate in re.findall(r"images, ([\d.]+)/min", "\n".join(caplog.messages))]
    assert len(rates) == 41
    assert all(rate == pytest.approx(10, rel=0.25) for rate in rates[2:])


def test_a_build_counts_images_and_crops(shapes_dataset, quick_config, tmp_path, caplog):
    request = BuildRequest(dataset=shapes_dataset, config=quick_config, out=tmp_path / "store", workers=1)
    with caplog.at_level(logging.INFO, logger="ezsd"):
        build_cache(request)
    (said,) = (line for line in caplog.messages if line.startswith("extract: "))
    assert re.fullmatch(r"extract: 12/12 images, .*, [1-9][0-9,]* crops/s", said)
