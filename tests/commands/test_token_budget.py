"""How much is trained where nobody says: by the machine and its text, said in the plan, kept by a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from iskd.commands import build
from iskd.commands.build import tokens as tokens_of
from iskd.commands.build.schedule import schedule_of
from iskd.commands.compose import compose_config
from iskd.commands.resume import resumed
from iskd.commands.values.config import as_meant
from iskd.plan.run_files import CONFIG_FILE
from iskd.plan.token_budget import ON_CPU, ON_GPU, PASSES, gpu_token_budget
from iskd.training import run
from iskd.training.plan_table import print_plan

BOARD = "Board 9000, 24 GB"


def config(*overrides: str) -> DictConfig:
    return as_meant(compose_config(["model=phi1", *overrides])[0])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tokens_of, "called", lambda device: BOARD if device.type == "cuda" else "a processor, 2 cores")


def settled(asked: DictConfig, tokens: int) -> tuple[int, str]:
    told = tokens_of.default_tokens(asked, lambda: tokens)
    return asked.schedule.tokens, told


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("schedule", ["iterative", "oneshot", "align edit=convert", "none"])
def test_a_gpu_is_not_given_the_budget_of_a_cpu(schedule: str) -> None:
    """The docstrings of the default are half a million tokens: a few passes over them, and the plan says so."""
    keys = [f"schedule={schedule.split()[0]}", *schedule.split()[1:]]
    tokens, told = settled(config(*keys), 512 * 900)
    assert tokens == PASSES * 512 * 900
    assert BOARD in told
    assert "4.0 passes over the 460,800 tokens" in told
    assert "20,000,000" in told
    assert told.endswith("more text by data=, another number by schedule.tokens=N")
    tokens, told = settled(config(*keys), 10**9)
    assert tokens == ON_GPU
    assert "20,000,000 for a run on a GPU (Board 9000, 24 GB)" in told
    assert "passes" not in told


@pytest.mark.usefixtures("gpu")
def test_who_asks_for_a_budget_or_the_cpu_gets_it() -> None:
    assert settled(config("schedule.tokens=7"), 10**9) == (7, "")
    assert settled(config("schedule.tokens=0"), 10**9) == (0, "")
    assert settled(config("experiment=ild"), 10**9) == (40960, "")
    tokens, told = settled(config("trainer=cpu"), 10**9)
    assert tokens == ON_CPU
    assert "32,768 for a run on a CPU (a processor, 2 cores)" in told
    assert "schedule.tokens=N" in told


@pytest.mark.usefixtures("gpu")
def test_micro_batches_of_a_gpu_are_not_short_of_updates() -> None:
    assert tokens_of.batch_of(config()) == 2
    assert tokens_of.batch_of(config("trainer=cpu")) == 1, "32,768 tokens are 64 steps of one window"
    assert tokens_of.batch_of(config("trainer=cpu", "schedule.tokens=1M")) == 2


def test_little_text_is_not_too_little_to_train() -> None:
    assert gpu_token_budget(BOARD, 100).tokens == ON_CPU
    assert gpu_token_budget(BOARD, ON_GPU // PASSES).tokens == ON_GPU


def test_the_plan_says_what_was_decided_and_the_run_keeps_it(tmp_path: Path, capsys: Any) -> None:
    keys = ["debug=smoke", "trainer=cpu", "plan_only=true", "schedule.tokens=null", f"cache_dir={tmp_path}/cache"]
    found, folder = compose_config([*keys, "data.seq_len=64", "export=false"], tmp_path / "run")
    run(build.parts(found, folder))
    said = " ".join(capsys.readouterr().out.split())
    assert "schedule.tokens is not set: 32,768 for a run on a CPU (" in said
    assert "(by one measured step)" in said
    assert "GiB of memory" in said
    assert OmegaConf.load(folder / "config.yaml").schedule.tokens == ON_CPU
    assert sum(row["tokens"] for row in json.loads((folder / "plan.json").read_text())) == ON_CPU


@pytest.mark.parametrize(("memory", "warned"), [(0, False), (20 * 2**30, False), (30 * 2**30, True)])
def test_a_plan_that_does_not_fit_into_memory_says_so(memory: int, warned: bool, capsys: Any) -> None:
    row = {"stage": "a", "objective": "loss", "params": 1, "block_params": 1, "steps": 1, "tokens": 8}
    print_plan([{**row, "train_seconds": 20_000.0}], memory=memory, capacity=24 * 2**30)
    said = " ".join(capsys.readouterr().out.split())
    assert "about 5.6 h" in said
    assert ("of memory" in said) == (memory > 0)
    assert ("warning: 30.0 GiB are more than the 24.0 GiB of this device" in said) == warned


def test_tokens_of_the_command_line_are_no_passes_of_a_preset() -> None:
    papers = ["experiment=iskd_gpt2_paper"]
    assert compose_config(papers)[0].schedule.epochs == 1
    for asked in (["schedule.tokens=6144"], ["schedule.tokens=6144", "schedule.epochs=null"]):
        schedule = compose_config([*papers, *asked])[0].schedule
        assert (schedule.tokens, schedule.epochs) == (6144, None)
    assert compose_config([*papers, "schedule.tokens=null"])[0].schedule.epochs == 1
    assert compose_config(["schedule.epochs=2"])[0].schedule.epochs == 2
    with pytest.raises(ValueError, match=r"schedule\.tokens=9 and schedule\.epochs=2 both say how long .* drop one"):
        compose_config([*papers, "schedule.tokens=9", "schedule.epochs=2"])


def test_a_stream_is_as_long_as_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are those of the schedule, of all steps of a mixed one, or of the machine; passes have no end."""
    stream = ["data=tinystories", "++data.source.streaming=true", "trainer=cpu"]
    steps = "schedule.steps=[{edit: remove, count: 1, tokens: 70000}, {edit: remove, count: 1, tokens: 50000}]"
    cases = {
        ("schedule.tokens=90000",): 90_000,
        ("schedule=mixed", steps): 120_000,
        ("schedule.tokens=null",): None,
    }
    for keys, tokens in cases.items():
        found = tokens_of.streamed(config(*stream, *keys))
        assert found == tokens if tokens else found > 16_384, keys
    with pytest.raises(ValueError, match=r"schedule\.epochs=2 takes all of the text, and data\.source\.streaming=true"):
        tokens_of.streamed(config(*stream, "schedule.epochs=2"))
    monkeypatch.setattr(tokens_of, "_device", lambda _: torch.device("cuda"))
    with pytest.raises(ValueError, match=r"schedule\.tokens=null goes by how long the text is.*set schedule\.tokens"):
        tokens_of.streamed(config(*stream, "schedule.tokens=null"))


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["schedule=oneshot", "schedule.layers=[1,2,3,0,4,5]"], {"layers": [1, 2, 3, 0, 4, 5]}),
        (["schedule=iterative", "schedule.layers=[3,1,2]", "schedule.count=2"], {"layers": [3, 1, 2], "count": 2}),
        (["schedule=iterative", "edit=remove", "schedule.target_layers=2"], {"target_layers": 2}),
        (["schedule=iterative", "schedule.layers=null"], {"count": 4}),
        (["experiment=ild", "schedule.count=2"], {"count": 2}),
        (["experiment=ild", "schedule.target_params=90000"], {"target_params": 90000}),
        (["experiment=ild"], {"target_layers": 26}),
        (["experiment=subquadratic", "schedule.attention_share=0.25"], {"attention_share": 0.25}),
        (["experiment=subquadratic", "schedule.layers=every_second"], {"layers": "every_second"}),
    ],
)
def test_layers_of_the_command_line_are_not_cut_to_a_presets_number(words: list[str], left: dict[str, Any]) -> None:
    schedule = compose_config(["model=tiny", *words])[0].schedule
    keys = ("layers", "count", "target_layers", "target_params", "attention_share")
    assert {key: schedule.get(key) for key in keys if schedule.get(key) is not None} == left
    schedule_of(compose_config(["model=tiny", *words, "schedule.tokens=64"])[0])


