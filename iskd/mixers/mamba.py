"""Mamba (arXiv 2312.00752, section 3): a selective state space model, N numbers per channel, each with its own decay.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        o_t = C_t^T h_t + D x_t        per channel; A = -exp(A_log)
    x = phi(conv(W_x u)),  (low, B, C) = W_s x,  dt = softplus(W_dt low + b)
    y_t = W_o (o_t * silu(W_z u_t + b_z))

Copied: W_x from v (key-value heads repeated) and W_o from o; as many channels as the attention has, where the published
model has 2 D. B and C are N numbers for all channels, so q and k have no place. Fresh: W_s, dt, A and D, as published;
with D = 1 an untrained copy passes every token's own value on. The gate starts at 1, the convolution as the identity;
phi is SiLU, near x / 2 for small x, unless `activation=identity`.

Every channel mixes the tokens in its own way, so there is no mixing matrix per head. The scan is made of chunks, inside
which spans of 1, 2, 4, ... tokens are joined, or on a CPU token after token (`iskd.mixers.ops.scan`): logarithms of
decays are neither summed nor divided, so strong decays do no harm. The backward pass computes a chunk's states again
instead of keeping [B, T, channels, N] many.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from iskd.mixers.base import Attention, Basics, RecurrentMixer, Streams
from iskd.mixers.modules import Context, OutputGate
from iskd.mixers.modules.gates import activation_of
from iskd.mixers.modules.limits import check_width
from iskd.mixers.ops.scan import scan as by_token
from iskd.models import at_least_fp32

if TYPE_CHECKING:
    from typing_extensions import Unpack

FASTEST, SLOWEST = 1e-1, 1e-3  # range of fresh step sizes


class Mamba(RecurrentMixer):
    """Mamba over inherited values and output. Its state is [B, I, N], I = H * V channels, fp32, and the conv's inputs.

    Args:
        attention: what it is made from.
        state: numbers N that every channel keeps.
        rank: channels through which dt is computed; None = a sixteenth of the stream.
        activation: of x, "silu" or "identity".
        conv, **common: as in `RecurrentMixer`.

    Raises:
        ValueError: an unknown activation, or a state or rank out of its range (`iskd.mixers.modules.limits`).

    Source: arXiv 2312.00752
    Needs: attention's v and o; has no matrix to align, so `schedule.mixers=mixer_output` or `auto`
    Costs: state of 1.3 MiB in SmolLM2-135M, time of a token 1.27 at a context of 8,192; attention has 360.0 and 1.89
        there (experiments/subquadratic-decode/README.md)
    Measured: 67.2 % of the teacher's accuracy, projections copied, in the grid on stories260K
        (experiments/subquadratic-stories/README.md)
    """

    inherits: ClassVar[str] = "vo"
    exposes_matrix: ClassVar[bool] = False
    keep_float32: ClassVar[tuple[str, ...]] = ("A_log",)
    notes: ClassVar[dict[str, str]] = {
        "q_proj": "dropped: C is the same for all channels",
        "k_proj": "dropped: B is the same for all channels",
        "select": "fresh: attention has no B, C and step size of so few channels",
        "dt": "fresh: attention has no step size",
        "A_log": "fresh: attention does not forget; 1 to N, as published",
        "D": "fresh: attention has no path around its state; starts at 1",
    }

    def __init__(
        self,
        attention: Attention,
        *,
        state: PositiveInt = 16,
        rank: PositiveInt | None = None,
        activation: str = "silu",
        conv: NonNegativeInt = 4,
        **common: Unpack[Basics],
    ) -> None:
        super().__init__(attention, conv=conv, **common)
        inner, rank = self.heads * self.head_dim, math.ceil(self.stream / 16) if rank is None else rank
        check_width("rank", rank, self.stream)
        check_width("state", state, self.stream)
        self.activation, self.sizes = activation_of(activation), (rank, state, state)
        self.select = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt = nn.Linear(rank, inner)
        nn.init.uniform_(self.dt.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            steps = SLOWEST * (FASTEST / SLOWEST) ** torch.rand(inner)
            self.dt.bias.copy_(steps + torch.log(-torch.expm1(-steps)))
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.gate = OutputGate(self.stream, inner)

    def streams(self, x_BTD: Tensor, context: Context) -> Streams:
        """C, B and x as queries, keys and values [B, T, I, 1]; dt [B, T, I] in the place of beta."""
        x_BTI = self.activation(self.project("v", x_BTD, context)).flatten(2)
        low, b, c = self.select(x_BTI).split(self.sizes, dim=-1)
        return Streams(c.unsqueeze(2), b.unsqueeze(2), x_BTI.unsqueeze(3), beta=F.softplus(at_least_fp32(self.dt(low))))

    def mix(self, streams: Streams, context: Context, state_BGKV: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mixed values [B, T, H, V] and the state after the last token [B, I, N]; a hidden token's dt is zero."""
        assert streams.beta is not None
        with torch.autocast(streams.v.device.type, enabled=False):
            dt, x = streams.beta, streams.v.squeeze(3).to(streams.beta.dtype)
            b, c = (stream.squeeze(2).to(dt.dtype) for stream in (streams.k, streams.q))
            rate = -self.A_log.to(dt.dtype).exp()
            state = x.new_zeros(len(x), *rate.shape) if state_BGKV is None else state_BGKV.to(dt.dtype)
            begins = x.new_zeros(x.shape[:2], dtype=torch.bool)
            if context.segments is not None:
                begins[:, 1:] = context.segments[:, 1:] != context.segments[:, :-1]
            if x.device.type == "cpu" and not torch.compiler.is_compiling():
                o_BTI, state = by_token(dt, dt * x, b, c, begins, rate, state, self.chunk)
                return (o_BTI + self.D.to(dt.dtype) * x).unflatten(-1, (self.heads, self.head_dim)), state
            outputs = []
            for chunks in zip(*(stream.split(self.chunk, dim=1) for stream in (dt, dt * x, b, c, begins)), strict=True):
                inputs: list[Tensor] = [*chunks, rate, state]
                if torch.is_grad_enabled():
                    o, state = checkpoint(scan, *inputs, use_reentrant=False, preserve_rng_state=False)
                else:
                    o, state = scan(*inputs)
                outputs.append(o)
            o_BTI = torch.cat(outputs, dim=1) + self.D.to(dt.dtype) * x
        return o_BTI.unflatten(-1, (self.heads, self.head_dim)), state


