"""Where a run stands at a training step, as one value: for logs, messages and learning rates."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """The place of a micro-batch in its run; the stage loop makes it, the module reads it.

    Attributes:
        tokens: training tokens before it, over all ranks.
        stage_number: of the stage in progress, from 1; 0 = none.
        step: optimizer steps of the whole run before it.
        rate: factor on the stage's learning rates in the step in progress.
    """

    tokens: int = 0
    stage_number: int = 0
    step: int = 0
    rate: float = 1.0
