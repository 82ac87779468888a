"""Trade-offs of many runs: retention against a cost, one point per configuration, with the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from iskd.report.figures.style import PALETTE, figure_of, log_x, needs_log, plain_x, set_heading, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Point:
    """One configuration: cost and retention of each of its runs (seeds), or of one run that did not finish.

    Attributes:
        label: What the table calls it.
        costs: One per run.
        retentions: Ratios to the teacher, one per run.
        finished: Whether its runs came to their end; only such points can be on the front.
        interval: Bounds of the retention of a single run, where they are known.
    """

    label: str
    costs: tuple[float, ...]
    retentions: tuple[float, ...]
    finished: bool = True
    interval: tuple[float, float] | None = None

    @property
    def cost(self) -> float:
        """Mean over the runs."""
        return sum(self.costs) / len(self.costs)

    @property
    def retention(self) -> float:
        """Mean over the runs."""
        return sum(self.retentions) / len(self.retentions)


@dataclass(frozen=True)
class Cost:
    """An axis of costs: its name with unit, a short name for ids, and whether more of it is better (speed)."""

    name: str
    label: str
    more_is_better: bool = False


def pareto_front(points: Sequence[tuple[float, float]], *, more_is_better: bool = False) -> list[int]:
    """Which points (cost, quality) no other one beats in both, by ascending cost.

    Of points that are equal in both the first one counts.

    Args:
        points: Finite numbers; more quality is better.
        more_is_better: Whether the first number is a speed and not a cost.
    """
    sign = -1.0 if more_is_better else 1.0
    order = sorted(range(len(points)), key=lambda i: (sign * points[i][0], -points[i][1], i))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def tradeoff(
    points: Sequence[Point],
    teachers: Sequence[tuple[float, float]],
    undone: Sequence[tuple[float, float]],
    cost: Cost,
) -> str | None:
    """Retention against a cost, with the Pareto front; None without a finite point.

    Args:
        points: Configurations, in finite numbers or not.
        teachers: (cost, retention) of the originals.
        undone: (cost, retention) of stages that were rolled back.
        cost: The axis.
    """
    shown = [p for p in points if math.isfinite(p.cost) and math.isfinite(p.retention)]
    references, undone = _finite(teachers), _finite(undone)
    if not shown:
        return None
    with figure_of(4.2) as figure:
        axes = figure.subplots()
        axes.axhline(100, color=PALETTE["muted"], linewidth=0.8, linestyle=(0, (4, 3)))
        candidates = [*((p.cost, p.retention) for p in shown if p.finished), *references]
        front = [candidates[i] for i in pareto_front(candidates, more_is_better=cost.more_is_better)]
        if len(front) > 1:
            # between two points of the front the cheaper one is the best that can be had
            style = "steps-pre" if cost.more_is_better else "steps-post"
            _series(axes, front, "-", "Pareto front", color=PALETTE["cell"], linewidth=2.2, drawstyle=style, zorder=1)
        _series(axes, references, "D", "teacher", color=PALETTE["ink"], markerfacecolor=PALETTE["surface"], **_THICK)
        _series(axes, undone, "x", "rolled back", color=PALETTE["vermillion"], **_THICK)
        finished = [p for p in shown if p.finished]
        _ranges(axes, finished)
        _series(axes, [(p.cost, p.retention) for p in finished], "o", "finished", color=PALETTE["blue"], zorder=3)
        stopped = [(p.cost, p.retention) for p in shown if not p.finished]
        hollow = {"color": PALETTE["orange"], "markerfacecolor": PALETTE["surface"], "zorder": 3, **_THICK}
        _series(axes, stopped, "s", "not finished", **hollow)
        _labels(axes, shown)
        costs = [x for x, _ in (*candidates, *stopped, *undone)]
        axes.margins(x=0.08, y=0.1)
        if needs_log(costs):
            log_x(axes)
        else:
            plain_x(axes)
        axes.set_xlabel(cost.label)
        set_heading(axes, "Retention (% of the teacher's score)")
        handles = len(axes.get_legend_handles_labels()[0])
        figure.legend(
            loc="outside lower left", ncols=handles if handles < 5 else 3, columnspacing=1.2, handletextpad=0.4
        )
        return to_svg(figure, cost.name, f"Retention against {cost.label}")


_THICK = {"markeredgewidth": 1.6}


def _finite(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return list(dict.fromkeys(pair for pair in pairs if all(map(math.isfinite, pair))))


def _series(axes: Axes, pairs: Sequence[tuple[float, float]], form: str, label: str, **look: Any) -> None:
    if pairs:
        axes.plot([x for x, _ in pairs], [100 * y for _, y in pairs], form, label=label, **look)


def _ranges(axes: Axes, points: Sequence[Point]) -> None:
    """From the least to the most of a configuration's runs, in both directions; a single run's own interval."""
    look: dict[str, Any] = {"color": PALETTE["blue"], "linewidth": 1.3, "zorder": 2}
    for p in (p for p in points if len(p.costs) > 1 or p.interval):
        low, high = p.interval or (min(p.retentions), max(p.retentions))
        axes.vlines(p.cost, 100 * low, 100 * high, **look)
        axes.hlines(100 * p.retention, min(p.costs), max(p.costs), **look)


def _labels(axes: Axes, points: Sequence[Point]) -> None:
    """The number of each configuration beside its point, on the side where its nearest neighbour is not."""
    spread_x = max(p.cost for p in points) - min(p.cost for p in points) or 1.0
    spread_y = max(p.retention for p in points) - min(p.retention for p in points) or 1.0
    for p in points:
        others = [
            ((q.cost - p.cost) / spread_x, (q.retention - p.retention) / spread_y) for q in points if q is not p
        ]  # fmt: skip
        near = min(others, key=lambda to: math.hypot(*to), default=(-1.0, -1.0))
        side, level = (-1 if near[0] > 0 else 1), (-1 if near[1] > 0 else 1)
        axes.annotate(
            p.label, (p.cost, 100 * p.retention), (7 * side, 6 * level), textcoords="offset points", fontsize=10,
            ha="right" if side < 0 else "left", va="top" if level < 0 else "bottom",
        )  # fmt: skip
