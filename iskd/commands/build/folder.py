"""The folder of a run: claimed by one process, with the resolved config in it."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from iskd.commands.values import plain
from iskd.plan.run_files import CONFIG_FILE, LOCK_FILE, refuse_strange, work_in
from iskd.plan.saved_config import read_config
from iskd.system import global_rank, run_lock, write_whole
from iskd.system.files import sweep
from iskd.system.text import argument

# of the config of every run, from the first version on
NEEDED = ("model", "data", "edit", "schedule", "loss", "optim", "trainer", "run", "seed")


def claim(run_dir: Path, resuming: bool) -> None:
    """A directory belongs to one run, and a run to one process: the lock comes before the look, not after it.

    A start that came to nothing, by a mistyped value or a plan, has left no run: its config is replaced.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    refuse_strange(run_dir)
    alone = run_lock.hold(run_dir / LOCK_FILE)
    sweep(run_dir)
    if resuming or global_rank() != 0 or not (run_dir / CONFIG_FILE).exists():
        return
    if not alone or work_in(run_dir) or not _of_a_run(run_dir / CONFIG_FILE):
        raise ValueError(
            f"{run_dir} holds another run; choose another hydra.run.dir, or continue that run with "
            f"{argument('resume', run_dir)}"
        )


def _of_a_run(config_file: Path) -> bool:
    """Whether a run of ours saved it; what somebody else keeps under that name is never replaced."""
    try:
        return all(key in read_config(config_file) for key in NEEDED)
    except (OSError, ValueError):
        return False


def save_config(config: DictConfig, run_dir: Path) -> None:
    """Whole or not at all: with resume=auto other ranks, and the next start of the job, look for this file."""
    write_whole(run_dir / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(plain(config))))
