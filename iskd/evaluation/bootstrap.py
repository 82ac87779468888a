"""How sure a mean is: the percentile bootstrap over items, windows or texts (Efron, 1979)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from iskd.evaluation.tasks.aggregates import Aggregate

_AT_A_TIME = 1 << 22  # weights of items in memory
_OF_TEXTS = 100  # resamples of what reads texts; lm-evaluation-harness takes as many


def resampled_means(values: Tensor, resamples: int, seed: int) -> Tensor:
    """Means over the items of bootstrap resamples [resamples, ...] in float64, for values [N, ...] of N items.

    What stands in one row, such as two models' scores, is drawn together. A few resamples exist at a time: all of them
    at once would be gigabytes for BLiMP. The draws are one stream of the seed, so that how many exist at a time changes
    nothing.
    """
    items, generator = len(values), torch.Generator().manual_seed(seed)
    step = max(1, _AT_A_TIME // items)
    values_NK = values.double().reshape(items, -1)
    means = []
    for start in range(0, resamples, step):
        drawn_RN = torch.randint(items, (min(step, resamples - start), items), generator=generator)
        # [R, N] item numbers with replacement -> how often each was drawn: no copy of the values for every resample
        times_RN = torch.zeros(drawn_RN.shape, dtype=torch.float64)
        times_RN.scatter_add_(1, drawn_RN, torch.ones_like(times_RN))
        means.append(times_RN @ values_NK / items)
    return torch.cat(means).reshape(resamples, *values.shape[1:])


def resampled_together(models: Sequence[Aggregate], resamples: int, seed: int) -> Tensor:
    """A metric that is no mean [1 + resamples, models], float64: of all items, then of resamples of them.

    Items are drawn for all models alike. Where texts are read for every number, few resamples are drawn, each of which
    then stands for several.
    """
    items, generator = len(models[0].told), torch.Generator().manual_seed(seed)
    few = min(resamples, _OF_TEXTS) if models[0].reads_texts else resamples
    drawn = []
    for _ in range(few):
        rows = torch.randint(items, (items,), generator=generator).tolist()
        drawn.append([model.over(rows) for model in models])
    whole = [model.whole() for model in models]
    return torch.tensor([whole, *(drawn[number % few] for number in range(resamples))], dtype=torch.float64)


def interval(means: Tensor, level: float = 0.95) -> Tensor:
    """Percentiles [2, ...] between which that share of the resampled means [resamples, ...] lies."""
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return means.quantile(tails, dim=0)
