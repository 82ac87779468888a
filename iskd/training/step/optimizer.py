"""Optimizer groups that survive edits, and the learning rate as a pure function.

Two standing kinds of groups: `base` and `new`, each once with weight decay and once without, and with Muon once for
what it steps (`iskd.training.step.muon`); any may be empty. An edit rewrites the groups' lists in place and keeps the
optimizer's state of every surviving parameter; the optimizer object never changes. Groups are always in the module's
own order, so that a resumed process builds the same lists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from iskd.models.sharding import like
from iskd.plan.stage import SHAPES


@dataclass(frozen=True)
class OptimSpec:
    """AdamW and its schedule.

    Attributes:
        betas, weight_decay, eps: of AdamW (decoupled decay; see `maps` for what decays).
        clip: largest gradient norm; None = no clipping.
        warmup: share of a stage in which its rates rise from their first step to full, in [0, 1).
        decay: `constant`, `linear`, `cosine`, or `wsd`: constant, and linear in the last tenth.
        decay_over: `run` decays once over all tokens, `stage` in every stage anew.
        end: share of the rate that is left at the end, in [0, 1].
        fused: update all parameters in one kernel; False = torch's loop over them, for comparison.
        anew: forget moments and step counts at the start of every stage, as code does that makes a new optimizer there
            (ISKD's, ILD's); False = those of surviving parameters are kept.
    """

    kinds: ClassVar[tuple[tuple[bool, bool], ...]] = ((True, False), (False, False))
    """Of standing groups: whether weights decay, and whether steps are orthogonal."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.0
    eps: PositiveFloat = 1e-8
    clip: PositiveFloat | None = 1.0
    warmup: float = 0.05
    decay: str = "cosine"
    decay_over: str = "run"
    end: float = 0.0
    fused: bool = True
    anew: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        if self.decay not in SHAPES[1:]:
            raise ValueError(f"optim.decay={self.decay!r}: choose constant, linear, cosine or wsd")
        if self.decay_over not in ("run", "stage"):
            raise ValueError(f"optim.decay_over={self.decay_over!r}: choose run or stage")
        if not 0 <= self.warmup < 1 or not 0 <= self.end <= 1:
            raise ValueError(
                f"optim.warmup must be in [0, 1) and optim.end in [0, 1], got {self.warmup} and {self.end}"
            )
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"optim.clip must be positive or null, got {self.clip}")

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        """The optimizer of these groups."""
        return torch.optim.AdamW(groups, lr=0.0, betas=self.betas, eps=self.eps, fused=self.fused)

    def scale(self, step: int, stage_steps: int, before: int, total: int, shape: str = "") -> float:
        """Factor on a stage's learning rates, in (0, 1].

        Args:
            step: optimizer steps done in this stage.
            stage_steps: optimizer steps of this stage.
            before: optimizer steps of earlier stages.
            total: optimizer steps of the whole run as planned.
            shape: falls over this stage, in the place of `decay` and `decay_over`; "" = as they say.
        """
        ramp = min(1.0, (step + 1) / (math.ceil(self.warmup * stage_steps) + 1))
        done, length = (
            (step, stage_steps)
            if shape or self.decay_over == "stage"
            else (before + step, max(total, before + stage_steps))
        )
        x = done / max(length, 1)
        falls = {"constant": 1.0, "linear": 1 - x, "cosine": 0.5 * (1 + math.cos(math.pi * x))}
        falls["wsd"] = min(1.0, 10 * (1 - x))
        fall = falls[shape or self.decay]
        return ramp * (self.end + (1 - self.end) * fall)


def make_optimizer(spec: OptimSpec) -> torch.optim.AdamW:
    """The optimizer with empty standing groups; `regroup` fills them."""
    return spec.make(
        [
            {"params": [], "name": name, "decays": decays, "orthogonal": orthogonal}
            | {"weight_decay": spec.weight_decay if decays else 0.0}
            for name in ("base", "new")
            for decays, orthogonal in spec.kinds
        ]
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Optimizer state by name, `exp_avg/<parameter>` -> tensor: names, not indices, so nothing can be misplaced."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{key}/{names[id(p)]}": value.detach().contiguous()
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


_SLOTS = frozenset({"step", "exp_avg", "exp_avg_sq"})


def _kinds_of_state(optimizer: torch.optim.Optimizer) -> dict[bool, frozenset[str]]:
    """Names of a parameter's state, by whether its steps are orthogonal."""
    orthogonal: frozenset[str] | None = getattr(optimizer, "slots", None)
    return {False: _SLOTS} | ({True: orthogonal} if orthogonal else {})


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`. Raises ValueError when a name or a shape does not fit the student."""
    parameters, kinds = dict(model.named_parameters()), _kinds_of_state(optimizer)
    known = frozenset[str]().union(*kinds.values())
    optimizer.state.clear()
    for key, value in tensors.items():
        slot, _, name = key.partition("/")
        if slot not in known or not value.is_floating_point() or (value.dim() == 0) != (slot == "step"):
            raise ValueError(
                f"optimizer state {key!r:.80} is none of {type(optimizer).__name__}'s; the checkpoint was changed "
                "after it was written"
            )
        if name not in parameters:
            raise ValueError(
                f"the optimizer state names {name!r}, which the student does not have; "
                "the checkpoint belongs to another student"
            )
        parameter = parameters[name]
        if value.dim() and value.shape != parameter.shape:
            raise ValueError(
                f"optimizer state {key!r} has shape {list(value.shape)}, the parameter {list(parameter.shape)}"
            )
        # the step count too: fused AdamW reads it on the parameter's device
        optimizer.state[parameter][slot] = (
            like(value, parameter) if value.dim() else value.to(parameter.device, torch.float32)
        )
    # of what is frozen in this stage the kind is not known
    held = {p: [kinds[group["orthogonal"]]] for group in optimizer.param_groups for p in group["params"]}
    states = [(name, p, optimizer.state[p]) for name, p in parameters.items() if p in optimizer.state]
    torn = [name for name, p, state in states if state.keys() not in held.get(p, list(kinds.values()))]
    if torn:
        raise ValueError(
            f"the optimizer state of {torn[0]!r} is not whole; the checkpoint was changed after it was written"
        )