STEPS = "[{edit: remove, count: 1}, {edit: convert, mixer: gla}]"
PASSES_IN_STEPS = "[{edit: remove, count: 1, epochs: 1}, {edit: convert, mixer: gla}]"


@pytest.mark.parametrize(
    ("words", "tokens"),
    [
        (["experiment=iskd"], [ON_CPU]),
        (["schedule=oneshot", "edit=remove"], [ON_CPU]),
        (["experiment=iskd_gpt2_paper"], [ON_CPU]),
        (["experiment=iskd", "schedule.tokens=5000"], [5000]),
        (["schedule=mixed", f"schedule.steps={STEPS}"], [ON_CPU // 2] * 2),
        (["schedule=mixed", f"schedule.steps={STEPS}", "schedule.tokens=1000"], [500] * 2),
        (["schedule=mixed", f"schedule.steps={PASSES_IN_STEPS}", "schedule.tokens=1000"], [ON_CPU, 1000]),
    ],
)
def test_the_same_command_takes_a_run_up_again(words: list[str], tokens: list[int], tmp_path: Path) -> None:
    """Whatever the run has settled for itself where nobody said; another number is another run."""
    words = ["trainer=cpu", *words]
    asked = config(*words)
    tokens_of.default_tokens(asked, lambda: 10**6)
    OmegaConf.save(asked, tmp_path / CONFIG_FILE)
    again = [*words, f"resume={tmp_path}"]
    found = resumed(compose_config(["model=phi1", *again])[0], again)
    schedules = [step.schedule for step in found.schedule.get("steps") or ()] or [found.schedule]
    assert [schedule.tokens for schedule in schedules] == tokens
    if len(tokens) == 1:
        other = [*again, "schedule.tokens=77"]
        with pytest.raises(ValueError, match=rf"changes .*schedule.tokens: {tokens[0]} -> 77"):
            resumed(compose_config(["model=phi1", *other])[0], other)


@pytest.mark.parametrize(
    ("steps", "tokens", "said"),
    [
        ("[{edit: remove, count: 1, tokens: 1000}]", 1000000, r"tokens=1000000: .* take 1,000, and none trains on"),
        ("[{edit: remove, count: 1, tokens: 1500}]", 1000, r"schedule.tokens=1000: .* take 1,500; give more, or null"),
        ("[{edit: remove, count: 1, tokens: 1500}, {edit: remove}]", 1000, r"take 1,500; give more, or null"),
        ("[{edit: remove, count: 1, tokens: 40, epochs: 1}]", "null", r"steps\[0\]: tokens=40 and epochs=1 both say"),
        ("[{edit: remove, count: 1, tokens: abc}]", 1000, r"schedule.steps\[0\].tokens=abc must be"),
        ("[{edit: remove, count: 1, tokens: 10}]", "abc", r"schedule.tokens=abc must be"),
        ("[{edit: remove, count: 1, epochs: 1}]", 1000, r"take 0, and none trains on the rest"),
    ],
)
def test_budgets_of_steps_that_contradict_the_runs_are_refused(steps: str, tokens: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config("schedule=mixed", f"schedule.steps={steps}", f"schedule.tokens={tokens}")


@pytest.mark.parametrize(("tokens", "batch"), [("1e6", 2), ("2000", 1), ("null", 1)])
def test_micro_batches_go_by_what_all_steps_train_on(tokens: str, batch: int) -> None:
    """64 steps of two windows of 512 are 65,536 tokens: more than a budget of nobody's."""
    steps = f"[{{edit: remove, count: 1, tokens: {tokens}}}, {{edit: convert, mixer: gla, tokens: {tokens}}}]"
    assert tokens_of.batch_of(config("trainer=cpu", "schedule=mixed", f"schedule.steps={steps}")) == batch
