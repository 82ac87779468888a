"""The timeline of a run: when each stage ran, and what it trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from iskd.plan import StageResult
from iskd.report.figures.edit_map import grid_height, label_rows, row_labels
from iskd.report.figures.style import PALETTE, figure_of, plain_x, to_svg

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
