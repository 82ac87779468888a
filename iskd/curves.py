"""Quality against depth: the stage tables of several runs in one picture and one csv."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from iskd.figure import PALETTE, figure_of, integer_x, log_y, needs_log, set_heading
from iskd.run_files import read_run
from iskd.table import kept_of
from iskd.tracking import StageResult

_LOOKS = (("blue", "o"), ("vermillion", "s"), ("green", "^"), ("purple", "D"), ("orange", "v"), ("sky", "P"))


@dataclass(frozen=True)
class Curve:
    """One run, or several of one method: the results of kept stages by layers left, deepest first."""

    name: str
    points: list[tuple[int, StageResult]]


def read_curve(run_dir: Path, name: str | None = None) -> Curve:
    """Curve of a run. Raises ValueError when the run kept no stage or its depth is not recorded."""
    files = read_run(run_dir)
    layers, points = files.num_layers, []
    for stage in kept_of(files.stages):
        layers -= sum(edit["op"] == "remove" for edit in stage.edits)
        points.append((layers, stage))
    if not points or layers < 1:
        raise ValueError(f"{run_dir} has no finished stage to draw; is it the folder of a run?")
    return Curve(name or files.name, points)


def joined(curves: Sequence[Curve]) -> list[Curve]:
    """Curves of one name as one: a method that removes all layers at once gives one depth per run."""
    found: dict[str, dict[int, StageResult]] = {}
    for curve in curves:
        points = found.setdefault(curve.name, {})
        for layers, stage in curve.points:
            if layers in points and stage.index and points[layers].index:
                raise ValueError(f"two runs named {curve.name!r} have a student of {layers} layers; name them apart")
            points.setdefault(layers, stage)
    return [Curve(name, sorted(points.items(), reverse=True)) for name, points in found.items()]


def write_curves(curves: Sequence[Curve], out: Path) -> None:
    """KL to the teacher and perplexity against layers left, as a PNG, and the numbers beside it as a csv.

    A dotted line leads over depths that nobody measured.
    """
    curves = joined(curves)
    if len(curves) > len(_LOOKS):
        raise ValueError(f"{len(curves)} runs in one picture; at most {len(_LOOKS)} can be told apart")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "layers", "params", "kl", "ppl", "retention", "tokens", "stage"])
        for curve in curves:
            for layers, s in curve.points:
                writer.writerow([curve.name, layers, s.params, s.kl, s.ppl, s.retention, s.tokens, s.name])
    _draw(curves, out)


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
        figure.savefig(out, dpi=120, facecolor="white", metadata={"Software": None})
