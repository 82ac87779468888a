"""The edit map: what sits at each layer after each stage, as data and as a grid of stages by layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from iskd.plan import StageResult
from iskd.plan.edits import REMOVAL_OPS
from iskd.plan.run_files import RECORD_FILE, STAGES_FILE
from iskd.report.figures.style import PALETTE, SQUARES, figure_of, short_label, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("original", "compact", "removed", "converted")
_KIND_OF_OP = {"replace": "compact", "convert": "converted"} | dict.fromkeys(REMOVAL_OPS, "removed")
KIND_COLOUR = {
    "original": PALETTE["cell"],
    "compact": PALETTE["blue"],
    "removed": PALETTE["vermillion"],
    "converted": PALETTE["green"],
}


def layer_states(results: Sequence[StageResult], num_layers: int) -> list[list[str]]:
    """State of every layer at every stage.

    A rolled-back stage shows what it tried; the next stage starts from what was kept.

    Args:
        results: Stages in order.
        num_layers: Layers of the teacher.

    Returns:
        [stages][layers], each one of `KINDS`.

    Raises:
        ValueError: An edit names a layer outside the teacher.
    """
    current = ["original"] * num_layers
    rows = []
    for result in results:
        tried = list(current)
        for edit in result.edits:
            if edit["layer"] >= num_layers:
                raise ValueError(
                    f"stage {result.index} edits layer {edit['layer']}, but the teacher has {num_layers} layers "
                    f"(0 to {num_layers - 1}): correct num_layers in {RECORD_FILE} or the edit in {STAGES_FILE}"
                )
            tried[edit["layer"]] = _KIND_OF_OP[edit["op"]]
        rows.append(tried)
        if result.status == "kept":
            current = tried
    return rows


def edit_map(results: Sequence[StageResult], num_layers: int) -> str:
    """Grid of stages (rows) by layers (columns): what sits at each layer, and what each stage changed."""
    with figure_of(grid_height(len(results))) as figure:
        draw_edit_map(figure.subplots(), results, num_layers)
        return to_svg(figure, "edits", "Edit map: stages by layers")


def draw_edit_map(axes: Axes, results: Sequence[StageResult], num_layers: int) -> None:
    """Draw the grid with its legend into `axes`."""
    from matplotlib.patches import Patch, PathPatch
    from matplotlib.path import Path as Shape

    states = layer_states(results, num_layers)
    for kind in KINDS:
        cells = [box(first, last, row) for row, line in enumerate(states) for first, last in _runs(line, kind)]
        if cells:  # one path per colour keeps the SVG small
            axes.add_patch(PathPatch(Shape.make_compound_path(*map(Shape, cells)), color=KIND_COLOUR[kind], lw=0))
    draw_grid(axes, row_labels(results), num_layers)
    for status, marker, size in (("kept", "o", 3.2), ("rolled_back", "x", 4.6)):
        new = [(e["layer"], row) for row, r in enumerate(results) if r.status == status for e in r.edits]
        axes.plot(
            [layer for layer, _ in new], [row for _, row in new], marker, color=PALETTE["surface"], markersize=size,
            markeredgewidth=0 if marker == "o" else 1.5,
        )  # fmt: skip
    shown = [kind for kind in KINDS if any(kind in line for line in states)]
    axes.legend(
        handles=[Patch(color=KIND_COLOUR[kind], lw=0, label=kind) for kind in shown],
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(KINDS), borderaxespad=0.6, **SQUARES,
    )  # fmt: skip


def grid_height(rows: int) -> float:
    """Inches of a figure of `rows` rows with its legend and its axis."""
    return 1.25 + min(0.235 * rows, 9.0)


def row_labels(results: Sequence[StageResult]) -> list[str]:
    """Stages as labels of rows: "3: remove 17"."""
    return [f"{result.index}: {short_label(result.name)}" for result in results]


def label_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Rows from top to bottom, one label each, or every few rows where there are many."""
    every = math.ceil(len(labels) / 40)
    axes.set_yticks(range(0, len(labels), every), labels[::every], color=PALETTE["ink"])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def draw_grid(axes: Axes, labels: Sequence[str], num_layers: int) -> None:
    """The axes of a grid of rows by layers, with gaps between its cells."""
    axes.vlines([i - 0.5 for i in range(1, num_layers)], -0.5, len(labels) - 0.5, color=PALETTE["surface"], lw=1.4)
    axes.hlines([i - 0.5 for i in range(1, len(labels))], -0.5, num_layers - 0.5, color=PALETTE["surface"], lw=2.2)
    label_rows(axes, labels)
    axes.set_xlim(-0.5, num_layers - 0.5)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    step = next(s for s in (1, 2, 5, 10, 20, 50) if num_layers / s <= 16 or s == 50)
    axes.set_xticks(range(0, num_layers, step))
    axes.set_xlabel("layer (teacher's index)")


def _runs(line: Sequence[str], kind: str) -> Iterator[tuple[int, int]]:
    """First and last layer of every stretch of `kind`."""
    start = None
    for layer, state in enumerate([*line, None]):
        if state == kind and start is None:
            start = layer
        elif state != kind and start is not None:
            yield start, layer - 1
            start = None


def box(first: int, last: int, row: int) -> list[tuple[float, float]]:
    """Corners of the cell of layers `first` to `last` in a row, closed."""
    left, right, low, high = first - 0.5, last + 0.5, row - 0.5, row + 0.5
    return [(left, low), (right, low), (right, high), (left, high), (left, low)]
