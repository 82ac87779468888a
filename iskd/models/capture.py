"""Capture of hidden states by layer, during forward passes that are no longer than they must be.

`output_hidden_states` is never used on a student: transformers collects by block class and silently leaves foreign
blocks out, which shifts every later pairing of teacher and student.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from iskd.models.stack import Stack


def state_of(output: Any) -> Tensor:
    """What a block or an attention returns first: its state [B, T, D]."""
    state = output[0] if isinstance(output, tuple) else output
    assert isinstance(state, Tensor)
    return state


class _Enough(Exception):
    """Ends a forward pass whose remaining blocks nobody needs."""


def _stop(stack: Stack) -> None:
    """End the forward pass, unless the model is in shards: a pass broken off leaves their state undefined."""
    if not isinstance(stack.model, FSDPModule):
        raise _Enough


def _pass(stack: Stack, input_ids: Tensor, handles: Sequence[RemovableHandle]) -> None:
    """One forward pass up to where a hook calls it enough; the hooks are gone afterwards."""
    try:
        with suppress(_Enough):
            stack.last_hidden(input_ids)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture(stack: Stack, layers: Sequence[int], wanted: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the state after some blocks during the forward passes inside the context.

    Args:
        stack: the model to read.
        layers: the teacher's layer number of each block in stack order (`Record.layers`).
        wanted: layer numbers to collect.

    Yields:
        A dict, filled by each forward pass: layer -> state after it [B, T, D], before the final norm.

    Raises:
        ValueError: a wanted layer is not in the stack, or `layers` is not as long as the stack.
    """
    missing = sorted(set(wanted) - set(layers))
    if missing:
        raise ValueError(f"cannot capture the state after layer {missing[0]}: the stack holds {list(layers)}")
    if len(layers) != len(stack.layers):
        raise ValueError(f"cannot capture states: the stack holds {len(stack.layers)} blocks, not {list(layers)}")
    states: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            states[layer] = state_of(output)

        return hook

    handles = [
        block.register_forward_hook(keep(layer))
        for layer, block in zip(layers, stack.layers, strict=True)
        if layer in set(wanted)
    ]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


class Trace:
    """Call arguments of every block in one forward pass, so that blocks can be run again one by one on other streams.

    The pass ends before the block at `last` is run (default: the top one).

    Attributes:
        input: state before the block at `position` [B, T, D].
    """

    def __init__(self, stack: Stack, input_ids: Tensor, position: int, last: int | None = None) -> None:
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        inputs: list[Tensor] = []

        end = len(stack.layers) - 1 if last is None else last

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # every host passes the stream by position; everything else is kept as it came
            if len(self._calls) == position:
                inputs.append(args[0])
            self._calls.append((args[1:], kwargs))
            if len(self._calls) > end:
                _stop(stack)

        handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in stack.layers]
        _pass(stack, input_ids, handles)
        self.input = inputs[0]

    def run(self, position: int, block: nn.Module, h_BTD: Tensor) -> Tensor:
        """Call `block` as the host called the block at `position`, with another input stream."""
        args, kwargs = self._calls[position]
        return state_of(block(h_BTD, *args, **kwargs))


def states_after(stack: Stack, layers: Sequence[int], wanted: Collection[int], input_ids: Tensor) -> dict[int, Tensor]:
    """The states after the wanted layers for `input_ids` [B, T]; blocks above the last of them are not run."""

    def stop(_module: nn.Module, _args: Any, _output: Any) -> None:
        _stop(stack)

    with capture(stack, layers, wanted) as states:
        handle = stack.layers[max(layers.index(layer) for layer in wanted)].register_forward_hook(stop)
        _pass(stack, input_ids, [handle])
    return states


def read(
    stack: Stack, layers: Sequence[int], wanted: Collection[int], input_ids: Tensor, *, last: bool
) -> tuple[Tensor | None, dict[int, Tensor]]:
    """One forward pass on `input_ids` [B, T], as short as it can be; gradients as the caller has them.

    Args:
        stack: the model to read.
        layers: the teacher's layer number of each block in stack order.
        wanted: layers whose states are read.
        input_ids: windows.
        last: whether the state after the final norm is read too; if not, blocks above the last wanted one are not run.

    Returns:
        The last hidden state [B, T, D] or None, and the state after each wanted layer [B, T, D].
    """
    if not last:
        return None, states_after(stack, layers, wanted, input_ids) if wanted else {}
    with capture(stack, layers, wanted) as states:
        return stack.last_hidden(input_ids), states


@dataclass(frozen=True)
class Call:
    """How a host called one of its modules, the stream included."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def stream(self) -> Tensor:
        """The stream that went in [B, T, D]; hosts pass it first or by its name."""
        stream: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return stream


@torch.no_grad()
def follow(
    stack: Stack,
    input_ids: Tensor,
    spans: Sequence[tuple[nn.Module, nn.Module]],
    visit: Callable[[int, Call, Any], None],
) -> None:
    """Run `stack` on `input_ids` [B, T] and visit stretches of it while it runs, so that nothing is kept for later.

    Args:
        stack: the model to read; the pass ends with the last span.
        input_ids: windows.
        spans: a first and a last module each, in the order of the pass; they may be the same module.
        visit: called right after a span's last module with the span's index, the call of its first module and the
            output of its last one. Gradients are off.
    """
    begun: dict[int, Call] = {}

    def begin(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            begun[index] = Call(args, kwargs)

        return hook

    def end(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            visit(index, begun.pop(index), output)
            if index == len(spans) - 1:
                _stop(stack)

        return hook

    handles = [first.register_forward_pre_hook(begin(i), with_kwargs=True) for i, (first, _) in enumerate(spans)]
    handles += [last.register_forward_hook(end(i)) for i, (_, last) in enumerate(spans)]
    _pass(stack, input_ids, handles)


@torch.no_grad()
def begins_with(stack: Stack, input_ids: Tensor) -> bool:
    """Whether blocks of this host return tuples that begin with the state; tried on `input_ids` [B, T]."""
    found: list[bool] = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(isinstance(output, tuple))
        _stop(stack)

    _pass(stack, input_ids, [stack.layers[0].register_forward_hook(note)])
    return found[0]


@contextmanager
def attention_weights(stack: Stack) -> Iterator[None]:
    """Inside the context attentions return their weights [B, H, T, T] second: softmax written out, masks with it."""
    before = stack.config._attn_implementation
    stack.config._attn_implementation = "eager"
    try:
        yield
    finally:
        stack.config._attn_implementation = before


@contextmanager
def scoring(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes are put back afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Autocast keeps low-precision copies of weights, and does not see that a fit has changed the originals."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
