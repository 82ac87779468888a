"""Quality against depth: the stage tables of several runs in one picture and one csv."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from iskd.plan import StageResult
from iskd.plan.edits import REMOVAL_OPS
from iskd.plan.results import kept_of
from iskd.report.beside import write_table
from iskd.report.figures.depth_curves import _LOOKS, Curve, _draw
from iskd.report.read_run import read_run


def read_curve(run_dir: Path, name: str | None = None) -> Curve:
    """Curve of a run. Raises ValueError when the run kept no stage or its depth is not recorded."""
    files = read_run(run_dir)
    layers, points = files.num_layers, []
    for stage in kept_of(files.stages):
        layers -= sum(edit["op"] in REMOVAL_OPS for edit in stage.edits)
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
    rows: list[list[object]] = [["run", "layers", "params", "kl", "ppl", "retention", "tokens", "stage"]]
    for curve in curves:
        for layers, s in curve.points:
            rows.append([curve.name, layers, s.params, s.kl, s.ppl, s.retention, s.tokens, s.name])
    if not write_table(out.with_suffix(".csv"), rows):
        raise ValueError(
            f"{out.with_suffix('.csv')} is no table of iskd curve and is not overwritten: choose another name"
        )
    _draw(curves, out)
