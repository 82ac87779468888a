"""RWKV-6 "Finch" (arXiv 2404.05892, section 4): a decay per key channel, and a bonus for the present token.

    S_t = diag(w_t) S_{t-1} + k_t v_t^T,  w_t = exp(-exp(b_w + B_w tanh(A_w x^w_t)))
    o_t = K^-1/2 r_t^T (S_{t-1} + diag(u) k_t v_t^T)
    y_t = W_o (LayerNorm_h(o_t) * silu(W_g x^g_t + b_g))

and, with `token_shift`, every projection has its own mix of the token and the one before (x_0 = 0):

    x^c_t = x_t + (x_{t-1} - x_t) (m_c + B_c tanh(A_c (x_t + (x_{t-1} - x_t) m)))        c = r, w, k, v, g

Copied: r from q, k, v (key-value heads repeated, as each head has its own decays) and o. Fresh: the decays, which start
at exp(-1 / memory), near 1; the bonus u, at 1: the present token counts as the others do; the gate, at 1; the norm; the
shift, near none (m = 0). It is off unless asked for: RADLADS (arXiv 2505.03005) finds it neutral. K^-1/2 is
attention's; the published model has none, the norm removes it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from iskd.mixers.base import Attention, Common, RecurrentMixer, Streams
from iskd.mixers.modules import Context, HeadNorm, OutputGate, check_memory
from iskd.mixers.modules.layers import gate_proj, last_bias
from iskd.mixers.modules.limits import check_width
from iskd.models import at_least_fp32

if TYPE_CHECKING:
    from typing_extensions import Unpack

SHIFTED = "rwkvg"


class TokenShift(nn.Module):
    """The five mixes of a token and the one before it; see the module."""

    def __init__(self, stream: int, rank: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.zeros(stream))
        self.outer = nn.Parameter(torch.zeros(len(SHIFTED), stream))
        self.down = nn.Linear(stream, len(SHIFTED) * rank, bias=False)
        # not zero, so that `down` gets a gradient from the first step
        self.up = nn.Parameter(0.01 * torch.randn(len(SHIFTED), rank, stream))

    def forward(self, before_BTD: Tensor, x_BTD: Tensor) -> dict[str, Tensor]:
        """The inputs of r, w, k, v and g, each [B, T, D]."""
        x, back = at_least_fp32(x_BTD), at_least_fp32(before_BTD) - at_least_fp32(x_BTD)
        inner, outer, up = (weight.to(x.dtype) for weight in (self.inner, self.outer, self.up))
        low = torch.tanh(at_least_fp32(self.down((x + back * inner).to(x_BTD.dtype)))).unflatten(-1, (len(SHIFTED), -1))
        # wide: a mix rounded to half precision would round what five projections see once more
        with torch.autocast(x.device.type, enabled=False):
            mixes = outer + torch.einsum("btcr,crd->btcd", low, up)
        return {name: (x + back * mix).to(x_BTD.dtype) for name, mix in zip(SHIFTED, mixes.unbind(2), strict=True)}


class RWKV6(RecurrentMixer):
    """RWKV-6 over inherited projections. Its state is [B, H, K, V], fp32, and with a shift the last token's stream.

    Args:
        attention: what it is made from.
        rank: channels through which the decays are computed.
        memory: tokens after which a fresh decay has forgotten all but 1/e.
        token_shift: mix every token with the one before.
        shift_rank: channels through which each of the five mixes is computed.
        **common: as in `RecurrentMixer`.

    Raises:
        ValueError: a rank, memory or shift_rank out of its range (`iskd.mixers.modules.limits`).

    Source: arXiv 2404.05892
    Needs: attention's q, k, v and o
    Costs: state of 4.2 MiB in SmolLM2-135M, time of a token 1.36 at a context of 8,192; attention has 360.0 and 1.89
        there (experiments/subquadratic-decode/README.md)
    Measured: 71.6 % of the teacher's accuracy, projections copied, in the grid on stories260K
        (experiments/subquadratic-stories/README.md)
    """

    notes: ClassVar[dict[str, str]] = {
        "decay": "fresh: attention does not forget; starts near 1",
        "bonus": "fresh: attention has no bonus on the present token; starts at 1, which is none",
        "shift": "fresh: attention has no token shift; starts near none",
    }

    def __init__(
        self,
        attention: Attention,
        *,
        rank: PositiveInt = 64,
        memory: PositiveFloat = 256.0,
        token_shift: bool = False,
        shift_rank: PositiveInt = 32,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(attention, **common)
        check_memory(memory)
        check_width("rank", rank, self.stream)
        check_width("shift_rank", shift_rank, self.stream)
        width = self.heads * self.head_dim
        self.decay = nn.Sequential(
            nn.Linear(self.stream, rank, bias=False), nn.Tanh(), gate_proj(rank, width, bias=-math.log(memory))
        )
        self.bonus = nn.Parameter(torch.ones(self.heads, self.head_dim))
        self.shift = TokenShift(self.stream, shift_rank) if token_shift else None
        self.norm = HeadNorm(self.heads, self.head_dim, centre=True)
        self.gate = OutputGate(self.stream, width)

    @torch.no_grad()
    def calibrate(self, memory_H: Tensor, strength_H: Tensor) -> list[str]:
        """The decays of a head, all alike."""
        last_bias(self.decay).copy_(-memory_H.log().repeat_interleave(self.head_dim))
        return ["decay"]

    def streams(self, x_BTD: Tensor, context: Context) -> Streams:
        """Receptance, keys and values, a log decay per key channel and the bonus; the gate's input."""
        shifted = dict.fromkeys(SHIFTED, x_BTD)
        if self.shift is not None:
            shifted = self.shift(*context.window(x_BTD, 2))
        r, k, v = (self.project(name, shifted[source], context) for name, source in zip("qkv", "rkv", strict=True))
        g = -at_least_fp32(self.decay(shifted["w"])).exp().unflatten(-1, (self.heads, self.head_dim))
        return Streams(r, k, v, g=g, scale=self.head_dim**-0.5, bonus=self.bonus, extra=(shifted["g"],))

    def output(self, o_BTHV: Tensor, x_BTD: Tensor, streams: Streams) -> Tensor:
        """Norm, gate by its own mix of tokens, output projection."""
        return super().output(o_BTHV, streams.extra[0], streams)
