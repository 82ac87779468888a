"""MetaLA (arXiv 2411.10741, section 4): gated linear attention whose key is what the decay gives up.

    S_t = diag(a_t) S_{t-1} + (1 - a_t) v_t^T,  a_t = sigmoid(W_a x'_t + b)^(1/16)      o_t = K^-1/2 q_t^T S_t
    o'_t = o_t + sigmoid((sum_d q_d (1 - a_d) w_d) v_t)                        the self-augmentation, w = 0 at the start
    y_t = W_o (LayerNorm_h(o'_t) * silu(W_g x'_t + b_g))

x' is the stream behind a short convolution. Copied: q, v (key-value heads repeated) and o; attention's keys have no
place. Queries keep the attention's width, where the published model takes half. The state is a moving average of the
values, and its decays start at exp(-1 / memory), near 1; the layer norm takes away that the average starts at zero and
that the augmentation starts at 1/2. It has a weight, unlike the published one: `HeadNorm.size_to` says why. The
convolution starts as the identity and has no activation, the gate starts at 1.
The augmentation is not linear in the values: the mixing matrix is without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from iskd.mixers.base import Attention, Basics, RecurrentMixer, Streams
from iskd.mixers.modules import Context, HeadNorm, OutputGate, ShortConv, check_count
from iskd.mixers.modules.layers import gate_proj, last_bias, logit_of_memory, logits_of_memory
from iskd.mixers.modules.limits import MAX_CONV
from iskd.models import at_least_fp32

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MetaLA(RecurrentMixer):
    """MetaLA over inherited queries, values and output. Its state is [B, H, K, V], fp32, and the last stream inputs.

    Args:
        attention: what it is made from.
        conv: tokens seen by the short convolution over the stream; 0 = none.
        temper: root that is taken of the sigmoid.
        memory: tokens after which a fresh decay has forgotten all but 1/e.
        augment: add the self-augmentation.
        **common: as in `RecurrentMixer`.

    Raises:
        ValueError: a conv, temper or memory out of its range (`iskd.mixers.modules.limits`).

    Source: arXiv 2411.10741
    Needs: attention's q, v and o; k is dropped
    Costs: state of 4.4 MiB in SmolLM2-135M, time of a token 1.36 at a context of 8,192; attention has 360.0 and 1.89
        there (experiments/subquadratic-decode/README.md)
    Measured: 42.1 % of the teacher's accuracy, projections copied, in the grid on stories260K
        (experiments/subquadratic-stories/README.md)
    """

    inherits: ClassVar[str] = "qvo"
    notes: ClassVar[dict[str, str]] = {
        "k_proj": "dropped: the key is 1 - decay",
        "decay": "fresh: attention does not forget; starts near 1",
        "conv": "fresh: attention has no short convolution; starts as the identity",
        "augment": "fresh: attention has no self-augmentation; its weights start at zero",
    }

    def __init__(
        self,
        attention: Attention,
        *,
        conv: NonNegativeInt = 4,
        temper: PositiveFloat = 16.0,
        memory: PositiveFloat = 256.0,
        augment: bool = True,
        **common: Unpack[Basics],
    ) -> None:
        # the convolution is over the stream, not behind each projection
        super().__init__(attention, **common)
        check_count("conv", conv, 0, MAX_CONV)
        width = self.heads * self.head_dim
        self.temper = temper
        self.decay = gate_proj(self.stream, width, bias=logit_of_memory(memory, temper))
        self.conv = ShortConv(self.stream, conv) if conv else None
        self.augment = nn.Parameter(torch.zeros(self.heads, self.head_dim)) if augment else None
        self.norm = HeadNorm(self.heads, self.head_dim, centre=True)
        self.gate = OutputGate(self.stream, width)

    @torch.no_grad()
    def calibrate(self, memory_H: Tensor, strength_H: Tensor) -> list[str]:
        """The decays of a head, all alike."""
        last_bias(self.decay).copy_(logits_of_memory(memory_H, self.temper).repeat_interleave(self.head_dim))
        return ["decay"]

    def streams(self, x_BTD: Tensor, context: Context) -> Streams:
        """Queries, values, log decays and the keys that follow from them; the convolved stream for the gate."""
        if self.conv is not None:
            x_BTD = context.conv(self.conv, x_BTD)
        q, v = self.project("q", x_BTD, context), self.project("v", x_BTD, context)
        logits = self.decay(x_BTD).unflatten(-1, (self.heads, self.head_dim))
        g = F.logsigmoid(at_least_fp32(logits)) / self.temper
        return Streams(q, (-torch.expm1(g)).to(q.dtype), v, g=g, scale=self.head_dim**-0.5, extra=(x_BTD,))

    def output(self, o_BTHV: Tensor, x_BTD: Tensor, streams: Streams) -> Tensor:
        """Self-augmentation, then norm, gate and output projection."""
        if self.augment is not None:
            # wide: it is about 1/2, of which the norm takes away all but the digits that half precision has not
            strength = (at_least_fp32(streams.q) * at_least_fp32(streams.k) * at_least_fp32(self.augment)).sum(
                -1, keepdim=True
            )
            o_BTHV = o_BTHV + torch.sigmoid(strength * at_least_fp32(streams.v))
        return super().output(o_BTHV, streams.extra[0], streams)
