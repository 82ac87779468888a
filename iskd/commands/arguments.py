"""What the command line may say beyond Hydra's overrides, and how an error is told there.

Hydra keeps the error of a sweep's job to itself, raises that of the first one when all have run, and writes none into a
log: a job that fails says so in its own log and, where that is its own, its folder (`noted`), and the end lists them
(`told_at_the_end`).
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from iskd.commands.line import FULL_ERROR, in_own_words, told
from iskd.commands.line.telling import variable
from iskd.commands.values.asked import as_asked, with_export_keys
from iskd.commands.values.config import NEEDED
from iskd.commands.values.paths import assigned, at_fault, literal, path_of, takes_path
from iskd.commands.values.unread import refuse_unknown_of_hydra
from iskd.models.model_folder import refuse_missing_folder
from iskd.plan.failure import in_a_line, read_failure, write_failure
from iskd.plan.run_files import CONFIG_FILE, FAILURE_FILE, refuse_strange
from iskd.system.files import expanded
from iskd.system.run_lock import InUseError
from iskd.system.text import argument, nearest
from iskd.system.version import CONF, options

_P = ParamSpec("_P")
_R = TypeVar("_R")
_sweeps: list[Path] = []
_failed: dict[Path, str] = {}  # jobs of this process that failed, by their resolved folders

AUTO = "auto"
"""`resume=auto`: continue the run in Hydra's directory if there is one (`iskd.commands.train.resume_folder`)."""
# the hub's oldest models have no owner: distilgpt2
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+|[A-Za-z][\w.-]{0,95}")
_TYPO = 0.75  # of difflib's ratio between a model's name and a preset; "gpt2-xl" has 0.73 with gpt2
_LIST = re.compile(r"\[([^\[\]]*)\]")
_OPEN = re.compile(r"(data\.sources|eval\.metrics)(\.[^=]+)?=")
_SWEEP = re.compile(r"[,()\[\]{}*]")  # several values at once, which Hydra reads


def arguments(argv: Sequence[str]) -> list[str]:
    """Command-line overrides; a resumed run gets its own folder as Hydra's run directory (`auto` stays in Hydra's)."""
    several = any(given in ("-m", "--multirun") or given.startswith("hydra.mode=") for given in argv)
    with told():
        argv = literal_paths(argv, several=several)
        last = dict(given.partition("=")[::2] for given in argv)
        resumed = last.get("resume", "")
        # Hydra writes into its folder before anything else is looked at
        if resumed in ("", "null", AUTO):
            for key in ("hydra.run.dir", "hydra.sweep.dir"):
                if key in last:
                    refuse_strange(Path(path_of(last[key])))
            return argv
        folder = Path(path_of(resumed))
        if "${" not in resumed and not several and not (folder / CONFIG_FILE).is_file():
            raise ValueError(f"{argument('resume', folder)}: no {CONFIG_FILE} in there, so it is not a run's folder")
        refuse_strange(folder)
    return [*argv, literal("hydra.run.dir", resumed), "hydra.output_subdir=null"]


def literal_paths(argv: Sequence[str], *, several: bool = False) -> list[str]:
    """Arguments of which Hydra reads each path as it was given, `model=` as what it names, `export=` as its keys.

    Args:
        argv: of the command line, or of a list of overrides.
        several: of a sweep, where commas part values.

    Raises:
        ValueError: as `named_model`; a path with `${` in it; null in the place of a choice, or a choice made twice.
    """
    return [other for given in argv for other in _literal(given, several)]


def _loggers(given: str) -> list[str]:
    """`logger=[a,b]` as one whose keys are `logger.KEY`, W&B wherever it stands, and others below: `logger.b.KEY`."""
    names = [name.strip() for name in given.partition("=")[2].strip("[] ").split(",")]
    chosen = [name for name in names if name in options("logger") and name != "csv"]  # which is always written
    chosen.sort(key=lambda name: name != "wandb")  # the one with keys that people set
    if len(names) < 2 or not set(names) <= set(options("logger")):
        return [given]
    return [f"logger={next(iter(chosen), 'csv')}", *(f"+logger@logger.{name}={name}" for name in chosen[1:])]


def _literal(given: str, several: bool) -> list[str]:
    if _OPEN.match(given):  # which sources a mix has, and of which tasks a metric is chosen, is for whoever sets them
        given = f"++{given}"
    key, equal, value = given.partition("=")
    _refuse_no_choice(key, value)
    if key == "logger" and value[:1] == "[":
        return _loggers(given)
    if key == "model":
        return named_model(path_of(value)) or [given]
    if not equal or not takes_path(key.lstrip("+")):
        return [with_export_keys(given)]
    return [literal(key, value, several=several and not key.startswith("hydra."))]


def _refuse_no_choice(group: str, value: str) -> None:
    """Hydra refuses no choice without saying of which group, if at all, and makes one part of a name given twice."""
    known = options(group) if value == "null" or "[" in value else []
    if known and (value == "null" or (value == "[]" and group in NEEDED)):
        raise ValueError(f"{group}={value} is no choice: use one of {', '.join(known)}, or leave {group}= out")
    for found in _LIST.findall(value) if known else ():
        names = [name.strip() for name in found.split(",")]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{group}={value:.80}: {twice[0]} stands twice, and would count once; name it once")


