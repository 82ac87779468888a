"""Scores of layers as a table, a file and a chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from torch import Tensor

from iskd.importance import LayerScore
from iskd.report.figures import figure_of
from iskd.report.figures.style import PALETTE, integer_x, set_heading, write_figure
from iskd.report.terminal import title
from iskd.system import number
from iskd.system.tables import write_csv


def score_table(scores: Sequence[LayerScore], name: str) -> Table:
    """Layers from the least important on."""
    table = Table(title=title(f"importance: {name} (higher = keep)"))
    for head in ("layer", "score", "standard error", "95 % interval", ""):
        table.add_column(head, justify="left" if not head else "right")
    for place, entry in enumerate(sorted(scores, key=lambda entry: (entry.score, entry.layer))):
        interval = "" if math.isnan(entry.low) else f"{number(entry.low)} .. {number(entry.high)}"
        note = "lowest" if not place else "within noise of the lowest" if entry.tied else ""
        table.add_row(
            str(entry.layer),
            number(entry.score),
            "" if math.isnan(entry.error) else number(entry.error),
            interval,
            note,
        )
    return table


def write_scores(
    folder: Path, scores: Sequence[LayerScore], rows: Tensor, name: str, runs: Tensor | None = None
) -> list[Path]:
    """`scores.csv`, `rows.csv` (one column per window) and `scores.png` in `folder`.

    With `runs` [n, L], scores of runs of 1..n consecutive layers by the first of them, also `runs.csv`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head = ["layer", "score", "standard_error", "low95", "high95", "within_noise_of_lowest"]
    values = [[entry.layer, entry.score, entry.error, entry.low, entry.high, int(entry.tied)] for entry in scores]
    windows = ["layer", *(f"window{index}" for index in range(rows.shape[1]))]
    by_window = [[entry.layer, *row] for entry, row in zip(scores, rows.tolist(), strict=True)]
    files = [
        write_csv(folder / "scores.csv", [head, *values]),
        write_csv(folder / "rows.csv", [windows, *by_window]),
        _chart(folder / "scores.png", scores, name),
    ]
    return files if runs is None else [*files, _write_runs(folder / "runs.csv", scores, runs)]


def _write_runs(path: Path, scores: Sequence[LayerScore], runs: Tensor) -> Path:
    """Every run that fits, of each length the lowest first."""
    lines: list[list[object]] = [["layers", "first", "last", "score"]]
    for length, row in enumerate(runs.tolist(), 1):
        fitting = sorted(zip(row, range(len(scores) - length + 1), strict=False))
        lines += [[length, scores[first].layer, scores[first + length - 1].layer, score] for score, first in fitting]
    return write_csv(path, lines)


def _chart(path: Path, scores: Sequence[LayerScore], name: str) -> Path:
    """Bars with 95 % intervals; those within noise of the lowest are hatched as well as coloured."""
    from matplotlib.patches import Patch

    with figure_of(3.3) as figure:
        axes = figure.subplots()
        colours = [PALETTE["vermillion"] if entry.tied else PALETTE["blue"] for entry in scores]
        heights = [entry.score for entry in scores]
        bars = axes.bar([entry.layer for entry in scores], heights, width=0.72, color=colours)
        for bar, entry in zip(bars, scores, strict=True):
            bar.set_hatch("//" if entry.tied else "")
        known = not any(math.isnan(entry.low) for entry in scores)
        if known:
            spans = [[s.score - s.low for s in scores], [s.high - s.score for s in scores]]
            places = [s.layer for s in scores]
            axes.errorbar(places, heights, yerr=spans, fmt="none", ecolor=PALETTE["ink"], elinewidth=1)
        interval = ", 95 % interval over windows" if known else ""
        set_heading(axes, f"{name}: score by layer (higher = keep){interval}")
        axes.set_xlabel("layer (teacher's index)")
        integer_x(axes, min(s.layer for s in scores), max(s.layer for s in scores))
        label = "lowest, or within noise of it"
        figure.legend(handles=[Patch(color=PALETTE["vermillion"], label=label)], loc="outside lower left")
        return write_figure(figure, path, dpi=160, facecolor="white")
