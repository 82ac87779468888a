"""Benchmarks: ways take turns, rows survive a break, a way that fails has a line, and plain and ours train alike."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from benchmarks import mixers, step, time_to_quality
from benchmarks.common import in_turns, rotated, spread
from benchmarks.step_setup import TASKS
from benchmarks.step_tables import notes, step_table
from benchmarks.step_ways import WAYS, run_ours, run_plain
from tests.factories import tiny, windows


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


def test_the_stock_way_runs_without_the_settings_that_this_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, dict[str, str]] = {}

    def started(command: list[str], env: dict[str, str], **_: Any) -> Any:
        seen[command[command.index("--only") + 1]] = env
        return subprocess.CompletedProcess(command, 1, "", "not run")

    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    monkeypatch.setattr(step.subprocess, "run", started)
    for name in ("ours", "stock"):
        assert step.in_a_process(name, "tiny", 1)["error"] == "not run"
    assert seen["ours"]["THP_MEM_ALLOC_ENABLE"] == "1"
    assert "ISKD_ALLOCATOR" not in seen["ours"]
    assert (seen["stock"]["THP_MEM_ALLOC_ENABLE"], seen["stock"]["ISKD_ALLOCATOR"]) == ("0", "stock")


def test_an_option_of_ours_changes_no_loss() -> None:
    ours = run_ours(TASKS["tiny"], 3)
    for name in ("selective", "checkpointing", "whole_logits"):
        assert WAYS[name](TASKS["tiny"], 3).losses == pytest.approx(ours.losses, rel=1e-4)


def test_plain_and_ours_see_the_same_batches_and_find_the_same_losses() -> None:
    plain, ours = run_plain(TASKS["tiny"], 3), run_ours(TASKS["tiny"], 3)
    assert plain.batches == ours.batches
    assert len(ours.seconds) == len(ours.losses) == len(ours.gaps) + 1 == 3
    assert ours.losses == pytest.approx(plain.losses, rel=1e-3)


def test_time_to_a_quality_and_quality_at_a_time(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    points = [(1.0, 0.8), (3.0, 0.4), (5.0, 0.5)]
    reached = [time_to_quality.time_to(points, goal) for goal in (0.9, 0.6, 0.1)]
    assert reached == [1.0, pytest.approx(2.0), None]
    assert [time_to_quality.kl_at(points, at) for at in (0.5, 2.0, 4.0, 9.0)] == pytest.approx([0.8, 0.6, 0.45, 0.5])
    rows = step.Rows(tmp_path / "rows.json", {"model": "tiny", "timed": 8, "device": step.DEVICE.type})
    for name in ("plain", "refit"):
        rows.add(name, 0, time_to_quality.measure(name, "tiny", 8))
    rows.add("trl", 0, {"error": "No module named 'trl'"})
    plain, refit = rows.rows[:2]
    assert plain["batches"] == refit["batches"]
    assert [at for at, _ in refit["kl"]] == list(range(9))
    assert plain["before"] == 0 < refit["before"] == time_to_quality.curve(refit)[0][0]
    # what is in the file is not run again, and what is missing can't be run here
    models = list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            time_to_quality, "in_a_process", lambda _, model, *__: models.append(model) or {"error": "No trl"}
        )
        time_to_quality.main(["--repeats", "1", "--ways", "plain"])
        assert models == ["smollm2"]
        patch.setattr(time_to_quality, "in_a_process", lambda *_: {"error": "No module named 'trl'"})
        options = ["--repeats", "1", "--timed", "8", "--ways", "plain", "trl", "refit", "--out", str(rows.file)]
        time_to_quality.main(["--tiny", *options])
    printed = capsys.readouterr().out
    assert "| trl | No module named 'trl' |" in printed
    assert f"| plain | {plain['kl'][0][1]:.3f} | {plain['kl'][-1][1]:.3f} | " in printed
    assert "Batches: the same for all." in printed


@pytest.mark.parametrize("kind", mixers.KINDS)
def test_both_ways_of_a_mixer_find_the_same(kind: str) -> None:
    torch.manual_seed(0)
    given, (chunk, step) = mixers.inputs(kind, 20, 2, 8), mixers.ways(kind, 2, 8, 8)
    torch.testing.assert_close(chunk(**given), step(**given), atol=1e-5, rtol=1e-4)


def test_every_kind_of_mixer_has_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"--repeats": "1", "--heads": "2", "--width": "8", "--size": "8", "--threads": str(torch.get_num_threads())}
    mixers.main([*(word for pair in sizes.items() for word in pair), "--tokens", "12", "16"])
    printed = capsys.readouterr().out
    for kind in mixers.KINDS:
        assert printed.count(f"\n| {kind} | ") == 2


@torch.no_grad()
def test_caches_with_room_ahead_say_what_a_growing_one_says() -> None:
    """The decoding experiment compares attention with three caches: their logits are the same."""
    file = Path(__file__).resolve().parents[2] / "experiments" / "subquadratic-decode" / "run.py"
    spec = importlib.util.spec_from_file_location("subquadratic_decode", file)
    assert spec is not None
    assert spec.loader is not None
    decode = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(decode)
    model, ids = tiny("llama", head_dim=8), windows(1, 12)

    def logits(cache: Any) -> list[torch.Tensor]:
        pieces = (ids[:, :9], *(ids[:, at : at + 1] for at in range(9, 12)))
        return [model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces]

    grown = logits(DynamicCache())
    for kind in (decode.IN_PLACE, decode.STATIC):
        for found, expected in zip(logits(decode.empty(model, kind, 12)), grown, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        cache = decode.filled(model, 10, kind, more=3)
        assert decode.seconds(model, cache, 10, 3) > 0
        assert cache.get_seq_length() == 13
