"""The report's figures of cost: when each stage ran and what it trained on, and what a context takes to hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from iskd.edit_map import grid_height, label_rows, row_labels
from iskd.figure import PALETTE, figure_of, log_y, needs_log, plain_x, set_heading, to_svg
from iskd.measurements import Efficiency
from iskd.table import byte_unit
from iskd.tracking import StageResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def timeline(results: Sequence[StageResult]) -> str | None:
    """Stage by stage (rows): its wall time since the start of the run, and the tokens it trained on.

    None when no stage took time or tokens.
    """
    from matplotlib.patches import Patch

    stages = [result for result in results if result.index > 0]
    seconds = [result.seconds if math.isfinite(result.seconds) else 0.0 for result in stages]
    tokens = tokens_by_stage(results)[-len(stages) :] if stages else []
    if not any(seconds) and not any(tokens):
        return None
    ends = list(accumulate(seconds))
    starts = [end - length for end, length in zip(ends, seconds, strict=True)]
    scale, unit = (3600.0, "h") if ends[-1] >= 5400 else (60.0, "min") if ends[-1] >= 120 else (1.0, "s")
    with figure_of(grid_height(len(stages))) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.7, 1))
        _bars(left, stages, [length / scale for length in seconds], [start / scale for start in starts])
        _bars(right, stages, [count / 1e3 for count in tokens], [0.0] * len(stages))
        label_rows(left, row_labels(stages))
        left.set_xlabel(f"time since the start ({unit})")
        right.set_xlabel("trained tokens (k)")
        if any(stage.status == "rolled_back" for stage in stages):
            handles = [Patch(color=PALETTE["blue"], label="kept"), Patch(**_UNDONE, label="rolled back")]
            left.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.6)
        return to_svg(figure, "timeline", "Wall time and tokens by stage")


_UNDONE: dict[str, Any] = {"facecolor": "none", "edgecolor": PALETTE["vermillion"], "linewidth": 1.4}


def _bars(axes: Axes, stages: Sequence[StageResult], lengths: Sequence[float], starts: Sequence[float]) -> None:
    for row, (stage, length, start) in enumerate(zip(stages, lengths, starts, strict=True)):
        if stage.status == "rolled_back":
            axes.barh(row, length, 0.66, start, **_UNDONE)
        else:
            axes.barh(row, length, 0.66, start, color=PALETTE["blue"], linewidth=0)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(left=0)
    plain_x(axes, 4)


def tokens_by_stage(results: Sequence[StageResult]) -> list[int]:
    """Tokens that each stage trained on, from the cumulative counts."""
    counts = [result.tokens for result in results]
    return [max(0, now - before) for before, now in zip([0, *counts], counts, strict=False)]


def state_sizes(measured: Efficiency) -> str | None:
    """Bytes held between two tokens (cache or mixers' states) against context length; None with one length or none.

    A single length says no more than the table does.
    """
    lines = []
    for name, model in (("teacher", measured.teacher), ("student", measured.student)):
        points = [(at.context, at.cache_bytes) for at in (model.contexts if model else ())]
        points = [(context, size) for context, size in points if math.isfinite(size) and size >= 0]
        if points:
            lines.append((name, points))
    values = [size for _, points in lines for _, size in points]
    contexts = sorted({context for _, points in lines for context, _ in points})
    if len(contexts) < 2:
        return None
    unit, label = byte_unit(max(values))
    looks: dict[str, dict[str, Any]] = {
        "teacher": {"color": PALETTE["ink"], "linestyle": "--", "marker": "s"},
        "student": {"color": PALETTE["blue"], "marker": "o"},
    }
    with figure_of(3.3) as figure:
        axes = figure.subplots()
        for name, points in lines:
            axes.plot([x for x, _ in points], [size / unit for _, size in points], label=name, **looks[name])
        if needs_log(values):
            log_y(axes)
        else:
            axes.set_ylim(0, 1.08 * max(values) / unit or 1.0)  # room for the topmost marker
        _context_axis(axes, contexts)
        set_heading(axes, f"State or cache ({label})")
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderpad=0.1, columnspacing=1.2)
        return to_svg(figure, "states", "Bytes of state or cache against context length")


def _context_axis(axes: Axes, contexts: Sequence[int]) -> None:
    """Context lengths, each twice as far as the half of it, with ticks where something was measured."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    every = math.ceil(len(contexts) / 8)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(contexts[::every], [f"{context:,}" for context in contexts[::every]])
    axes.set_xlabel("context (tokens)")
