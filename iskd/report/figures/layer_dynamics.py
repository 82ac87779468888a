"""Training dynamics by layer: how far each layer is from its teacher's, along the stages that align layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from iskd.plan import StageResult
from iskd.report.figures.style import PALETTE, SQUARES, figure_of, log_y, needs_log, set_heading, to_svg

_PALEST = 0.2  # of the darkest line
_POINTS = 200  # of a line
_MOST = 4  # panels

Points = Sequence[tuple[float, float]]


def layer_dynamics(layers: Mapping[int, Points], results: Sequence[StageResult]) -> str | None:
    """A panel per stage, a line per layer, pale at the bottom of the stack and dark at its top; None without lines.

    Args:
        layers: For each layer of the teacher its points (tokens, distance) in order.
        results: Stages in order, whose tokens part the panels.
    """
    panels = []
    starts = [0, *(result.tokens for result in results[1:])]
    for start, result in zip(starts, results[1:], strict=False):
        # a step is logged with the tokens before it
        here = {layer: [(x, y) for x, y in points if start <= x < result.tokens] for layer, points in layers.items()}
        found = {layer: thin for layer, points in here.items() if len(thin := _thin(points)) > 1}
        if found:
            panels.append((result, found))
    if not panels:
        return None
    panels = panels[:_MOST]
    numbers = sorted({layer for _, found in panels for layer in found})
    with figure_of(2.7 * len(panels) + 0.4) as figure:
        for axes, (result, found) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            for layer, points in sorted(found.items()):
                look = {"color": PALETTE["blue"], "alpha": _shade(layer, numbers), "linewidth": 1.2}
                axes.plot([x / 1e3 for x, _ in points], [y for _, y in points], "-", **look)
            if needs_log([y for points in found.values() for _, y in points]):
                log_y(axes)
            axes.set_xlabel("training tokens (thousands)")
            set_heading(axes, f"Stage {result.index}: distance of each layer from the teacher's")
        figure.legend(handles=_legend(numbers), loc="outside lower left", ncols=2, **SQUARES)
        return to_svg(figure, "dynamics", "Distance from the teacher by layer")


def _legend(numbers: Sequence[int]) -> list[Any]:
    from matplotlib.lines import Line2D

    ends = dict.fromkeys((numbers[0], numbers[-1]))
    return [Line2D([], [], color=PALETTE["blue"], alpha=_shade(n, numbers), label=f"layer {n}") for n in ends]


def _shade(layer: int, numbers: Sequence[int]) -> float:
    return min(1.0, _PALEST + (1 - _PALEST) * numbers.index(layer) / max(1, len(numbers) - 1))


def _thin(points: Points) -> list[tuple[float, float]]:
    """At most `_POINTS` finite points above 0, evenly spaced."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and y > 0]
    return finite[:: max(1, -(-len(finite) // _POINTS))]
