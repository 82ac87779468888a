"""Kimi Delta Attention (arXiv 2510.26692, section 3): the delta rule with a decay per key channel.

    S_t = (I - beta_t k_t k_t^T) diag(a_t) S_{t-1} + beta_t k_t v_t^T        o_t = K^-1/2 q_t^T S_t
    log a_t = -exp(A_log) softplus(W_2 W_1 x_t + dt_bias)
    y_t = W_o (RMSNorm_h(o_t) * sigmoid(U_2 U_1 x_t + b_g))

with q and k of length 1 (`iskd.mixers.delta`, which says what the SiLU in front of them does to the copies). Copied: q,
k, v (key-value heads repeated, as each head has its own gates) and o. Fresh: beta, which starts at 1/2; the decays, at
exp(-1 / memory), near 1; the output gate, at 0.95; the short convolutions, as the identity; the norm. Both W and U go
through `rank` channels, the width of a head as published.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from iskd.mixers.base import Attention, Streams
from iskd.mixers.delta import DeltaBasics, DeltaMixer
from iskd.mixers.modules import Context
from iskd.mixers.modules.gates import SoftplusDecay
from iskd.mixers.modules.layers import gate_proj
from iskd.mixers.modules.limits import check_width
from iskd.models import at_least_fp32

if TYPE_CHECKING:
    from typing_extensions import Unpack


class KDA(DeltaMixer):
    """Kimi Delta Attention over inherited projections. Its state is that of Gated DeltaNet.

    Args:
        attention: what it is made from.
        rank: channels through which the decays and the output gate are computed; None = the width of a head.
        memory: tokens after which a fresh decay has forgotten all but 1/e.
        activation, conv, rotary, **common: as in `iskd.mixers.delta.DeltaMixer`.

    Raises:
        ValueError: an unknown activation, or a rank or memory out of its range (`iskd.mixers.modules.limits`).

    Source: arXiv 2510.26692
    Needs: attention's q, k, v and o
    Costs: state of 4.8 MiB in SmolLM2-135M, time of a token 1.57 at a context of 8,192; attention has 360.0 and 1.89
        there (experiments/subquadratic-decode/README.md)
    Measured: 84.5 % of the teacher's accuracy, projections copied, in the grid on stories260K
        (experiments/subquadratic-stories/README.md)
    """

    notes: ClassVar[dict[str, str]] = {
        **DeltaMixer.notes,
        "out_gate": "fresh: attention has no output gate; it starts open",
    }

    def __init__(
        self,
        attention: Attention,
        *,
        rank: PositiveInt | None = None,
        memory: PositiveFloat = 256.0,
        activation: str = "silu",
        conv: NonNegativeInt = 4,
        rotary: bool = False,
        **common: Unpack[DeltaBasics],
    ) -> None:
        super().__init__(attention, activation=activation, conv=conv, rotary=rotary, **common)
        if rank is not None:
            check_width("rank", rank, self.stream)
        rank, width = self.head_dim if rank is None else rank, self.heads * self.head_dim
        self.decay = SoftplusDecay(self.stream, self.heads, self.head_dim, rank=rank, memory=memory)
        self.out_gate = gate_proj(self.stream, width, rank=rank, bias=3.0)

    def streams(self, x_BTD: Tensor, context: Context) -> Streams:
        """Those of the delta rule with a log decay per key channel."""
        return replace(super().streams(x_BTD, context), g=self.decay(x_BTD))

    def output(self, o_BTHV: Tensor, x_BTD: Tensor, streams: Streams) -> Tensor:
        """Norm, sigmoid gate and output projection."""
        gate = torch.sigmoid(at_least_fp32(self.out_gate(x_BTD))).unflatten(-1, o_BTHV.shape[2:])
        assert self.norm is not None
        return self.projections.out((self.norm(o_BTHV) * gate).to(x_BTD.dtype))
