"""All stages that a schedule would give, before the first one runs."""

from __future__ import annotations

from collections.abc import Sequence

from iskd.plan import Stage
from iskd.schedules.base import History, Schedule, next_stage


def forecast(schedule: Schedule, history: History) -> list[Stage]:
    """All stages if every one of them is kept. Exact for fixed orders; with rescoring, later layers may differ."""
    stages: list[Stage] = []
    while (stage := next_stage(schedule, history)) is not None:
        stages.append(stage)
        history = history.after(stage)
    return stages


def stage_steps(stage: Stage, finished: Sequence[Stage], steps_done: int, step_tokens: int) -> int:
    """Optimizer steps of a stage, so that the run's sum is its budget rounded once and not stage by stage.

    At least one for a stage that trains; 0 for one that only edits.
    """
    if not stage.tokens:
        return 0
    end = sum(past.tokens for past in finished) + stage.tokens
    return max(1, round(end / step_tokens) - steps_done)


def planned_steps(stages: Sequence[Stage], step_tokens: int) -> list[int]:
    """Optimizer steps of every stage of a plan."""
    steps: list[int] = []
    for index, stage in enumerate(stages):
        steps.append(stage_steps(stage, stages[:index], sum(steps), step_tokens))
    return steps
