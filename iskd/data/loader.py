"""The data loader of one stage, in the one order that all training windows have.

The k-th window of training is perm(seed, epoch)[k mod n] with epoch = k // n and n windows, and the global micro-batch
b on rank r of w takes the windows k = (b*w + r)*B ... (b*w + r + 1)*B - 1. A position is thus one integer; nothing
random is stored, and stages, restarts and processes agree on who sees what. The order of a mix of sources is that of
`iskd.data.order`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iskd.data.order import MixOrder, permutation
from iskd.data.shards import Tokens

Batch = dict[str, Any]


class StageLoader:
    """The batches of one stage: sized, and the same ones at every pass.

    Having a length matters: Lightning then fetches no batch ahead, and the batches handed out are the batches trained
    on (`lightning.pytorch.loops.fetchers`).

    Args:
        windows: [windows, seq_len] of token ids, may be memory-mapped.
        batch_size: windows per micro-batch and process.
        seed: of the order.
        first_step: global micro-batch at which this stage begins.
        steps: micro-batches in this stage.
        rank: this process among those that see different data.
        world_size: how many those are.
        targets: which tokens are to be learned, 0 or 1, [windows, seq_len]; None = all.
        numbers: which windows take part; None = all.
        order: the number of the window at each place, of a mix; None = permutations of `numbers`.
    """

    def __init__(
        self,
        windows: Tokens,
        *,
        batch_size: int,
        seed: int,
        first_step: int,
        steps: int,
        rank: int = 0,
        world_size: int = 1,
        targets: Tokens | None = None,
        numbers: NDArray[np.int64] | None = None,
        order: MixOrder | None = None,
    ) -> None:
        self.windows, self.batch_size, self.seed = windows, batch_size, seed
        self.first_step, self.steps = first_step, steps
        self.rank, self.world_size = rank, world_size
        self.targets, self.numbers, self.order = targets, numbers, order

    def __len__(self) -> int:
        """Return the micro-batches of the stage."""
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        """Yield {"input_ids": [batch_size, seq_len] int64, "index": the windows' numbers, a list}.

        Where not all tokens are learned, "targets" [batch_size, seq_len] says which are. The numbers are no tensor:
        Lightning would put it on the device, and reading it there waits for all that was asked of it.
        """
        return (self.batch(self.first_step + step) for step in range(self.steps))

    def batch(self, micro_batch: int) -> Batch:
        """Return the batch of this rank at a global micro-batch number."""
        first = (micro_batch * self.world_size + self.rank) * self.batch_size
        index = self._numbers(range(first, first + self.batch_size))
        found: Batch = {"input_ids": to_tensor(self.windows[index]), "index": [int(window) for window in index]}
        return found if self.targets is None else {**found, "targets": to_tensor(self.targets[index]).bool()}

    def _numbers(self, places: range) -> NDArray[np.int64]:
        """The windows at these places of the order of training."""
        if self.order is not None:
            return np.asarray([self.order[place] for place in places], dtype=np.int64)
        count = len(self.windows if self.numbers is None else self.numbers)
        order = np.asarray([_permutation(self.seed, k // count, count)[k % count] for k in places], dtype=np.int64)
        return order if self.numbers is None else self.numbers[order]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Return the order of one epoch; two are kept because a batch may straddle them."""
    return permutation((seed, epoch), count)


def to_tensor(windows: Tokens) -> torch.Tensor:
    """Return token ids of any integer type and shape as a tensor in memory, int64."""
    return torch.from_numpy(windows.astype(np.int64))


def pinned(values: Tensor, device: torch.device) -> Tensor:
    """Values on the host, where a copy to `device` does not make the host wait: page-locked for a CUDA device."""
    return values.pin_memory() if device.type == "cuda" else values


def batches_of(windows: Sequence[Tensor], targets: Tensor | None) -> list[Batch]:
    """Batches of windows, each with its part of which tokens are to be learned, None = all."""
    if targets is None:
        return [{"input_ids": batch} for batch in windows]
    parts = targets.split([len(batch) for batch in windows])
    return [{"input_ids": batch, "targets": part} for batch, part in zip(windows, parts, strict=True)]
