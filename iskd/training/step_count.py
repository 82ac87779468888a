"""Where a run stands, counted in steps: derived from its state and from the size of a step, and kept nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

from iskd.plan import Stage
from iskd.schedules import stage_steps
from iskd.training.state import RunState
from iskd.training.step import OptimSpec, Position


@dataclass(frozen=True)
class StepCount:
    """Counts for one layout of batches over processes.

    Attributes:
        state: the position, in micro-batches and tokens.
        step_tokens: tokens of one optimizer step over all ranks.
        accumulate: micro-batches of an optimizer step.
    """

    state: RunState
    step_tokens: int
    accumulate: int

    @property
    def stage_number(self) -> int:
        """Of the stage in progress, from 1."""
        return len(self.state.finished) + 1

    @property
    def stage_steps(self) -> int:
        """Optimizer steps that the stage in progress has in all."""
        return stage_steps(self._stage, self.state.finished, self.state.first_step, self.step_tokens)

    @property
    def in_stage(self) -> int:
        """Optimizer steps taken in the stage in progress."""
        return self.state.batch // self.accumulate

    @property
    def in_run(self) -> int:
        """Optimizer steps taken in the whole run."""
        return self.state.first_step + self.in_stage

    @property
    def batches_left(self) -> int:
        """Micro-batches of the stage in progress that are still to be trained."""
        return self.stage_steps * self.accumulate - self.state.batch

    @property
    def _stage(self) -> Stage:
        assert self.state.stage is not None
        return self.state.stage

    def position(self, optim: OptimSpec) -> Position:
        """The place of the next micro-batch, with the factor on the learning rates of its step."""
        steps = self.stage_steps
        step = max(min(self.in_stage, steps - 1), 0)  # behind the last step no other comes
        rate = optim.scale(step, steps, self.state.first_step, self.state.total_steps, self._stage.shape)
        return Position(self.state.tokens, self.stage_number, self.in_run, rate)
