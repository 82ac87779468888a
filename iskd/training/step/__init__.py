"""One training step: what runs, what is read, what trains, and the optimizer.

Imports: system, plan, models, losses, teacher, data.
"""

from __future__ import annotations

from iskd.training.step.flops import MfuMeter
from iskd.training.step.guard import StepGuard
from iskd.training.step.module import DistillModule
from iskd.training.step.optimizer import OptimSpec, make_optimizer
from iskd.training.step.position import Position
from iskd.training.step.trainable import check_partition, regroup, watched_parameters

__all__ = [
    "DistillModule",
    "MfuMeter",
    "OptimSpec",
    "Position",
    "StepGuard",
    "check_partition",
    "make_optimizer",
    "regroup",
    "watched_parameters",
]
