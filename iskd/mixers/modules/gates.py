"""Gates of several mixers: activations of q, k and v, decays through a softplus."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iskd.mixers.modules.layers import gate_proj, last_bias
from iskd.mixers.modules.limits import check_memory
from iskd.models import at_least_fp32


def identity(x: Tensor) -> Tensor:
    """No activation; a function with a name, as mixers hold theirs and are pickled."""
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "identity": identity}
# Where exp(A_log) starts: within the published range of (0, 16) (arXiv 2312.00752, 2405.21060 and 2412.06464)
RATE = 4.0


def activation_of(name: str, key: str = "activation") -> Callable[[Tensor], Tensor]:
    """The activation of that name, given as `mixer.<key>`. Raises ValueError when there is none."""
    if name not in ACTIVATIONS:
        raise ValueError(f"mixer.{key}={name!r}: choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def inverse_softplus(y: float) -> float:
    """The z with log(1 + e^z) = y > 0."""
    return y + math.log(-math.expm1(-y))


class SoftplusDecay(nn.Module):
    """Log decays -exp(A_log) softplus(W x + dt_bias), A_log per head, dt_bias per output (it is the bias of `proj`).

    The form is Mamba's (arXiv 2312.00752, section 3.2): small steps, hence little forgetting, unless a token asks for
    more. All start at -1 / memory, where published models draw them between 1 and 1000 tokens.

    Args:
        stream: width of the stream.
        heads: heads, each with its own A_log.
        width: outputs per head; 1 = one decay per head, of shape [B, T, H] instead of [B, T, H, K].
        rank: channels through which W goes; None = none.
        memory: tokens after which a fresh decay has forgotten all but 1/e.

    Raises:
        ValueError: a memory out of its range.
    """

    keep_float32: ClassVar[tuple[str, ...]] = ("A_log",)

    def __init__(self, stream: int, heads: int, width: int = 1, *, rank: int | None = None, memory: float) -> None:
        super().__init__()
        check_memory(memory)
        self.width = width
        self.A_log = nn.Parameter(torch.full((heads,), math.log(RATE)))
        self.proj = gate_proj(stream, heads * width, rank=rank, bias=inverse_softplus(1 / (memory * RATE)))

    @torch.no_grad()
    def remember(self, memory_H: Tensor) -> None:
        """Have the decays of each head forget all but 1/e after so many tokens, wherever W x is zero."""
        steps_H = 1 / (memory_H * self.A_log.exp())
        # the inverse of softplus, without overflow or cancellation
        bias_H = steps_H + torch.log(-torch.expm1(-steps_H))
        last_bias(self.proj).copy_(bias_H.repeat_interleave(self.width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Log decays [B, T, H] or [B, T, H, K], at most 0, in the wide dtype."""
        steps = F.softplus(at_least_fp32(self.proj(x_BTD))).unflatten(-1, (-1, self.width))
        g: Tensor = -self.A_log.to(steps.dtype).exp()[:, None] * steps
        return g if self.width > 1 else g.squeeze(-1)
