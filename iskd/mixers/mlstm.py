"""mLSTM (xLSTM, arXiv 2405.04517, section 2.3, with the gates of xLSTM 7B, arXiv 2503.13427, section 3).

    S_t = f_t S_{t-1} + i_t k_t v_t^T        n_t = f_t n_{t-1} + i_t k_t
    o_t = K^-1/2 q_t^T S_t / max(|K^-1/2 q_t^T n_t|, 1)
    i_t = exp(cap(w_i x_t + b_i)),  f_t = sigmoid(cap(w_f x_t + b_f)),  cap(z) = 15 tanh(z / 15)
    y_t = W_o (LayerNorm_h(o_t) * sigmoid(W_g x_t + b_g))

The normaliser n is a column of ones beside the values, i is a factor of the keys. The cap keeps i between e^-15 and
e^15, so that fp32 does without the running maximum of the paper, which changes no output.

Copied: q, k, v (key-value heads repeated, as each head has its own gates) and o. Fresh: the input gate, which starts at
1/2 (b_i = -ln 2, as in the students of arXiv 2504.14366); the forget gate, at exp(-1 / memory), near 1; the output
gate, at 0.95; the norm.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from iskd.mixers.base import Attention, Common, Context, RecurrentMixer, Streams
from iskd.mixers.modules import HeadNorm, OutputGate
from iskd.mixers.modules.layers import gate_proj, last_bias, logit_of_memory, logits_of_memory
from iskd.models import at_least_fp32

if TYPE_CHECKING:
    from typing_extensions import Unpack

CAP = 15.0


def soft_cap(z: Tensor) -> Tensor:
    """Bend z so that it stays within -CAP and CAP."""
    return CAP * torch.tanh(z / CAP)


class MLSTM(RecurrentMixer):
    """The mLSTM over inherited projections. Its state is [B, H, K, V + 1], fp32.

    Args:
        attention: what it is made from.
        memory: tokens after which a fresh forget gate has forgotten all but 1/e.
        **common: as in `RecurrentMixer`.

    Raises:
        ValueError: a memory out of its range (`iskd.mixers.modules.limits`), all of which is within the cap.

    Source: arXiv 2405.04517; gates: arXiv 2503.13427
    Needs: attention's q, k, v and o
    Costs: state of 4.3 MiB in SmolLM2-135M, time of a token 1.13 at a context of 8,192; attention has 360.0 and 1.89
        there (experiments/subquadratic-decode/README.md)
    Measured: 79.3 % of the teacher's accuracy, projections copied, in the grid on stories260K
        (experiments/subquadratic-stories/README.md)
    """

    notes: ClassVar[dict[str, str]] = {
        "input_gate": "fresh: attention writes every token alike; starts near 1/2",
        "forget_gate": "fresh: attention does not forget; starts near 1",
    }

    def __init__(self, attention: Attention, *, memory: PositiveFloat = 256.0, **common: Unpack[Common]) -> None:
        super().__init__(attention, **common)
        logit = logit_of_memory(memory)
        self.input_gate = gate_proj(self.stream, self.heads, bias=-math.log(2))
        self.forget_gate = gate_proj(self.stream, self.heads, bias=CAP * math.atanh(logit / CAP))
        self.norm = HeadNorm(self.heads, self.head_dim, centre=True)
        self.gate = OutputGate(self.stream, self.heads * self.head_dim, "sigmoid")

    @torch.no_grad()
    def calibrate(self, memory_H: Tensor, strength_H: Tensor) -> list[str]:
        """The forget gates, within their cap."""
        last_bias(self.forget_gate).copy_(CAP * torch.atanh((logits_of_memory(memory_H) / CAP).clamp(-0.999, 0.999)))
        return ["forget_gate"]

    def streams(self, x_BTD: Tensor, context: Context) -> Streams:
        """Queries, keys times the input gate, values, the log of the forget gate and the normaliser."""
        q, k, v = self.qkv(x_BTD, context)
        g = F.logsigmoid(soft_cap(at_least_fp32(self.forget_gate(x_BTD))))
        keys = at_least_fp32(k) * soft_cap(at_least_fp32(self.input_gate(x_BTD))).exp()[..., None]
        # e^15 is more than float16 holds
        keys = keys if k.dtype == torch.float16 else keys.to(k.dtype)
        return Streams(
            q, keys, v, g=g, scale=self.head_dim**-0.5, normalizer=lambda weights: weights.abs().clamp_min(1.0)
        )
