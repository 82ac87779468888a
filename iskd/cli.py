"""Commands: `iskd train` (what train.py runs) and `iskd report`, over the same conf/."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from iskd.allocator import tune

tune()  # before torch is imported below

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

_HERE = Path(__file__).parent
# processes that a multi-process run starts get the arguments without the command's name, but the environment
_COMMAND = "ISKD_COMMAND"
CONF = str(_HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf")


def arguments(argv: Sequence[str]) -> list[str]:
    """Command-line overrides; a resumed run gets its own folder as Hydra's run directory."""
    folders = [argument.partition("=")[2] for argument in argv if argument.startswith("resume=")]
    if not folders or folders[-1] in ("", "null"):
        return list(argv)
    return [*argv, f"hydra.run.dir={folders[-1]}", "hydra.output_subdir=null"]


@hydra.main(config_path=CONF, config_name="config", version_base="1.3")
def train(config: DictConfig) -> float:
    """Compose, build, run; the last perplexity is what a sweep minimises."""
    from iskd import build
    from iskd.run import run

    # Lightning's start-up notes say nothing about a compression run and bury what does
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    hydra_config = HydraConfig.get()
    if config.resume is not None:
        config = build.resumed(config, hydra_config.overrides.task)
    return run(build.parts(config, Path(hydra_config.runtime.output_dir))).final.ppl


def report() -> None:
    """`iskd report RUN_DIR...`: write report.html of finished runs again."""
    from iskd.report import write_report

    for folder in sys.argv[1:]:
        print(write_report(Path(folder)))


def main() -> None:
    """Entry point of the `iskd` command."""
    commands = {"train": train, "report": report}
    if len(sys.argv) > 1 and sys.argv[1] in commands:
        os.environ[_COMMAND] = sys.argv.pop(1)
    if os.environ.get(_COMMAND) not in commands:
        names = ", ".join(commands)
        sys.exit(f"usage: iskd COMMAND ...; commands: {names}")
    sys.argv[1:] = arguments(sys.argv[1:])
    commands[os.environ[_COMMAND]]()
