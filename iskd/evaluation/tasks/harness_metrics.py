"""What a task of lm-evaluation-harness reports, and which of it is compared.

A metric is a mean over items, or what the harness's own aggregation makes of all of them (MCC, F1, a perplexity, BLEU
of a corpus): such a one is kept with what each item contributes (`Aggregate`), so that items can be drawn anew by a
bootstrap. A task that reads an answer off a text in several ways reports each metric once per way (filter): the first
way's under the metric's name, every way's as `metric,filter`, which is how the harness writes it. RULER names metrics
after lengths and gives an item that of its own length, -1 for the others: they are one metric here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iskd.evaluation.tasks.aggregates import Aggregate

USUAL = ("acc", "acc_norm", "exact_match")
"""Metrics that are reported beside the main one, where a task has them."""
BY_LENGTH = "string_match"
"""Our name of a metric that the harness names after lengths."""
_PERCENT = frozenset({"bleu", "chrf", "chrfpp", "ter"})
"""Aggregations of the harness that give per cent, by the names of their functions."""
_LOWER = frozenset({"ter", "bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity", "brier_score"})
_ALONE = "none"  # the harness's name of the only way where a task names none
_NO_METRIC = "bypass"
_OWN = "lm_eval.api.metrics"

Sample = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Found:
    """What a model got on a task: the metric that is compared, values [N] by item, and metrics of all items."""

    main: str
    values: dict[str, Tensor]
    wholes: dict[str, Aggregate]


def reported(tasks: Mapping[str, Any]) -> list[str]:
    """Metrics that all of a group's tasks report, in their order, then those of each way of reading an answer."""
    lists = [list(task.aggregation()) for task in tasks.values()]
    names = [name for name in lists[0] if all(name in other for other in lists)] if lists else []
    lengths = [name for name in names if name.isdecimal()]
    plain = [name for name in names if name not in lengths and name != _NO_METRIC]
    plain += [BY_LENGTH] if lengths else []
    ways = _ways_of(tasks)
    return [*plain, *(f"{name},{way}" for way in ways for name in plain if len(ways) > 1)]


def check_metric(name: str, asked: str | None, tasks: Mapping[str, Any]) -> None:
    """Raise ValueError where a task does not report the metric that was asked for."""
    known = reported(tasks)
    alone = [f"{metric},{way}" for way in _ways_of(tasks) for metric in known]
    if asked is not None and asked not in (*known, *alone) and known:
        raise ValueError(
            f"task {name!r} reports no metric {asked!r}: set eval.metrics.{name} to {' or '.join(map(_quoted, known))}"
        )


def higher_is_better(metric: str, tasks: Mapping[str, Any]) -> bool:
    """Whether more of a metric is better, as the harness says; by its name where it says nothing."""
    name = metric.partition(",")[0]
    said = [task.higher_is_better().get(name) for task in tasks.values()]
    return bool(said[0]) if said and said[0] is not None else name not in _LOWER


def values_of(
    name: str, samples: Mapping[str, Sequence[Sample]], tasks: Mapping[str, Any], asked: str | None, usual: str = ""
) -> Found:
    """The metrics of a task that a model was asked.

    Args:
        name: of the task, for messages.
        samples: by task of the harness what it logged, way after way.
        tasks: the harness's objects by name.
        asked: the metric to compare; None = `usual` where there is one, the first of `USUAL`, else the first.
        usual: as `asked`, where it is reported.

    Raises:
        ValueError: there is no metric, the asked one is not reported, or its values are no numbers.
    """
    leaves = [leaf for leaf, logged in samples.items() for _ in _first(logged)]
    columns = {metric: told for metric, told in _columns(samples) if metric != _NO_METRIC}
    if not columns:
        raise ValueError(f"task {name!r} reports no metric of its items: choose another task")
    if asked is not None and asked not in columns:
        plain = ", ".join(columns)
        raise ValueError(f"task {name!r} reports no metric {asked!r}: set eval.metrics.{name} to one of {plain}")
    first = [metric for metric in columns if "," not in metric]
    common = [metric for metric in columns if metric.partition(",")[0] in USUAL]
    main = asked or next((metric for metric in (usual, *USUAL) if metric in columns), first[0])
    values, wholes = dict[str, Tensor](), dict[str, Aggregate]()
    several = any(len(_first(logged)) < len(logged) for logged in samples.values())
    for metric in dict.fromkeys([main, *(common or columns)]):
        if "," in metric and metric != main and not several:
            continue
        made = _column(metric, columns[metric], leaves, tasks)
        if isinstance(made, Aggregate):
            wholes[metric] = made
        elif made is not None:
            values[metric] = made
    if main not in values and main not in wholes:
        raise ValueError(f"task {name!r}: the values of its metric {main!r} are no numbers: choose another metric")
    return Found(main, values, wholes)


