"""How sure a score is: standard errors and intervals over calibration windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iskd.evaluation.bootstrap import interval, resampled_means
from iskd.importance.base import refuse_not_finite

_RESAMPLES = 2000


@dataclass(frozen=True)
class LayerScore:
    """Importance of one layer: mean over windows, its standard error, and a 95 % interval.

    Attributes:
        layer: in the teacher's numbering.
        score: higher = keep.
        error: standard error of the mean over windows; nan for one window.
        low, high: percentile bootstrap over windows; nan for one window.
        tied: whether the windows cannot tell it from the lowest layer (one paired standard error).
    """

    layer: int
    score: float
    error: float
    low: float
    high: float
    tied: bool


def layer_scores(rows: Tensor, layers: Sequence[int], seed: int = 0) -> list[LayerScore]:
    """Summary of an importance's rows [L, W] for the layers of a stack. Raises ValueError when a row is not finite."""
    refuse_not_finite(rows, layers)
    low, high = bootstrap(rows, seed)
    means, errors = rows.mean(1), standard_error(rows)
    lowest = int(means.argmin())
    ties = {lowest, *within_noise(rows, lowest, range(len(rows)))}
    columns = zip(means.tolist(), errors.tolist(), low.tolist(), high.tolist(), strict=True)
    return [
        LayerScore(layer, *values, tied=position in ties)
        for position, (layer, values) in enumerate(zip(layers, columns, strict=True))
    ]


def bootstrap(rows: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """2.5 and 97.5 % points [L] of the mean of rows [L, W] over resampled windows, the same windows for all layers.

    One window, or a score that reads none, has no interval: nan.
    """
    if rows.shape[1] < 2:
        return torch.full((len(rows),), torch.nan), torch.full((len(rows),), torch.nan)
    low, high = interval(resampled_means(rows.T, _RESAMPLES, seed)).float()
    return low, high


def standard_error(rows: Tensor) -> Tensor:
    """Standard error [L] of the mean over windows of rows [L, W], from the spread between windows; nan where W = 1."""
    windows = rows.shape[1]
    if windows < 2:  # std itself would warn
        return torch.full((rows.shape[0],), torch.nan)
    return (rows.double().std(1) / windows**0.5).float()


def within_noise(rows: Tensor, chosen: int, candidates: Sequence[int]) -> list[int]:
    """The candidates that the windows cannot tell from the chosen block.

    Differences are paired by window: what makes a window hard for every block cancels.

    Args:
        rows: scores [L, W].
        chosen: position of the chosen block.
        candidates: positions to compare with it; `chosen` itself is never returned.

    Returns:
        Positions whose mean difference to the chosen block is at most one paired standard error, either way; a tie in
        every window counts. Empty for one window, which says nothing about noise. Windows that were not read for the
        chosen block (nan) do not count, and a block that was not read on the others is no tie.
    """
    others = [position for position in candidates if position != chosen]
    rows = rows[:, rows[chosen].isfinite()]
    if not others:
        return []
    difference = rows[others].double() - rows[chosen].double()
    close = difference.mean(1).abs() <= standard_error(difference).double()
    return [position for position, tied in zip(others, close.tolist(), strict=True) if tied]
