"""Scores along runs: against blocks edited (as ISKD draws them), layers left (ILD) and training tokens (all)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from iskd.evaluation import Evaluation
from iskd.evaluation.results import evaluation_of
from iskd.plan import StageResult
from iskd.plan.edits import REMOVAL_OPS
from iskd.plan.results import kept_of
from iskd.report.figures.style import PALETTE, figure_of, set_heading, short_label, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TEXT = "text perplexity"
MOST_LINES = 12
"""Lines of a panel."""
_LOOKS = (
    *((PALETTE["blue"], "-o"), (PALETTE["vermillion"], "--s"), (PALETTE["green"], "-.^"), (PALETTE["purple"], ":D")),
    *((PALETTE["orange"], "--v"), (PALETTE["sky"], "-.P")),
)


@dataclass(frozen=True)
class ScorePoint:
    """A student between two stages, or inside one.

    Attributes:
        edited: Blocks that were edited so far, removed ones among them.
        layers: Layers left.
        tokens: Training tokens so far.
        retention: Its mean over tasks where they were asked, else that on validation text; low, high: its interval.
        tasks: Scores by task, and perplexity on the text that was asked for; whether each is a share.
        inside: Whether it was measured inside a stage.
    """

    edited: int
    layers: int
    tokens: int
    retention: float
    low: float = math.nan
    high: float = math.nan
    tasks: Mapping[str, tuple[float, bool]] | None = None
    inside: bool = False


@dataclass(frozen=True)
class ScoreCurve:
    """The points of a run, in order, and whether their retention is that of tasks."""

    name: str
    points: Sequence[ScorePoint]
    by_tasks: bool


def asked_of(stage: StageResult) -> Evaluation | None:
    """What tasks and text said of a stage's student; None where it was not asked, or says nothing."""
    try:
        return None if stage.evaluation is None else evaluation_of(stage.evaluation)
    except ValueError:
        return None


def items_of(found: Evaluation | None) -> dict[str, tuple[object, ...]]:
    """By task, and for the text, what has to be equal where two evaluations have asked the same."""
    if found is None:
        return {}
    asked: dict[str, tuple[object, ...]] = {task.task: (task.metric, str(task.items)) for task in found.tasks}
    return asked if found.text is None else {**asked, _TEXT: (found.text.sha256,)}


def _scores_of(found: Evaluation, asked: Mapping[str, tuple[object, ...]]) -> dict[str, tuple[float, bool]]:
    """Scores of what others were asked too, and of the same items."""
    scores = {task.task: (task.student, task.per_cent) for task in found.tasks}
    scores |= {} if found.text is None else {_TEXT: (found.text.perplexity, False)}
    mine = items_of(found)
    return {name: score for name, score in scores.items() if mine[name] == asked.get(name)}


def score_curve(name: str, stages: Sequence[StageResult], num_layers: int) -> ScoreCurve:
    """The points of a run: kept stages, and between them what was measured inside.

    A run that was continued with other tasks has no mean along all of it; of tasks those scores are left that were
    taken on the items of the last stage that was asked.
    """
    kept, points = kept_of(stages), list[ScorePoint]()
    every = [asked_of(stage) for stage in kept]
    last = items_of(next((found for found in reversed(every) if found is not None), None))
    by_tasks = len(kept) > 1 and all(
        found and math.isfinite(found.mean.value) and {**items_of(found), _TEXT: ()} == {**last, _TEXT: ()}
        for found in every
    )
    edited, layers = set[int](), num_layers
    for stage in kept:
        edited |= {edit["layer"] for edit in stage.edits}
        layers -= sum(edit["op"] in REMOVAL_OPS for edit in stage.edits)
        at = (len(edited), layers)
        if not by_tasks:
            points += [
                ScorePoint(*at, int(each["tokens"]), each.get("retention", math.nan), inside=True)
                for each in stage.inside
                if math.isfinite(each["tokens"])
            ]
        found = asked_of(stage)
        tasks = None if found is None else _scores_of(found, last) or None
        low, high = (stage.intervals or {}).get("retention", [math.nan, math.nan])
        told = (stage.retention, low, high)
        if by_tasks and found is not None:
            told = (found.mean.value, found.mean.low, found.mean.high)
        points.append(ScorePoint(*at, stage.tokens, *told, tasks=tasks))
    return ScoreCurve(name, points, by_tasks)


