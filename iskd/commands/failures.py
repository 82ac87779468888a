"""Jobs that fail: each says so in its own log and folder, and the end of a sweep lists them.

Hydra keeps the error of a job to itself, raises that of the first one when all have run, and writes none into a log.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from iskd.plan.failure import read_failure, write_failure
from iskd.plan.run_folder import CONFIG_FILE, FAILURE_FILE

_P = ParamSpec("_P")
_R = TypeVar("_R")
_sweeps: list[Path] = []


class SweepFolder(Callback):
    """Remembers where a sweep writes, for `told_at_the_end`; of conf/config.yaml."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """A sweep begins."""
        _sweeps.append(Path(config.hydra.sweep.dir))


def noted(job: Callable[_P, _R]) -> Callable[_P, _R]:
    """A job whose error goes into its log too, and into its folder where it did not come to be that of a run."""

    @wraps(job)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return job(*args, **kwargs)
        except Exception as error:
            where = sys.exc_info()
            record = logging.LogRecord(__name__, logging.ERROR, __file__, 0, "the job failed: %s", (error,), where)
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.FileHandler):  # Hydra prints it
                    handler.handle(record)
            folder = Path(HydraConfig.get().runtime.output_dir)
            if not any((folder / name).exists() for name in (CONFIG_FILE, FAILURE_FILE)):
                write_failure(folder, error)
            raise

    return wrapped


def told_at_the_end(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """A command that lists the jobs of its sweep which failed, and why."""

    @wraps(command)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return command(*args, **kwargs)
        finally:
            for folder in _sweeps:
                sys.stderr.write(listed(folder))
            _sweeps.clear()

    return wrapped


def listed(sweep: Path) -> str:
    """One line for every job of a sweep that failed; empty when none did."""
    jobs = sorted((path for path in sweep.glob("*") if path.is_dir() and path.name[:1] != "."), key=_number)
    failed = {job: read_failure(job) for job in jobs}
    lines = [f"  {job}: {why}\n" for job, why in failed.items() if why is not None]
    return f"{len(lines)} of {len(jobs)} jobs failed:\n{''.join(lines)}" if lines else ""


def _number(job: Path) -> tuple[int, str]:
    return (int(job.name) if job.name.isdecimal() else sys.maxsize, job.name)
