"""What every compact block offers, and what they are fitted to.

A compact block is a class with

- `from_block(old, stack, **kwargs) -> nn.Module`: builds the block from the one it replaces, inheriting weights where
  it can; works on the meta device, so that a plan can count parameters without memory;
- `fit(new, old, data, **kwargs) -> None` (optional): fits the new block, as it stands in the stack, to the teacher's
  block output on calibration tokens, before any training step;
- `forward(h_BTD, *, mask, positions, cache) -> h_BTD`, residual inside, unless it returns one of the host's own blocks;
- `adds` (optional): the name of its last linear map, where what that returns is added to the stream as it is: refits
  re-solve it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from iskd.blocks.regression import Regression
from iskd.blocks.ridge import Ridge, row_weights
from iskd.models import Stack

Run = Callable[[nn.Module, Tensor, int], Tensor]
"""Calls a block as the host would on the batch of a number."""
Add = Callable[["FitData", Ridge], None]
"""Adds the rows of some text to the equations of a map."""


class Batches(Protocol):
    """A tensor for each batch of windows, by its number."""

    def __getitem__(self, index: int, /) -> Tensor:
        """That of a batch."""

    def __len__(self) -> int:
        """How many there are."""


@dataclass(frozen=True)
class FitData:
    """Calibration data of one layer, in batches.

    Attributes:
        inputs: the student's own stream before the layer, each [B, T, D]; it goes on once the layer is fitted.
        targets: the teacher's stream after the layer, each [B, T, D]; so does it.
        run: `run(block, h_BTD, i)` calls a block as the host would on batch i.
        stack: the student, for sizes and paths.
        own: what the teacher's own blocks, in the place of this one, give on `inputs`; None = `targets`, as where the
            student's stream is still the teacher's.
        held: the same of text that is not to be fitted to: it chooses among fits. None = there is none.
        systems: normal equations that fits on these very data have summed up already, by the block that is replaced
            and the heads that stay of it; whoever fits several blocks for one hands them on.
    """

    inputs: Batches
    targets: Batches
    run: Run
    stack: Stack
    own: Batches | None = None
    held: FitData | None = None
    systems: dict[tuple[nn.Module, tuple[int, ...]], Regression] = field(default_factory=dict)

    def rows(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Per batch: index, input [B, T, D], target [B, T, D] and row weight [B, T, 1] (`row_weights`)."""
        return (self.row(index) for index in range(len(self.inputs)))

    def row(self, index: int) -> tuple[int, Tensor, Tensor, Tensor]:
        """Those of one batch, the target in float32."""
        target = self.targets[index].float()
        return index, self.inputs[index], target, row_weights(target)

    def goals(self, index: int) -> list[Tensor]:
        """What a batch is regressed on, in float32: the teacher's state, and `own` where it is another one."""
        both = [self.targets] if self.own is None else [self.targets, self.own]
        return [each[index].float() for each in both]

    def regression(self, module: nn.Module, add: Add, *, own: bool = True) -> Regression:
        """The equations of a linear map, with the rows of this text and of the text held out.

        Args:
            module: the map; weights as its family stores them.
            add: adds the rows of some text: for each of its `goals` what the map should give, one behind the other.
            own: whether there are two goals where there is `own`; a map that has a goal of its own adds that alone.
        """
        found = Regression.of(module, 2 if own and self.own is not None else 1, held=self.held is not None)
        add(self, found.fit)
        if self.held is not None and found.held is not None:
            add(self.held, found.held)
        return found

    @property
    def judging(self) -> FitData:
        """What fits are judged by: the text held out, or this where there is none."""
        return self if self.held is None else self.held


@dataclass(frozen=True)
class _Some:
    """Batches of a stream from one number on, counted from 0."""

    stream: Batches
    first: int
    count: int

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.stream[self.first + index]

    def __len__(self) -> int:
        return self.count


def part(inputs: Batches, goals: Batches, run: Run, stack: Stack, first: int, end: int) -> FitData:
    """What is fitted to the batches from `first` to before `end`."""

    def from_first(block: nn.Module, h_BTD: Tensor, index: int) -> Tensor:
        return run(block, h_BTD, first + index)

    ours, theirs = (_Some(stream, first, end - first) for stream in (inputs, goals))
    return FitData(ours, theirs, from_first, stack)


def fit_error(new: nn.Module, data: FitData) -> float:
    """Mean over tokens of |block(h) - target|^2 / |target|^2: what fitting minimises; 0 = exact."""
    total, count = 0.0, 0
    with torch.no_grad():
        for index, h, target, weight in data.rows():
            error = ((data.run(new, h, index) - target).float() * weight).square().sum(-1)
            total, count = total + error.sum().item(), count + error.numel()
    return total / max(count, 1)
