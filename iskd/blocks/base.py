"""What every compact block offers, and the ridge regression that most of them are fitted with.

A compact block is a class with

- `from_block(old, stack, **kwargs) -> nn.Module`: builds the block from the one it replaces, inheriting weights where
  it can; works on the meta device, so that a plan can count parameters without memory;
- `fit(new, old, data, **kwargs) -> None` (optional): fits the new block, as it stands in the stack, to the teacher's
  block output on calibration tokens, before any training step;
- `forward(h_BTD, *, mask, positions, cache) -> h_BTD`, residual inside, unless it returns one of the host's own blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iskd.models import Stack


@dataclass(frozen=True)
class FitData:
    """Calibration data of one layer, in batches.

    Attributes:
        inputs: the student's own stream before the layer, each [B, T, D].
        targets: the teacher's stream after the layer, each [B, T, D].
        run: `run(block, h_BTD, i)` calls a block as the host would on batch i.
        stack: the student, for sizes and paths.
    """

    inputs: list[Tensor]
    targets: list[Tensor]
    run: Callable[[nn.Module, Tensor, int], Tensor]
    stack: Stack

    def rows(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Per batch: index, input [B, T, D], target [B, T, D] and row weight [B, T, 1].

        The weight is 1 / |target|: without it position 0, whose norm is 20 to 200 times that of other positions in
        models with an attention sink, would decide every least-squares fit.
        """
        for index, (h, target) in enumerate(zip(self.inputs, self.targets, strict=True)):
            yield index, h, target, 1.0 / target.float().norm(dim=-1, keepdim=True).clamp_min(1e-6)


class Ridge:
    """Accumulates weighted normal equations of `targets ~ features @ W.T + b` and solves them.

    Minimises sum_n w_n^2 |x_n W^T + b - y_n|^2 + ridge * mean(diag(X^T X)) * |W - W0|^2, in float64.
    """

    def __init__(self, features: int, outputs: int, *, bias: bool, device: torch.device) -> None:
        size = features + int(bias)
        self._bias = bias
        self._xx = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._xy = torch.zeros(size, outputs, dtype=torch.float64, device=device)

    def add(self, features: Tensor, targets: Tensor, weight: Tensor) -> None:
        """Add rows: features [..., F], targets [..., D], weight [..., 1]."""
        with torch.autocast(features.device.type, enabled=False):
            x = features.float().flatten(0, -2)
            if self._bias:
                x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
            w = weight.float().flatten(0, -2)
            x, y = x * w, targets.float().flatten(0, -2) * w
            self._xx += (x.T @ x).double()
            self._xy += (x.T @ y).double()

    def normal_equations(self, start: Tensor, ridge: float, start_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """X^T X + ridge [F, F] and the solution [F, D] pulled towards `start` [D, F]; a bias is the last row."""
        prior = start.double().T
        if self._bias:
            bias = torch.zeros_like(start[:, 0]) if start_bias is None else start_bias
            prior = torch.cat([prior, bias.double().unsqueeze(0)])
        strength = ridge * self._xx.diagonal().mean().clamp_min(1e-12)
        gram = self._xx + strength * torch.eye(len(self._xx), dtype=torch.float64, device=self._xx.device)
        return gram, torch.linalg.solve(gram, self._xy + strength * prior)

    def solve(self, start: Tensor, start_bias: Tensor | None, ridge: float) -> tuple[Tensor, Tensor | None]:
        """Weight [D, F] and bias [D] (None without one), pulled towards `start` and `start_bias`."""
        _, solution = self.normal_equations(start, ridge, start_bias)
        if not solution.isfinite().all():
            raise ValueError(
                "the least-squares fit of a compact block is not finite; "
                "raise block.ridge or use more calibration tokens (run.fit_tokens)"
            )
        if self._bias:
            return solution[:-1].T.to(start.dtype), solution[-1].to(start.dtype)
        return solution.T.to(start.dtype), None


def fit_error(new: nn.Module, data: FitData) -> float:
    """Mean over tokens of |block(h) - target|^2 / |target|^2: what fitting minimises; 0 = exact."""
    total, count = 0.0, 0
    with torch.no_grad():
        for index, h, target, weight in data.rows():
            error = ((data.run(new, h, index) - target).float() * weight).square().sum(-1)
            total, count = total + error.sum().item(), count + error.numel()
    return total / max(count, 1)