def _ways_of(tasks: Mapping[str, Any]) -> list[str]:
    """Ways in which all tasks read an answer off a text."""
    lists = [
        [str(each.get("name")) for each in getattr(task.config, "filter_list", None) or ()] or [_ALONE]
        for task in tasks.values()
    ]
    return [way for way in lists[0] if all(way in other for other in lists)] if lists else []


def _quoted(name: str) -> str:
    """As it is to be written in a list of keys."""
    return f'"{name}"' if "," in name else name


def _first(logged: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in logged if sample["filter"] == logged[0]["filter"]]


def _columns(samples: Mapping[str, Sequence[Sample]]) -> Iterator[tuple[str, list[Any]]]:
    """By metric what each item contributes: of the first way under the metric's name, then of every way."""
    lists = [dict.fromkeys(str(sample["filter"]) for sample in logged) for logged in samples.values()]
    ways: list[str | None] = [None, *(way for way in lists[0] if all(way in other for other in lists))]
    for way in ways:
        told = [
            _told(sample)
            for logged in samples.values()
            for sample in (_first(logged) if way is None else logged)
            if way is None or sample["filter"] == way
        ]
        for metric in told[0]:
            if all(metric in each for each in told):
                yield metric if way is None else f"{metric},{way}", [each[metric] for each in told]


def _told(sample: Sample) -> dict[str, Any]:
    """Values of an item by metric."""
    found = {str(name): sample[name] for name in sample["metrics"] if name in sample}
    lengths = {name: value for name, value in found.items() if name.isdecimal()}
    if lengths:
        own = [float(value) for value in lengths.values() if float(value) >= 0]
        found = {name: value for name, value in found.items() if name not in lengths}
        found[BY_LENGTH] = own[0] if own else math.nan
    return found


def _column(metric: str, told: list[Any], leaves: Sequence[str], tasks: Mapping[str, Any]) -> Tensor | Aggregate | None:
    """Values [N] of what is a mean over items, the aggregate of what is not; None where there is no number."""
    name = metric.partition(",")[0]
    functions = {leaf: task.aggregation().get(name) for leaf, task in tasks.items() if leaf in leaves}
    numbers = [_number(value) for value in told]
    if all(number is not None for number in numbers) and (
        name == BY_LENGTH or all(function is None or _own_name(function) == "mean" for function in functions.values())
    ):
        return torch.tensor([float(number or 0.0) for number in numbers])
    if any(function is None for function in functions.values()):
        return None
    per_cent = all(_own_name(function) in _PERCENT for function in functions.values())
    made = Aggregate(told, leaves, functions, 100.0 if per_cent else 1.0)
    try:
        made.check()
    except Exception:  # of whoever wrote the task: it needs a package, the hub, another kind of value
        return None
    return made


def _own_name(function: Any) -> str:
    """The name of an aggregation that is the harness's own; empty for a task's."""
    return str(getattr(function, "__name__", "")) if getattr(function, "__module__", "") == _OWN else ""


def _number(value: Any) -> float | None:
    plain = isinstance(value, bool | int | float) or (hasattr(value, "item") and getattr(value, "size", 0) == 1)
    return float(value) if plain else None
