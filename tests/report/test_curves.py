"""Curves of runs: layers left per stage, the csv, the picture."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from iskd.plan import StageResult
from iskd.report.curves import joined, read_curve, write_curves
from iskd.report.figures.depth_curves import Curve
from iskd.schedules.edits import RemoveLayers
from iskd.schedules.iterative import Iterative
from iskd.training import run
from tests.runs import TOKENS, make_parts, write_text


def test_a_removal_run_becomes_a_curve(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    runs = []
    for name, tokens in (("healed", 4 * TOKENS), ("plain", 0)):
        schedule = Iterative(RemoveLayers(), layers=[2, 1], tokens=tokens, lr=1e-3)
        run(make_parts(tmp_path / name, text, tmp_path / "cache", schedule=schedule))
        runs.append(read_curve(tmp_path / name))
    assert [[layers for layers, _ in curve.points] for curve in runs] == [[4, 3, 2]] * 2
    write_curves(runs, tmp_path / "out" / "curve.png")
    rows = list(csv.DictReader((tmp_path / "out" / "curve.csv").read_text().splitlines()))
    assert [(row["run"], row["layers"]) for row in rows][:3] == [("healed", "4"), ("healed", "3"), ("healed", "2")]
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at most 6"):
        write_curves([Curve(str(n), runs[0].points) for n in range(7)], tmp_path / "many.png")


def test_runs_of_one_name_are_one_curve(tmp_path: Path) -> None:
    def point(layers: int, index: int) -> tuple[int, StageResult]:
        sizes = {"params": layers, "block_params": layers, "tokens": 0, "seconds": 0.0}
        return layers, StageResult(
            index=index, name=str(layers), ppl=30.0 - layers, kl=1.0, top1=1.0, retention=1.0, **sizes
        )

    ends = [Curve("at once", [point(6, 0), point(left, 1)]) for left in (2, 4)]
    (whole,) = joined(ends)
    assert [layers for layers, _ in whole.points] == [6, 4, 2]
    write_curves(ends, tmp_path / "curve.png")
    assert [row["layers"] for row in csv.DictReader((tmp_path / "curve.csv").read_text().splitlines())] == [
        "6",
        "4",
        "2",
    ]
    with pytest.raises(ValueError, match="two runs named 'at once' have a student of 4 layers"):
        joined([*ends, ends[1]])


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished stage to draw"):
        read_curve(tmp_path)
