"""RetNet (arXiv 2307.08621, section 2): attention without softmax, with a fixed decay per head and rotary positions.

    S_t = gamma_h S_{t-1} + k_t v_t^T,  gamma_h = 1 - 2^(-5 - h)        o_t = K^-1/2 q_t^T S_t
    y_t = W_o (RMSNorm_h(o_t) * silu(W_g x_t + b_g))

Copied: q, k, v (key-value heads repeated, as each head has its own decay) and o. The decays are constants: the first
head forgets after 32 tokens, each further one after twice as many. Rotary positions are kept as the teacher has them;
the published mixer has its own. The gate starts at 1 (`iskd.mixers.modules.layers.OutputGate`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from iskd.mixers.base import Attention, Basics, RecurrentMixer, Streams
from iskd.mixers.modules import Context, HeadNorm, OutputGate

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RetNet(RecurrentMixer):
    """Retention over inherited projections. Its state is [B, H, K, V], fp32.

    Args:
        attention: what it is made from.
        gate: gate the output.
        rotary, conv, **common: as in `RecurrentMixer`.

    Source: arXiv 2307.08621
    Needs: attention's q, k, v and o
    Costs: state of 4.2 MiB in SmolLM2-135M, time of a token 1.52 at a context of 8,192; attention has 360.0 and 1.89
        there (experiments/subquadratic-decode/README.md)
    Measured: 64.5 % of the teacher's accuracy, copied and aligned, in the grid on stories260K
        (experiments/subquadratic-stories/README.md)
    """

    def __init__(
        self,
        attention: Attention,
        *,
        gate: bool = True,
        rotary: bool = True,
        conv: NonNegativeInt = 0,
        **common: Unpack[Basics],
    ) -> None:
        super().__init__(attention, rotary=rotary, conv=conv, **common)
        self.norm = HeadNorm(self.heads, self.head_dim)
        self.gate = OutputGate(self.stream, self.heads * self.head_dim) if gate else None

    def streams(self, x_BTD: Tensor, context: Context) -> Streams:
        """Queries, keys and values with the fixed decays."""
        q, k, v = self.qkv(x_BTD, context)
        head = torch.arange(self.heads, device=x_BTD.device, dtype=torch.promote_types(x_BTD.dtype, torch.float32))
        decay = torch.log1p(-torch.exp2(-5 - head)).expand(*x_BTD.shape[:2], -1)
        return Streams(q, k, v, g=decay, scale=self.head_dim**-0.5)
