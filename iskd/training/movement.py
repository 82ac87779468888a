"""The proof that an edit took: every new parameter gets a gradient and moves.

Without it the failure is silent: a block that is missing from the optimizer, from the graph or from gradient
synchronisation leaves the loss finite and the run green.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from iskd.models.sharding import local
from iskd.system.faults import RunError


class MovementCheck:
    """Watches the parameters that an edit put in, from the edit until `steps` optimizer steps later."""

    def __init__(self, steps: int) -> None:
        self._limit, self._steps = steps, 0
        self._watched: dict[str, tuple[nn.Parameter, Tensor]] = {}

    def watch(self, model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        """Start with the values that the parameters have now; frozen ones are left out."""
        names = {id(p): name for name, p in model.named_parameters()}
        self._steps = 0
        self._watched = {names[id(p)]: (p, p.detach().clone()) for p in parameters if p.requires_grad}

    @property
    def watching(self) -> bool:
        """Whether the watch goes on."""
        return bool(self._watched)

    def check_gradients(self) -> None:
        """Raise RunError when a watched parameter has no gradient; call before an optimizer step."""
        missing = [name for name, (parameter, _) in self._watched.items() if parameter.grad is None]
        if missing:
            raise RunError(
                f"new parameter {missing[0]} got no gradient in the first steps after its edit ({len(missing)} such): "
                "it takes no part in the forward pass"
            )

    def stepped(self, rate: float, *, skipped: bool, last: bool) -> list[str] | None:
        """Count an optimizer step; at the end of the watch, the names of the parameters that are where they started.

        Args:
            rate: learning rate of the new parameters in this step.
            skipped: whether the step changed nothing.
            last: whether it was the stage's last one, which ends the watch early.

        Returns:
            None while the watch goes on, and when standing still would prove nothing: without a rate, or after a single
            step, because behind a zero up-projection the first gradient is exactly zero. Of a parameter in shards the
            answer is about the rank's own shard, which may be empty.
        """
        self._steps += not skipped
        if not self._watched or not (last or self._steps >= self._limit):
            return None
        pairs = {name: (local(parameter.detach()), local(start)) for name, (parameter, start) in self._watched.items()}
        self._watched = {}
        if self._steps < 2 or rate <= 0:
            return None
        return [name for name, (now, start) in pairs.items() if torch.equal(now, start)]


def require_moved(still: Sequence[Sequence[str]], *, split: bool) -> None:
    """Raise RunError when a new parameter stood still although its learning rate was positive.

    Args:
        still: each rank's names.
        split: whether the ranks hold shards, of which one that moves is enough; whole weights must move on every rank.
    """
    stuck = list(dict.fromkeys(name for names in still for name in names))
    if split:
        stuck = [name for name in stuck if all(name in names for names in still)]
    if stuck:
        raise RunError(
            f"new parameter {stuck[0]} did not move in the first steps after its edit ({len(stuck)} such). Either no "
            "group of the optimizer has it, or its gradient is zero as the loss does not depend on it: so it is with "
            "queries and keys in windows of two tokens (data.seq_len), with feature maps of mixer=sliding where "
            "mixer.window and mixer.sinks together are not below data.seq_len, and in a student that broke before (lower "
            "schedule.lr)"
        )