def named_model(name: str) -> list[str]:
    """The overrides that a name stands for: `model=PRESET`, or `model=local` or `model=hub` with the name beside it.

    A preset of conf/model goes before a folder of that name; ./name is the folder. Empty for what is none of the three.

    Raises:
        ValueError: it can only be meant as a folder, and there is none, or it looks like a preset and is none.
    """
    if not name:
        return []
    if name in options("model"):
        return [f"model={name}"]
    if os.path.isdir(expanded(name)):  # False for a text too long to be a name, where Path raises
        return ["model=local", assigned("model.path", expanded(name))]
    if _SWEEP.search(name):
        return []
    refuse_missing_folder("model", name)
    if "/" not in name and (preset := nearest(name, options("model"), _TYPO)):
        raise ValueError(
            f"model={name} is no preset and no folder (did you mean {preset}?); a model of the hub by that very name "
            f"is model=hub model.name={name}"
        )
    return ["model=hub", assigned("model.name", name)] if _HUB_ID.fullmatch(name) else []


def hydra_main(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
    """A command's `main`: compose the config of the command line and call `task` with it.

    Hydra prints a traceback for anything that goes wrong and exits with 1, unless its own variable has it raise. It is
    set here, but not while `task` runs, whose child processes take over the environment. A single run is told here;
    Hydra has to see that a job of a sweep failed.

    Raises:
        ValueError: of `main`, where the command line composes no config; else whatever `task` raises.
        SystemExit: what is told.
    """

    @wraps(task)
    def main() -> None:
        before, composed = os.environ.get(FULL_ERROR), list[bool]()

        @wraps(task)
        def as_it_was(config: DictConfig) -> Any:
            composed.append(True)
            single = HydraConfig.get().mode == RunMode.RUN
            with variable(FULL_ERROR, before), told() if single else nullcontext(), _in_words():
                refuse_unknown_of_hydra(config, HydraConfig.get())
                as_asked(config, HydraConfig.get().overrides.task)
                return task(config)

        with variable(FULL_ERROR, "1"), _in_words(composed):
            hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(as_it_was)()

    return main


@contextmanager
def _in_words(composed: Sequence[bool] = (True,)) -> Iterator[None]:
    """What Hydra and OmegaConf raise as a ValueError that begins with the command line; a path's error with its key.

    Args:
        composed: empty until there is a config: before, a ValueError is Hydra's too, then in the task's own words.
    """
    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if composed and not isinstance(error, HydraException | OmegaConfBaseException):
            raise
        raise ValueError(f"{' '.join(sys.argv[1:])[:400]}: {sentence(error)}") from error
    except OSError as error:
        if said := at_fault(error, sys.argv[1:]):
            raise ValueError(said) from error
        raise


def sentence(error: BaseException) -> str:
    """What Hydra found, with OmegaConf's reason, in one sentence."""
    cause = error.__cause__
    return in_own_words(str(error), str(cause) if isinstance(cause, OmegaConfBaseException) else "")


def output_folder() -> Path:
    """Where Hydra lets this job write."""
    return Path(HydraConfig.get().runtime.output_dir)


class SweepFolder(Callback):
    """Remembers where a sweep writes, for `told_at_the_end`; of conf/config.yaml."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """A sweep begins."""
        _sweeps.append(Path(config.hydra.sweep.dir))


def noted(job: Callable[_P, _R]) -> Callable[_P, _R]:
    """A job whose error goes into its log, is remembered for the list at the end, and stands in a folder of its own.

    Whoever claims a folder writes there what fails later (`told_in`). An error from before is written where nobody has
    claimed it; a run that is there did not fail because somebody asked for it in vain.
    """

    @wraps(job)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        folder = Path(HydraConfig.get().runtime.output_dir)
        before = _written(folder)
        try:
            return job(*args, **kwargs)
        except Exception as error:
            where = sys.exc_info()
            record = logging.LogRecord(__name__, logging.ERROR, __file__, 0, "the job failed: %s", (error,), where)
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.FileHandler):  # Hydra prints it
                    handler.handle(record)
            told = _written(folder) != before  # by this process, or by the job's own
            if not told and not isinstance(error, InUseError) and not (folder / CONFIG_FILE).exists():
                write_failure(folder, error)
            said = read_failure(folder) if told else None
            _failed[folder.resolve()] = said or in_a_line(type(error).__name__, str(error))
            raise

    return wrapped


def _written(folder: Path) -> int | None:
    """When a failure was written into a folder, in ns; None where none was."""
    try:
        return (folder / FAILURE_FILE).lstat().st_mtime_ns
    except FileNotFoundError:
        return None


def told_at_the_end(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """A command that lists the jobs of its sweep which failed, and why."""

    @wraps(command)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return command(*args, **kwargs)
        finally:
            for folder in _sweeps:
                sys.stderr.write(listed(folder, _failed))
            _sweeps.clear()
            _failed.clear()

    return wrapped


def listed(sweep: Path, known: Mapping[Path, str] = MappingProxyType({})) -> str:
    """One line for every job of a sweep that failed; empty when none did.

    Args:
        sweep: folder of the sweep.
        known: why jobs of this process failed, by their resolved folders; of others their folders tell.
    """
    jobs = sorted((path for path in sweep.glob("*") if path.is_dir() and path.name[:1] != "."), key=_number)
    failed = {job: known.get(job.resolve()) or read_failure(job) for job in jobs}
    lines = [f"  {job}: {why}\n" for job, why in failed.items() if why is not None]
    return f"{len(lines)} of {len(jobs)} jobs failed:\n{''.join(lines)}" if lines else ""


def _number(job: Path) -> tuple[int, str]:
    return (int(job.name) if job.name.isdecimal() else sys.maxsize, job.name)
