"""How a host calls each of its blocks on a batch, found out without running them.

So that two models can be walked side by side, block by block over all batches, and every block runs once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from iskd.models.capture import Call, begins_with, state_of
from iskd.models.stack import Stack


class BlockCalls:
    """The stream that enters a model's first block, and what its host passes to every block beside the stream.

    Attributes:
        embedded: state before the first block [B, T, D]; gone once it was handed over.
    """

    def __init__(self, stack: Stack, input_ids: Tensor, as_tuple: bool | None = None) -> None:
        """One pass on `input_ids` [B, T] in which every block hands on what it was given.

        `as_tuple`: whether blocks return tuples (`begins_with`); None = the first one is run to find out.
        """
        if as_tuple is None:
            as_tuple = begins_with(stack, input_ids[:1, :2])
        self._calls: list[Call] = []
        entered: list[Tensor] = []
        layers = stack.layers
        blocks = list(layers)
        try:
            for position, block in enumerate(blocks):
                layers[position] = _HandsOn(block, self._calls, entered, as_tuple=as_tuple)
            with torch.no_grad():
                stack.last_hidden(input_ids)
        finally:
            for position, block in enumerate(blocks):
                layers[position] = block
        self.embedded = entered[0]

    def hand_over(self) -> Tensor:
        """`embedded`, which is not kept here any longer: of many windows it may have to lie elsewhere."""
        embedded = self.embedded
        del self.embedded
        return embedded

    def lay(self, put: Callable[[Tensor], Callable[[], Tensor]]) -> None:
        """Keep what blocks are given beside the stream elsewhere: `put` takes a tensor and returns what reads it."""
        known: dict[int, _Laid] = {}  # the same tensors are given to all blocks

        def laid(tensor: Tensor) -> _Laid:
            if id(tensor) not in known:
                known[id(tensor)] = _Laid(put(tensor))
            return known[id(tensor)]

        self._calls = [
            Call(_mapped(call.args, Tensor, laid), _mapped(call.kwargs, Tensor, laid)) for call in self._calls
        ]

    def run(self, position: int, block: nn.Module, h_BTD: Tensor) -> Tensor:
        """Call `block` as the host calls the block at `position`, on a stream [B, T, D]; returns the one after it."""
        call = self._calls[position]
        args, kwargs = (_mapped(given, _Laid, lambda laid: laid.read()) for given in (call.args, call.kwargs))
        return state_of(block(h_BTD, *args, **kwargs))


@dataclass(frozen=True)
class _Laid:
    """A tensor that lies elsewhere."""

    read: Callable[[], Tensor]


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A value in which everything of a kind has been changed, in tuples, lists and dictionaries too."""
    if isinstance(value, kind):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(one, kind, change) for one in value)
    if type(value) is dict:
        return {key: _mapped(one, kind, change) for key, one in value.items()}
    return value


class _HandsOn(nn.Module):
    """Stands where a block stood, returns the stream as it is, and notes the call."""

    def __init__(self, block: nn.Module, calls: list[Call], entered: list[Tensor], *, as_tuple: bool) -> None:
        super().__init__()
        vars(self)["stands_for"] = block  # not a submodule: hosts ask blocks for attributes, never for parameters
        vars(self)["calls"], vars(self)["entered"], vars(self)["as_tuple"] = calls, entered, as_tuple

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["stands_for"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        calls, entered = vars(self)["calls"], vars(self)["entered"]
        # every host passes the stream by position; everything else is kept as it came
        entered.extend(args[:1] if not calls else ())
        calls.append(Call(args[1:], kwargs))
        return (args[0],) if vars(self)["as_tuple"] else args[0]
