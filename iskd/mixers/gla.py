"""Gated linear attention (arXiv 2312.06635, section 4): every key channel has a decay that depends on the token.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T,  a_t = sigmoid(W_2 W_1 x_t + b)^(1/16)        o_t = K^-1/2 q_t^T S_t
    y_t = W_o (RMSNorm_h(o_t) * silu(W_g x_t + b_g))

Copied: q, k, v (key-value heads repeated, as each head has its own decays) and o; the teacher's heads are kept where
the published model has 4 with keys of half the width. Fresh: the decays, through 16 channels, and the gate. The decays
start at exp(-1 / memory), near 1, so that copied queries find what copied keys wrote; the published bias of 0 would
forget after 23 tokens. The gate starts at 1 (`iskd.mixers.modules.layers.OutputGate`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from iskd.mixers.base import Attention, Common, RecurrentMixer, Streams
from iskd.mixers.modules import Context, HeadNorm, OutputGate
from iskd.mixers.modules.layers import gate_proj, last_bias, logit_of_memory, logits_of_memory
from iskd.mixers.modules.limits import check_width
from iskd.models import at_least_fp32

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GLA(RecurrentMixer):
    """Gated linear attention over inherited projections. Its state is [B, H, K, V], fp32.

    Args:
        attention: what it is made from.
        rank: channels through which the decays are computed.
        temper: root that is taken of the sigmoid.
        memory: tokens after which a fresh decay has forgotten all but 1/e.
        gate: gate the output.
        **common: as in `RecurrentMixer`.

    Raises:
        ValueError: a rank, temper or memory out of its range (`iskd.mixers.modules.limits`).

    Source: arXiv 2312.06635
    Needs: attention's q, k, v and o
    Costs: state of 4.2 MiB in SmolLM2-135M, time of a token 1.39 at a context of 8,192; attention has 360.0 and 1.89
        there (experiments/subquadratic-decode/README.md)
    Measured: 63.3 % of the teacher's accuracy, projections copied, in the grid on stories260K
        (experiments/subquadratic-stories/README.md); 64.2 % on SmolLM2-135M, copied and aligned
        (experiments/subquadratic-smollm2/README.md)
    """

    notes: ClassVar[dict[str, str]] = {"decay": "fresh: attention does not forget; starts near 1"}

    def __init__(
        self,
        attention: Attention,
        *,
        rank: PositiveInt = 16,
        temper: PositiveFloat = 16.0,
        memory: PositiveFloat = 256.0,
        gate: bool = True,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(attention, **common)
        check_width("rank", rank, self.stream)
        width = self.heads * self.head_dim
        self.temper = temper
        self.decay = gate_proj(self.stream, width, rank=rank, bias=logit_of_memory(memory, temper))
        self.norm = HeadNorm(self.heads, self.head_dim)
        self.gate = OutputGate(self.stream, width) if gate else None

    @torch.no_grad()
    def calibrate(self, memory_H: Tensor, strength_H: Tensor) -> list[str]:
        """The decays of a head, all alike."""
        last_bias(self.decay).copy_(logits_of_memory(memory_H, self.temper).repeat_interleave(self.head_dim))
        return ["decay"]

    def streams(self, x_BTD: Tensor, context: Context) -> Streams:
        """Queries, keys and values with a log decay per key channel."""
        q, k, v = self.qkv(x_BTD, context)
        logits = self.decay(x_BTD).unflatten(-1, (self.heads, self.head_dim))
        g = F.logsigmoid(at_least_fp32(logits)) / self.temper
        return Streams(q, k, v, g=g, scale=self.head_dim**-0.5)
