"""DeltaNet (arXiv 2406.06484, section 3.3; the rule: arXiv 2102.11174): a new value replaces what its key finds.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = K^-1/2 q_t^T S_t
    y_t = W_o RMSNorm_h(o_t)

with q and k of length 1 (`iskd.mixers.delta`, which says what the SiLU in front of them does to the copies). Copied: q,
k, v (key-value heads repeated, as each head has its own beta) and o. Fresh: beta, which starts at 1/2, the short
convolutions, which start as the identity, and the norm. It forgets only by replacing.

DeltaProduct (arXiv 2502.10297, section 4) does so n times for every token, each time with another key and value:

    S_t = (prod_j I - beta_tj k_tj k_tj^T) a_t S_{t-1} + what the steps write        o_t = K^-1/2 q_t^T S_t

so that one token can turn the state by more than a reflection. The first step has the copied key and value; the others'
are drawn as the host draws its weights, with a beta that starts near 1/20 (near 1/10
where it may reach 2), so that they disturb the first one little.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from iskd.mixers.base import Attention, Basics, Streams
from iskd.mixers.delta import DeltaMixer
from iskd.mixers.modules import Context, OutputGate, ShortConv, check_count
from iskd.mixers.modules.gates import SoftplusDecay
from iskd.mixers.modules.layers import gate_proj
from iskd.mixers.modules.limits import MAX_STEPS
from iskd.models import at_least_fp32

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DeltaNet(DeltaMixer):
    """DeltaNet over inherited projections. Its state is [B, H, K, V], fp32, and the convolutions' last inputs.

    Arguments and errors as in `iskd.mixers.delta.DeltaMixer`.

    Source: arXiv 2406.06484; the rule: arXiv 2102.11174
    Needs: attention's q, k, v and o
    Costs: state of 4.8 MiB in SmolLM2-135M, time of a token 1.40 at a context of 8,192; attention has 360.0 and 1.89
        there (experiments/subquadratic-decode/README.md)
    Measured: 82.2 % of the teacher's accuracy, copied and aligned, in the grid on stories260K
        (experiments/subquadratic-stories/README.md)
    """


LATER = -3.0  # where the logit of the later steps' beta starts


class DeltaProduct(DeltaMixer):
    """Several delta rules a token over inherited projections. Its state is [B, H, K, V], fp32, and the convolutions'.

    Args:
        attention: what it is made from.
        steps: delta rules a token, n.
        decay: forget by a decay per head, as Gated DeltaNet does.
        memory: tokens after which a fresh decay has forgotten all but 1/e.
        gate: gate the output.
        negative_eigenvalues, activation, conv, rotary, **common: as in `iskd.mixers.delta.DeltaMixer`.

    Raises:
        ValueError: an unknown activation, or steps or a memory out of their range (`iskd.mixers.modules.limits`).

    Source: arXiv 2502.10297
    Needs: attention's q, k, v and o; has no matrix to align, so `schedule.mixers=mixer_output` or `auto`
    Costs: that of n tokens of Gated DeltaNet for every token
    Measured: not measured
    """

    exposes_matrix: ClassVar[bool] = False
    notes: ClassVar[dict[str, str]] = {
        **DeltaMixer.notes,
        "later": "fresh: attention has one key and one value a token",
    }

    def __init__(
        self,
        attention: Attention,
        *,
        steps: PositiveInt = 2,
        decay: bool = True,
        memory: PositiveFloat = 256.0,
        gate: bool = True,
        negative_eigenvalues: bool = True,
        activation: str = "silu",
        conv: NonNegativeInt = 4,
        rotary: bool = False,
        **common: Unpack[Basics],
    ) -> None:
        super().__init__(
            attention,
            activation=activation,
            negative_eigenvalues=negative_eigenvalues,
            conv=conv,
            rotary=rotary,
            **common,
        )
        check_count("steps", steps, 1, MAX_STEPS)
        self.steps, width = steps, self.heads * self.head_dim
        std = float(getattr(attention.stack.config, "initializer_range", 0.02))
        self.later = nn.ModuleList(_Step(self.stream, self.heads, width, conv, std) for _ in range(steps - 1))
        self.decay = SoftplusDecay(self.stream, self.heads, memory=memory) if decay else None
        self.gate = OutputGate(self.stream, width) if gate else None

    def streams(self, x_BTD: Tensor, context: Context) -> Streams:
        """Those of the first step with the log decay; keys, values and beta of the later ones [B, T, n - 1, ...]."""
        first, later = super().streams(x_BTD, context), []
        for step in self.later:
            assert isinstance(step, _Step)
            k, v = (self.conv_activation(step.project(name, x_BTD, context)) for name in "kv")
            k = k.unflatten(-1, (-1, self.projections.inner_dim))  # positions turn heads as wide as the attention's
            k = self.projections.regrouped(k if self.rotary is None else self.rotary(k, context.positions))
            k, v = self.activation(k), self.activation(v).unflatten(-1, (self.heads, self.head_dim))
            k = F.normalize(at_least_fp32(k), dim=-1, eps=1e-6).to(v.dtype)
            beta = self.most * torch.sigmoid(at_least_fp32(step.beta(x_BTD)))
            # a hidden token leaves the state as it is in every step
            later.append((k, v, beta if context.seen is None else beta * context.seen[..., None]))
        extra = tuple(torch.stack(each, dim=2) for each in zip(*later, strict=True))
        return replace(first, g=None if self.decay is None else self.decay(x_BTD), extra=extra)

    def mix(self, streams: Streams, context: Context, state_BGKV: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mixed values [B, T, H, V] and the state after the last token: n tokens of the core for every one."""
        s, n = streams, self.steps
        if n == 1:
            return super().mix(s, context, state_BGKV)
        assert s.beta is not None
        k, v, beta = (
            torch.cat([first.unsqueeze(2), later.to(first.dtype)], dim=2).flatten(1, 2)
            for first, later in zip((s.k, s.v, s.beta), s.extra, strict=True)
        )
        # the decay comes before the first step, and the query reads what the last one leaves
        g = None if s.g is None else F.pad(s.g.unsqueeze(2), (0, 0, 0, n - 1)).flatten(1, 2)
        q = s.q.repeat_interleave(n, dim=1)
        segments = None if context.segments is None else context.segments.repeat_interleave(n, dim=1)
        every = replace(s, q=q, k=k, v=v, beta=beta, g=g, extra=())
        o, state = super().mix(every, replace(context, segments=segments), state_BGKV)
        return o[:, n - 1 :: n], state


class _Step(nn.Module):
    """Key, value and strength of one later step of DeltaProduct, with short convolutions of their own."""

    def __init__(self, stream: int, heads: int, width: int, conv: int, std: float) -> None:
        super().__init__()
        self.k_proj, self.v_proj = (nn.Linear(stream, width, bias=False) for _ in range(2))
        for layer in (self.k_proj, self.v_proj):
            nn.init.normal_(layer.weight, std=std)
        self.convs = nn.ModuleDict({name: ShortConv(width, conv) for name in "kv" if conv})
        self.beta = gate_proj(stream, heads, bias=LATER)

    def project(self, name: str, x_BTD: Tensor, context: Context) -> Tensor:
        """Keys or values ("k", "v") [B, T, H * K], before what stands behind a convolution."""
        y_BTC: Tensor = self.get_submodule(f"{name}_proj")(x_BTD)
        if name not in self.convs:
            return y_BTC
        conv = self.convs[name]
        assert isinstance(conv, ShortConv)
        return context.conv(conv, y_BTC)
