"""Scores of a model on items, from the log-likelihoods of their choices.

As in lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.12608602) `acc` picks the continuation of the highest sum of
log p, `acc_norm` that of the highest sum per character. Of an item with a single choice it is right that greedy
decoding gives it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iskd.data import Framing
from iskd.evaluation.bootstrap import interval, resampled_means, resampled_together
from iskd.evaluation.likelihood import BATCH_TOKENS, Likelihoods, Step, log_likelihoods
from iskd.evaluation.tasks import Item
from iskd.evaluation.tasks.aggregates import Aggregate

METRICS = ("acc", "acc_norm", "acc_token", "log_p", "led", "hits")
"""What `judge` finds; `TaskResult` says what they are."""
_RESAMPLES = 100  # behind the standard error of what is no mean


@dataclass(frozen=True, eq=False)
class TaskResult:
    """Scores of a model by item.

    Attributes:
        ids: the items' ids.
        values: by metric, one number per item [N] in float32: `acc`, `acc_norm` and `acc_token` (by the mean over all
            characters, over all tokens), 1 = right; `log_p` of the right
            continuation in nats; `led`, the share of its tokens that greedy decoding gives before its first mistake;
            `hits`, the share that are the likeliest after the right ones before them.
        wholes: metrics that are a number of all items and no mean over them.
        cut: how many texts the model's context was too short for: of the question, or of the answer it was to write.
    """

    ids: tuple[str, ...]
    values: dict[str, Tensor]
    wholes: Mapping[str, Aggregate] = field(default_factory=dict)
    cut: int = 0

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics."""
        return (*self.values, *self.wholes)

    def of(self, metric: str) -> Tensor:
        """Values [N] of a metric. Raises ValueError for an unknown one, and for one that items do not have."""
        if metric not in self.values:
            raise ValueError(f"unknown metric {metric!r}: choose one of {', '.join(self.values)}")
        return self.values[metric]

    def mean(self, metric: str = "acc") -> float:
        """The metric of all items, which is the mean over them unless it is one of `wholes`."""
        return self.wholes[metric].whole() if metric in self.wholes else self.of(metric).double().mean().item()

    def stderr(self, metric: str = "acc") -> float:
        """Standard error of the mean; nan for a single item. Of `wholes` the deviation over resamples of the items."""
        if metric in self.wholes:
            drawn = resampled_together([self.wholes[metric]], _RESAMPLES, 0)[1:, 0]
            known = drawn[drawn.isfinite()]
            return known.std().item() if len(known) > 1 and len(self.ids) > 1 else float("nan")
        values = self.of(metric).double()
        return float("nan") if len(values) < 2 else (values.std() / len(values) ** 0.5).item()


@dataclass(frozen=True)
class Paired:
    """Mean difference of two models on the same items, with a bootstrap confidence interval."""

    difference: float
    low: float
    high: float


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    batch_tokens: int = BATCH_TOKENS,
    step: Step | None = None,
    frame: Framing | None = None,
    first_given: bool = False,
) -> TaskResult:
    """Scores of a model on items; for `first_given` see `by_branch`.

    Raises ValueError as `log_likelihoods` does, and when there is no item.
    """
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "step": step, "frame": frame}
    return judge(items, log_likelihoods(model, tokenizer, pairs_of(items), first_given=first_given, **options))


def paired(
    a: TaskResult, b: TaskResult, metric: str = "acc", *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Paired:
    """Difference `a` minus `b` on the same items, with the percentile interval of a bootstrap over items.

    Raises:
        ValueError: the two do not have the same items in the same order, or an unknown metric.
    """
    if a.ids != b.ids:
        raise ValueError(
            f"a paired difference needs the same items in the same order, got {len(a.ids)} and {len(b.ids)}"
        )
    if metric in a.wholes:
        both = resampled_together([a.wholes[metric], b.wholes[metric]], resamples, seed)
        gaps = both[:, 0] - both[:, 1]
        known = gaps[1:][gaps[1:].isfinite()]
        return Paired(gaps[0].item(), *(interval(known, level).tolist() if len(known) else (math.nan, math.nan)))
    differences = (a.of(metric) - b.of(metric)).double()
    low, high = interval(resampled_means(differences, resamples, seed), level).tolist()
    return Paired(differences.mean().item(), low, high)


def pairs_of(items: Sequence[Item]) -> list[tuple[str, str]]:
    """(context, continuation) of all choices of all items, in order."""
    return [pair for item in items for pair in item.pairs]


def judge(items: Sequence[Item], found: Likelihoods) -> TaskResult:
    """Scores that follow from the likelihoods of `pairs_of(items)`; of equal choices the first counts.

    Raises:
        ValueError: an item has a choice whose likelihood is nan, or none that is possible at all.
    """
    log_p = found.log_p.tolist()
    norm = (found.log_p / found.characters).tolist()
    by_token = (found.log_p / found.tokens).tolist()
    greedy, led, hits = found.greedy.tolist(), *((one / found.tokens).tolist() for one in (found.led, found.hits))
    rows, start = [], 0
    for item in items:  # its choices are start..end-1
        end, gold = start + len(item.pairs), start + item.gold
        if any(map(math.isnan, log_p[start:end])) or not math.isfinite(max(log_p[start:end])):
            raise ValueError(
                f"item {item.id}: the model gives {', '.join(f'{value:g}' for value in log_p[start:end])} for its "
                "choices, among which none is best: its weights are broken"
            )
        if end - start == 1:  # nothing to choose from: right is what greedy decoding gives
            right = [greedy[start]] * 3
        else:
            right = [max(range(start, end), key=values.__getitem__) == gold for values in (log_p, norm, by_token)]
        rows.append([*map(float, right), log_p[gold], led[gold], hits[gold]])
        start = end
    columns = torch.tensor(rows).unbind(1)
    return TaskResult(
        tuple(item.id for item in items),
        dict(zip(METRICS, columns, strict=True)),
        cut=found.cut,
    )
