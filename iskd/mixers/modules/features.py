"""Feature maps phi of linear attention, whose weights are phi(q)^T phi(k) where softmax attention has exp(q^T k).

A map without negative values allows the normaliser. All keep the dtype of their input, so that a half-precision pass
stays one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "elu1": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "identity": lambda x: x,
}
SIGNED = ("identity",)


class Hedgehog(nn.Module):
    """softmax(W x) and softmax(-W x), one after the other, W [K, K] per head (arXiv 2402.04347, section 4.1).

    W starts as the identity, so that untrained features follow the copied queries and keys. [..., K] -> [..., 2K].
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width).repeat(heads, 1, 1))

    def forward(self, x_BTHK: Tensor) -> Tensor:
        """Features of each head."""
        y_BTHK = torch.einsum("bthk,hkj->bthj", x_BTHK, self.weight.to(x_BTHK.dtype))
        return torch.cat([y_BTHK.softmax(-1), (-y_BTHK).softmax(-1)], dim=-1).to(x_BTHK.dtype)


def quadratic(x_BTHK: Tensor) -> Tensor:
    """Products x_i x_j, i <= j, with phi(x)^T phi(y) = (x^T y)^2: K (K + 1) / 2 features (arXiv 2402.10644)."""
    width = x_BTHK.shape[-1]
    i, j = torch.triu_indices(width, width, device=x_BTHK.device)
    # a product of two different channels stands for both orders
    weights = x_BTHK.new_full(i.shape, 2.0**0.5).masked_fill(i == j, 1.0)
    return x_BTHK[..., i] * x_BTHK[..., j] * weights
