"""The figures along a run: retention and size, healing, losses, importance; each an inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from iskd.evaluation import Evaluation
from iskd.plan import StageResult
from iskd.plan.results import kept_of, rolled_back_of
from iskd.report.figures.edit_map import KIND_COLOUR, KINDS, label_rows, layer_states
from iskd.report.figures.style import (
    PALETTE,
    SQUARES,
    figure_of,
    integer_x,
    legend_at_right,
    log_y,
    needs_log,
    set_heading,
    short_label,
    to_svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = (
    (PALETTE["ink"], "-"),
    (PALETTE["blue"], "-"),
    (PALETTE["vermillion"], "--"),
    (PALETTE["green"], "-."),
    (PALETTE["purple"], ":"),
    (PALETTE["orange"], "--"),
    (PALETTE["sky"], "-."),
)


def progress(results: Sequence[StageResult]) -> str:
    """Retention (percent) above parameters (millions), stage by stage."""
    with figure_of(4.3) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1.15, 1))
        kept, undone = kept_of(results), rolled_back_of(results)
        top.axhline(100, color=PALETTE["muted"], linewidth=0.8, linestyle=(0, (4, 3)))
        top.plot([r.index for r in kept], [100 * r.retention for r in kept], "o-", color=PALETTE["blue"], label="kept")
        if undone:
            points = [r.index for r in undone], [100 * r.retention for r in undone]
            top.plot(*points, "x", color=PALETTE["vermillion"], markeredgewidth=1.6, label="rolled back")
            legend_at_right(top)
        top.margins(y=0.12)
        set_heading(top, "Retention (% of the teacher's score)")
        _draw_sizes(bottom, results)
        bottom.set_xlabel("stage (0 = teacher)")
        integer_x(bottom, min(r.index for r in results), max(r.index for r in results))
        return to_svg(figure, "progress", "Retention and parameters by stage")


def _draw_sizes(axes: Axes, results: Sequence[StageResult]) -> None:
    """Bars of parameters split into blocks and the rest; the first and the last kept one carry their total."""
    for group, strength in ((kept_of(results), 1.0), (rolled_back_of(results), 0.35)):
        index = [r.index for r in group]
        rest = [(r.params - r.block_params) / 1e6 for r in group]
        blocks = [r.block_params / 1e6 for r in group]
        named = strength == 1.0
        axes.bar(index, rest, 0.62, color=PALETTE["cell"], alpha=strength, label="rest" if named else None)
        axes.bar(index, blocks, 0.62, rest, color=PALETTE["blue"], alpha=strength, label="blocks" if named else None)
    for result in {r.index: r for r in (*kept_of(results)[:1], *kept_of(results)[-1:])}.values():
        total = result.params / 1e6
        axes.annotate(
            f"{total:.1f}", (result.index, total), (0, 3), textcoords="offset points", ha="center", fontsize=10
        )  # fmt: skip
    axes.margins(y=0.16)
    set_heading(axes, "Parameters (millions)")
    legend_at_right(axes)


def healing(results: Sequence[StageResult]) -> str | None:
    """KL and perplexity before (hollow) and after (solid) healing; None when no stage was measured before healing."""
    healed = [result for result in results if result.before]
    if not healed:
        return None
    panels = (("kl", "KL (nats per token)"), ("ppl", "Perplexity (validation text)"))
    with figure_of(4.3) as figure:
        both = figure.subplots(2, 1, sharex=True)
        for axes, (key, heading) in zip(both, panels, strict=True):
            _dumbbells(axes, healed, key)
            set_heading(axes, heading)
        teacher = next((r for r in results if r.index == 0), None)
        if teacher is not None and math.isfinite(teacher.ppl):
            line = both[1].axhline(teacher.ppl, color=PALETTE["muted"], linewidth=0.9, linestyle=(0, (4, 3)))
            both[1].legend([line], ["teacher"], loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0.1)
        legend_at_right(both[0])
        both[1].set_xlabel("stage")
        integer_x(both[1], min(r.index for r in healed), max(r.index for r in healed))
        return to_svg(figure, "healing", "KL and perplexity before and after healing")


def _dumbbells(axes: Axes, healed: Sequence[StageResult], key: str) -> None:
    x = [r.index for r in healed]
    before = [(r.before or {}).get(key, math.nan) for r in healed]
    after = [float(getattr(r, key)) for r in healed]
    pairs = [(i, b, a) for i, b, a in zip(x, before, after, strict=True) if math.isfinite(b) and math.isfinite(a)]
    axes.vlines(
        [i for i, _, _ in pairs], [a for *_, a in pairs], [b for _, b, _ in pairs], color=PALETTE["cell"], linewidth=2
    )
    axes.plot(
        x, before, "o", markerfacecolor=PALETTE["surface"], markeredgecolor=PALETTE["orange"], markeredgewidth=1.6,
        label="after the edit",
    )  # fmt: skip
    axes.plot(x, after, "o", color=PALETTE["blue"], label="after healing")
    if needs_log(_finite([*before, *after])):
        log_y(axes)
    else:
        axes.margins(y=0.12)


def losses(
    curves: Mapping[str, Sequence[tuple[float, float]]], results: Sequence[StageResult], axis: str, points: int = 240
) -> str | None:
    """Loss terms against cumulative tokens, a vertical line where a stage edits the model; None without curves.

    Every point is drawn; where there are many, their mean over equal stretches stands above them.

    Args:
        curves: For each metric, its points (x, value) in order.
        results: Stages in order; their token counts place the lines.
        axis: Name of what x counts, e.g. "tokens".
        points: Most points of a curve's mean.
    """
    whole = {name: found for name, curve in curves.items() if (found := _thin(curve, len(curve) or 1))}
    thin = {name: _thin(curve, points) for name, curve in whole.items()}
    values = [value for curve in whole.values() for _, value in curve]
    if not values:
        return None
    furthest = max(x for curve in thin.values() for x, _ in curve)
    scale, unit = (1e6, " (millions)") if furthest >= 2e6 else (1e3, " (thousands)") if furthest >= 2e3 else (1.0, "")
    with figure_of(3.5) as figure:
        axes = figure.subplots()
        for (name, curve), (colour, style) in zip(sorted(thin.items(), key=_total_first), cycle(LINES), strict=False):
            label = short_label(name.removeprefix("train/"))
            if len(whole[name]) > len(curve):
                every = whole[name]
                axes.plot([x / scale for x, _ in every], [v for _, v in every], style, color=colour, lw=0.6, alpha=0.4)
            axes.plot([x / scale for x, _ in curve], [v for _, v in curve], style, color=colour, label=label)
        if needs_log(values):
            log_y(axes)
        if axis == "tokens":
            for start in (start for start in _edit_tokens(results) if start <= furthest):
                axes.axvline(start / scale, color=PALETTE["muted"], linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"cumulative training {axis}{unit}")
        set_heading(axes, "Training loss (per token)")
        figure.legend(loc="outside lower left", ncols=4, columnspacing=1.2)
        return to_svg(figure, "losses", "Training losses against cumulative tokens")


def _finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _total_first(item: tuple[str, object]) -> tuple[bool, str]:
    return item[0] != "train/loss", item[0]


def _edit_tokens(results: Sequence[StageResult]) -> list[int]:
    """Cumulative tokens at the start of every stage that edits the model."""
    starts = [0, *(result.tokens for result in results)]
    return sorted({start for start, result in zip(starts, results, strict=False) if result.edits})


def _thin(curve: Sequence[tuple[float, float]], points: int) -> list[tuple[float, float]]:
    """At most `points` points, each the mean of an equal stretch; non-finite values are left out."""
    finite = [(x, y) for x, y in curve if math.isfinite(x) and math.isfinite(y)]
    stretch = math.ceil(len(finite) / points) if finite else 1
    groups = [finite[i : i + stretch] for i in range(0, len(finite), stretch)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def importance(results: Sequence[StageResult], num_layers: int) -> str | None:
    """First and latest importance scores by layer, coloured by what became of the layer; None without scores."""
    from matplotlib.patches import Patch

    scored = [result for result in results if result.scores]
    if not scored:
        return None
    final = layer_states(kept_of(results), num_layers)[-1] if kept_of(results) else ["original"] * num_layers
    first = _by_layer(scored[0])
    with figure_of(3.3) as figure:
        axes = figure.subplots()
        axes.bar(list(first), list(first.values()), width=0.72, color=[KIND_COLOUR[final[i]] for i in first])
        shown = [kind for kind in KINDS if kind in [final[i] for i in first]]
        handles: list[Any] = [Patch(color=KIND_COLOUR[kind], lw=0, label=kind) for kind in shown]
        values = list(first.values())
        if len(scored) > 1:
            last = _by_layer(scored[-1])
            values += last.values()
            handles += axes.plot(
                list(last), list(last.values()), "o", markersize=4, markerfacecolor=PALETTE["surface"],
                markeredgecolor=PALETTE["ink"], label=f"score at stage {scored[-1].index}",
            )  # fmt: skip
        if needs_log(values):
            axes.set_ylim(min(values) / 2, max(values) * 1.5)
            log_y(axes)
        set_heading(axes, f"Importance at stage {scored[0].index} (higher = keep)")
        axes.set_xlabel("layer (teacher's index), coloured by what became of it")
        integer_x(axes, 0, num_layers - 1)
        figure.legend(handles=handles, loc="outside lower left", ncols=5, **SQUARES)
        return to_svg(figure, "importance", "Importance by layer")


def _by_layer(result: StageResult) -> dict[int, float]:
    scores = {int(layer): score for layer, score in (result.scores or {}).items()}
    return {layer: scores[layer] for layer in sorted(scores) if math.isfinite(scores[layer])}


def task_retention(evaluation: Evaluation) -> str | None:
    """Retention by task with its interval, the teacher at 100 %; None when no task has a retention."""
    tasks = [(task.task, kept) for task in evaluation.tasks if (kept := task.retention) and math.isfinite(kept.value)]
    if not tasks:
        return None
    with figure_of(1.1 + min(0.27 * len(tasks), 12.0)) as figure:
        axes = figure.subplots()
        axes.axvline(100, color=PALETTE["muted"], linewidth=0.8, linestyle=(0, (4, 3)))
        if math.isfinite(evaluation.mean.value):
            axes.axvline(100 * evaluation.mean.value, color=PALETTE["blue"], linewidth=1.2, linestyle=":")
        for row, (_, kept) in enumerate(tasks):
            if math.isfinite(kept.low) and math.isfinite(kept.high):
                axes.hlines(row, 100 * kept.low, 100 * kept.high, color=PALETTE["blue"], linewidth=1.6)
        axes.plot([100 * kept.value for _, kept in tasks], range(len(tasks)), "o", color=PALETTE["blue"])
        label_rows(axes, [short_label(name, 24) for name, _ in tasks])
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.margins(x=0.06)
        axes.set_xlabel("retention (% of the teacher's score)")
        return to_svg(figure, "tasks", "Retention by task")
