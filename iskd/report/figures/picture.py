"""The picture of a run, a PNG for a README: retention against parameters along the stages, and the edit map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from iskd.plan import StageResult
from iskd.plan.results import kept_of, rolled_back_of
from iskd.report.figures.edit_map import draw_edit_map
from iskd.report.figures.style import PALETTE, figure_of, plain, set_heading, write_figure
from iskd.system import number
from iskd.system.text import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_picture(results: Sequence[StageResult], num_layers: int, out: Path) -> None:
    """Write a 1200 x 600 PNG: retention against parameters along the stages, and the edit map.

    Args:
        results: Stages in order, at least one kept.
        num_layers: Layers of the teacher.
        out: The PNG to write.
    """
    with figure_of(6.0, width=12.0) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        first, last = kept_of(results)[0], kept_of(results)[-1]
        size = f"{first.params / 1e6:.1f} M to {last.params / 1e6:.1f} M parameters"
        perplexity = f"perplexity {number(first.ppl, 4)} to {number(last.ppl, 4)}"
        title = f"{size}, {perplexity}, retention {percent(last.retention)} %"
        figure.suptitle(title, fontsize=14, x=0.02, ha="left")
        _draw_tradeoff(left, results)
        draw_edit_map(right, results, num_layers)
        figure.get_layout_engine().set(w_pad=0.25, h_pad=0.2, wspace=0.04)  # type: ignore[union-attr,call-arg]
        write_figure(figure, out, dpi=100, facecolor="#ffffff", metadata={"Software": None})


def _draw_tradeoff(axes: Axes, results: Sequence[StageResult]) -> None:
    from matplotlib.ticker import FuncFormatter

    kept, undone = kept_of(results), rolled_back_of(results)
    axes.axhline(100, color=PALETTE["muted"], linewidth=0.8, linestyle=(0, (4, 3)))
    axes.plot([r.params / 1e6 for r in kept], [100 * r.retention for r in kept], "o-", color=PALETTE["blue"])
    if undone:
        points = [r.params / 1e6 for r in undone], [100 * r.retention for r in undone]
        axes.plot(*points, "x", color=PALETTE["vermillion"], markeredgewidth=1.6, label="rolled back")
        axes.legend(loc="lower left")
    start = f"stage {kept[0].index}" if kept[0].index else "teacher"
    for text, result in [(start, kept[0]), ("student", kept[-1])][: len(kept)]:
        at = (result.params / 1e6, 100 * result.retention)
        axes.annotate(text, at, (9, 6), textcoords="offset points", ha="left")
    axes.invert_xaxis()  # a run goes from left to right
    axes.margins(x=0.16, y=0.12)
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.yaxis.set_major_formatter(FuncFormatter(plain))
    set_heading(axes, "Retention (% of the teacher's score)")
    axes.set_xlabel("parameters (millions)")
