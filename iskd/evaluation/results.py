"""What was measured about a finished student: efficiency.json and evaluation.json of a run, read for people.

A number that a file lacks, or that is no number, is NaN and shows as absent: a page about ten measurements must not
fail because of the eleventh. Keys that are not known here are kept in `Evaluation.rest` and `Efficiency.machine`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from iskd.plan.run_folder import EFFICIENCY_FILE, EVALUATION_FILE
from iskd.system.files import MAX_NUMBER


@dataclass(frozen=True)
class AtContext:
    """One model at one context length.

    Attributes:
        context: Tokens of the context.
        prefill_seconds: Time to read the whole context; NaN where it was not read and the cache filled instead.
        decode_seconds_per_token: Time of one more token after it.
        cache_bytes: Keys and values, or the mixers' states, held between two tokens.
    """

    context: int
    prefill_seconds: float
    decode_seconds_per_token: float
    cache_bytes: float


@dataclass(frozen=True)
class Measured:
    """Size and speed of one model; contexts ascending, each length once; why others were left out, by length."""

    params: float
    weight_bytes: float
    peak_memory_bytes: float
    contexts: tuple[AtContext, ...]
    left_out: Mapping[int, str] = field(default_factory=dict)

    def at(self, context: int) -> AtContext | None:
        """The measurement at a context length, None where there is none."""
        return next((found for found in self.contexts if found.context == context), None)


@dataclass(frozen=True)
class Efficiency:
    """efficiency.json: the machine, and what both models cost on it."""

    machine: Any
    teacher: Measured | None
    student: Measured | None


@dataclass(frozen=True)
class Interval:
    """A ratio and the bounds of its interval; NaN where something is not known."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TaskScore:
    """Scores on one task, ratios, by the `metric`; `items` is how many questions both models were asked."""

    name: str
    student: float
    teacher: float
    retention: Interval
    items: float
    chance: float = math.nan
    metric: str = ""


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json.

    Attributes:
        tasks: In the file's order.
        means: Mean retention by kind of task, as the file gives it.
        mean: Mean retention over all tasks, without bounds where the file gives none for it.
        rest: Whatever else the file says.
    """

    tasks: tuple[TaskScore, ...]
    means: dict[str, Interval]
    mean: Interval
    rest: dict[str, Any]


def efficiency_of(value: Any) -> Efficiency:
    """What efficiency.json holds.

    Raises:
        ValueError: It is no JSON object, or holds neither model.
    """
    data = _object(value, EFFICIENCY_FILE)
    teacher, student = _measured(data.get("teacher")), _measured(data.get("student"))
    if teacher is None and student is None:
        raise ValueError(f"{EFFICIENCY_FILE} holds neither 'teacher' nor 'student': measure the run again")
    return Efficiency(data.get("machine"), teacher, student)


def evaluation_of(value: Any) -> Evaluation:
    """What evaluation.json holds.

    Raises:
        ValueError: It is no JSON object.
    """
    rest = dict(_object(value, EVALUATION_FILE))
    listed = _named(rest.get("tasks"))
    if listed is not None:
        del rest["tasks"]
    tasks = tuple(_task(name, scores) for name, scores in listed or [])
    by_kind = rest.get("retention")
    means: dict[str, Interval] = {}
    if isinstance(by_kind, dict) and all(isinstance(each, dict) for each in by_kind.values()):
        means = {str(kind): _interval(each) for kind, each in rest.pop("retention").items()}
    told = _interval(rest.pop("mean_retention", None))
    return Evaluation(tasks, means, _mean(told, means, tasks), rest)


def _mean(told: Interval, means: dict[str, Interval], tasks: tuple[TaskScore, ...]) -> Interval:
    """The mean over all tasks: as told, or that of the one kind there is, or computed."""
    if not math.isnan(told.value):
        return told
    if len(means) == 1:
        return next(iter(means.values()))
    known = [task.retention.value for task in tasks if math.isfinite(task.retention.value)]
    return Interval(sum(known) / len(known) if known else math.nan, math.nan, math.nan)


def _named(value: Any) -> list[tuple[str, dict[str, Any]]] | None:
    """Tasks as (name, scores): an object by name, or a list of objects that say their name under `task`."""
    if isinstance(value, dict) and all(isinstance(scores, dict) for scores in value.values()):
        return [(str(name), scores) for name, scores in value.items()]
    if isinstance(value, list) and all(isinstance(scores, dict) and "task" in scores for scores in value):
        return [(str(scores["task"]), scores) for scores in value]
    return None


def _task(name: str, scores: dict[str, Any]) -> TaskScore:
    retention = scores.get("retention")
    if not isinstance(retention, dict):
        retention = {"value": retention, "low": scores.get("low"), "high": scores.get("high")}
    student, teacher, items, chance = (_number(scores.get(key)) for key in ("student", "teacher", "items", "chance"))
    metric = scores.get("metric")
    return TaskScore(
        name, student, teacher, _interval(retention), items, chance, metric if isinstance(metric, str) else ""
    )


def _interval(value: Any) -> Interval:
    if not isinstance(value, dict):
        return Interval(_number(value), math.nan, math.nan)
    return Interval(*(_number(value.get(key)) for key in ("value", "low", "high")))


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must hold a JSON object, got {type(value).__name__}: write it again")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _measured(value: Any) -> Measured | None:
    if not isinstance(value, dict):
        return None
    listed = value.get("contexts")
    found = {}
    for item in listed if isinstance(listed, list) else []:
        length = item.get("context") if isinstance(item, dict) else None
        if isinstance(length, int) and not isinstance(length, bool) and 0 < length <= MAX_NUMBER:
            keys = ("prefill_seconds", "decode_seconds_per_token", "cache_bytes")
            found[length] = AtContext(length, *(_number(item.get(key)) for key in keys))
    params, weights, peak = (_number(value.get(key)) for key in ("params", "bytes", "peak_memory_bytes"))
    return Measured(params, weights, peak, tuple(found[length] for length in sorted(found)), _reasons(value))


def _reasons(value: dict[str, Any]) -> dict[int, str]:
    """Why contexts were not measured, by their length ascending."""
    told = value.get("left_out")
    items = told.items() if isinstance(told, dict) else ()
    known = {int(at): why for at, why in items if at.isdecimal() and len(at) < 18 and isinstance(why, str)}
    return dict(sorted(known.items()))
