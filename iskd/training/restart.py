"""`schedule.restart_at_edit`: every edit is made in a fresh process, before anything is wrapped.

For strategies on a torch whose wrapping is not tried with edits (`iskd.models.sharding.UNTESTED`). The run is saved
right before the edit and the process ends (`StartAgain`); the next one makes the edit here, on whole weights, and the
stage loop goes on from there.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
from torch import nn

from iskd.models import sharding
from iskd.system import global_rank
from iskd.system.text import argument
from iskd.training.stages import StageLoop
from iskd.training.state import checkpoint
from iskd.training.step import DistillModule, make_optimizer
from iskd.training.step.optimizer import optimizer_tensors
from iskd.training.strategies import whole_device


class StartAgain(SystemExit):
    """The run is saved right before an edit and goes on in a fresh process (`schedule.restart_at_edit`).

    Ends the process with code 75, "try again"; processes other than rank 0 end with 0, because Lightning kills rank 0
    as soon as another one fails.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__(75 if global_rank() == 0 else 0)
        self.run_dir = run_dir
        self.message = f"saved before an edit: start again with {argument('resume', run_dir)}"


def edit_early(loop: StageLoop, module: DistillModule, trainer: L.Trainer, path: Path) -> None:
    """Make a pending edit of a resumed run now, before the strategy wraps anything; `loop.edit` goes on from it.

    Args:
        loop: its position is at an edit, or nothing happens.
        module: teacher and student, whole.
        trainer: gives device and precision.
        path: the checkpoint right before the edit.
    """
    if not loop.schedule.restart_at_edit or loop.state.stage is None or loop.state.edited:
        return
    for model in (module.student, module.teacher):
        nn.Module.to(model, whole_device(trainer.strategy))
    optimizer = make_optimizer(module.optim)
    module.regroup(optimizer)
    checkpoint.restore(path, module.student, optimizer, rng=False)
    edited = loop.carry_out(module, optimizer, trainer.precision_plugin.forward_context)
    sharding.from_first_rank(module.student)
    loop.made_early = (edited, dict(optimizer_tensors(optimizer, module.student)))
