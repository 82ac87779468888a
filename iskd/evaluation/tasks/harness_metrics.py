"""What a task of lm-evaluation-harness reports, item by item, and which of it is compared.

The harness gives most metrics per item as numbers; others as what its aggregation takes (a reference and a prediction
for BLEU, a log-likelihood and a number of words for a perplexity): such an item is aggregated alone, so that items can
be drawn by a bootstrap. RULER names metrics after lengths and gives an item that of its own length, -1 for the others:
they are one metric here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

USUAL = ("acc", "acc_norm", "exact_match")
"""Metrics that are reported beside the main one, where a task has them."""
BY_LENGTH = "string_match"
"""Our name of a metric that the harness names after lengths."""
_PERCENT = frozenset({"bleu", "chrf", "ter", "rouge1", "rouge2", "rougeL", "rougeLsum"})
_LOWER = frozenset({"ter", "bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity", "brier_score"})


def reported(tasks: Mapping[str, Any]) -> list[str]:
    """Metrics that all of a group's tasks report, in their order."""
    lists = [list(task.aggregation()) for task in tasks.values()]
    names = [name for name in lists[0] if all(name in other for other in lists)] if lists else []
    lengths = [name for name in names if name.isdecimal()]
    return [*(name for name in names if name not in lengths), *([BY_LENGTH] if lengths else [])]


def check_metric(name: str, asked: str | None, tasks: Mapping[str, Any]) -> None:
    """Raise ValueError where a task does not report the metric that was asked for."""
    known = reported(tasks)
    if asked is not None and asked not in known and known:
        raise ValueError(f"task {name!r} reports no metric {asked!r}: set eval.metrics.{name} to {' or '.join(known)}")


def higher_is_better(metric: str, tasks: Mapping[str, Any]) -> bool:
    """Whether more of a metric is better, as the harness says; by its name where it says nothing."""
    said = [task.higher_is_better().get(metric) for task in tasks.values()]
    return bool(said[0]) if said and said[0] is not None else metric not in _LOWER


def values_of(
    name: str, samples: Sequence[tuple[str, Mapping[str, Any]]], tasks: Mapping[str, Any], asked: str | None
) -> dict[str, Tensor]:
    """Values [N] of the metrics by item, the one that is compared first.

    Args:
        name: of the task, for messages.
        samples: each item's task and what the harness logged of it.
        tasks: the harness's objects by name.
        asked: the metric to compare; None = the first of `USUAL`, else the first that is reported.

    Raises:
        ValueError: there is no metric, the asked one is not reported, or its values are no numbers.
    """
    told = [_told(leaf, sample, tasks) for leaf, sample in samples]
    names = [metric for metric in told[0] if all(metric in each for each in told)]
    if not names:
        raise ValueError(f"task {name!r} reports no metric item by item: choose another task")
    if asked is not None and asked not in names:
        raise ValueError(f"task {name!r} reports no metric {asked!r}: set eval.metrics.{name} to {' or '.join(names)}")
    usual = [metric for metric in USUAL if metric in names]
    main = asked or (usual or names)[0]
    kept = dict.fromkeys([main, *(usual or names)])
    values: dict[str, Tensor] = {}
    for metric in kept:
        numbers = [_number(metric, each[metric], tasks[leaf]) for each, (leaf, _) in zip(told, samples, strict=True)]
        if all(number is not None for number in numbers):
            values[metric] = torch.tensor([float(number or 0.0) for number in numbers])
    if main not in values:
        raise ValueError(f"task {name!r}: the values of its metric {main!r} are no numbers: choose another metric")
    return values


def _told(leaf: str, sample: Mapping[str, Any], tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Values of an item by metric."""
    listed = sample.get("metrics")
    names = listed if isinstance(listed, list) else [name for name in tasks[leaf].aggregation() if name in sample]
    found = {str(name): sample[name] for name in names if name in sample}
    lengths = {name: value for name, value in found.items() if name.isdecimal()}
    if lengths:
        own = [float(value) for value in lengths.values() if float(value) >= 0]
        found = {name: value for name, value in found.items() if name not in lengths}
        found[BY_LENGTH] = own[0] if own else math.nan
    return found


def _number(metric: str, value: Any, task: Any) -> float | None:
    """A value as a number in the metric's own unit, or in [0, 1] where that is per cent."""
    aggregate = task.aggregation().get(metric)
    plain = isinstance(value, bool | int | float) or (hasattr(value, "item") and getattr(value, "size", 0) == 1)
    if aggregate is not None and (not plain or metric in _LOWER):
        try:
            value = aggregate([value])
        except Exception:
            return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number / 100 if metric in _PERCENT and number > 1 else number
