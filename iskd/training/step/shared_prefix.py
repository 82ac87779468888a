"""The shared frozen prefix: leading blocks that are the same in teacher and student, run once per step for both.

Below the first layer that was edited, trains or has other weights, the teacher's pass computes what the student's
would. So the student is given the teacher's state before its first own block, and its graph begins there:

    h_k = teacher's blocks 0 .. k-1,  without gradients          k = `SharedPrefix.depth`
    student = head(blocks k .. of the student(h_k))

The same operations on the same numbers, once instead of twice: loss and gradients are those of the unshared step, bit
for bit. It holds only while the embedding and all of those blocks are frozen, are equal to the teacher's number by
number, and draw no random numbers (dropout in training mode); an embedding that is tied to a head that trains is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.models import Stack, sharding
from iskd.plan import Record


class SharedPrefix:
    """How many leading blocks student and teacher share now; weights are compared once, while they stand still."""

    def __init__(self) -> None:
        self._stamp: tuple[Any, ...] | None = None
        self._depth = 0

    def depth(self, student: PreTrainedModel, teacher: PreTrainedModel, record: Record) -> int:
        """Number of leading blocks that need not be run for the student; 0 = nothing is shared.

        Whatever trained, moved, was edited or put in another mode since the last call is compared again: weights and
        buffers by torch's own count of writes, modes of every module inside, the attention kernels of both models. What
        that cannot see, and nothing in a run does between two steps: writing through `.data` into the same memory,
        changing the rate of a dropout module, writing to the teacher. Take another `SharedPrefix` after such a thing.

        A model in shards shares nothing: its blocks gather their weights when they are called, and the two have other
        groups.
        """
        if sharding.is_sharded(student) or sharding.is_sharded(teacher):
            return 0
        ours = Stack(student)
        below, blocks = entrance(ours), _untouched(ours, record)
        # blocks are shared only on top of a shared input: what they are given must be the teacher's too
        if not blocks or any(_trains(module) for module in below):
            self._stamp = None
            return 0
        # comparing weights reads all of them and waits for the device: only after something changed, not at every step
        stamp = _stamp(student, teacher, [*below, *blocks])
        if stamp != self._stamp:
            self._stamp, self._depth = stamp, _equal_depth(ours, Stack(teacher), len(blocks))
        return self._depth


@contextmanager
def standing_in(stack: Stack, depth: int, state: Tensor | None) -> Iterator[None]:
    """Inside the context the `depth` leading blocks of `stack` are not run: what comes out of them is `state`.

    Args:
        stack: the student.
        depth: number of blocks; 0 changes nothing.
        state: what the last of them would return [B, T, D]; None when there is none.
    """
    layers, blocks = stack.layers, list(stack.layers)[:depth]
    try:
        if state is not None:
            # other modules in their places and not hooks on them: a compiled block would run all the same
            given = _Given(state)
            for position in range(depth):
                layers[position] = given
        yield
    finally:
        for position, block in enumerate(blocks):
            layers[position] = block


class _Given(nn.Module):
    """Block that returns a state [B, T, D] computed before, whatever it is called with."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state

    def forward(self, *_args: Any, **_kwargs: Any) -> Tensor:
        return self.state


def entrance(stack: Stack) -> list[nn.Module]:
    """What a host runs before its first block: embeddings, their projection and dropout, rotary tables."""
    later = {stack.family.layers, stack.family.norm, "project_out"}
    return [module for name, module in stack.base.named_children() if name not in later]


def _untouched(stack: Stack, record: Record) -> list[nn.Module]:
    """The leading blocks that no edit has reached and of which nothing trains."""
    found: list[nn.Module] = []
    for block in list(stack.layers)[: min(record.edited, default=record.num_layers)]:
        if _trains(block):
            break
        found.append(block)
    return found


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _stamp(student: PreTrainedModel, teacher: PreTrainedModel, below: list[nn.Module]) -> tuple[Any, ...]:
    """Version of all that sharing depends on, to be compared for equality; made on the host, it costs no kernel.

    It changes as soon as weights or buffers are written to, moved or exchanged, or a mode or kernel is switched.
    """
    modules = [module for shared in below for module in shared.modules()]
    # torch counts in `_version` every write in place
    numbers = tuple(
        (tensor.data_ptr(), tensor._version)
        for module in modules
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    )
    modes = (teacher.training, student.training, *(module.training for module in modules))
    kernels = tuple(model.config._attn_implementation for model in (student, teacher))
    place = next(teacher.parameters()).device
    # weak: a student that a rollback replaced is not kept alive, and one at the same address is not taken for it
    return weakref.ref(student), weakref.ref(teacher), place, numbers, modes, kernels


def _equal_depth(ours: Stack, theirs: Stack, most: int) -> int:
    """How many of the `most` leading blocks compute the same as the teacher's; 0 when the embeddings do not."""
    # OPT drops whole layers, by a rate on the decoder itself
    if ours.config._attn_implementation != theirs.config._attn_implementation or _drops(ours.base):
        return 0
    pairs = zip(entrance(ours), entrance(theirs), strict=True)
    if not all(_same(mine, its) for mine, its in pairs):
        return 0
    depth = 0
    for mine, its in list(zip(ours.layers, theirs.layers, strict=False))[:most]:
        if not _same(mine, its):
            break
        depth += 1
    return depth


def _same(mine: nn.Module, its: nn.Module) -> bool:
    """Whether a module of the student is made like the teacher's, has its numbers and draws no random ones."""
    modules = list(mine.named_modules())
    # from cheap to dear: classes and paths, dropout, numbers
    if [(name, type(module)) for name, module in modules] != [
        (name, type(module)) for name, module in its.named_modules()
    ]:
        return False
    if any(_drops(module) for made in (mine, its) for module in made.modules()):
        return False
    return all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
        for a, b in zip(_tensors(mine), _tensors(its), strict=True)
    )


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _drops(module: nn.Module) -> bool:
    """Whether a module drops something at random: `p` of nn.Dropout, or a rate that it keeps under such a name."""
    own = {name: value for name, value in vars(module).items() if "drop" in name}
    if isinstance(module, nn.modules.dropout._DropoutNd):
        own["p"] = module.p
    return module.training and any(isinstance(rate, int | float) and rate > 0 for rate in own.values())
