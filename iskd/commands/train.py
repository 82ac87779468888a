"""`iskd train`, which train.py runs: compose, build, run."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from iskd.commands.arguments import AUTO, hydra_main, noted, told_at_the_end
from iskd.commands.config import plain
from iskd.commands.fresh_process import RESUME, go_on, in_a_child
from iskd.plan.run_files import CONFIG_FILE


@told_at_the_end
@hydra_main
@noted
def main(config: DictConfig) -> float | list[float]:
    """Compose, build, run; what `objectives` names is returned to a sweep."""
    from iskd.commands import build, resume
    from iskd.plan.summary import objectives
    from iskd.system import Preempted, global_rank
    from iskd.system.ranks import one_of_several
    from iskd.training import StartAgain, run

    # Lightning's start-up notes say nothing about a compression run and bury what does
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    environment, hydra_config = dict(os.environ), HydraConfig.get()
    run_dir = Path(hydra_config.runtime.output_dir)
    config.resume = resume_folder(config.resume, run_dir, hydra_config)
    result_of = objectives(plain(config.objectives))
    if hydra_config.mode == RunMode.MULTIRUN and config.schedule.get("restart_at_edit"):
        return result_of(in_a_child(run_dir, config.resume, hydra_config.overrides.task))
    if config.resume is not None:
        config = resume.resumed(config, hydra_config.overrides.task)
    try:
        return result_of(run(build.parts(config, run_dir)).stages)
    except (Preempted, StartAgain) as stop:
        if global_rank() == 0:  # Python prints nothing for an exit with a code
            print(stop.message, file=sys.stderr)
        if isinstance(stop, Preempted) or one_of_several(environment):
            raise
    go_on(run_dir, hydra_config, environment)


def resume_folder(asked: str | None, run_dir: Path, hydra_config: HydraConf) -> str | None:
    """The folder to continue, or None to start a run; `auto` continues the run in Hydra's output directory, if any.

    A batch system starts a job again with the arguments it had; `auto` makes these mean start the first time and
    continue afterwards. A run that died before its config was saved starts again.
    Raises ValueError when `auto` could never find anything.
    """
    asked = asked or os.environ.get(RESUME) or None
    if asked != AUTO:
        return asked
    named_after_time = "${now" in str(OmegaConf.to_container(hydra_config.run, resolve=False))
    if hydra_config.mode != RunMode.MULTIRUN and named_after_time:
        raise ValueError(
            "resume=auto continues the run in hydra.run.dir, but that folder is named after the time and new at every "
            "start: set hydra.run.dir=DIR (or, for a launcher preset, add -m)"
        )
    return str(run_dir) if (run_dir / CONFIG_FILE).is_file() else None
