"""What a run is made of, where the config leaves it to the run's other values."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from iskd.commands import build
from iskd.commands.build.schedule import schedule_of
from iskd.commands.compose import compose_config
from iskd.commands.values import as_meant
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


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("{edit: remove, count: 0}", "schedule.count=0: nothing would be edited"),
        ("{edit: remove, count: 2, target_layers: 1}", "schedule.count=2 and schedule.target_layers=1 are two targets"),
        ("{edit: remove, count: 1, importance: task_accuracy}", "importance.data_dir is not set"),
        ("{edit: convert, mixer: gla, attention_share: 2}", "schedule.attention_share=2.0 must be in"),
    ],
)
def test_what_a_step_refuses_is_told_with_the_step(step: str, said: str) -> None:
    words = ["model=tiny", "schedule=mixed", f"schedule.steps=[{{edit: remove, count: 1}}, {step}]"]
    config = as_meant(compose_config([*words, "schedule.tokens=64"])[0])
    with pytest.raises(ValueError, match=re.escape(f"schedule.steps[1]: {said}")):
        schedule_of(config)


@pytest.mark.parametrize(
    ("refit", "made"),
    [
        ("output", [("Output", 32768)]),
        ("[{name: output, tokens: 8192}, local]", [("Output", 8192), ("Local", 32768)]),
        ("{name: local, tokens: 4096}", [("Local", 4096)]),
        ("none", []),
        ("[]", []),
    ],
)
def test_a_step_has_refits_with_keys_of_its_own(refit: str, made: list[tuple[str, int]]) -> None:
    words = ["model=tiny", "schedule=mixed", f"schedule.steps=[{{edit: remove, count: 1, refit: {refit}}}]"]
    config = as_meant(compose_config([*words, "schedule.tokens=64"])[0])
    [step] = schedule_of(config).parts  # type: ignore[attr-defined]
    assert [(type(each).__name__, each.tokens) for each in step.refits] == made


def test_a_key_that_a_steps_refit_has_not_is_told() -> None:
    step = "{edit: remove, count: 1, refit: [{name: output, token: 8192}]}"
    with pytest.raises(ValueError, match=r"schedule.steps\[0\].refit.token is no key \(did you mean tokens\?\)"):
        as_meant(compose_config(["model=tiny", "schedule=mixed", f"schedule.steps=[{step}]"])[0])
