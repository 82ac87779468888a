"""Gated DeltaNet (arXiv 2412.06464, section 3): the delta rule with a decay per head that depends on the token.

    S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = K^-1/2 q_t^T S_t
    log a_t = -exp(A_log) softplus(w_a x_t + dt_bias)
    y_t = W_o (RMSNorm_h(o_t) * silu(W_g x_t + b_g))

with q and k of length 1 (`iskd.mixers.delta`, which says what the SiLU in front of them does to the copies). Copied: q,
k, v (key-value heads repeated, as each head has its own gates) and o. Fresh: beta, which starts at 1/2; the decay, at
exp(-1 / memory), near 1; the output gate, at 1; the short convolutions, as the identity; the norm. The published model
has 6 heads of 256 with values twice as wide; here heads and widths are the teacher's. `group` gives groups of key
channels a decay of their own: between this mixer and KDA (arXiv 2510.26692), whose every channel has one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from iskd.mixers.base import Attention, Streams
from iskd.mixers.delta import DeltaBasics, DeltaMixer
from iskd.mixers.modules import Context, OutputGate, check_count
from iskd.mixers.modules.gates import SoftplusDecay

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GatedDeltaNet(DeltaMixer):
    """Gated DeltaNet over inherited projections. Its state is [B, H, K, V], fp32, and the convolutions' last inputs.

    Args:
        attention: what it is made from.
        memory: tokens after which a fresh decay has forgotten all but 1/e.
        gate: gate the output.
        group: key channels that share a decay; None = all of a head, as published; 1 = each its own, as in KDA.
        activation, conv, rotary, **common: as in `iskd.mixers.delta.DeltaMixer`.

    Raises:
        ValueError: an unknown activation, a memory out of its range (`iskd.mixers.modules.limits`), or a group that
            does not divide the width of a head.

    Source: arXiv 2412.06464
    Needs: attention's q, k, v and o
    Costs: state of 4.8 MiB in SmolLM2-135M, time of a token 1.49 at a context of 8,192; attention has 360.0 and 1.89
        there (experiments/subquadratic-decode/README.md)
    Measured: 87.3 % of the teacher's accuracy, copied and aligned, in the grid on stories260K
        (experiments/subquadratic-stories/README.md); 70.8 % on SmolLM2-135M, copied and aligned
        (experiments/subquadratic-smollm2/README.md)
    """

    def __init__(
        self,
        attention: Attention,
        *,
        memory: PositiveFloat = 256.0,
        gate: bool = True,
        group: PositiveInt | None = None,
        activation: str = "silu",
        conv: NonNegativeInt = 4,
        rotary: bool = False,
        **common: Unpack[DeltaBasics],
    ) -> None:
        super().__init__(attention, activation=activation, conv=conv, rotary=rotary, **common)
        if group is not None:
            check_count("group", group, 1, self.head_dim)
            if self.head_dim % group:
                raise ValueError(
                    f"mixer.group={group} does not divide the {self.head_dim} key channels of a head; choose a divisor"
                )
        self.group = self.head_dim if group is None else group
        self.decay = SoftplusDecay(self.stream, self.heads, self.head_dim // self.group, memory=memory)
        self.gate = OutputGate(self.stream, self.heads * self.head_dim) if gate else None

    def streams(self, x_BTD: Tensor, context: Context) -> Streams:
        """Those of the delta rule with a log decay per head, or per key channel where groups of them have their own."""
        g = self.decay(x_BTD)
        return replace(super().streams(x_BTD, context), g=g if g.dim() == 3 else g.repeat_interleave(self.group, -1))
