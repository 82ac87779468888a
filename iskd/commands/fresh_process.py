"""`iskd train` in a fresh process: in the place of this one, or as its child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from hydra.conf import HydraConf

from iskd.commands.config import PACKAGE
from iskd.plan import StageResult
from iskd.plan.results import read_stages
from iskd.plan.run_files import LOCK_FILE
from iskd.system import Preempted, run_lock
from iskd.system.stop_signals import EXIT_CODE, INTERRUPTED, StopSignals

COMMAND = "ISKD_COMMAND"
"""Names the command where processes get the arguments without it: those that a multi-process run starts."""
RESUME = "ISKD_RESUME"
"""A launcher preset can set variables of its jobs but no key of the config; `resume=` on the command line is first."""
# sys.argv[0] may be a launcher's, and the package need not be installed. As `python -m iskd`, but that one looks for
# modules in the working directory first, where paths of the command line count from: it may be a downloaded folder.
_START = (
    "import sys; sys.path[:] = [place for place in sys.path if place]; "
    "import runpy; runpy.run_module('iskd', run_name='__main__', alter_sys=True)"
)
_ENTRY = (sys.executable, "-c", _START)


def go_on(run_dir: Path, hydra_config: HydraConf, environment: Mapping[str, str]) -> NoReturn:
    """Put a fresh process in the place of this one, which continues the run."""
    given = [argument for argument in hydra_config.overrides.task if not argument.startswith("resume=")]
    ours = _ours(environment)
    run_lock.hand_on(run_dir / LOCK_FILE, ours)
    os.execve(sys.executable, [*_ENTRY, *given, f"resume={run_dir}"], ours)


def in_a_child(run_dir: Path, resume: str | None, overrides: Sequence[str]) -> list[StageResult]:
    """Run one job of a sweep in a process of its own, which may be replaced by fresh ones; stop signals are passed on.

    Returns:
        The rows of its stages.
    """
    given = [argument for argument in overrides if not argument.startswith("resume=")]
    command = [*_ENTRY, *given, f"hydra.run.dir={run_dir}", *([f"resume={resume}"] if resume else [])]
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
            raise RuntimeError(f"the run in {run_dir} ended with code {child.returncode}; see its last lines above")
    finally:
        stop_signals.uninstall()
    return read_stages(run_dir)


def _ours(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that runs `iskd train` from where this one's package lies."""
    paths = [str(PACKAGE.parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    found = {**environment, COMMAND: "train", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return {**found, "PYTHONSAFEPATH": "1"}  # from Python 3.11 on also for the processes that this one starts
