"""Laws of the bootstrap: draws are those of the seed, however many are made at a time; intervals are scipy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from iskd.evaluation import bootstrap
from iskd.evaluation.bootstrap import interval, resampled_means


def test_how_many_resamples_exist_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(37, 2, generator=torch.Generator().manual_seed(0))
    whole = resampled_means(values, 101, seed=5)
    assert whole.shape == (101, 2)
    drawn = torch.randint(37, (101, 37), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(whole, values.double()[drawn].mean(1))
    for at_a_time in (1, 37 * 10):
        monkeypatch.setattr(bootstrap, "_AT_A_TIME", at_a_time)
        torch.testing.assert_close(resampled_means(values, 101, seed=5), whole, rtol=1e-14, atol=0)


def test_shapes_follow_the_values() -> None:
    values = torch.rand(9, 2, 3)
    means = resampled_means(values, 50, 0)
    assert means.shape == (50, 2, 3)
    assert resampled_means(values[:, 0, 0], 50, 0).shape == (50,)
    torch.testing.assert_close(resampled_means(values[:, 0, 0], 50, 0), means[:, 0, 0])
    assert interval(means).shape == (2, 2, 3)
    assert (interval(means, 0.5)[0] >= interval(means)[0]).all()


def test_the_interval_of_a_ratio_on_the_same_items_is_that_of_scipy() -> None:
    """`scipy.stats.bootstrap(paired=True)`: both models' items drawn together, other draws, the same interval."""
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    teacher = (torch.rand(400, generator=generator) < 0.7).double()
    student = teacher * (torch.rand(400, generator=generator) < 0.9)
    means = resampled_means(torch.stack([student, teacher], dim=1), 8000, seed=1)
    low, high = interval(means[:, 0] / means[:, 1]).tolist()
    found = stats.bootstrap(
        (student.numpy(), teacher.numpy()),
        lambda mine, theirs, axis=-1: mine.mean(axis) / theirs.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=8000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    width = found.high - found.low
    assert (low, high) == pytest.approx((found.low, found.high), abs=0.05 * width)
