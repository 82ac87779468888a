"""A student put back to where it stood between two stages: after a trial, or a stage that fell below its floor."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from iskd.models import surgery
from iskd.plan import Record, Stage
from iskd.training.state import checkpoint
from iskd.training.step import DistillModule, adapters


def back_to(path: Path, module: DistillModule, optimizer: torch.optim.Optimizer, stage: Stage) -> Record:
    """Give the module the student and the optimizer state of a checkpoint between two stages; returns its record.

    Args:
        path: the checkpoint.
        module: gets a new student, on its device or in shards.
        optimizer: the running one; its groups are rewritten in place.
        stage: the one that the checkpoint's weights were trained in.
    """
    record, device = checkpoint.read_state(path).record, module.device
    module.hold(surgery.rebuild(module.teacher, record).train(), record)
    nn.Module.to(module.student, device)
    module.configure_model()
    module.enter(adapters.merged(stage))
    module.regroup(optimizer)
    checkpoint.restore(path, module.student, optimizer, rng=False)
    return record
