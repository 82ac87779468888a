"""`iskd profile experiment=...`: where the time of a training step goes."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from iskd.commands.arguments import hydra_main
from iskd.commands.build import parts
from iskd.commands.values import as_meant, plain
from iskd.report.terminal import print_table, terminal
from iskd.system import ProgressLine
from iskd.training.profile import profile_parts, profile_table, write_profile


@hydra_main
def main(config: DictConfig) -> None:
    """Profile a step of the first stage that trains; `profile.steps`, `profile.edits` and `profile.operators`."""
    config = as_meant(config)
    folder = Path(HydraConfig.get().runtime.output_dir)
    with ProgressLine() as line:
        found = profile_parts(parts(config, folder), **plain(config.profile), progress=line)
    console = terminal()
    print_table(profile_table(found), console=console)
    console.print(f"written: {write_profile(folder, found)}", soft_wrap=True)
