"""ReBased (arXiv 2402.10644, section 4): linear attention with learned quadratic features of few channels.

    q', k' = LayerNorm(W_q x), LayerNorm(W_k x), each with weight and bias, N channels per head
    S_t = S_{t-1} + phi(k'_t) v_t^T        o_t = phi(q''_t)^T S_t / (sum_{s <= t} (q''_t^T k'_s)^2 + eps)

with q'' = q' / sqrt(N) and phi(q)^T phi(k) = (q^T k)^2 in N (N + 1) / 2 features: weights that are never negative and,
but for eps, sum to 1. Copied: v (the key-value heads stay grouped) and o. Queries and keys are fresh: N = 16 channels
are fewer than the attention's heads have, and the features of 64 channels would be 2,080.

The features stay in the wide dtype: rounded ones give squares below zero, and sums next to -eps whose quotients and
gradients explode. So the kernels for half precision (`iskd.mixers.ops.fla`) do not serve this mixer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from iskd.mixers.base import Attention, Common, RecurrentMixer, Streams
from iskd.mixers.modules import Context, check_count, check_number
from iskd.mixers.modules.features import quadratic
from iskd.mixers.modules.limits import MAX_FEATURES, MIN_EPS
from iskd.models import at_least_fp32

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ReBased(RecurrentMixer):
    """ReBased over inherited values and output. Its state is [B, G, N (N + 1) / 2, V + 1], fp32.

    Args:
        attention: what it is made from.
        feature_dim: channels N of queries and keys.
        eps: added to the sum of the weights.
        **common: as in `RecurrentMixer`, `rotary` excepted.

    Raises:
        ValueError: a feature_dim or an eps out of its range (`iskd.mixers.modules.limits`).

    Source: arXiv 2402.10644
    Needs: attention's v and o; q and k are fresh, and fla's kernels do not serve it
    Costs: state of 3.0 MiB in SmolLM2-135M, time of a token 1.15 at a context of 8,192; attention has 360.0 and 1.89
        there (experiments/subquadratic-decode/README.md)
    Measured: 39.0 % of the teacher's accuracy, projections copied, in the grid on stories260K
        (experiments/subquadratic-stories/README.md)
    """

    inherits: ClassVar[str] = "vo"
    expands: ClassVar[bool] = False
    notes: ClassVar[dict[str, str]] = {
        "q_proj": "fresh: its heads have feature_dim channels, not the attention's",
        "k_proj": "fresh: its heads have feature_dim channels, not the attention's",
        "q_affine": "fresh: attention has no norm with bias on its queries",
        "k_affine": "fresh: attention has no norm with bias on its keys",
    }

    def __init__(
        self,
        attention: Attention,
        *,
        feature_dim: PositiveInt = 16,
        eps: PositiveFloat = 1e-5,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(attention, **common)
        check_count("feature_dim", feature_dim, 1, MAX_FEATURES)
        check_number("eps", eps, MIN_EPS, 1)
        self.feature_dim, self.eps = feature_dim, eps
        self.q_proj = nn.Linear(self.stream, self.heads * feature_dim, bias=False)
        self.k_proj = nn.Linear(self.stream, self.kv_heads * feature_dim, bias=False)
        self.q_affine, self.k_affine = nn.LayerNorm(feature_dim), nn.LayerNorm(feature_dim)

    def streams(self, x_BTD: Tensor, context: Context) -> Streams:
        """Quadratic features in the wide dtype, values and the normaliser."""
        q = quadratic(self._normed(self.q_affine, self.q_proj(x_BTD)) * self.feature_dim**-0.5)
        k = quadratic(self._normed(self.k_affine, self.k_proj(x_BTD)))
        v = self.project("v", x_BTD, context)
        # a sum of squares of which the chunks' rounding may leave a trace below zero
        return Streams(q, k, v, normalizer=lambda weights: weights.clamp_min(0) + self.eps)

    def _normed(self, affine: nn.LayerNorm, y_BTC: Tensor) -> Tensor:
        """Heads of N channels, normed in the wide dtype whatever the weights have."""
        y = at_least_fp32(y_BTC).unflatten(-1, (-1, self.feature_dim))
        with torch.autocast(y.device.type, enabled=False):
            return F.layer_norm(y, (self.feature_dim,), affine.weight.to(y.dtype), affine.bias.to(y.dtype), affine.eps)
