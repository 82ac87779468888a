"""Importance by round: rounds of scoring by layers, as ranks within the round, so that rounds can be compared."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from iskd.plan import StageResult
from iskd.report.figures.edit_map import box, draw_grid, grid_height, layer_states, row_labels
from iskd.report.figures.style import PALETTE, SQUARES, figure_of, to_svg

_LEVELS = 9
_PALEST = 0.1  # of the darkest colour; a removed layer has none
_MARK: dict[str, Any] = {"color": PALETTE["ink"], "markersize": 4.2, "markeredgecolor": PALETTE["surface"]}


def rounds(results: Sequence[StageResult], num_layers: int) -> list[tuple[StageResult, dict[int, float]]]:
    """Rounds in which layers were scored anew.

    Args:
        results: Stages in order.
        num_layers: Layers of the teacher.

    Returns:
        For each round its stage and the rank of every layer that was still there: 0 for the least important, 1 for the
        most important, equal scores share the middle of their ranks. A stage that went by older scores is no round.

    Raises:
        ValueError: An edit names a layer outside the teacher.
    """
    found = []
    known: Mapping[str, float] = {}
    before = ["original"] * num_layers
    for result, after in zip(results, layer_states(results, num_layers), strict=True):
        scores = {int(layer): score for layer, score in (result.scores or {}).items() if not math.isnan(score)}
        here = {i: score for i, score in sorted(scores.items()) if i < num_layers and before[i] != "removed"}
        if len(here) > 1 and result.scores and dict(result.scores) != known:
            found.append((result, _ranks(here)))
            known = result.scores
        if result.status == "kept":
            before = after
    return found


def _ranks(scores: Mapping[int, float]) -> dict[int, float]:
    ordered = sorted(scores.values())
    last = len(ordered) - 1
    return {
        layer: (bisect_left(ordered, score) + bisect_right(ordered, score) - 1) / 2 / last
        for layer, score in scores.items()
    }


def importance_rounds(results: Sequence[StageResult], num_layers: int) -> str | None:
    """Heat map of importance ranks, rounds (rows) by layers (columns); None with fewer than two rounds.

    One hue from pale to dark, told apart without colour vision; removed layers stay blank.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, PathPatch
    from matplotlib.path import Path as Shape

    drawn = rounds(results, num_layers)
    if len(drawn) < 2:
        return None
    cells: dict[int, list[list[tuple[float, float]]]] = {}
    for row, (_, ranks) in enumerate(drawn):
        for layer, rank in ranks.items():
            cells.setdefault(round(rank * (_LEVELS - 1)), []).append(box(layer, layer, row))
    with figure_of(grid_height(len(drawn))) as figure:
        axes = figure.subplots()
        for level in sorted(cells):  # one path per shade keeps the SVG small
            shape = Shape.make_compound_path(*map(Shape, cells[level]))
            axes.add_patch(PathPatch(shape, color=PALETTE["blue"], alpha=_shade(level), lw=0))
        draw_grid(axes, row_labels([result for result, _ in drawn]), num_layers)
        edited = [(edit["layer"], row) for row, (result, _) in enumerate(drawn) for edit in result.edits]
        axes.plot([layer for layer, _ in edited], [row for _, row in edited], "o", **_MARK)
        shades = ((0, "least important"), (_LEVELS // 2, "middle"), (_LEVELS - 1, "most important"))
        handles: list[Patch | Line2D] = [
            Patch(color=PALETTE["blue"], alpha=_shade(level), lw=0, label=label) for level, label in shades
        ]
        handles += [Line2D([], [], marker="o", linestyle="", label="edited", **_MARK)] if edited else []
        axes.legend(
            handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, borderaxespad=0.6, **SQUARES
        )  # fmt: skip
        return to_svg(figure, "rounds", "Importance ranks: rounds by layers")


def _shade(level: int) -> float:
    return _PALEST + (1 - _PALEST) * level / (_LEVELS - 1)
