"""Quality against depth, several runs in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from iskd.plan import StageResult
from iskd.report.figures.style import PALETTE, figure_of, integer_x, log_y, needs_log, set_heading, write_figure

_LOOKS = (("blue", "o"), ("vermillion", "s"), ("green", "^"), ("purple", "D"), ("orange", "v"), ("sky", "P"))


@dataclass(frozen=True)
class Curve:
    """One run, or several of one method: the results of kept stages by layers left, deepest first."""

    name: str
    points: list[tuple[int, StageResult]]


def _draw(curves: Sequence[Curve], out: Path) -> None:
    with figure_of(4.2, width=10.0) as figure:
        panels = figure.subplots(1, 2)
        for axes, key, title in zip(panels, ("kl", "ppl"), ("KL to the teacher (nats)", "Perplexity"), strict=True):
            values = []
            for curve, (colour, marker) in zip(curves, _LOOKS, strict=False):
                points = [(layers, getattr(stage, key)) for layers, stage in curve.points if key != "kl" or stage.index]
                values += [value for _, value in points]
                skips = any(above - below > 1 for (above, _), (below, _) in pairwise(curve.points))
                axes.plot(
                    *zip(*points, strict=True),
                    linestyle=":" if skips else "-", marker=marker, color=PALETTE[colour], label=curve.name,
                )  # fmt: skip
            if needs_log(values):
                log_y(axes)
            depths = [layers for curve in curves for layers, _ in curve.points]
            integer_x(axes, min(depths), max(depths))
            axes.invert_xaxis()  # a run goes from left to right
            set_heading(axes, title)
            axes.set_xlabel("layers left")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=min(3, len(curves)))
        write_figure(figure, out, dpi=120, facecolor="white", metadata={"Software": None})
