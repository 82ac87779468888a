"""Laws of calibrated predictions: monotone, exact where nothing is added, better than sums where sums fall short."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import spearmanr

from iskd.schedules.budget.calibration import Calibration, Promise, left_out, rank_correlation

DEPTH = 30


def plans(
    seed: int, count: int, shift: float = 0.2, bend: float = 0.05, noise: float = 0.05
) -> tuple[list[Promise], list[float]]:
    """Plans whose scores add up to too little, the more so the more there are."""
    draw = np.random.default_rng(seed)
    promises, measured = [], []
    for _ in range(count):
        n, added = int(draw.integers(2, DEPTH)), float(np.exp(draw.uniform(-3, 1)))
        promises.append(Promise(added, n))
        more = math.log1p(n) * (shift + bend * math.log(added)) + noise * draw.standard_normal()
        measured.append(added * math.exp(more))
    return promises, measured


def off(predicted: Sequence[float], measured: Sequence[float]) -> float:
    return float(np.mean(np.abs(np.log(np.asarray(predicted)) - np.log(np.asarray(measured)))))


def test_without_plans_scores_add_up() -> None:
    found = Calibration.fit([], [], DEPTH)
    assert (found.shift, found.bend) == pytest.approx((0.0, 0.0), abs=1e-12)
    for added, count in ((0.3, 4), (2.0, 30)):
        assert found.of(Promise(added, count)) == pytest.approx(added)


@pytest.mark.parametrize("seed", range(8))
def test_a_larger_sum_never_promises_less_and_an_empty_one_is_what_was_measured(seed: int) -> None:
    draw = np.random.default_rng(seed)
    promises = [Promise(float(draw.uniform(-0.1, 2)), int(draw.integers(0, DEPTH))) for _ in range(6)]
    found = Calibration.fit(promises, draw.uniform(0.0, 3, 6).tolist(), DEPTH)
    for count in (1, 5, DEPTH):
        kls = [found.of(Promise(added, count)) for added in (-0.5, 0.0, 1e-3, 0.1, 0.5, 2.0, 9.0)]
        assert kls == sorted(kls)
        assert kls[0] > 0
        assert kls[-1] > kls[-2]
    assert found.of(Promise(0.7, 0)) == 0.7


@pytest.mark.parametrize("seed", range(4))
def test_plans_that_were_not_fitted_to_are_predicted_better_than_by_sums(seed: int) -> None:
    promises, measured = plans(seed, 12)
    others, kls = plans(seed + 100, 40)
    found = Calibration.fit(promises, measured, DEPTH)
    assert off([found.of(each) for each in others], kls) < 0.3 * off([each.added for each in others], kls)
    predicted = left_out(promises, measured, DEPTH)
    assert off(predicted, measured) < 0.3 * off([each.added for each in promises], measured)


def test_sums_that_were_seen_to_fall_short_are_put_right() -> None:
    """Added scores of three students of one small model, and what they were measured to lose."""
    promises, measured = [Promise(0.18, 2), Promise(0.62, 3), Promise(1.42, 4)], [0.23, 0.91, 2.03]
    predicted = left_out(promises, measured, 5)
    for one, promise, kl in zip(predicted, promises, measured, strict=True):
        assert abs(one - kl) < 0.5 * abs(promise.added - kl)


def test_the_curve_is_the_best_one_by_a_slow_search() -> None:
    promises, measured = plans(3, 7)

    def loss(values: Sequence[float]) -> float:
        found = Calibration(*values)
        errors = [math.log(found.of(each) / kl) / 0.1 for each, kl in zip(promises, measured, strict=True)]
        return sum(error**2 for error in errors) + (values[0] / 0.2) ** 2 + (values[1] / 0.1) ** 2

    slow = minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-9}).x
    found = Calibration.fit(promises, measured, DEPTH)
    assert (found.shift, found.bend) == pytest.approx(tuple(slow), abs=1e-4)


def test_what_a_plan_was_measured_to_lose_has_no_part_in_its_prediction() -> None:
    promises, measured = plans(5, 6)
    before = left_out(promises, measured, DEPTH)
    after = left_out(promises, [*measured[:2], 10 * measured[2], *measured[3:]], DEPTH)
    assert after[2] == before[2]
    assert after[1] != before[1]


def test_rank_correlations_are_those_of_scipy() -> None:
    draw = np.random.default_rng(0)
    for _ in range(5):
        a, b = draw.integers(0, 6, 12).tolist(), draw.normal(size=12).tolist()
        assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
