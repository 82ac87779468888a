"""Causal linear attention (arXiv 2006.16236): softmax(q k^T) becomes phi(q) phi(k)^T, so a state replaces the cache.

    S_t = S_{t-1} + phi(k_t) v_t^T        o_t = phi(q_t)^T S_t / (phi(q_t)^T sum_{s <= t} phi(k_s) + eps)

or, without the normaliser, o_t = K^-1/2 phi(q_t)^T S_t. All weights are inherited (arXiv 2504.14366): q, k, v and o
with their biases, and the q and k norms of Qwen3 and Phi, which come before phi. Key-value heads stay grouped. Rotary
positions are dropped, as there, unless `rotary` asks for them: order then reaches the mixer through causality and
through what the stream carries. A map that is learned starts as the identity: Hedgehog before its softmax, T2R before
its relu, Hadamard's product as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from iskd.mixers.base import Attention, Common, RecurrentMixer, Streams
from iskd.mixers.modules import Context, check_count, check_number
from iskd.mixers.modules.features import FIXED, LEARNED, SIGNED, dpfp
from iskd.mixers.modules.limits import MAX_NU, MIN_EPS

if TYPE_CHECKING:
    from typing_extensions import Unpack

MAPS = (*FIXED, "dpfp", *LEARNED)


class LinearAttention(RecurrentMixer):
    """Linear attention over inherited projections. Its state is [B, G, K', V + 1] (V without the normaliser), fp32.

    Args:
        attention: what it is made from.
        feature_map: phi, one of `MAPS`; hedgehog (K' = 2K features), t2r and hadamard are learned, a map for q and one
            for k; dpfp has K' = 2 nu K.
        nu: of dpfp.
        normalize: divide by the sum of the weights; needs a map without negative values.
        eps: added to the normaliser.
        **common: as in `RecurrentMixer`.

    Raises:
        ValueError: an unknown map, a map that cannot be normalised, or an eps or nu out of its range.

    What for hadamard: linear attention of the students of arXiv 2504.14366, a product of two learned maps, short
        convolutions with SiLU, no normaliser
    What for hedgehog: linear attention with a learned feature map, softmax of Wx and of -Wx
    Source: arXiv 2006.16236; conversion with inherited projections: arXiv 2504.14366
    Source for hedgehog: arXiv 2402.04347
    Source for hadamard: arXiv 2504.14366
    Needs: attention's q, k, v and o
    Costs: state of 1.4 MiB in SmolLM2-135M, time of a token 1.09 at a context of 8,192; attention has 360.0 and 1.89
        there (experiments/subquadratic-decode/README.md)
    Costs for hedgehog: state of 2.9 MiB in SmolLM2-135M, time of a token 1.17 at a context of 8,192; attention has
        360.0 and 1.89 there (experiments/subquadratic-decode/README.md)
    Costs for hadamard: not measured
    Measured for hadamard: not measured
    Measured: 38.8 % of the teacher's accuracy, projections copied, in the grid on stories260K
        (experiments/subquadratic-stories/README.md)
    Measured for hedgehog: 39.8 % of the teacher's accuracy, projections copied, in the grid on stories260K
        (experiments/subquadratic-stories/README.md)
    """

    expands: ClassVar[bool] = False
    notes: ClassVar[dict[str, str]] = {
        "q_map": "fresh: attention has no feature map; starts as the identity, before the map's own softmax or relu",
        "k_map": "fresh: attention has no feature map; starts as the identity, before the map's own softmax or relu",
    }

    def __init__(
        self,
        attention: Attention,
        *,
        feature_map: str = "elu1",
        normalize: bool = True,
        eps: PositiveFloat = 1e-6,
        nu: PositiveInt = 4,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(attention, **common)
        if feature_map not in MAPS:
            raise ValueError(f"mixer.feature_map={feature_map!r}: choose one of {', '.join(MAPS)}")
        if normalize and feature_map in SIGNED:
            positive = ", ".join(name for name in MAPS if name not in SIGNED)
            raise ValueError(
                f"mixer.normalize=true needs weights that are not negative; choose mixer.feature_map among {positive}, "
                "or mixer.normalize=false"
            )
        check_number("eps", eps, MIN_EPS, 1)
        check_count("nu", nu, 1, MAX_NU)
        self.feature_map, self.normalize, self.eps, self.nu = feature_map, normalize, eps, nu
        if feature_map in LEARNED:
            self.q_map: nn.Module = LEARNED[feature_map](self.heads, self.head_dim)
            self.k_map: nn.Module = LEARNED[feature_map](self.kv_heads, self.head_dim)

    def streams(self, x_BTD: Tensor, context: Context) -> Streams:
        """Features of queries and keys, values, and the normaliser or K^-1/2."""
        q, k, v = self.qkv(x_BTD, context)
        phi_q, phi_k = self._maps()
        if not self.normalize:
            return Streams(phi_q(q), phi_k(k), v, scale=self.head_dim**-0.5)
        return Streams(phi_q(q), phi_k(k), v, normalizer=lambda weights: weights + self.eps)

    def _maps(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        if self.feature_map in LEARNED:
            return self.q_map, self.k_map
        fixed = partial(dpfp, nu=self.nu) if self.feature_map == "dpfp" else FIXED[self.feature_map]
        return fixed, fixed
