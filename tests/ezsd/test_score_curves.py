"""Curves that a threshold is chosen by: those that AP50 is the mean of, and the best threshold among all."""

import numpy as np
import pytest

from ezsd.metrics import evaluate_at, limits_of, read_truth
from ezsd.metrics.average_precision import RECALLS
from ezsd.metrics.score_curves import ScoreCurve, score_curves
from tests.ezsd.test_metrics import SPLIT, crowded_scene


def average_precision(curve):
    """AP50 by its definition: the best precision at each recall threshold or a higher one."""
    best = [curve.precision[curve.recall >= least].max(initial=0) for least in RECALLS]
    return np.mean(best)


@pytest.mark.parametrize("limit", [0, 1])
def test_curves_are_those_that_ap50_is_the_mean_of(tmp_path, limit):
    path, results = crowded_scene(tmp_path, seed=3)
    truth = read_truth(path, SPLIT)
    chosen = limits_of(truth)[limit]
    figures = evaluate_at(truth, results, limits=[chosen])[chosen.label]["per_class"]
    curves = score_curves(truth, results, limit=chosen)
    assert list(curves) == list(SPLIT.names)
    for name, curve in curves.items():
        assert curve.objects == figures[name]["boxes"]
        # One class has crowds alone, which are no objects.
        if curve.objects:
            assert average_precision(curve) == pytest.approx(figures[name]["AP50"], abs=1e-9)
        assert (np.diff(curve.score) <= 0).all()


def curve(score, right, objects):
    return ScoreCurve(score=np.array(score, float), right=np.array(right, bool), objects=objects)


def test_figures_at_a_threshold():
    one = curve([0.9, 0.8, 0.8, 0.3], [1, 0, 1, 0], 4)
    assert one.at(0.8) == (0.8, pytest.approx(2 / 3), 0.5)
    assert one.at(0.95) == (0.95, None, 0.0)
    assert curve([0.9], [0], 0).at(0.5) == (0.5, 0.0, None)
    assert one.at(0.8).f1 == pytest.approx(4 / 7)
    assert one.at(0.95).f1 == 0


def test_the_best_threshold_is_the_best_of_all_in_steps_and_the_highest_of_equals():
    rng = np.random.default_rng(0)
    for objects in (5, 60):
        score = np.sort(rng.random(200))[::-1]
        one = curve(score, rng.random(200) < score, objects)
        found = one.best()
        every = {step: one.at(step / 100).f1 for step in range(1, 100)}
        assert found.f1 == pytest.approx(max(every.values()))
        assert round(100 * found.threshold) == max(step for step, f1 in every.items() if f1 == max(every.values()))
    # Equal scores cannot be told apart by a threshold.
    assert curve([0.5, 0.5], [1, 0], 1).best() == (0.5, 0.5, 1.0)
    assert curve([0.5, 0.4], [0, 0], 1).best() is None
    assert curve([], [], 1).best() is None
