"""The figure of efficiency by context: time of a token and bytes held between two tokens, against the length.

The point of a converted student: attention's cache and time grow with the context, a state's do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from iskd.evaluation.results import AtContext
from iskd.report.figures.style import PALETTE, figure_of, legend_at_right, log_y, needs_log, set_heading, to_svg
from iskd.system.text import byte_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEACHER: dict[str, Any] = {"color": PALETTE["ink"], "linestyle": "--", "marker": "s", "zorder": 3}
_COLOURS = ("blue", "vermillion", "green", "purple", "orange", "sky")
_FORMS = (("-", "o"), ("-.", "^"), (":", "D"))
_SHORT_LABEL = 12  # characters; up to three of such labels fit beside a heading, others stand below the panels


@dataclass(frozen=True)
class Line:
    """One model: its label ("" = a further line under the one before), what was measured, and how it is drawn."""

    label: str
    contexts: Sequence[AtContext]
    look: Mapping[str, Any]


def look_of(index: int) -> dict[str, Any]:
    """Colour, dashes and marker of the model with a number; after 18 models they begin again."""
    style, marker = _FORMS[index // len(_COLOURS) % len(_FORMS)]
    return {"color": PALETTE[_COLOURS[index % len(_COLOURS)]], "linestyle": style, "marker": marker}


def against_context(lines: Sequence[Line]) -> str | None:
    """Time per decoded token (ms) above bytes of cache or state, a line per model; None with fewer than two contexts.

    A single context says no more than a table does.
    """
    times = [_points(line, lambda at: 1e3 * at.decode_seconds_per_token) for line in lines]
    sizes = [_points(line, lambda at: at.cache_bytes) for line in lines]
    contexts = sorted({context for points in (*times, *sizes) for context, _ in points})
    if len(contexts) < 2:
        return None
    unit, label = byte_unit(max((size for points in sizes for _, size in points), default=0.0))
    sizes = [[(context, size / unit) for context, size in points] for points in sizes]
    labels = [line.label for line in lines if line.label]
    short = all(len(label) <= _SHORT_LABEL for label in labels)
    columns = 3 if short else 2
    rows = 0 if short and len(labels) <= columns else math.ceil(len(labels) / columns)
    with figure_of(4.6 + 0.2 * rows) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True)
        _panel(top, lines, times, "Time of a token (ms)")
        _panel(bottom, lines, sizes, f"Cache or state ({label})")
        context_axis(bottom, contexts)
        if rows:
            handles = top.get_legend_handles_labels()
            figure.legend(*handles, loc="outside lower left", ncols=columns, columnspacing=1.2, fontsize=9)
        else:
            legend_at_right(top, columns)
        return to_svg(figure, "contexts", "Time of a token and bytes of cache or state against the context")


def _points(line: Line, value: Callable[[AtContext], float]) -> list[tuple[int, float]]:
    found = [(at.context, value(at)) for at in line.contexts]
    return [(context, number) for context, number in found if math.isfinite(number) and number >= 0]


def _panel(axes: Axes, lines: Sequence[Line], points: Sequence[Sequence[tuple[int, float]]], heading: str) -> None:
    for line, found in zip(lines, points, strict=True):
        label = line.label or "_nolegend_"
        axes.plot([x for x, _ in found], [y for _, y in found], label=label, **line.look)
    values = [value for found in points for _, value in found]
    if needs_log(values):
        log_y(axes)
    else:
        axes.set_ylim(0, 1.08 * max(values, default=0.0) or 1.0)  # room for the topmost marker
    set_heading(axes, heading)


def context_axis(axes: Axes, contexts: Sequence[int], label: str = "context (tokens)") -> None:
    """Context lengths, each twice as far as the half of it, with ticks where something was measured."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    every = math.ceil(len(contexts) / 8)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(contexts[::every], [f"{context:,}" for context in contexts[::every]])
    axes.set_xlabel(label)