_AXES: tuple[tuple[str, Callable[[ScorePoint], float]], ...] = (
    ("blocks edited", lambda point: point.edited),
    ("layers left", lambda point: point.layers),
    ("training tokens (thousands)", lambda point: point.tokens / 1e3),
)


def retention_curves(curves: Sequence[ScoreCurve], number: int = 0) -> str | None:
    """Retention of several runs, or of one, against whatever of the three changes along them; None where nothing does.

    Tasks and validation text are different scores: where only some runs have tasks, all are drawn by their text, which
    the caller has to see to. Of more than `MOST_LINES` the first are drawn; `number`: of the figure on its page.
    """
    curves = [curve for curve in curves if len(curve.points) > 1][:MOST_LINES]
    axes_of = [
        (label, x) for label, x in _AXES if any(len({x(point) for point in curve.points}) > 1 for curve in curves)
    ]
    if not axes_of:
        return None
    with figure_of(2.6 * len(axes_of) + 0.5) as figure:
        panels = figure.subplots(len(axes_of), 1, squeeze=False)[:, 0]
        for axes, (label, x) in zip(panels, axes_of, strict=True):
            axes.axhline(100, color=PALETTE["muted"], linewidth=0.8, linestyle=(0, (4, 3)))
            for curve, (colour, form) in zip(curves, cycle(_LOOKS), strict=False):
                _draw(axes, curve, x, colour, form, inside=label.startswith("training"))
            if label == "layers left":
                axes.invert_xaxis()  # a run goes from left to right
            axes.set_xlabel(label)
            axes.margins(y=0.12)
        measure = "mean of the tasks" if curves[0].by_tasks else "validation text"
        set_heading(panels[0], f"Retention (% of the teacher's score, {measure})")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
        return to_svg(figure, f"scores{number or ''}", "Retention along the runs")


def _draw(
    axes: Axes, curve: ScoreCurve, x: Callable[[ScorePoint], float], colour: str, form: str, *, inside: bool
) -> None:
    points = [point for point in curve.points if math.isfinite(point.retention) and (inside or not point.inside)]
    style: dict[str, Any] = {"color": colour, "label": short_label(curve.name)}
    axes.plot([x(point) for point in points], [100 * point.retention for point in points], form, **style)
    for point in points:
        if math.isfinite(point.low) and math.isfinite(point.high):
            axes.vlines(x(point), 100 * point.low, 100 * point.high, color=colour, linewidth=1.0, alpha=0.6)


def task_curves(curve: ScoreCurve) -> str | None:
    """Score by task of one run, stage by stage; None without tasks at two stages.

    Shares are drawn in per cent, perplexities and the like as they are, in a panel of their own.
    """
    points = [point for point in curve.points if point.tasks]
    names = list(dict.fromkeys(name for point in points for name in point.tasks or {}))[:MOST_LINES]
    if len(points) < 2 or not names:
        return None
    removes = points[0].layers != points[-1].layers
    label, x = _AXES[1 if removes else 0]
    if len({x(point) for point in points}) < 2:
        label, x = _AXES[2]
    found, shares = dict[str, list[tuple[float, float]]](), set[str]()
    for name in names:
        told = [(x(point), score) for point in points if (score := (point.tasks or {}).get(name))]
        found[name] = [(at, score) for at, (score, _) in told if math.isfinite(score)]
        if all(share for _, (_, share) in told):
            shares.add(name)
    looks = dict(zip(names, cycle(_LOOKS), strict=False))
    panels = [("Score by task (%)", 100, shares), ("Score by task", 1, set(names) - shares)]
    panels = [panel for panel in panels if panel[2]]
    with figure_of(3.6 * len(panels) + 0.12 * len(names)) as figure:
        for axes, (heading, unit, some) in zip(
            figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True
        ):
            for name in filter(some.__contains__, names):
                colour, form = looks[name]
                at, scores = [at for at, _ in found[name]], [unit * score for _, score in found[name]]
                axes.plot(at, scores, form, color=colour, label=short_label(name))
            if label == "layers left":
                axes.invert_xaxis()
            axes.set_xlabel(label)
            set_heading(axes, heading)
        figure.legend(loc="outside lower left", ncols=3, columnspacing=1.2)
        return to_svg(figure, "task-scores", "Score by task along the run")
