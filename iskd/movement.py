"""The proof that an edit took: every new parameter gets a gradient and moves.

Without it the failure is silent: a block that is missing from the optimizer, from the graph or from gradient
synchronisation leaves the loss finite and the run green.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class MovementCheck:
    """Watches the parameters that an edit put in, from the edit until a few optimizer steps later."""

    def __init__(self) -> None:
        self._watched: dict[str, tuple[nn.Parameter, Tensor]] = {}

    def watch(self, model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        """Start with the values that the parameters have now; frozen ones are left out."""
        names = {id(p): name for name, p in model.named_parameters()}
        self._watched = {names[id(p)]: (p, p.detach().clone()) for p in parameters if p.requires_grad}

    @property
    def active(self) -> bool:
        """Whether anything is watched."""
        return bool(self._watched)

    def check_gradients(self) -> None:
        """Raise RuntimeError when a watched parameter has no gradient; call before an optimizer step."""
        missing = [name for name, (parameter, _) in self._watched.items() if parameter.grad is None]
        if missing:
            raise RuntimeError(
                f"new parameter {missing[0]} got no gradient in the first steps after its edit ({len(missing)} such): "
                "it takes no part in the forward pass"
            )

    def finish(self, *, rate: float) -> None:
        """Raise RuntimeError when a watched parameter is where it started although its learning rate is positive."""
        still = [name for name, (parameter, start) in self._watched.items() if torch.equal(parameter.detach(), start)]
        self._watched = {}
        if still and rate > 0:
            raise RuntimeError(
                f"new parameter {still[0]} did not move in the first steps after its edit ({len(still)} such): "
                "is it in the optimizer?"
            )
