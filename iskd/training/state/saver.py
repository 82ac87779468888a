"""The checkpoints of a running run: when one is written, which are kept, and the last one at a stage boundary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from iskd.plan.options import RunOptions
from iskd.plan.results import write_stages
from iskd.plan.run_files import CHECKPOINTS
from iskd.system import Ranks
from iskd.training.state import checkpoint, checkpoint_files
from iskd.training.state.run_state import RunState


class Saver:
    """Writes checkpoints into `run_dir`/checkpoints and drops the ones that are no longer needed.

    Attributes:
        boundary: newest checkpoint between two stages, where a rollback leads; it is always kept.
    """

    def __init__(self, run_dir: Path, options: RunOptions) -> None:
        self.run_dir, self.options = run_dir, options
        self.boundary: Path | None = None

    @property
    def root(self) -> Path:
        """The folder of the checkpoints."""
        return self.run_dir / CHECKPOINTS

    def find_boundary(self) -> None:
        """Take up a run: its newest checkpoint at a boundary."""
        self.boundary = checkpoint_files.newest(self.root, checkpoint_files.BOUNDARY)

    def save(
        self,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: RunState,
        ranks: Ranks,
        loggers: Sequence[Any],
    ) -> None:
        """Write weights, optimizer state, position and every rank's random numbers; call it on every rank.

        Loggers are asked to write before: rows up to here must outlive a kill, as the resumed run continues after them.
        """
        checkpoint.together(ranks, self.run_dir, lambda: _write_rows(loggers) if ranks.rank == 0 else None)
        sharded = self.options.checkpoints == "sharded"
        path = checkpoint.save(self.root, student, optimizer, state, ranks, sharded=sharded)
        if not state.edited:
            self.boundary = path

        def keep_up() -> None:
            pinned = [self.boundary] if self.boundary else []
            checkpoint_files.prune(self.root, keep=self.options.keep, pinned=pinned)
            write_stages(self.run_dir, state.results)

        checkpoint.together(ranks, self.run_dir, lambda: keep_up() if ranks.rank == 0 else None)


def _write_rows(loggers: Sequence[Any]) -> None:
    for logger in loggers:
        logger.save()
