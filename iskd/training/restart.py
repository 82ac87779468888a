"""`schedule.restart_at_edit`: every edit is made in a fresh process, before anything is wrapped.

For strategies on a torch whose wrapping is not tried with edits (`iskd.models.sharding.UNTESTED`). The run is saved
right before the edit and the process ends (`StartAgain`); the next one makes the edit here, on whole weights, and the
stage loop goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from iskd.models import sharding
from iskd.plan import Stage
from iskd.system import global_rank
from iskd.system.text import argument
from iskd.training.editing import Edited, Editor
from iskd.training.state import RunState, checkpoint
from iskd.training.step import DistillModule, make_optimizer
from iskd.training.step.optimizer import load_optimizer_tensors, optimizer_tensors


class StartAgain(SystemExit):
    """The run is saved right before an edit and goes on in a fresh process (`schedule.restart_at_edit`).

    Ends the process with code 75, "try again"; processes other than rank 0 end with 0, because Lightning kills rank 0
    as soon as another one fails.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__(75 if global_rank() == 0 else 0)
        self.run_dir = run_dir
        self.message = f"saved before an edit: start again with {argument('resume', run_dir)}"


class EditInFreshProcess(Editor):
    """Edits are made before the strategy wraps anything, by a process that was started for them."""

    in_place = False

    _made: tuple[Edited, dict[str, Tensor]] | None = None  # and moments of the optimizer, by name

    def check(self, *, timed: bool) -> None:
        """A time limit counts from the start of a process."""
        if timed:
            raise ValueError(
                "trainer.max_time is of one process, and schedule.restart_at_edit=true starts a fresh one at every "
                "edit: drop it, and have your batch system send SIGTERM or SIGUSR1"
            )

    def before_wrapping(
        self,
        state: RunState,
        module: DistillModule,
        path: Path,
        device: torch.device,
        forward_context: Callable[[], AbstractContextManager[None]],
        alike: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Make a pending edit now, on whole weights; `carry_out` hands it over."""
        if state.stage is None or state.edited:
            return
        for model in (module.student, module.teacher):
            nn.Module.to(model, device)
        optimizer = make_optimizer(module.optim)
        module.regroup(optimizer)
        checkpoint.restore(path, module.student, optimizer, rng=False)
        edited = super().carry_out(module, optimizer, state.stage, forward_context, state.finished, alike)
        sharding.from_first_rank(module.student)
        self._made = edited, dict(optimizer_tensors(optimizer, module.student))

    def restore(self, path: Path, module: DistillModule, optimizer: torch.optim.Optimizer, rank: int) -> None:
        """Of an edited student random numbers alone: it was made from the checkpoint's weights."""
        checkpoint.restore(path, None if self._made else module.student, optimizer, rank)

    def carry_out(
        self,
        module: DistillModule,
        optimizer: torch.optim.Optimizer,
        stage: Stage,
        forward_context: Callable[[], AbstractContextManager[None]],
        finished: Sequence[Stage],
        alike: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Edited:
        """Hand over the edit that was made; stages without edits need none."""
        if self._made is None:
            return super().carry_out(module, optimizer, stage, forward_context, finished, alike)
        (edited, moments), self._made = self._made, None
        load_optimizer_tensors(optimizer, module.student, moments)
        return edited

    def leaves_before(self, state: RunState) -> bool:
        """Before every edit that this process has not begun with."""
        pending = state.stage is not None and not state.edited and bool(state.stage.edits)
        return pending and self._made is None

    def leave(self, run_dir: Path) -> None:
        """Raise `StartAgain`."""
        raise StartAgain(run_dir)
