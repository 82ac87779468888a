"""Sweeps in which jobs fail, and folders that several processes want in the same second."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from torch import OutOfMemoryError, nn

from iskd.__main__ import main
from iskd.commands import arguments, train
from iskd.commands.arguments import listed, noted, told_at_the_end
from iskd.commands.line import FULL_ERROR
from iskd.commands.values.config import forget_folders, new_folder
from iskd.models import sharding
from iskd.plan.failure import read_failure, write_failure
from iskd.plan.run_files import FAILURE_FILE, STAGES_FILE
from iskd.report.read_run import read_run
from iskd.report.run_list import read_runs
from iskd.system.faults import RunError
from iskd.training.movement import MovementCheck, require_moved
from tests.factories import CONF

YAML = """
seed: 0
hydra: {callbacks: {failures: {_target_: iskd.commands.arguments.SweepFolder}}}
"""


def test_failed_jobs_of_a_sweep_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(YAML)

    @told_at_the_end
    @hydra.main(config_path=str(tmp_path), config_name="config", version_base="1.3")
    @noted
    def job(config: DictConfig) -> None:
        if config.seed:
            raise ValueError(f"seed {config.seed} is\nno good")

    sweep = tmp_path / "sweep"
    monkeypatch.setattr(sys, "argv", ["app", "-m", "seed=0,1,2", f"hydra.sweep.dir={sweep}"])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit):
        job()
    said = capsys.readouterr().err
    assert said.endswith(
        f"2 of 3 jobs failed:\n  {sweep}/1: ValueError: seed 1 is no good\n  {sweep}/2: ValueError: seed 2 is no good\n"
    )
    logs = [next((sweep / str(number)).glob("*.log")).read_text() for number in range(3)]
    assert logs[0] == ""
    assert "seed 2 is" in logs[2]
    assert "Traceback" in logs[2]
    runs, _ = read_runs([sweep])
    assert [run.marks[0] for run in runs] == [f"failed: ValueError: seed {seed} is no good" for seed in (1, 2)]
    assert "the run failed: ValueError: seed 1 is no good" in read_run(sweep / "1").notes


def test_every_job_that_fails_is_listed_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it fails of: a setting that is refused after its config is saved, a run that it may not continue so."""
    sweep = tmp_path / "sweep"
    keys = ["model=tiny", "debug=smoke", "trainer=cpu", "trainer.progress=false", "run.mfu=false", "plan_only=true"]
    keys += [f"cache_dir={tmp_path}/cache", f"hydra.sweep.dir={sweep}", "data.val_tokens=256"]

    def said(*given: str) -> str:
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as stop:
            main(["train", "-m", *keys, *given])
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert f"1 of 2 jobs failed:\n  {sweep}/0: ValueError: trainer.pre" in said("trainer.precision=bf16-true,32-true")
    assert [run.marks[0].split(":")[0] for run in read_runs([sweep])[0]] == ["failed", "planned only"]
    before = (sweep / "0" / FAILURE_FILE).read_bytes()
    for job in "01":  # as if both had come to their first checkpoint
        (sweep / job / STAGES_FILE).write_text("[]")
    found = said("resume=auto", "seed=7,8")
    assert "2 of 2 jobs failed:" in found
    for job in "01":
        assert f"  {sweep}/{job}: ValueError: " in found
        assert f"changes seed: 0 -> {7 + int(job)}" in found
    assert (sweep / "0" / FAILURE_FILE).read_bytes() == before, "no run fails of what was asked of it in vain"
    assert read_failure(sweep / "1") is None


def no_gradient() -> None:
    model, check = nn.Linear(2, 2), MovementCheck(2)
    check.watch(model, model.parameters())
    check.check_gradients()


def wrong_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "is_sharded", lambda model: True)
    sharding.check_roots(nn.Linear(2, 2))


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


MENDABLE = {
    "a value": raising(ValueError("run.keep=0 is too few")),
    "a file": raising(FileNotFoundError(2, "no such file", "text.jsonl")),
    "a device's memory": raising(OutOfMemoryError("CUDA out of memory")),
    "memory in words": raising(RuntimeError("DefaultCPUAllocator: can't allocate memory")),
    "an edit without a gradient": no_gradient,
    "an edit that stands still": lambda: require_moved([["layers.1.up"]], split=False),
}


@pytest.fixture
def said_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Callable[[], None], Path], str]:
    """What the `iskd` command prints of an error inside its task, which it has to tell; its config holds nothing."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("{}")
    monkeypatch.setattr(arguments, "CONF", tmp_path / "conf")
    monkeypatch.setattr(sys, "argv", ["iskd"])

    def said(fail: Callable[[], None], folder: Path) -> str:
        monkeypatch.setattr(train, "main", arguments.hydra_main(arguments.noted(lambda config: fail())))
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as stop:
            main(["train", f"hydra.run.dir={folder}"])
        assert stop.value.code == 2
        return capsys.readouterr().err

    return said


def test_what_a_user_can_mend_is_one_sentence_and_a_fault_of_ours_a_traceback(
    said_by: Callable[[Callable[[], None], Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(FULL_ERROR, raising=False)
    cases = {**MENDABLE, "shards": lambda: wrong_root(monkeypatch)}
    cases |= {kind.__name__: raising(kind("it stopped")) for kind in RunError.__subclasses__()}
    for number, (case, fail) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        said = said_by(fail, folder)
        assert said.startswith("error: "), case
        assert said.count("\n") == 1, f"one line and nothing of Hydra's: {said}"
        assert said[len("error: ") : -1] in str(read_failure(folder)), case
    for ours in (RuntimeError("a parameter is in two optimizer groups"), KeyError("x")):
        with pytest.raises(type(ours)):
            said_by(raising(ours), tmp_path / "ours")
    monkeypatch.setenv(FULL_ERROR, "1")
    with pytest.raises(RunError):
        said_by(no_gradient, tmp_path / "full")


def test_what_lies_there_is_shown_and_no_more(tmp_path: Path) -> None:
    assert read_failure(tmp_path) is None
    assert listed(tmp_path) == ""
    for content in ("[", "[]", "{}"):
        (tmp_path / "failure.json").write_text(content)
        assert read_failure(tmp_path) == "failure.json cannot be read"
    write_failure(tmp_path, ValueError("\x1b[2J" + "x" * 9000))
    assert len(read_failure(tmp_path) or "") < 2100
    assert "\x1b" not in (read_failure(tmp_path) or "")


def test_folders_of_one_second_are_never_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "runs" / "now")
    assert new_folder(path) == new_folder(path) == path
    found = set()
    for _ in range(3):  # another process, or another run of this one
        forget_folders()
        found.add(new_folder(path))
    assert found == {f"{path}-{number}" for number in (2, 3, 4)}
    forget_folders()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert new_folder(path) == path, "processes that belong together share one"


def test_names_of_runs_and_sweeps_are_taken_once() -> None:
    hydra_keys = OmegaConf.load(CONF / "config.yaml").hydra
    for node in (hydra_keys.run, hydra_keys.sweep):
        assert str(OmegaConf.to_container(node)["dir"]).startswith('${new_folder:"runs/${now:')
