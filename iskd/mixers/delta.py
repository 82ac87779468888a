"""The base of the mixers with a delta rule: activated and normalised queries and keys, and beta.

    q_t, k_t = phi(conv(W x_t)) / |phi(conv(W x_t))|,  v_t = phi(conv(W x_t)),  beta_t = sigmoid(w_b x_t + b)
    S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = K^-1/2 q_t^T S_t

phi is SiLU, as published (arXiv 2406.06484, section 3.3). Behind a copied projection it is no identity: near x / 2 for
small x, a factor that the normalisation of q and k and the norm of the output remove, it flattens negative numbers as
they grow. `activation=identity` leaves the copies whole. The convolutions start as the identity, beta at 1/2.

With `negative_eigenvalues` beta is 2 sigmoid(...), in (0, 2): above 1 a write turns what its key finds round instead of
only erasing it, so that I - beta k k^T has eigenvalues down to -1 and can count parity (arXiv 2411.12537).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import NonNegativeInt
from torch import Tensor
from torch.nn import functional as F

from iskd.mixers.base import Attention, Basics, RecurrentMixer, Streams
from iskd.mixers.modules import Context, HeadNorm
from iskd.mixers.modules.gates import activation_of
from iskd.mixers.modules.layers import gate_proj, last_bias
from iskd.models import at_least_fp32

if TYPE_CHECKING:
    from typing_extensions import Unpack

BETA = 0.5  # where beta starts


class DeltaBasics(Basics, total=False):
    """Those that every mixer with a delta rule takes too."""

    negative_eigenvalues: bool


class DeltaMixer(RecurrentMixer):
    """A mixer with a delta rule over inherited projections and an RMS norm per head. Its state is [B, H, K, V], fp32.

    Args:
        attention: what it is made from.
        activation: of q, k and v, "silu" or "identity".
        negative_eigenvalues: let beta reach 2.
        conv, rotary, **common: as in `RecurrentMixer`.

    Raises:
        ValueError: an unknown activation.
    """

    notes: ClassVar[dict[str, str]] = {
        "beta": "fresh: attention has no delta rule; starts near 1/2",
        "decay": "fresh: attention does not forget; starts near 1",
    }

    def __init__(
        self,
        attention: Attention,
        *,
        activation: str = "silu",
        conv: NonNegativeInt = 4,
        rotary: bool = False,
        negative_eigenvalues: bool = False,
        **common: Unpack[Basics],
    ) -> None:
        super().__init__(attention, conv=conv, rotary=rotary, **common)
        self.activation, self.most = activation_of(activation), 2.0 if negative_eigenvalues else 1.0
        self.beta = gate_proj(self.stream, self.heads, bias=math.log(BETA / (self.most - BETA)))
        self.norm = HeadNorm(self.heads, self.head_dim)

    @torch.no_grad()
    def calibrate(self, memory_H: Tensor, strength_H: Tensor) -> list[str]:
        """The strength of the delta rule, and the decays where there are some."""
        last_bias(self.beta).copy_(torch.logit(strength_H / self.most))
        decay = getattr(self, "decay", None)
        if decay is None:
            return ["beta"]
        decay.remember(memory_H)
        return ["beta", "decay"]

    def streams(self, x_BTD: Tensor, context: Context) -> Streams:
        """Queries and keys of length 1, values, and beta; without decay."""
        q, k, v = (self.activation(x) for x in self.qkv(x_BTD, context))
        # in the wide dtype, because a sum of squares is; back, because the kernels want half precision
        q, k = (F.normalize(at_least_fp32(x), dim=-1, eps=1e-6).to(v.dtype) for x in (q, k))
        beta = self.most * torch.sigmoid(at_least_fp32(self.beta(x_BTD)))
        return Streams(q, k, v, beta=beta, scale=self.head_dim**-0.5)
