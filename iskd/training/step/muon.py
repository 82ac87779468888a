"""Muon: on the matrices of blocks every step is an orthogonal matrix; AdamW on all other parameters.

A step of AdamW goes far along the few directions in which gradients are large. Muon takes the momentum M = U S V^T and
steps along U V^T, so that all directions of a matrix go equally far; U V^T comes from a few products of matrices
(Newton-Schulz) and needs no decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from iskd.models import Stack
from iskd.models.sharding import like, local, whole
from iskd.system.precision import fast_bf16
from iskd.training.step.optimizer import OptimSpec

# a quintic whose slope at 0 is as steep as it can be: small singular values rise fast, and all end in about 0.7 to 1.2
QUINTIC = (3.4445, -4.7750, 2.0315)
RMS = 0.2
"""Root mean square of AdamW's steps at a rate of 1, as measured in training (arXiv 2502.16982)."""


@dataclass(frozen=True)
class MuonSpec(OptimSpec):
    """Muon on weights of linear maps in blocks, inherited and new, with AdamW as in `OptimSpec` on the rest.

    A rate means the same kind of step for both: what Muon adds to a matrix [m, n] has a root mean square of about 0.2
    times the rate, as that of AdamW has (the orthogonal step times 0.2 sqrt(max(m, n))). So `schedule.lr` and weight
    decay carry over. It holds one number for every weight where AdamW holds two, and costs 5 products of matrices more
    for each, about 15 min(m, n) operations a weight: dear where a step has few tokens. In shards every process
    orthogonalises the whole matrix.

    Attributes:
        momentum: share of the old momentum that is kept, in [0, 1).
        ns_steps: iterations of Newton-Schulz.

    Source: K. Jordan et al. 2024 (kellerjordan.github.io/posts/muon); scale of a step: arXiv 2502.16982, section 2.2
    """

    kinds: ClassVar[tuple[tuple[bool, bool], ...]] = ((True, True), (True, False), (False, False))
    momentum: float = 0.95
    ns_steps: int = 5

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim.momentum must be in [0, 1), got {self.momentum}")
        if not 1 <= self.ns_steps <= 20:
            raise ValueError(f"optim.ns_steps must be in 1..20, got {self.ns_steps}: 5 is usual")

    def make(self, groups: list[dict[str, Any]]) -> Muon:
        """The optimizer of these groups."""
        return Muon(groups, self)


class Muon(torch.optim.AdamW):
    """Orthogonal steps in the groups that say so (`orthogonal`), those of AdamW in the others.

    One object for both, so that groups, edits, checkpoints and skipped steps go as they do with AdamW.
    """

    slots: ClassVar[frozenset[str]] = frozenset({"momentum"})
    """State of a parameter with orthogonal steps."""

    def __init__(self, groups: list[dict[str, Any]], spec: MuonSpec) -> None:
        super().__init__(groups, lr=0.0, betas=spec.betas, eps=spec.eps, fused=spec.fused)
        self._momentum, self._ns_steps = spec.momentum, spec.ns_steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all groups; nothing moves where `found_inf` is set (`iskd.training.step.guard`)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            for parameter in group["params"] if group["orthogonal"] else ():
                if parameter.grad is not None:
                    self._orthogonal_step(parameter, group["lr"], group["weight_decay"])
        return loss

    def _orthogonal_step(self, parameter: nn.Parameter, rate: float, weight_decay: float) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        fresh = state["momentum"].lerp(gradient, 1 - self._momentum)
        ahead = whole(gradient.lerp(fresh, self._momentum))  # Nesterov's
        old, new = local(state["momentum"]), local(fresh)
        step = local(like(orthogonal(ahead, self._ns_steps).to(parameter.dtype), parameter))
        kept: Tensor | float = 1 - rate * weight_decay
        skipped: Tensor | None = getattr(self, "found_inf", None)
        if skipped is not None:  # decided on the device, for which the host does not wait
            wrong = skipped > 0
            new, step = torch.where(wrong, old, new), torch.where(wrong, torch.zeros_like(step), step)
            kept = torch.where(wrong, 1.0, kept)
        old.copy_(new)
        local(parameter).mul_(kept).add_(step, alpha=-rate * RMS * math.sqrt(max(parameter.shape)))


def orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """About U V^T [m, n] of a matrix U S V^T, with singular values of 0.7 to 1.2 in the place of 1; 0 of a zero matrix.

    In bf16 where the device multiplies it in hardware, else in float32.
    """
    a, b, c = QUINTIC
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if matrix.is_cuda else fast_bf16()
    with torch.autocast(matrix.device.type, enabled=False):
        x = matrix.float()
        x = x.T if matrix.shape[0] > matrix.shape[1] else x  # the gram matrix of the shorter side
        x = x / x.norm().clamp_min(1e-12)  # singular values of at most 1
        x = x.bfloat16() if fast else x
        for _ in range(steps):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def matrices(model: PreTrainedModel) -> set[int]:
    """Ids of the weights of linear maps in blocks; the embedding and the head, which are looked up by row, are none."""
    return {id(m.weight) for m in Stack(model).layers.modules() if isinstance(m, nn.Linear | Conv1D)}
