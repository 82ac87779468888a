"""ReBased (arXiv 2402.10644, section 4): linear attention with learned quadratic features of few channels.

    q', k' = LayerNorm(W_q x), LayerNorm(W_k x), each with weight and bias, N channels per head
    S_t = S_{t-1} + phi(k'_t) v_t^T        o_t = phi(q''_t)^T S_t / (sum_{s <= t} (q''_t^T k'_s)^2 + eps)

with q'' = q' / sqrt(N) and phi(q)^T phi(k) = (q^T k)^2 in N (N + 1) / 2 features: weights that are never negative and,
but for eps, sum to 1. Copied: v (the key-value heads stay grouped) and o. Queries and keys are fresh: N = 16 channels
are fewer than the attention's heads have, and the features of 64 channels would be 2,080.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from iskd.mixers.base import Attention, Common, Context, RecurrentMixer, Streams
from iskd.mixers.features import quadratic

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
        ValueError: a feature_dim below 1 or an eps that is not positive.
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
        self, attention: Attention, *, feature_dim: int = 16, eps: float = 1e-5, **common: Unpack[Common]
    ) -> None:
        super().__init__(attention, **common)
        if feature_dim < 1 or eps <= 0:
            raise ValueError(
                f"mixer.feature_dim must be at least 1 and mixer.eps positive, got {feature_dim} and {eps}"
            )
        self.feature_dim, self.eps = feature_dim, eps
        self.q_proj = nn.Linear(self.stream, self.heads * feature_dim, bias=False)
        self.k_proj = nn.Linear(self.stream, self.kv_heads * feature_dim, bias=False)
        self.q_affine, self.k_affine = nn.LayerNorm(feature_dim), nn.LayerNorm(feature_dim)

    def streams(self, x_BTD: Tensor, context: Context) -> Streams:
        """Quadratic features, values and the normaliser."""
        heads = (-1, self.feature_dim)
        q = quadratic(self.q_affine(self.q_proj(x_BTD).unflatten(-1, heads)) * self.feature_dim**-0.5)
        k = quadratic(self.k_affine(self.k_proj(x_BTD).unflatten(-1, heads)))
        v = self.project("v", x_BTD, context)
        return Streams(q.to(v.dtype), k.to(v.dtype), v, normalizer=lambda weights: weights + self.eps)
