"""Settings of a run that belong to no part; group `run` of the config."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunOptions:
    """Settings of a run that belong to no part.

    Attributes:
        checkpoint_every: optimizer steps between checkpoints inside a stage; stage ends always write one.
        keep: how many checkpoints are kept.
        fit_tokens: calibration tokens for fitting compact blocks; 0 = no fit.
        score_tokens: calibration tokens for importance scores.
        measure_before: measure quality between edit and healing as well.
        movement_steps: optimizer steps after which every new parameter must have got a gradient and moved.
        plan_only: print the plan and stop.
    """

    checkpoint_every: int = 50
    keep: int = 2
    fit_tokens: int = 4096
    score_tokens: int = 2048
    measure_before: bool = True
    movement_steps: int = 4
    plan_only: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        for key in ("checkpoint_every", "keep", "movement_steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"run.{key} must be at least 1, got {getattr(self, key)}")
        for key in ("fit_tokens", "score_tokens"):
            if getattr(self, key) < 0:
                raise ValueError(f"run.{key} must not be negative, got {getattr(self, key)}")
