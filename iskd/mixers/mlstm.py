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

With a window inside (xLSTM hybrids, arXiv 2603.15590) both are mixed by head, m = sigmoid(window_gate), 0.9 at first:

    y_t = W_o ((m_h softmax_h(q_t, near t) + (1 - m_h) LayerNorm_h(o_t)) * sigmoid(W_g x_t + b_g))

Softmax reads the copied queries and keys with their rotary positions, the last w tokens and the sinks.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from iskd.mixers.base import Attention, Common, RecurrentMixer, Streams, rotary_of
from iskd.mixers.modules import Context, HeadNorm, OutputGate
from iskd.mixers.modules.layers import gate_proj, last_bias, logit_of_memory, logits_of_memory
from iskd.mixers.modules.window import Window, check_window
from iskd.models import at_least_fp32

if TYPE_CHECKING:
    from typing_extensions import Unpack

CAP = 15.0
EPS = 1e-12  # what a hidden token, whose window is empty, is divided by


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
        return self.gated(*self.qkv(x_BTD, context), x_BTD)

    def gated(self, q: Tensor, k: Tensor, v: Tensor, x_BTD: Tensor) -> Streams:
        """The mLSTM's gates for given queries, keys and values."""
        g = F.logsigmoid(soft_cap(at_least_fp32(self.forget_gate(x_BTD))))
        keys = at_least_fp32(k) * soft_cap(at_least_fp32(self.input_gate(x_BTD))).exp()[..., None]
        # e^15 is more than float16 holds
        keys = keys if k.dtype == torch.float16 else keys.to(k.dtype)
        return Streams(
            q, keys, v, g=g, scale=self.head_dim**-0.5, normalizer=lambda weights: weights.abs().clamp_min(1.0)
        )


MIX = 0.9  # where the window's share starts


class MLSTMWindow(MLSTM):
    """The mLSTM beside softmax in a window with sinks. Its state is both of theirs (`iskd.mixers.modules.window`).

    Args:
        attention: what it is made from.
        window: tokens that softmax sees, the present one included.
        sinks: first tokens of every document that it always sees, beside the window.
        memory, **common: as in `MLSTM`.

    Raises:
        ValueError: a window, sinks or a memory out of their range (`iskd.mixers.modules.limits`).

    Source: arXiv 2603.15590; mLSTM: arXiv 2405.04517
    Needs: attention's q, k, v and o; has no matrix to align, so `schedule.mixers=mixer_output` or `auto`
    Costs: not measured
    Measured: not measured
    """

    exposes_matrix: ClassVar[bool] = False
    notes: ClassVar[dict[str, str]] = {
        **MLSTM.notes,
        "window_gate": "fresh: attention has no second mixer; starts at nine tenths for the window",
    }

    def __init__(
        self,
        attention: Attention,
        *,
        window: PositiveInt = 64,
        sinks: NonNegativeInt = 4,
        memory: PositiveFloat = 256.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(attention, memory=memory, **common)
        check_window(window, sinks)
        self.window, self.sinks = window, sinks
        self.window_gate = nn.Parameter(torch.full((self.heads,), math.log(MIX / (1 - MIX))))
        self.turn = None if self.rotary is not None else rotary_of(attention)

    @property
    def turns(self) -> bool:
        """The window's softmax turns queries and keys where the mLSTM does not."""
        return super().turns or self.turn is not None

    def streams(self, x_BTD: Tensor, context: Context) -> Streams:
        """Those of the mLSTM; queries and keys of softmax, with their positions."""
        q, k, v = self.qkv(x_BTD, context)
        given = self.gated(q, k, v, x_BTD)
        if self.turn is not None:
            q, k = (self._turned(x, context) for x in (q, k))
        return replace(given, extra=(q, k))

    def _turned(self, x_BTHK: Tensor, context: Context) -> Tensor:
        """Rotary positions, on heads of the attention's width where the mixer has other ones."""
        assert self.turn is not None
        heads = x_BTHK.flatten(2).unflatten(-1, (-1, self.projections.inner_dim))
        return self.projections.regrouped(self.turn(heads, context.positions))

    def mix(self, streams: Streams, context: Context, state_BGKV: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Values [B, T, H, 2V] mixed by the mLSTM, then by softmax; the state of the former."""
        s = streams
        q, k = s.extra
        near = Window.read(context, k, s.v, size=self.window, sinks=self.sinks)
        with torch.autocast(q.device.type, enabled=False):
            q = at_least_fp32(q) * self.scale
            soft = near.softmax(q, reach=self.window, size=self.chunk, softcap=self.softcap)
        o, state = super().mix(s, context, state_BGKV)
        return torch.cat([o, (soft[..., :-1] / soft[..., -1:].clamp_min(EPS)).to(o.dtype)], dim=-1), state

    def output(self, o_BTHV: Tensor, x_BTD: Tensor, streams: Streams) -> Tensor:
        """Norm of the mLSTM's part, the mix of both, gate and output projection."""
        assert self.norm is not None
        assert self.gate is not None
        recurrent, soft = o_BTHV.chunk(2, dim=-1)
        share = torch.sigmoid(self.window_gate.to(soft.dtype))[:, None]
        mixed = (share * soft + (1 - share) * self.norm(recurrent)).to(x_BTD.dtype)
        return self.projections.out(self.gate(mixed, x_BTD))
