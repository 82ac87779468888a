"""HGRN2 (arXiv 2404.07904, section 3): a gated recurrence over outer products, its key what the forget gate gives up.

    S_t = diag(f_t) S_{t-1} + (1 - f_t) i_t^T,  f_t = l + (1 - l) sigmoid(W_f x_t + b)      o_t = K^-1/2 silu(q_t)^T S_t
    y_t = W_o RMSNorm_h(o_t)

Copied: q, v as the input i (key-value heads repeated) and o; attention's keys have no place. Fresh: the forget gate and
its lower bound l in (0, 1), learned per channel. The published bounds grow with the depth through a softmax over all
layers; a layer that is converted alone has no others to share with, so all start at `lower_bound`. The gate starts at
exp(-1 / memory), near 1: the state is a slow moving average of the values, whose size the norm restores. The norm is
one per head, as in the other mixers here; the published code norms the whole width at once, heads together.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from iskd.mixers.base import Attention, Common, RecurrentMixer, Streams
from iskd.mixers.modules import Context, HeadNorm, check_memory
from iskd.mixers.modules.layers import gate_proj, last_bias

if TYPE_CHECKING:
    from typing_extensions import Unpack

LEAST = 1e-3  # of the way from the lower bound to 1: how near to the bound a gate may start


class HGRN2(RecurrentMixer):
    """HGRN2 over inherited queries, values and output. Its state is [B, H, K, V], fp32.

    Args:
        attention: what it is made from.
        lower_bound: where the lower bound of the forget gate starts, in (0, 1).
        memory: tokens after which a fresh gate has forgotten all but 1/e.
        **common: as in `RecurrentMixer`, `rotary` excepted.

    Raises:
        ValueError: a lower bound outside (0, 1), or a memory out of its range or too short for it.

    Source: arXiv 2404.07904
    Needs: attention's q, v and o; k is dropped
    Costs: state of 4.2 MiB in SmolLM2-135M, time of a token 1.25 at a context of 8,192; attention has 360.0 and 1.89
        there (experiments/subquadratic-decode/README.md)
    Measured: 46.3 % of the teacher's accuracy, projections copied, in the grid on stories260K
        (experiments/subquadratic-stories/README.md)
    """

    inherits: ClassVar[str] = "qvo"
    keep_float32: ClassVar[tuple[str, ...]] = ("bound",)
    notes: ClassVar[dict[str, str]] = {
        "k_proj": "dropped: the key is 1 - forget gate",
        "forget": "fresh: attention does not forget; starts near 1",
        "bound": "fresh: the forget gate's lower bound, before its sigmoid",
    }

    def __init__(
        self,
        attention: Attention,
        *,
        lower_bound: Annotated[float, Field(gt=0, lt=1)] = 0.5,
        memory: PositiveFloat = 256.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(attention, **common)
        if not 0 < lower_bound < 1:
            raise ValueError(f"mixer.lower_bound must be in (0, 1), got {lower_bound}")
        check_memory(memory)
        start = math.exp(-1 / memory)
        if start <= lower_bound:
            raise ValueError(
                f"mixer.memory={memory} tokens ask for a forget gate of {start:.3f}, which is not above "
                f"mixer.lower_bound={lower_bound}; raise the memory or lower the bound"
            )
        width = self.heads * self.head_dim
        self.forget = gate_proj(self.stream, width, bias=math.log((start - lower_bound) / (1 - start)))
        self.bound = nn.Parameter(torch.full((width,), math.log(lower_bound / (1 - lower_bound))))
        self.norm = HeadNorm(self.heads, self.head_dim)

    @torch.no_grad()
    def calibrate(self, memory_H: Tensor, strength_H: Tensor) -> list[str]:
        """The forget gates of a head, all alike; above their lower bound."""
        bound = self.bound.sigmoid()
        start = (-1 / memory_H).exp().repeat_interleave(self.head_dim).clamp_min(bound + LEAST * (1 - bound))
        last_bias(self.forget).copy_(((start - bound) / (1 - start)).log())
        return ["forget"]

    def streams(self, x_BTD: Tensor, context: Context) -> Streams:
        """Queries, values, log decays and the keys that follow from them."""
        q, v = self.project("q", x_BTD, context), self.project("v", x_BTD, context)
        logits = self.forget(x_BTD)
        wide = torch.promote_types(logits.dtype, torch.float32)
        # 1 - f = (1 - l) (1 - sigmoid(z)), without the cancellation
        key = torch.sigmoid(-self.bound.to(wide)) * torch.sigmoid(-logits.to(wide))
        key = key.unflatten(-1, (self.heads, self.head_dim))
        return Streams(F.silu(q), key.to(q.dtype), v, g=torch.log1p(-key), scale=self.head_dim**-0.5)
