"""What the stage loop needs of whatever trains: a Lightning trainer, or a few lines in a test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from iskd.system import Ranks
from iskd.training.step import DistillModule


@dataclass(frozen=True)
class Live:
    """The objects that live as long as a fit.

    Attributes:
        module: teacher, student and the step.
        optimizer: the running one; edits rewrite its groups in place.
        ranks: the processes of the run.
        accumulate: micro-batches of an optimizer step.
        forward_context: the precision of passes outside a step.
        rewrap: puts the student anew into what spreads it over processes, after its structure or groups changed.
        loggers: what is told of every row. precision: of the run, as its configuration says.
        stop_wanted: whether this process was asked to end the run; it does at the next stage or step.
        breaking_off: inside, a stop signal raises `BrokenOffError`, where one process works alone.
    """

    module: DistillModule
    optimizer: torch.optim.Optimizer
    ranks: Ranks = field(default_factory=Ranks)
    accumulate: int = 1
    forward_context: Callable[[], AbstractContextManager[None]] = nullcontext
    rewrap: Callable[[], None] = lambda: None
    loggers: Sequence[Any] = ()
    precision: str = "32-true"
    stop_wanted: Callable[[], bool] = lambda: False
    breaking_off: Callable[[], AbstractContextManager[None]] = nullcontext
