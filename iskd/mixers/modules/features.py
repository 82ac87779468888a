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
SIGNED = ("identity", "hadamard")


def dpfp(x_BTHK: Tensor, nu: int = 4) -> Tensor:
    """Products of neighbours at distance 1 to nu among relu(x) and relu(-x): 2 nu K features (arXiv 2102.11174)."""
    both = F.relu(torch.cat([x_BTHK, -x_BTHK], dim=-1))
    return torch.cat([both * both.roll(shift, -1) for shift in range(1, nu + 1)], dim=-1)


class T2R(nn.Module):
    """relu(W x), W [K, K] per head (arXiv 2103.13076, section 2.2); W starts as the identity. [..., K] -> [..., K]."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width).repeat(heads, 1, 1))

    def forward(self, x_BTHK: Tensor) -> Tensor:
        """Features of each head."""
        return F.relu(torch.einsum("bthk,hkj->bthj", x_BTHK, self.weight.to(x_BTHK.dtype))).to(x_BTHK.dtype)


class Hadamard(nn.Module):
    """(W_1 x + b_1) * (W_2 x + b_2), W [K, K] and b [K] per head.

    In the students of arXiv 2504.14366 all heads share one map.
    Starts as the identity: W_1 = 1, b_1 = 0, W_2 = 0, b_2 = 1. Products have either sign. [..., K] -> [..., K].
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        eye = torch.eye(width).repeat(heads, 1, 1)
        self.weight = nn.Parameter(torch.stack([eye, torch.zeros_like(eye)]))
        self.bias = nn.Parameter(torch.stack([torch.zeros(heads, width), torch.ones(heads, width)]))

    def forward(self, x_BTHK: Tensor) -> Tensor:
        """Features of each head."""
        one, other = (
            torch.einsum("bthk,hkj->bthj", x_BTHK, weight.to(x_BTHK.dtype)) + bias.to(x_BTHK.dtype)
            for weight, bias in zip(self.weight, self.bias, strict=True)
        )
        return (one * other).to(x_BTHK.dtype)


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


LEARNED: dict[str, type[nn.Module]] = {"hedgehog": Hedgehog, "t2r": T2R, "hadamard": Hadamard}
"""Maps with weights: one for q and one for k, made of a number of heads and their width."""
