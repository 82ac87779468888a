"""A linear map that adds to the stream, regressed on what its block lacks; text that is held out says how far to go.

There are two goals. One is the teacher's state behind the block, for which the map has to make up for all that went
wrong below. The other is what the teacher's own blocks give on the student's stream, which leaves errors from below as
they are. With little text the first is fitted to noise, layer after layer, and the second gives away what could be put
right; so the map goes a share of the way from the second to the first. Ridge and share are those with the least error
towards the teacher's state on text that was not fitted to.

Source: Quantization Error Propagation (arXiv 2504.09629) makes up for a share of the error from below that is given;
ours: text held out chooses it for every map, together with the ridge
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iskd.blocks.ridge import RIDGES, Ridge, Solution, lowest
from iskd.models.projections import weight_of

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_RIDGE, _SHARE = 0.3, 0.5  # where nothing is held out


@dataclass(frozen=True)
class Best:
    """Weights of a map, the ridge and the share that gave them, and their squared error (a sum over rows)."""

    solution: Solution
    ridge: float
    share: float
    error: float


class Regression:
    """The normal equations of one map: towards one or both goals, and on the text held out towards the teacher's state.

    Args:
        fit: of the text to fit to; its outputs are those of the map for each goal, the teacher's state first.
        held: of the text held out; None = there is none.
        outputs: of the map.
    """

    def __init__(self, fit: Ridge, held: Ridge | None, outputs: int) -> None:
        self.fit, self.held, self._outputs = fit, held, outputs
        self._goals = (fit.sums.shape[1] - len(fit.sums) + 1) // outputs

    @classmethod
    def of(cls, module: nn.Module, goals: int, *, held: bool) -> Regression:
        """No rows yet.

        Args:
            module: the map; weights as its family stores them.
            goals: how many.
            held: whether text is held out.
        """
        weight, bias = weight_of(module), getattr(module, "bias", None) is not None
        fit, judge = (Ridge(weight.shape[1], n * weight.shape[0], bias=bias, device=weight.device) for n in (goals, 1))
        return cls(fit, judge if held else None, weight.shape[0])

    def only(self, features: Tensor) -> Regression:
        """Those of a map that reads some of the features alone: numbers of them, ascending."""
        held = None if self.held is None else self.held.only(features)
        return Regression(self.fit.only(features), held, self._outputs)

    def equations(self, start: Solution, ridge: float, share: float) -> tuple[Tensor, Tensor]:
        """X^T X + ridge [F, F] and the solution [F, D] that is pulled towards `start`; a bias is the last row.

        Raises ValueError as `Ridge.normal_equations` does.
        """
        gram, solved = self._solved(start, ridge)
        return gram, torch.lerp(solved[:, -self._outputs :], solved[:, : self._outputs], share)

    def _solved(self, start: Solution, ridge: float) -> tuple[Tensor, Tensor]:
        """The same towards each goal [F, goals D]."""
        bias = None if start.bias is None else start.bias.repeat(self._goals)
        return self.fit.normal_equations(start.weight.repeat(self._goals, 1), ridge, bias)

    def best(self, module: nn.Module, ridge: float | None = None) -> Best:
        """The weights of a map that are nearest to the teacher's state on the text held out.

        Args:
            module: the map; its weights are those that a ridge pulls towards.
            ridge: its strength, in units of the mean of diag(X^T X); None = chosen among `RIDGES`.

        Raises:
            ValueError: every system is singular, or its solution is not finite.
        """
        judge = self.fit.towards(0, self._outputs) if self.held is None else self.held
        start = judge.start(weight_of(module), getattr(module, "bias", None))
        ridges: tuple[float, ...] = RIDGES if ridge is None else (ridge,)
        shares: tuple[float, ...] = SHARES if self._goals > 1 else (1.0,)
        if self.held is None:  # what was fitted to cannot say how far to go
            ridges, shares = (_RIDGE if ridge is None else ridge,), (_SHARE if self._goals > 1 else 1.0,)
        tried: dict[int, Best] = {}

        def error(number: int) -> float:
            """Of a ridge, with its best share; solved once. Infinite where its system is singular, unless all are."""
            if number not in tried:
                try:
                    tried[number] = self._at(start, judge, ridges[number], shares)
                except ValueError:
                    if number == len(ridges) - 1:  # the largest: no other is better
                        raise
                    tried[number] = Best(start, ridges[number], 1.0, math.inf)
            return tried[number].error

        return tried[lowest(error, len(ridges), len(ridges) // 2)]

    def _at(self, start: Solution, judge: Ridge, ridge: float, shares: Sequence[float]) -> Best:
        """The best share of the way between the solutions towards both goals."""
        _, solved = self._solved(start, ridge)
        sides = solved[:, -self._outputs :], solved[:, : self._outputs]  # one of them twice where there is one goal
        ours, theirs = (Solution(w.T, None) if start.bias is None else Solution(w[:-1].T, w[-1]) for w in sides)
        errors = judge.errors_from(ours)(theirs, shares)
        least, share = min(zip(errors, shares, strict=True))
        return Best(theirs.towards(ours, share), ridge, share, least)