def scan(
    dt_BTI: Tensor, x_BTI: Tensor, b_BTN: Tensor, c_BTN: Tensor, begins_BT: Tensor, rate_IN: Tensor, state_BIN: Tensor
) -> tuple[Tensor, Tensor]:
    """C_t^T h_t [B, T, I] and the last h [B, I, N] for h_t = exp(dt_t rate) h_{t-1} + x_t B_t, from the given state.

    A document begins with h = 0. After the round with span s, h_t holds what the last 2s tokens put in and `decay` what
    they keep of what was before: T log T work, and every factor is at most 1.
    """
    decay = (dt_BTI[..., None] * rate_IN).exp().masked_fill(begins_BT[..., None, None], 0.0)
    h = x_BTI[..., None] * b_BTN[:, :, None]
    h = torch.cat([h[:, :1] + decay[:, :1] * state_BIN[:, None], h[:, 1:]], dim=1)
    span, tokens = 1, h.shape[1]
    while span < tokens:
        h = torch.cat([h[:, :span], h[:, span:] + decay[:, span:] * h[:, :-span]], dim=1)
        decay = torch.cat([decay[:, :span], decay[:, span:] * decay[:, :-span]], dim=1)
        span *= 2
    return torch.einsum("btin,btn->bti", h, c_BTN), h[:, -1]
