"""Stop signals: noted and nothing else, saved at the next step, handed on, resumed by the same command line."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import hydra
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from iskd.commands import verify
from iskd.commands.arguments import arguments
from iskd.commands.build.folder import claim
from iskd.commands.train import resume_folder
from iskd.plan.run_files import CONFIG_FILE
from iskd.system.ranks import global_rank
from iskd.system.stop_signals import EXIT_CODE, INTERRUPTED, Handler, Preempted, StopSignals, stop_signals
from iskd.system.text import argument
from iskd.training.state import checkpoint, checkpoint_files
from tests.commands.test_cli import NAME, ROOT
from tests.factories import CONF
from tests.worlds import Command

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SUBMITIT_EXECUTOR", "SUBMITIT_PREEMPT_SIGNAL")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (*RANKS, "ISKD_RESUME"):
        monkeypatch.delenv(name, raising=False)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # the interpreter runs handlers between bytecodes


# ---- marks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_leaves_a_mark(number: int) -> None:
    before = signal.getsignal(number)
    caught = StopSignals()
    caught.install()
    assert caught.received is None
    send(number)
    send(signal.SIGTERM)
    assert caught.received == number, "the first one counts"
    caught.hand_on()  # nothing was there before
    caught.uninstall()
    assert signal.getsignal(number) == before
    assert caught.received == number


def test_handlers_of_lightning_are_replaced_and_those_of_before_handed_on() -> None:
    calls: list[tuple[str, int]] = []
    signal.signal(signal.SIGTERM, lambda number, frame: calls.append(("before", number)))
    lightnings = cast(Handler, _HandlersCompose([lambda number, frame: calls.append(("lightning", int(number)))]))
    signal.signal(signal.SIGUSR1, lightnings)
    caught = StopSignals()
    caught.install()
    for number in (signal.SIGTERM, signal.SIGUSR1):  # as Lightning does between on_fit_start and on_train_start
        signal.signal(number, lightnings)
    caught.install()
    send(signal.SIGUSR1)
    send(signal.SIGTERM)
    assert caught.received == signal.SIGUSR1
    assert calls == []
    caught.hand_on()
    assert calls == [("before", signal.SIGTERM)]
    caught.uninstall()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_handlers_that_exit_or_fail_are_not_hidden() -> None:
    def requeue(number: int, frame: object) -> None:
        sys.exit(144)

    signal.signal(signal.SIGTERM, requeue)
    caught = StopSignals()
    caught.install()
    send(signal.SIGTERM)
    with pytest.raises(SystemExit, match="144"):
        caught.hand_on()


def test_the_signal_of_a_submitit_job(monkeypatch: pytest.MonkeyPatch) -> None:
    always = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    assert stop_signals() == always
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    assert stop_signals() == (*always, signal.SIGUSR2)
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    assert stop_signals() == always
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR7")
    with pytest.raises(ValueError, match="SUBMITIT_PREEMPT_SIGNAL=USR7"):
        stop_signals()


def test_the_second_ctrl_c_ends_the_process() -> None:
    """The system itself ends it: a handler would wait for whatever the first one waits for."""
    signals = StopSignals()
    signals.install()
    send(signal.SIGINT)
    signals.install()  # as at the start of training, after Lightning
    assert signals.received == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    signals.hand_on()  # the handler of before would raise KeyboardInterrupt
    signals.uninstall()
    assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL


def test_other_threads_install_nothing() -> None:
    caught, before = StopSignals(), signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=caught.install)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before


# ---- exit code and ranks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "1"}, 1),
        ({"RANK": "5", "LOCAL_RANK": "1"}, 5),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, 3),
    ],
)
def test_rank_and_exit_code(variables: dict[str, str], rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert global_rank() == rank
    stop = Preempted(Path("runs/x"))
    assert stop.code == (EXIT_CODE if rank == 0 else 0)
    assert "resume=runs/x" in stop.message
    by_user = Preempted(Path("runs/x y"), number=signal.SIGINT)
    assert by_user.code == (INTERRUPTED if rank == 0 else 0)
    assert by_user.message.endswith("continue with 'resume=runs/x y'"), "to be pasted"


def test_only_rank_zero_claims_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(tmp_path, resuming=False)
    (tmp_path / CONFIG_FILE).write_text("seed: 1")
    with pytest.raises(ValueError, match="holds another run"):
        claim(tmp_path, resuming=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")  # first of its node, with LOCAL_RANK 0 or none
    claim(tmp_path, resuming=False)


@pytest.mark.parametrize("mode", ["run", "sweep"])
def test_hydra_lets_the_exit_code_through(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    started = []

    @hydra.main(config_path=str(tmp_path), config_name="config", version_base="1.3")
    def app(config: DictConfig) -> None:
        started.append(config.seed)
        raise Preempted(tmp_path)

    sweep = ["-m", "seed=1,2", f"hydra.sweep.dir={tmp_path}/sweep"]
    monkeypatch.setattr(sys, "argv", ["app", *([f"hydra.run.dir={tmp_path}/run"] if mode == "run" else sweep)])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as caught:
        app()
    assert caught.value.code == EXIT_CODE == 143
    assert started == ([0] if mode == "run" else [1]), "a preempted job ends the sweep"


# ---- resume=auto ----------------------------------------------------------------------------------------------------


@pytest.fixture
def composed() -> Iterator[Callable[..., DictConfig]]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *overrides: compose("config", overrides=list(overrides), return_hydra_config=True)
    GlobalHydra.instance().clear()


def test_auto_continues_what_is_there(
    composed: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert arguments(["resume=auto", "seed=1"]) == ["resume=auto", "seed=1"]
    config = composed("resume=auto", f"hydra.run.dir={tmp_path}").hydra
    assert resume_folder("auto", tmp_path, config) is None, "nothing there yet"
    (tmp_path / "checkpoints").mkdir()
    assert resume_folder("auto", tmp_path, config) is None, "died before its config was saved"
    (tmp_path / CONFIG_FILE).write_text("seed: 1")
    assert resume_folder("auto", tmp_path, config) is None, "no run yet: a corrected command starts it"
    (tmp_path / "checkpoints" / "000000-start").mkdir()
    assert resume_folder("auto", tmp_path, config) == str(tmp_path)
    assert resume_folder(None, tmp_path, config) is None
    assert resume_folder("elsewhere", tmp_path, config) == "elsewhere"
    monkeypatch.setenv("ISKD_RESUME", "auto")
    assert resume_folder(None, tmp_path, config) == str(tmp_path)
    assert resume_folder("elsewhere", tmp_path, config) == "elsewhere"


def test_auto_needs_a_folder_that_stays(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    config = composed("resume=auto").hydra
    with pytest.raises(ValueError, match=r"set hydra\.run\.dir=DIR"):
        resume_folder("auto", tmp_path, config)
    config.mode = RunMode.MULTIRUN  # a launcher that starts a job again keeps its sweep's folder
    assert resume_folder("auto", tmp_path, config) is None


@pytest.mark.parametrize(("name", "executor"), [("slurm", "Slurm"), ("slurm_local", "Local")])
def test_presets_compose(name: str, executor: str, composed: Callable[..., DictConfig]) -> None:
    pytest.importorskip("submitit")
    config = composed("debug=smoke", f"hydra/launcher={name}", "hydra.launcher.tasks_per_node=2")
    launcher = config.hydra.launcher
    assert launcher._target_.endswith(f".{executor}Launcher")
    assert OmegaConf.to_container(config.hydra.job.env_set) == {"ISKD_RESUME": "auto"}
    assert config.resume is None
    if name == "slurm":
        assert launcher.gpus_per_node == 2
        assert launcher.max_num_timeout > 0
        assert launcher.additional_parameters == {"requeue": True}
    assert launcher.timeout_min > 10, "submitit takes any signal for a timeout in the last ten minutes of a job"


# ---- whole runs -----------------------------------------------------------------------------------------------------

TINY = ("debug=smoke", "export=false", "run.checkpoint_every=10", "trainer.progress=false", "schedule.tokens=8192")
EACH_STEP = "trainer.log_every_n_steps=1"
STEP_TOKENS = 256


def start(*overrides: str, cwd: Path) -> Command:
    """`iskd train` in a process of its own; tokens are cached beside the runs."""
    log = cwd / f"output{len(list(cwd.glob('output*')))}.log"
    words = ("train", *TINY, EACH_STEP, *overrides)
    return Command(words, cwd, log, {"ISKD_CACHE": str(cwd / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def wait_for(process: Command, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while process.running() and time.monotonic() < deadline and not condition():
        time.sleep(0.02)
    assert process.running(), f"over before it could be stopped:\n{process.log.read_text()}"


def newest(run_dir: Path) -> Path:
    found = checkpoint_files.newest(run_dir / "checkpoints")
    assert found is not None
    return found


def trained(run_dir: Path) -> int:
    """Tokens of the newest checkpoint."""
    return checkpoint.read_state(newest(run_dir)).tokens


def assert_same_end(one: Path, other: Path) -> None:
    for file in ("student.safetensors", "optimizer.safetensors"):
        a, b = load_file(newest(one) / file), load_file(newest(other) / file)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    rows = [json.loads((run_dir / "stages.json").read_text()) for run_dir in (one, other)]
    assert len(rows[0]) == len(rows[1]) == 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `whole`, a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("stopped") / NAME
    folder.mkdir()
    code, output = start(f"hydra.run.dir={folder}/whole", cwd=folder).end()
    assert code == 0, output
    return folder


def test_stopped_and_killed_runs_continue_bit_for_bit(place: Path) -> None:
    """Ctrl-C in the first stage, then SIGUSR1, then kill -9, then to the end, until its student is verified."""
    run_dir = place / "stopped"
    before = 0
    for number, expected in ((signal.SIGINT, INTERRUPTED), (signal.SIGUSR1, EXIT_CODE), (signal.SIGKILL, -9)):
        process = start("resume=auto", f"hydra.run.dir={run_dir}", cwd=place)
        wait_for(process, lambda: any(run_dir.glob("checkpoints/*-stage")) and trained(run_dir) > before)  # noqa: B023
        process.send(number)
        code, output = process.end()
        assert code == expected, output
        assert "Traceback" not in output
        if number == signal.SIGKILL:
            break
        assert output.splitlines()[-1].endswith(f"everything is saved: continue with {argument('resume', run_dir)}")
        logged = [float(row.split(",")[column]) for column, row in rows_of(run_dir / "metrics.csv")]
        assert 0 <= trained(run_dir) - max(logged) <= STEP_TOKENS
        assert trained(run_dir) > before
        before = trained(run_dir)
    code, output = start(f"resume={run_dir}", "export=true", cwd=place).end()
    assert code == 0, output
    assert_same_end(place / "whole", run_dir)
    assert verify.run([str(run_dir), "--no-timing"]) == 0
    assert (place / "cache" / "data").is_dir()


def rows_of(path: Path) -> Iterator[tuple[int, str]]:
    """Rows of metrics.csv with the column of their tokens."""
    header, *rows = path.read_text().splitlines()
    return ((header.split(",").index("tokens"), row) for row in rows)


@pytest.mark.slow
def test_a_submitit_job_is_queued_again_and_continues(place: Path) -> None:
    """The preemption signal reaches the job as a cluster would send it; submitit starts the job again by itself."""
    pytest.importorskip("submitit")
    sweep = place / "sweep"
    numbered = "hydra.job_logging.formatters.simple.format='<%(process)d> %(message)s'"
    process = start("-m", "hydra/launcher=slurm_local", "seed=0", numbered, f"hydra.sweep.dir={sweep}", cwd=place)
    wait_for(process, lambda: any(sweep.glob("0/checkpoints/*-stage")))
    job = re.findall(r"^<(\d+)>", (sweep / "0" / "train.log").read_text(), re.MULTILINE)[-1]
    os.kill(int(job), signal.SIGUSR2)
    code, output = process.end()
    logs = "\n".join(path.read_text() for path in sweep.glob(".submitit/*/*_log.*"))
    assert code == 0, output + logs
    assert "Requeued job" in logs
    assert "starts from its beginning" not in logs
    assert len(set(re.findall(r"^<(\d+)>", (sweep / "0" / "train.log").read_text(), re.MULTILINE))) == 2
    assert_same_end(place / "whole", sweep / "0")


@pytest.mark.slow
def test_two_processes_stop_and_continue_together(tmp_path: Path) -> None:
    """The signal reaches one of them; both stop at the same step, and Lightning kills neither."""
    two = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    same = (*two, "resume=auto", f"hydra.run.dir={tmp_path}/run")
    process = start(*same, cwd=tmp_path)
    wait_for(process, lambda: any(tmp_path.glob("run/checkpoints/*-stage")))
    process.send(signal.SIGTERM)
    code, output = process.end()
    assert code == EXIT_CODE, output
    assert not (tmp_path / "run" / "record.json").exists()
    code, output = start(*same, cwd=tmp_path).end()
    assert code == 0, output
    assert len(json.loads((tmp_path / "run" / "stages.json").read_text())) == 3
