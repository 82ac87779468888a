"""What a run is made of, where the config leaves it to the run's other values."""

from __future__ import annotations

from pathlib import Path

import pytest

from iskd.commands import build
from iskd.commands.compose import compose_config
from iskd.plan.run_files import CONFIG_FILE, LOCK_FILE
from iskd.plan.saved_config import read_config
from iskd.system import run_lock


@pytest.mark.parametrize(
    ("given", "windows"),
    [
        (["schedule.tokens=4096"], 1),
        (["schedule.tokens=8192"], 2),
        (["schedule.tokens=1e9"], 2),
        (["schedule.tokens=0"], 2),
        (["schedule.tokens=8192", "trainer.accumulate_grad_batches=2"], 1),
        (["schedule.tokens=4096", "data.batch_size=3"], 3),
        (["schedule.tokens=4096", "data=tinystories", "data.path=texts.txt", "data.seq_len=64"], 4),
    ],
)
def test_a_small_budget_takes_small_steps(
    given: list[str], windows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 steps at least, with windows of 64 tokens; the number is of the run, so that it resumes with it."""
    monkeypatch.setenv("ISKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("Once upon a time.\n\n" * 2000)
    config, _ = compose_config(["model=tiny", "data=sample", "data.seq_len=64", "trainer=cpu", *given])
    parts = build.parts(config, tmp_path / "run")
    run_lock.release(tmp_path / "run" / LOCK_FILE)
    assert parts.data.batch_size == read_config(tmp_path / "run" / CONFIG_FILE)["data"]["batch_size"] == windows
