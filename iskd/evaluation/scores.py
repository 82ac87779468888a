"""What a comparison on tasks found: scores by task, retention with intervals.

Retention is the student's score / the teacher's on the same items, by task and as the mean over tasks, apart for
multiple choice and for generation: students without some layers often still choose well when they can no longer write.
Chance stands beside every score, as a ratio says nothing about tasks on which both models guess.

Intervals hold 95 % of a bootstrap over items, which are drawn for both models alike (Koehn, EMNLP 2004). Those of means
over tasks come from the same draws, each task's items drawn on their own: tasks count alike, whatever their metric and
their number of items, and how much another choice of tasks would change is not in the interval. A metric that is no
mean over items is computed anew on every draw. Where the two models' contexts were too short for different numbers of
texts, they were not asked the same, and a ratio would say nothing of what was kept.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from iskd.evaluation.bootstrap import interval, resampled_means, resampled_together
from iskd.evaluation.judging import Paired, TaskResult, paired
from iskd.evaluation.results import Interval, TaskScore

CHOICE, GENERATION, LIKELIHOOD = "choice", "generation", "likelihood"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Scored:
    """One model on one task.

    Attributes:
        kind: `choice`, the likeliest of several texts must be the right one, `generation`, greedy decoding must give
            it, or `likelihood`, a text's own probability counts.
        metric: the metric of `result` that is compared, most of them in [0, 1].
        chance: what guessing gets.
        result: all metrics by item.
        higher: whether more of the metric is better; of one where less is, retention is teacher / student.
    """

    kind: str
    metric: str
    chance: float
    result: TaskResult
    higher: bool = True


def compare(
    student: Mapping[str, Scored],
    teacher: Mapping[str, Scored] | None,
    *,
    resamples: int,
    seed: int,
    beyond: Collection[str] = (),
) -> tuple[tuple[TaskScore, ...], dict[str, Interval], Interval | None]:
    """Scores by task, mean retention by kind, and over all tasks.

    Args:
        student: by task.
        teacher: the same tasks and items; None = nothing to compare with.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        beyond: tasks whose texts the teacher cannot read whole, so that no ratio to its score says anything.

    Raises:
        ValueError: the two were not asked the same items.
    """
    scores: list[TaskScore] = []
    ratios: dict[str, Tensor] = {}
    for task, mine in student.items():
        theirs = None if teacher is None else teacher[task]
        if theirs is None:
            scores.append(_score(task, mine, None, None, None))
            continue
        difference = paired(mine.result, theirs.result, mine.metric, resamples=resamples, seed=seed)
        ratios[task] = _ratios(mine, theirs, resamples, zlib.crc32(f"{seed}/{task}".encode()))
        cut = mine.result.cut, theirs.result.cut
        if cut[0] != cut[1]:
            told = "%s: the context of the student is too short for %d texts, the teacher's for %d: no ratio is taken"
            _log.warning(told, task, *cut)
        if task in beyond or cut[0] != cut[1]:
            ratios[task] = torch.full_like(ratios[task], torch.nan)
        scores.append(_score(task, mine, theirs, difference, _estimate(ratios[task])))
    kept = {task: row for task, row in ratios.items() if row[0].isfinite()}
    means: dict[str, Interval] = {}
    for kind in (CHOICE, GENERATION, LIKELIHOOD):
        some = [row for task, row in kept.items() if student[task].kind == kind]
        if some:
            means[kind] = _estimate(torch.stack(some).mean(0))
    return tuple(scores), means, _estimate(torch.stack(list(kept.values())).mean(0)) if kept else None


def _score(
    task: str, mine: Scored, theirs: Scored | None, difference: Paired | None, retention: Interval | None
) -> TaskScore:
    metrics = {"student": _means(mine.result)} | ({} if theirs is None else {"teacher": _means(theirs.result)})
    return TaskScore(
        task=task,
        kind=mine.kind,
        metric=mine.metric,
        items=len(mine.result.ids),
        chance=mine.chance,
        student=mine.result.mean(mine.metric),
        student_error=mine.result.stderr(mine.metric),
        teacher=None if theirs is None else theirs.result.mean(mine.metric),
        teacher_error=None if theirs is None else theirs.result.stderr(mine.metric),
        difference=None if difference is None else Interval(difference.difference, difference.low, difference.high),
        retention=retention,
        metrics=metrics,
    )


def _means(result: TaskResult) -> dict[str, float]:
    return {metric: result.mean(metric) for metric in result.metrics}


def _ratios(mine: Scored, theirs: Scored, resamples: int, seed: int) -> Tensor:
    """Student's score / teacher's [1 + resamples], float64: on the items, then on every resample of them."""
    if mine.metric in mine.result.wholes:
        both = [one.result.wholes[mine.metric] for one in (mine, theirs)]
        means = resampled_together(both, resamples, seed)
    else:
        both_N2 = torch.stack([one.result.of(mine.metric).double() for one in (mine, theirs)], dim=1)
        means = torch.cat([both_N2.mean(0, keepdim=True), resampled_means(both_N2, resamples, seed)])
    student, teacher = means.unbind(1)
    if not mine.higher:
        student, teacher = teacher, student
    return torch.where(teacher > 0, student / teacher, torch.nan)


def _estimate(values: Tensor) -> Interval:
    """The first of the values, and the interval of the others, as far as they are finite."""
    first, others = float(values[0]), values[1:][values[1:].isfinite()]
    if math.isnan(first) or not len(others):
        return Interval(first, math.nan, math.nan)
    return Interval(first, *interval(others).tolist())
