"""Commands. Hydra applications over the same conf/: `iskd train` (what train.py runs), `score`, `evaluate`, `profile`.

On folders: `iskd report`, `curve`, `verify`, `generate`.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from iskd.allocator import tune
from iskd.model_names import CONF as _CONF
from iskd.model_names import named_model

tune()  # before torch is imported below

import hydra  # noqa: E402
from hydra.conf import HydraConf  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.types import RunMode  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

if TYPE_CHECKING:
    from iskd.tracking import StageResult

_HERE = Path(__file__).parent
# processes that a multi-process run starts get the arguments without the command's name, but the environment
_COMMAND = "ISKD_COMMAND"
AUTO = "auto"
# a launcher preset can set variables of its jobs but no key of the config; a resume= on the command line comes first
_RESUME = "ISKD_RESUME"
# a fresh process of our own: sys.argv[0] may be a launcher's, and the package need not be installed
_ENTRY = (sys.executable, "-m", "iskd")
CONF = str(_CONF)
_RUN_HOLDS = "a run's folder (hydra.run.dir) holds config.yaml and, from its first stage on, stages.json"


def arguments(argv: Sequence[str]) -> list[str]:
    """Command-line overrides; a resumed run gets its own folder as Hydra's run directory (`auto` stays in Hydra's)."""
    with _told():
        argv = [other for argument in argv for other in _named(argument)]
    folders = [argument.partition("=")[2] for argument in argv if argument.startswith("resume=")]
    if not folders or folders[-1] in ("", "null", AUTO):
        return list(argv)
    return [*argv, f"hydra.run.dir={folders[-1]}", "hydra.output_subdir=null"]


def _named(argument: str) -> list[str]:
    """`model=` takes a folder and a hub id too: what they stand for; any other argument as it is."""
    key, _, value = argument.partition("=")
    return (named_model(value) if key == "model" else []) or [argument]


@hydra.main(config_path=CONF, config_name="config", version_base="1.3")
def train(config: DictConfig) -> float | list[float]:
    """Compose, build, run; what `objectives` names is returned to a sweep."""
    from iskd import build
    from iskd.preemption import Preempted
    from iskd.ranks import global_rank
    from iskd.run import StartAgain, run
    from iskd.summary import objectives

    # Lightning's start-up notes say nothing about a compression run and bury what does
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    environment, hydra_config = dict(os.environ), HydraConfig.get()
    run_dir = Path(hydra_config.runtime.output_dir)
    config.resume = resume_folder(config.resume, run_dir, hydra_config)
    result_of = objectives(build.plain(config.objectives))
    if hydra_config.mode == RunMode.MULTIRUN and config.schedule.get("restart_at_edit"):
        return result_of(in_a_child(run_dir, config.resume, hydra_config.overrides.task))
    if config.resume is not None:
        config = build.resumed(config, hydra_config.overrides.task)
    try:
        return result_of(run(build.parts(config, run_dir)).stages)
    except (Preempted, StartAgain) as stop:
        if global_rank() == 0:  # Python prints nothing for an exit with a code
            print(stop.message, file=sys.stderr)
        if isinstance(stop, Preempted) or several(environment):
            raise
    go_on(run_dir, hydra_config, environment)


def several(environment: Mapping[str, str]) -> bool:
    """Whether something else started this process as one of several, and has to start them again."""
    return "LOCAL_RANK" in environment or "RANK" in environment or int(environment.get("SLURM_NTASKS", "1")) > 1


def go_on(run_dir: Path, hydra_config: HydraConf, environment: Mapping[str, str]) -> NoReturn:
    """Put a fresh process in the place of this one, which continues the run."""
    given = [argument for argument in hydra_config.overrides.task if not argument.startswith("resume=")]
    os.execve(sys.executable, [*_ENTRY, *given, f"resume={run_dir}"], _ours(environment))


def in_a_child(run_dir: Path, resume: str | None, overrides: Sequence[str]) -> list[StageResult]:
    """Run one job of a sweep in a process of its own, which may be replaced by fresh ones; stop signals are passed on.

    Returns:
        The rows of its stages.
    """
    from iskd.preemption import EXIT_CODE, Preempted, StopSignals
    from iskd.tracking import read_stages

    given = [argument for argument in overrides if not argument.startswith("resume=")]
    command = [*_ENTRY, *given, f"hydra.run.dir={run_dir}", *([f"resume={resume}"] if resume else [])]
    environment = {key: value for key, value in os.environ.items() if key != _RESUME}
    signals = StopSignals()
    signals.install()
    try:
        child = subprocess.Popen(command, env=_ours(environment))
        asked = False
        while child.poll() is None:
            if signals.received is not None and not asked:
                child.send_signal(signal.SIGTERM)
                asked = True
            time.sleep(0.1)
        if child.returncode == EXIT_CODE:
            signals.hand_on()
            raise Preempted(run_dir)
        if child.returncode:
            raise RuntimeError(f"the run in {run_dir} ended with code {child.returncode}; see its last lines above")
    finally:
        signals.uninstall()
    return read_stages(run_dir)


def _ours(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that runs `iskd train` from where this one's package lies."""
    paths = [str(_HERE.parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    return {**environment, _COMMAND: "train", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def resume_folder(asked: str | None, run_dir: Path, hydra_config: HydraConf) -> str | None:
    """The folder to continue, or None to start a run; `auto` continues the run in Hydra's output directory, if any.

    A batch system starts a job again with the arguments it had; `auto` makes these mean start the first time and
    continue afterwards. A run that died before its config was saved starts again.
    Raises ValueError when `auto` could never find anything.
    """
    from iskd.build import SAVED

    asked = asked or os.environ.get(_RESUME) or None
    if asked != AUTO:
        return asked
    named_after_time = "${now" in str(OmegaConf.to_container(hydra_config.run, resolve=False))
    if hydra_config.mode != RunMode.MULTIRUN and named_after_time:
        raise ValueError(
            "resume=auto continues the run in hydra.run.dir, but that folder is named after the time and new at every "
            "start: set hydra.run.dir=DIR (or, for a launcher preset, add -m)"
        )
    return str(run_dir) if (run_dir / SAVED).is_file() else None


@hydra.main(config_path=CONF, config_name="config", version_base="1.3")
def score(config: DictConfig) -> None:
    """`iskd score model=... importance=...`: score the layers of a model without training it."""
    from rich.console import Console

    from iskd import build
    from iskd.score import layer_scores, score_table, write_scores

    folder, name = Path(HydraConfig.get().runtime.output_dir), HydraConfig.get().runtime.choices["importance"]
    rows, layers, runs = build.importance_rows(config)
    scores = layer_scores(rows, layers, config.seed)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(score_table(scores, name))
    for file in write_scores(folder, scores, rows, name, runs):
        console.print(str(file), highlight=False, soft_wrap=True)


@hydra.main(config_path=CONF, config_name="config", version_base="1.3")
def evaluate(config: DictConfig) -> None:
    """`iskd evaluate model=DIR_OR_NAME eval=quick`: tasks and text, beside the teacher on the same items."""
    from rich.console import Console

    from iskd import build_evaluate
    from iskd.efficiency import efficiency_table
    from iskd.evaluation import evaluation_table

    found = build_evaluate.evaluation(config, Path(HydraConfig.get().runtime.output_dir))
    console = Console(width=None if sys.stdout.isatty() else 120)
    if found.evaluation is not None:
        console.print(evaluation_table(found.evaluation))
    if found.efficiency is not None:
        console.print(efficiency_table(found.efficiency))
    for file in found.files:
        console.print(f"written: {file}", highlight=False, soft_wrap=True)


@hydra.main(config_path=CONF, config_name="config", version_base="1.3")
def profile(config: DictConfig) -> None:
    """`iskd profile experiment=...`: where the time of a training step goes."""
    from rich.console import Console

    from iskd import build_evaluate
    from iskd.profile_report import profile_table, write_profile

    folder = Path(HydraConfig.get().runtime.output_dir)
    found = build_evaluate.profile(config, folder)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(profile_table(found))
    console.print(f"written: {write_profile(folder, found)}", highlight=False, soft_wrap=True)


def report() -> None:
    """`iskd report DIR...`: report.html of one run again, or runs.html over several or a folder of runs."""
    from iskd.report import write_report
    from iskd.report_runs import runs_file, write_runs_report
    from iskd.run_list import is_run

    folders = [Path(argument) for argument in sys.argv[1:]]
    if not folders:
        sys.exit("usage: iskd report RUN_DIR...")
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise ValueError(f"no such folder: {', '.join(missing)}; {_RUN_HOLDS}")
    if len(folders) == 1 and is_run(folders[0]):
        print(write_report(folders[0]))
    else:
        print(write_runs_report(folders, runs_file(folders)))


def verify() -> None:
    """`iskd verify DIR...`: reopen students in a clean process."""
    from iskd.verify import main as command

    if code := command(sys.argv[1:]):
        sys.exit(code)


def generate() -> None:
    """`iskd generate DIR [PROMPT]`: teacher and student side by side."""
    from iskd.generate import main as command

    if code := command(sys.argv[1:]):
        sys.exit(code)


def curve() -> None:
    """`iskd curve OUT.png [NAME=]RUN_DIR...`: quality against depth of several runs in one picture."""
    from iskd.curves import read_curve, write_curves
    from iskd.run_list import is_run

    if len(sys.argv) < 3:
        sys.exit("usage: iskd curve OUT.png [NAME=]RUN_DIR...")
    named = [argument.rpartition("=") for argument in sys.argv[2:]]
    for folder in (Path(folder) for _, _, folder in named):
        if not is_run(folder):
            raise ValueError(f"{folder} is {'no run' if folder.is_dir() else 'no such folder'}; {_RUN_HOLDS}")
    write_curves([read_curve(Path(folder), name or None) for name, _, folder in named], Path(sys.argv[1]))
    print(sys.argv[1])


# the first ones read Hydra overrides
_HYDRA = {"train": train, "score": score, "evaluate": evaluate, "profile": profile}
_COMMANDS = {**_HYDRA, "report": report, "curve": curve, "verify": verify, "generate": generate}


def main() -> None:
    """Entry point of the `iskd` command."""
    if len(sys.argv) > 1 and sys.argv[1] in _COMMANDS:
        os.environ[_COMMAND] = sys.argv.pop(1)
    name = os.environ.get(_COMMAND)
    if name not in _COMMANDS:
        sys.exit(f"usage: iskd COMMAND ...; commands: {', '.join(_COMMANDS)}")
    if name in _HYDRA:
        sys.argv[1:] = arguments(sys.argv[1:])
    if name == "evaluate" and not any(argument.startswith("eval=") for argument in sys.argv):
        sys.argv.append("eval=quick")
    with nullcontext() if name in _HYDRA else _told():  # Hydra shows errors its own way
        _COMMANDS[name]()


@contextmanager
def _told() -> Iterator[None]:
    """What a user can mend is said in a line, without a traceback; the exit code is 2."""
    try:
        yield
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
