"""The figure of what a model recalls and predicts by length: recall of texts of so many tokens, loss by position.

A window or a state may keep the short end and lose the long one, which one number over all lengths does not show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from iskd.evaluation import Evaluation
from iskd.report.figures.context import TEACHER, context_axis, look_of
from iskd.report.figures.style import PALETTE, figure_of, set_heading, short_label, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LONGEST = 22  # characters of a label
_SURE = 1.96  # standard errors of 95 %


@dataclass(frozen=True)
class ByLength:
    """One model: its label ("" = as the one before), its numbers by length in tokens, and how it is drawn.

    Attributes:
        recall: (tokens of the text, share of items recalled, standard error).
        loss: (last position, nats per token from the position after the row before up to that one).
    """

    label: str
    recall: Sequence[tuple[int, float, float]]
    loss: Sequence[tuple[int, float]]
    look: Mapping[str, Any]

    def named(self, label: str) -> ByLength:
        """The same under another label, in which a glyph that the font lacks is told by a sign that it has."""
        return replace(self, label=short_label(label, _LONGEST))


def lines_of(evaluation: Evaluation, index: int = 0) -> dict[str, ByLength]:
    """Teacher and student of an evaluation, by name, each up to the length that it can read; none without numbers."""
    found = {}
    for who, look in (("teacher", TEACHER), ("student", look_of(index))):
        recall, loss = evaluation.recall(who), evaluation.loss_by_position(who)
        if recall or loss:
            found[who] = ByLength(who, recall, loss, look)
    return found


def by_length(lines: Sequence[ByLength]) -> str | None:
    """Recall (percent) and loss (nats per token) against tokens; None where neither has two lengths."""
    recalled = {length for line in lines for length, *_ in line.recall}
    placed = {last for line in lines for last, _ in line.loss}
    panels = [name for name, lengths in (("recall", recalled), ("loss", placed)) if len(lengths) > 1]
    if not panels:
        return None
    labels = [line.label for line in lines if line.label]
    with figure_of(2.4 * len(panels) + 0.4 + 0.2 * math.ceil(len(labels) / 2)) as figure:
        for axes, name in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            if name == "recall":
                _recall(axes, lines)
                context_axis(axes, sorted(recalled), "tokens of the text")
            else:
                _loss(axes, lines)
                context_axis(axes, sorted(placed), "position in the window (tokens before)")
            shown = axes
        handles = shown.get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower left", ncols=2, columnspacing=1.2, fontsize=9)
        return to_svg(figure, "lengths", "Recall and loss against length")


def _recall(axes: Axes, lines: Sequence[ByLength]) -> None:
    for line in lines:
        at, scores = [length for length, *_ in line.recall], [100 * score for _, score, _ in line.recall]
        axes.plot(at, scores, label=line.label or "_nolegend_", **line.look)
        for length, score, error in line.recall:
            if math.isfinite(error):
                low, high = (100 * min(max(score + side * _SURE * error, 0.0), 1.0) for side in (-1, 1))
                axes.vlines(length, low, high, color=line.look["color"], linewidth=1.0, alpha=0.6)
    axes.axhline(100, color=PALETTE["muted"], linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_ylim(-4, 106)
    set_heading(axes, "Recall (% of the items)")


def _loss(axes: Axes, lines: Sequence[ByLength]) -> None:
    for line in lines:
        at, nats = [last for last, _ in line.loss], [value for _, value in line.loss]
        axes.plot(at, nats, label=line.label or "_nolegend_", **line.look)
    axes.margins(y=0.12)
    set_heading(axes, "Loss by position (nats per token)")
