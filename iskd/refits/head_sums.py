"""Least squares for the values of one key-value head that several query heads read: sums over rows, and their solution.

The left side is a sum of Kronecker products, one for every pair of readers, which is never written out: two eigenvalue
decompositions solve it where one head reads, and stand in front of conjugate gradients where several do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from iskd.blocks.ridge import whole_float32

_TOLERANCE, _MOST_STEPS = 1e-9, 500  # of conjugate gradients: residual over right side


class HeadSums:
    """Normal equations of the change of one key-value head's values [K, F], and the error of any such change.

    Args:
        out_RDK: what the output projection does with the head, for each query head that reads it.
        features: inputs of the values' projection F, the one of a bias among them.
    """

    def __init__(self, out_RDK: Tensor, features: int) -> None:
        self._readers, _, self._width = out_RDK.shape
        self._features = features
        self._mixing = torch.einsum("rdk,sdl->rskl", out_RDK, out_RDK)
        size = self._readers * features
        # one tensor, so that processes add theirs in one exchange: C | right side | squared residuals
        self.flat = torch.zeros(size * size + self._width * features + 1, dtype=torch.float64, device=out_RDK.device)
        gram, right, self._squares = self.flat.split([size * size, self._width * features, 1])
        self._gram = gram.view(self._readers, features, self._readers, features)
        self._right = right.view(self._width, features)

    def add(self, z_RNF: Tensor, wanted_RNK: Tensor, squares: Tensor) -> None:
        """Add rows, already weighted: mixed inputs, and the residuals through the output projection."""
        flat_NF = z_RNF.transpose(0, 1).flatten(1)
        with whole_float32(z_RNF.device):
            self._gram.view(flat_NF.shape[1], -1).add_((flat_NF.T @ flat_NF).double())
            self._right.add_(torch.einsum("rnk,rnf->kf", wanted_RNK, z_RNF).double())
        self._squares += squares.double()

    def applied(self, change_KF: Tensor) -> Tensor:
        """The left side for a change, without the ridge."""
        mixed = change_KF @ self._gram.flatten(2)  # [R', K, R F]
        return torch.einsum("rskl,slrf->kf", self._mixing, mixed.unflatten(-1, (self._readers, -1)))

    def error(self, change_KF: Tensor) -> float:
        """Sum of the weighted squared errors with a change."""
        found = (change_KF * (self.applied(change_KF) - 2 * self._right)).sum() + self._squares[0]
        return float(found.item())

    def solved(self, ridge: float) -> Tensor:
        """The change [K, F] that solves the equations, pulled towards none."""
        own = torch.arange(self._readers, device=self.flat.device)
        mixing = self._mixing[own, own].sum(0)
        gram = self._gram[own, :, own].mean(0)
        diagonal = torch.einsum("rskk,rfsf->kf", self._mixing, self._gram)  # of the left side
        strength = ridge * diagonal.mean().clamp_min(1e-12)
        (s, q), (c, u) = (torch.linalg.eigh(each) for each in (mixing, gram))
        scale = (s.clamp_min(0)[:, None] * c.clamp_min(0) + strength).reciprocal()

        def nearly(right: Tensor) -> Tensor:
            """Solves the equations of readers that all mix alike."""
            found: Tensor = q @ ((q.T @ right @ u) * scale) @ u.T
            return found

        if self._readers == 1:
            return nearly(self._right)
        return conjugate_gradients(lambda x: self.applied(x) + strength * x, self._right, nearly)


def conjugate_gradients(apply: Callable[[Tensor], Tensor], right: Tensor, nearly: Callable[[Tensor], Tensor]) -> Tensor:
    """Solve `apply(x) = right` for a symmetric positive definite map; `nearly` is an inverse of one like it."""
    x, residual = torch.zeros_like(right), right.clone()
    ready = nearly(residual)
    way, size = ready, (residual * ready).sum()
    for _ in range(_MOST_STEPS):
        if residual.norm() <= _TOLERANCE * right.norm():
            break
        image = apply(way)
        step = size / (way * image).sum()
        x, residual = x + step * way, residual - step * image
        ready = nearly(residual)
        size, before = (residual * ready).sum(), size
        way = ready + size / before * way
    return x
