"""Mamba-2 (arXiv 2405.21060, section 7): a state space model with one decay per head, as gated linear attention.

    S_t = a_t S_{t-1} + dt_t B_t x_t^T,  dt_t = softplus(w_dt u_t + dt_bias),  log a_t = -exp(A_log) dt_t
    o_t = K^-1/2 C_t^T S_t + D x_t
    y_t = W_o RMSNorm_h(o_t * silu(W_z u_t + b_z))

C, B, x = phi(conv(W u_t)) are copied from q, k, v (arXiv 2408.10189, 2408.15237; key-value heads repeated, as each head
has its own decay) and W_o from o, so every head has its own B and C and widths are the teacher's; the published model
shares one B and C of 128 among heads of 64. dt goes with B here, so that the values that are mixed are x.

Fresh: dt, which starts at 1, so that every token is written as it is; A_log, so that the decay starts at
exp(-1 / memory), near 1; D, at 0, as attention has no path around the state (published: 1); the gate, at 1; the short
convolutions, as the identity; the norm, after the gate. phi is the identity, which leaves the copies whole, as in
MOHAWK (arXiv 2408.10189). The published SiLU (`activation=silu`) is near x / 2 for small x, a factor that the norm
removes, but it flattens negative numbers as they grow. K^-1/2 is attention's; the published model has none, the norm
removes it.

Discrete Mamba-2 (MOHAWK, arXiv 2408.10189, appendix; Llamba, arXiv 2502.14458) has its step size in the decay alone:

    S_t = exp(-softplus(w_a u_t + b_a)) S_{t-1} + B_t x_t^T        o_t = K^-1/2 C_t^T S_t + D x_t
    y_t = W_o (o_t * silu(W_z u_t + b_z))

with the identity for phi and no norm. Fresh decays are 1/2, as there. There D is 1, the gate random, and K^-1/2 is
missing: here D starts at 0, as attention has no path around the state, and the gate at 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from iskd.mixers.base import Attention, Basics, RecurrentMixer, Streams
from iskd.mixers.modules import Context, HeadNorm, OutputGate, check_memory
from iskd.mixers.modules.gates import activation_of, inverse_softplus
from iskd.mixers.modules.layers import gate_proj, last_bias
from iskd.models import at_least_fp32

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(Basics, total=False):
    """Keywords that both take alike."""

    activation: str
    conv: NonNegativeInt
    rotary: bool


class _StateSpace(RecurrentMixer):
    """What both are made of, in the order in which its weights are drawn: decay, D, norm if any, gate."""

    normed: ClassVar[bool] = False

    def __init__(
        self,
        attention: Attention,
        *,
        memory: PositiveFloat,
        activation: str = "identity",
        conv: NonNegativeInt = 4,
        rotary: bool = False,
        **common: Unpack[Basics],
    ) -> None:
        super().__init__(attention, conv=conv, rotary=rotary, **common)
        check_memory(memory)
        self.activation = activation_of(activation)
        self._forget(memory)
        self.D = nn.Parameter(torch.zeros(self.heads))
        if self.normed:
            self.norm = HeadNorm(self.heads, self.head_dim)
        self.gate = OutputGate(self.stream, self.heads * self.head_dim)

    def _forget(self, memory: float) -> None:
        """Make what the decay is computed by."""
        raise NotImplementedError


class Mamba2(_StateSpace):
    """Mamba-2 over inherited projections. Its state is [B, H, K, V], fp32, and the convolutions' last inputs.

    Args:
        attention: what it is made from.
        activation: of C, B and x, "identity" or, as published, "silu".
        memory: tokens after which a fresh decay has forgotten all but 1/e.
        conv, rotary, **common: as in `RecurrentMixer`.

    Raises:
        ValueError: an unknown activation or a memory out of its range (`iskd.mixers.modules.limits`).

    Source: arXiv 2405.21060; copied as in arXiv 2408.10189 and 2408.15237
    Needs: attention's q, k, v and o
    Costs: state of 4.8 MiB in SmolLM2-135M, time of a token 1.50 at a context of 8,192; attention has 360.0 and 1.89
        there (experiments/subquadratic-decode/README.md)
    Measured: 44.4 % of the teacher's accuracy, projections copied, SiLU, in the grid on stories260K
        (experiments/subquadratic-stories/README.md)
    """

    normed: ClassVar[bool] = True
    keep_float32: ClassVar[tuple[str, ...]] = ("A_log",)
    notes: ClassVar[dict[str, str]] = {
        "dt": "fresh: attention has no step size; starts near 1",
        "A_log": "fresh: attention does not forget; the decay starts near 1",
        "D": "fresh: attention has no path around its state; starts at 0",
    }

    def __init__(self, attention: Attention, *, memory: PositiveFloat = 256.0, **options: Unpack[Options]) -> None:
        super().__init__(attention, memory=memory, **options)

    def _forget(self, memory: float) -> None:
        self.dt = gate_proj(self.stream, self.heads, bias=inverse_softplus(1.0))
        self.A_log = nn.Parameter(torch.full((self.heads,), -math.log(memory)))

    @torch.no_grad()
    def calibrate(self, memory_H: Tensor, strength_H: Tensor) -> list[str]:
        """The decays at a step size of 1, where they start."""
        self.A_log.copy_(-memory_H.log())
        return ["A_log"]

    def streams(self, x_BTD: Tensor, context: Context) -> Streams:
        """C, dt B and x as queries, keys and values; a log decay per head; D."""
        q, k, v = (self.activation(x) for x in self.qkv(x_BTD, context))
        dt = F.softplus(at_least_fp32(self.dt(x_BTD)))
        g = -self.A_log.to(dt.dtype).exp() * dt
        k = (at_least_fp32(k) * dt[..., None]).to(k.dtype)
        return Streams(q, k, v, g=g, scale=self.head_dim**-0.5, skip=self.D)

    def output(self, o_BTHV: Tensor, x_BTD: Tensor, streams: Streams) -> Tensor:
        """Gate, then norm, then output projection."""
        assert self.norm is not None
        assert self.gate is not None
        return self.projections.out(self.norm(self.gate(o_BTHV, x_BTD)).to(x_BTD.dtype))


class DiscreteMamba2(_StateSpace):
    """Mamba-2 whose step size is in its decay alone, without a norm. Its state is that of `Mamba2`.

    Args:
        attention: what it is made from.
        activation: of C, B and x, "identity" or "silu".
        memory: tokens after which a fresh decay has forgotten all but 1/e; that of 1 / ln 2 is 1/2 for every token.
        conv, rotary, **common: as in `RecurrentMixer`.

    Raises:
        ValueError: an unknown activation or a memory out of its range (`iskd.mixers.modules.limits`).

    Source: arXiv 2408.10189; Llamba: arXiv 2502.14458
    Needs: attention's q, k, v and o
    Costs: not measured
    Measured: not measured
    """

    notes: ClassVar[dict[str, str]] = {
        "decay": "fresh: attention does not forget; starts at 1/2, as published",
        "D": "fresh: attention has no path around its state; starts at 0",
    }

    def __init__(self, attention: Attention, *, memory: PositiveFloat = 1.4427, **options: Unpack[Options]) -> None:
        super().__init__(attention, memory=memory, **options)

    def _forget(self, memory: float) -> None:
        self.decay = gate_proj(self.stream, self.heads, bias=inverse_softplus(1 / memory))

    @torch.no_grad()
    def calibrate(self, memory_H: Tensor, strength_H: Tensor) -> list[str]:
        """The decays."""
        last_bias(self.decay).copy_(1 / memory_H + torch.log(-torch.expm1(-1 / memory_H)))
        return ["decay"]

    def streams(self, x_BTD: Tensor, context: Context) -> Streams:
        """C, B and x as queries, keys and values; a log decay per head; D."""
        q, k, v = (self.activation(x) for x in self.qkv(x_BTD, context))
        g = -F.softplus(at_least_fp32(self.decay(x_BTD)))
        return Streams(q, k, v, g=g, scale=self.head_dim**-0.5, skip=self.D)
