"""Ridge regression of a linear map towards the weights that it has, from sums over rows: one pass over the text.

The sums of several processes add up, and those of text that is held out tell the error of any weights on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # with one layer out and little text, the larger ones
"""Strengths to choose from on text that was not fitted to."""
_BLOCK = 384  # features of a product: large enough for full speed


@dataclass(frozen=True)
class Solution:
    """Weights of a linear map y = W x + b, in float64.

    Attributes:
        weight: [D, F].
        bias: [D], or None.
    """

    weight: Tensor
    bias: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        """The map's output [..., D] for inputs [..., F], in their precision."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def towards(self, start: Solution, share: float) -> Solution:
        """From `start` so far on the way here: 0 = there, 1 = here."""
        bias = None if self.bias is None or start.bias is None else torch.lerp(start.bias, self.bias, share)
        return Solution(torch.lerp(start.weight, self.weight, share), bias)


def row_weights(target: Tensor) -> Tensor:
    """1 / |target| [B, T, 1] for targets [B, T, D].

    Without it position 0, whose norm is 20 to 200 times that of others in models with an attention sink, would decide
    every least-squares fit.
    """
    return 1.0 / target.float().norm(dim=-1, keepdim=True).clamp_min(1e-6)


class Ridge:
    """Accumulates weighted normal equations of `targets ~ features @ W.T + b` and solves them.

    Minimises sum_n w_n^2 |x_n W^T + b - y_n|^2 + ridge * mean(diag(X^T X)) * |W - W0|^2, in float64.

    Attributes:
        rows: how many were added.
    """

    def __init__(self, features: int, outputs: int, *, bias: bool, device: torch.device) -> None:
        size = features + int(bias)
        self._bias, self._features, self._outputs = bias, features, outputs
        # one tensor, so that processes add theirs in one exchange: X^T X | X^T Y, and below them the rows and |Y|^2
        self._sums = torch.zeros(size + 1, size + outputs, dtype=torch.float64, device=device)

    @property
    def rows(self) -> int:
        """How many were added."""
        return int(self._sums[-1, 0].item())

    @property
    def sums(self) -> Tensor:
        """All that was added up; those of several processes may be added in place."""
        return self._sums

    @property
    def _xx(self) -> Tensor:
        return self._sums[:-1, : len(self._sums) - 1]

    @property
    def _xy(self) -> Tensor:
        return self._sums[:-1, len(self._sums) - 1 :]

    @property
    def _yy(self) -> Tensor:
        """Sum of the squares of each output [D]."""
        return self._sums[-1, len(self._sums) - 1 :]

    @classmethod
    def total(cls, systems: Sequence[Ridge], *, without: Ridge | None = None) -> Ridge:
        """The sums of several systems of one map, and not those of one of them."""
        first = systems[0]
        found = cls(first._features, first._outputs, bias=first._bias, device=first.sums.device)
        for system in systems:
            if system is not without:
                found.sums.add_(system.sums)
        return found

    def only(self, features: Tensor) -> Ridge:
        """The equations of a map that reads some of the features alone: numbers of them, ascending."""
        found = Ridge(len(features), self._outputs, bias=self._bias, device=self.sums.device)
        last = torch.arange(self._features, len(self._sums) - 1, device=features.device)  # the bias, if there is one
        kept = torch.cat([features, last])
        outputs = torch.arange(len(self._sums) - 1, self._sums.shape[1], device=features.device)
        found.sums[:-1] = self._sums[kept][:, torch.cat([kept, outputs])]
        found.sums[-1, 0], found._yy[:] = self._sums[-1, 0], self._yy
        return found

    def towards(self, first: int, end: int) -> Ridge:
        """The equations of some of the outputs, from `first` to before `end`, by themselves."""
        found, inputs = (
            Ridge(self._features, end - first, bias=self._bias, device=self.sums.device),
            len(self._sums) - 1,
        )
        found.sums[:, :inputs] = self._sums[:, :inputs]
        found.sums[:, inputs:] = self._sums[:, inputs + first : inputs + end]
        return found

    def add(self, features: Tensor, targets: Tensor, weight: Tensor) -> None:
        """Add rows: features [..., F], targets [..., D], weight [..., 1]."""
        with whole_float32(features.device):
            x = features.float().flatten(0, -2)
            if self._bias:
                x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
            w = weight.float().flatten(0, -2)
            x, y = x * w, targets.float().flatten(0, -2) * w
            self._xx.add_(_gram(x).double())
            self._xy.add_((x.T @ y).double())
            self._yy.add_(y.square().sum(0, dtype=torch.float64))
            self._sums[-1, 0] += len(x)

    def start(self, weight: Tensor, bias: Tensor | None) -> Solution:
        """The weights [D, F] and bias [D] that a map has."""
        zero = torch.zeros_like(weight[:, 0]) if self._bias and bias is None else bias
        return Solution(weight.double(), None if zero is None or not self._bias else zero.double())

    def _as_rows(self, solution: Solution) -> Tensor:
        """Weights [F, D] as the equations have them: a bias is the last row."""
        w = solution.weight.T
        return w if solution.bias is None or not self._bias else torch.cat([w, solution.bias.unsqueeze(0)])

    def error(self, solution: Solution) -> float:
        """Sum of the weighted squared errors of some weights on the rows that were added."""
        w = self._as_rows(solution)
        square = (w * (self._xx @ w)).sum() - 2 * (w * self._xy).sum() + self._yy.sum()
        return float(square.item())

    def errors_from(self, start: Solution) -> Callable[[Solution, Sequence[float]], list[float]]:
        """`error` of weights at several shares of the way from `start` to others, by one product for all shares.

        |X (W0 + s D) - Y|^2 = |X W0 - Y|^2 - 2 s <D, X^T Y - X^T X W0> + s^2 <D, X^T X D>; the first and the matrix in
        the second are the same for all D.
        """
        w = self._as_rows(start)
        product = self._xx @ w
        before = (w * product).sum() - 2 * (w * self._xy).sum() + self._yy.sum()
        slope = self._xy - product

        def errors(solution: Solution, shares: Sequence[float]) -> list[float]:
            way = self._as_rows(solution) - w
            first, second = (way * slope).sum(), (way * (self._xx @ way)).sum()
            return [float((before - 2 * share * first + share**2 * second).item()) for share in shares]

        return errors

    def normal_equations(self, start: Tensor, ridge: float, start_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """X^T X + ridge [F, F] and the solution [F, D] pulled towards `start` [D, F]; a bias is the last row.

        Raises:
            ValueError: the system is singular, or its solution is not finite.
        """
        prior = start.double().T
        if self._bias:
            bias = torch.zeros_like(start[:, 0]) if start_bias is None else start_bias
            prior = torch.cat([prior, bias.double().unsqueeze(0)])
        strength = ridge * self._xx.diagonal().mean().clamp_min(1e-12)
        gram = self._xx + strength * torch.eye(len(self._xx), dtype=torch.float64, device=self._xx.device)
        factor, failed = torch.linalg.cholesky_ex(gram)
        solved = torch.cholesky_solve(self._xy + strength * prior, factor)
        if failed.item() or not solved.isfinite().all():
            raise ValueError(
                f"a least-squares fit of {len(gram)} unknowns on {self.rows} rows is singular or not finite; raise its "
                "ridge (block.ridge, edit.ridge, refit.output.ridge, refit.replaceme.ridge) or use more calibration "
                "tokens (run.fit_tokens, refit.output.tokens)"
            )
        return gram, solved

    def solve(self, start: Tensor, start_bias: Tensor | None, ridge: float) -> tuple[Tensor, Tensor | None]:
        """Weight [D, F] and bias [D] (None without one), pulled towards `start` and `start_bias`."""
        found = self.solution(self.start(start, start_bias), ridge)
        return found.weight.to(start.dtype), None if found.bias is None else found.bias.to(start.dtype)

    def solution(self, start: Solution, ridge: float) -> Solution:
        """The weights that solve the equations, pulled towards `start`. Raises ValueError as `normal_equations`."""
        _, solved = self.normal_equations(start.weight, ridge, start.bias)
        return Solution(solved[:-1].T, solved[-1]) if self._bias else Solution(solved.T, None)


def lowest(error: Callable[[int], float], count: int, start: int) -> int:
    """Where a function of 0 .. count - 1 with one valley is lowest, walking downhill from `start`."""
    at = start
    while math.isinf(error(at)) and at + 1 < count:  # the walk begins where there is a height
        at += 1
    while True:
        near = [number for number in (at - 1, at, at + 1) if 0 <= number < count]
        best = min(near, key=error)
        if best == at:
            return at
        at = best


@contextmanager
def whole_float32(device: torch.device) -> Iterator[None]:
    """Products of float32 matrices on a device without TF32 or bf16 inside, whatever the run allows, autocast too.

    Their error, 1e-3 of the largest sums, is more than a small ridge adds to the diagonal.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _gram(x: Tensor) -> Tensor:
    """X^T X [F, F] of x [N, F]: half of it by products, the other half by symmetry."""
    size = x.shape[1]
    found = x.new_empty(size, size)
    for begin in range(0, size, _BLOCK):
        end = begin + _BLOCK
        found[begin:end, begin:] = x[:, begin:end].T @ x[:, begin:]
        found[end:, begin:end] = found[begin:end, end:].T
    return found
