"""Benchmarks: ways take turns, rows survive a break, a way that fails has a line, and plain and ours train alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import step
from benchmarks.common import in_turns, rotated, spread
from benchmarks.step_setup import TASKS
from benchmarks.step_tables import notes, step_table
from benchmarks.step_ways import run_ours, run_plain


def row(way: str, repeat: int, seconds: float) -> dict[str, Any]:
    timed = {"seconds": [9.0, 9.0, seconds, seconds], "tokens": [100] * 4, "losses": [0.5, 0.4], "gaps": [0.01] * 3}
    return {"way": way, "repeat": repeat, **timed, "batches": ["a", "b"], "first_kl": 0.5, "peak_bytes": 2**30}


def test_every_way_runs_once_in_every_repeat_and_none_is_always_first() -> None:
    called: list[tuple[int, str]] = []
    found = in_turns({name: lambda repeat, n=name: called.append((repeat, n)) for name in "abc"}, repeats=3)
    assert {name: len(results) for name, results in found.items()} == {"a": 3, "b": 3, "c": 3}
    assert [sorted(name for at, name in called if at == repeat) for repeat in range(4)] == [["a", "b", "c"]] * 4
    assert {rotated("abc", repeat)[0] for repeat in range(3)} == {"a", "b", "c"}


def test_ratios_are_taken_within_a_repeat() -> None:
    assert spread([2.0, 40.0, 6.0], [1.0, 10.0, 2.0]) == "3.00 (2.00-4.00)"


def test_a_failed_way_has_its_reason_and_the_others_their_numbers() -> None:
    rows = [
        *(row(way, repeat, seconds) for repeat in (0, 1) for way, seconds in (("ours", 1.0), ("plain", 2.0))),
        {"way": "trl", "repeat": 0, "error": "No module named 'trl'"},
        *({"way": "peak", "repeat": repeat, "flops_per_s": 100.0, "dtype": "bfloat16"} for repeat in (0, 1)),
        {"way": "flops", "repeat": 0, "flops": 50},
    ]
    lines = dict(line.strip("| ").split(" | ", 1) for line in step_table(rows, ("plain", "trl", "ours"), 100, "cpu")
                 if " | " in line)  # fmt: skip
    assert "2.00 (2.00-2.00) | >= 1.3" in lines["plain"]
    assert "25.0 (25.0-25.0)" in lines["plain"]
    assert "50.0 (50.0-50.0)" in lines["ours"]
    assert "No module named 'trl'" in lines["trl"]
    said = "\n".join(notes(rows, ("plain", "trl", "ours"), "cpu"))
    assert "the same, in the same order" in said
    assert "1.00, 1.00 % of a step" in said


def test_rows_survive_a_break_and_failed_ones_run_again(tmp_path: Path) -> None:
    file, settings = tmp_path / "deeper" / "rows.json", {"timed": 2}
    rows = step.Rows(file, settings)
    rows.add("plain", 0, {"seconds": [1.0]})
    rows.add("trl", 0, {"error": "no memory"})
    again = step.Rows(file, settings)
    assert again.has("plain", 0)
    assert not again.has("trl", 0)
    again.add("trl", 0, {"seconds": [2.0]})
    assert [kept["way"] for kept in step.Rows(file, settings).rows] == ["plain", "trl"]
    with pytest.raises(SystemExit, match="other settings"):
        step.Rows(file, {"timed": 3})


def test_plain_and_ours_see_the_same_batches_and_find_the_same_losses() -> None:
    plain, ours = run_plain(TASKS["tiny"], 3), run_ours(TASKS["tiny"], 3)
    assert plain.batches == ours.batches
    assert len(ours.seconds) == len(ours.losses) == len(ours.gaps) + 1 == 3
    assert ours.losses == pytest.approx(plain.losses, rel=1e-3)
