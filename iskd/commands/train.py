"""`iskd train`, which train.py runs: compose, build, run; in a fresh process where an edit wants one.

That one takes the place of this process, or of a job of a sweep is a child of it.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from iskd.commands.arguments import AUTO, hydra_main, noted, told_at_the_end
from iskd.commands.line.steps import restarts_at_edit
from iskd.commands.values import plain
from iskd.commands.values.paths import assigned
from iskd.plan import StageResult
from iskd.plan.failure import write_failure
from iskd.plan.results import read_stages
from iskd.plan.run_files import CONFIG_FILE, LOCK_FILE, work_in
from iskd.system import Preempted, global_rank, run_lock
from iskd.system.faults import RunError, UnavailableError
from iskd.system.files import expanded
from iskd.system.ranks import one_of_several
from iskd.system.stop_signals import EXIT_CODE, INTERRUPTED, StopSignals
from iskd.system.version import COMMAND, PACKAGE

RESUME = "ISKD_RESUME"
"""A launcher preset can set variables of its jobs but no key of the config; `resume=` on the command line is first."""
# sys.argv[0] may be a launcher's, and the package need not be installed. As `python -m iskd`, but that one looks for
# modules in the working directory first, where paths of the command line count from: it may be a downloaded folder.
_START = (
    "import sys; sys.path[:] = [place for place in sys.path if place]; "
    "import runpy; runpy.run_module('iskd', run_name='__main__', alter_sys=True)"
)
_ENTRY = (sys.executable, "-c", _START)


@told_at_the_end
@hydra_main
@noted
def main(config: DictConfig) -> float | list[float] | None:
    """Compose, build, run; what `objectives` names is returned to a sweep, and nothing where there is none."""
    from iskd.commands import build, resume
    from iskd.plan.summary import objectives
    from iskd.training import StartAgain, run

    # Lightning's start-up notes say nothing about a compression run and bury what does
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    environment, hydra_config = dict(os.environ), HydraConfig.get()
    run_dir = Path(hydra_config.runtime.output_dir)
    config.resume = resume_folder(config.resume, run_dir, hydra_config)
    result_of, several = objectives(plain(config.objectives)), hydra_config.mode == RunMode.MULTIRUN
    if several and restarts_at_edit(plain(config.schedule)):
        return answer(run_dir, result_of, in_a_child(run_dir, config.resume, hydra_config.overrides.task))
    if config.resume is not None:
        config = resume.resumed(config, hydra_config.overrides.task)
    try:
        stages = planned(config, run_dir) if config.plan_only else run(build.parts(config, run_dir)).stages
        if stages is None:
            return None
        return answer(run_dir, result_of, stages) if several else None
    except (Preempted, StartAgain) as stop:
        if global_rank() == 0:  # Python prints nothing for an exit with a code
            print(stop.message, file=sys.stderr)
        if isinstance(stop, Preempted) or one_of_several(environment):
            raise
    go_on(run_dir, hydra_config, environment)


def planned(config: DictConfig, run_dir: Path) -> list[StageResult] | None:
    """Show the plan: measured where all that it takes is on this machine, else by the model's sizes (None)."""
    from iskd.commands import build
    from iskd.system.patches import nothing_fetched
    from iskd.training import run

    try:
        with nothing_fetched():
            return run(build.parts(config, run_dir)).stages
    except UnavailableError as error:
        build.plan_without(config, run_dir, error)
        return None


def answer(
    run_dir: Path, result_of: Callable[[Sequence[StageResult]], float | list[float]], stages: Sequence[StageResult]
) -> float | list[float]:
    """What a job tells its sweep; of a run that has no such answer, its folder says why."""
    try:
        return result_of(stages)
    except RunError as error:
        write_failure(run_dir, error)
        raise


def resume_folder(asked: str | None, run_dir: Path, hydra_config: HydraConf) -> str | None:
    """The folder to continue, or None to start a run; `auto` continues the run in Hydra's output directory, if any.

    A batch system starts a job again with the arguments it had; `auto` makes these mean start the first time and
    continue afterwards. A run that came to no checkpoint starts again, with what the command says now.
    Raises ValueError when `auto` could never find anything.
    """
    asked = asked or os.environ.get(RESUME) or None
    if asked != AUTO:
        return None if asked is None else expanded(asked)
    named_after_time = "${now" in str(OmegaConf.to_container(hydra_config.run, resolve=False))
    if hydra_config.mode != RunMode.MULTIRUN and named_after_time:
        raise ValueError(
            "resume=auto continues the run in hydra.run.dir, but that folder is named after the time and new at every "
            "start: set hydra.run.dir=DIR (or, for a launcher preset, add -m)"
        )
    return str(run_dir) if (run_dir / CONFIG_FILE).is_file() and work_in(run_dir) else None


def go_on(run_dir: Path, hydra_config: HydraConf, environment: Mapping[str, str]) -> NoReturn:
    """Put a fresh process in the place of this one, which continues the run."""
    given = [argument for argument in hydra_config.overrides.task if not argument.startswith("resume=")]
    ours = _ours(environment)
    run_lock.hand_on(run_dir / LOCK_FILE, ours)
    os.execve(sys.executable, [*_ENTRY, *given, assigned("resume", str(run_dir))], ours)


def in_a_child(run_dir: Path, resume: str | None, overrides: Sequence[str]) -> list[StageResult]:
    """Run one job of a sweep in a process of its own, which may be replaced by fresh ones; stop signals are passed on.

    Returns:
        The rows of its stages.
    """
    given = [argument for argument in overrides if not argument.startswith("resume=")]
    command = [
        *_ENTRY,
        *given,
        assigned("hydra.run.dir", str(run_dir)),
        *([assigned("resume", resume)] if resume else []),
    ]
    environment = {key: value for key, value in os.environ.items() if key != RESUME}
    stop_signals = StopSignals()
    stop_signals.install()
    try:
        child = subprocess.Popen(command, env=_ours(environment))
        asked = False
        while child.poll() is None:
            if stop_signals.received is not None and not asked:
                child.send_signal(signal.SIGTERM)
                asked = True
            time.sleep(0.1)
        if child.returncode in (EXIT_CODE, INTERRUPTED):
            stop_signals.hand_on()
            raise Preempted(run_dir, number=signal.SIGINT if child.returncode == INTERRUPTED else stop_signals.received)
        if child.returncode and stop_signals.received is not None:  # before there was anything to save
            raise SystemExit(128 + stop_signals.received)
        if child.returncode:
            raise RunError(f"the run in {run_dir} ended with code {child.returncode}; see its last lines above")
    finally:
        stop_signals.uninstall()
    return read_stages(run_dir)


def _ours(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that runs `iskd train` from where this one's package lies."""
    paths = [str(PACKAGE.parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    found = {**environment, COMMAND: "train", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return {**found, "PYTHONSAFEPATH": "1"}  # from Python 3.11 on also for the processes that this one starts
