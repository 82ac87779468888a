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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from iskd.blocks.ridge import Ridge, row_weights
from iskd.blocks.streams import Streams
from iskd.models import Stack


@dataclass(frozen=True)
class FitData:
    """Calibration data of one layer, in batches.

    Attributes:
        inputs: the student's own stream before the layer, each [B, T, D]; it goes on once the layer is fitted.
        targets: the teacher's stream after the layer, each [B, T, D]; so does it.
        run: `run(block, h_BTD, i)` calls a block as the host would on batch i.
        stack: the student, for sizes and paths.
        systems: normal equations that fits on these very data have summed up already, by the block that is replaced
            and the heads that stay of it; whoever fits several blocks for one hands them on.
    """

    inputs: Sequence[Tensor] | Streams
    targets: Sequence[Tensor] | Streams
    run: Callable[[nn.Module, Tensor, int], Tensor]
    stack: Stack
    systems: dict[tuple[nn.Module, tuple[int, ...]], Ridge] = field(default_factory=dict)

    def rows(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Per batch: index, input [B, T, D], target [B, T, D] and row weight [B, T, 1] (`row_weights`)."""
        return (self.row(index) for index in range(len(self.inputs)))

    def row(self, index: int) -> tuple[int, Tensor, Tensor, Tensor]:
        """Those of one batch, the target in float32."""
        target = self.targets[index].float()
        return index, self.inputs[index], target, row_weights(target)


def fit_error(new: nn.Module, data: FitData) -> float:
    """Mean over tokens of |block(h) - target|^2 / |target|^2: what fitting minimises; 0 = exact."""
    total, count = 0.0, 0
    with torch.no_grad():
        for index, h, target, weight in data.rows():
            error = ((data.run(new, h, index) - target).float() * weight).square().sum(-1)
            total, count = total + error.sum().item(), count + error.numel()
    return total / max(count, 1)
