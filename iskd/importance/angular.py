"""Angular distance: how far a run of n consecutive blocks turns the stream, from one forward pass.

    d(l, n) = arccos(cos(x, y)) / pi        x = stream before block l, y = stream after block l + n - 1

Source: Gromov et al. (arXiv 2403.17887, section 3.2), who read the last token of each window and remove the run of n
blocks with the smallest distance. Over all tokens, position 0 is left out (ours).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.importance.base import WindowImportance, refuse_not_finite, stream
from iskd.models import Stack, scoring


class Angular(WindowImportance):
    """Smallest angular distance among the runs of `window` blocks that a block is part of; in [0, 1].

    The blocks of the best run share the lowest score, so the `window` lowest scores are the run that the paper removes.

    Args:
        window: blocks in a run; 1 scores every block by itself.
        tokens: `last` = the last token of each calibration window, as in the paper; `mean` = all but the first.

    Source: Gromov et al. (arXiv 2403.17887, section 3.2)
    Needs: calibration tokens (`run.score_tokens`); with `window` above 1 a whole run of blocks to remove
    Costs: one forward pass, no head
    Measured: not measured
    """

    def __init__(self, window: int = 1, tokens: str = "last") -> None:
        if window < 1:
            raise ValueError(f"importance.window must be at least 1 block, got {window}")
        _check(tokens)
        self.window, self.tokens = window, tokens

    def rows(self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]) -> Tensor:
        """Scores [L, W] of the student's blocks on calibration windows [B, T].

        Raises:
            ValueError: the student has fewer blocks than a run.
        """
        blocks = len(Stack(student).layers)
        if self.window > blocks:
            raise ValueError(f"importance.window={self.window} does not fit into a student of {blocks} blocks")
        runs = _run_rows(student, batches, [self.window], self.tokens)[0]
        starts = range(blocks - self.window + 1)  # behind them no run fits
        refuse_not_finite(runs[: len(starts)], starts, f"runs of {self.window} blocks from")
        means = runs.mean(1).tolist()
        # which run a block stands for is decided once, on all windows: rows of one score must measure one thing
        best = [
            min(range(max(0, block - self.window + 1), min(block, blocks - self.window) + 1), key=means.__getitem__)
            for block in range(blocks)
        ]
        return runs[best]


def angular_windows(
    student: PreTrainedModel, batches: Sequence[Tensor], max_window: int, tokens: str = "last"
) -> Tensor:
    """Distances of all runs of consecutive blocks from one pass; each state is computed and kept once.

    Args:
        student: the model to read.
        batches: token ids [B, T].
        max_window: most blocks in a run.
        tokens: `last` or `mean`, see `Angular`.

    Returns:
        Mean over calibration windows [max_window, L], float32: entry [n - 1, l] is the run of n blocks that starts at
        block l; nan where it does not fit.

    Raises:
        ValueError: max_window is below 1, or `tokens` is unknown.
    """
    if max_window < 1:
        raise ValueError(f"angular_windows: max_window must be at least 1 block, got {max_window}")
    _check(tokens)
    return _run_rows(student, batches, range(1, max_window + 1), tokens).mean(2)


def _check(tokens: str) -> None:
    if tokens not in ("last", "mean"):
        raise ValueError(f"importance.tokens={tokens!r}: choose 'last' or 'mean'")


def _run_rows(student: PreTrainedModel, batches: Sequence[Tensor], lengths: Sequence[int], tokens: str) -> Tensor:
    """Distance of the run of each length at each start, by calibration window [lengths, L, W]; nan where none fits."""
    stack = Stack(student)
    blocks, columns = len(stack.layers), []
    chosen = slice(-1, None) if tokens == "last" else slice(1, None)
    for batch in batches:
        with scoring(student):
            units = [nn.functional.normalize(h_BTD[:, chosen].float(), dim=-1) for h_BTD in stream(stack, batch)]
        runs = torch.full((len(lengths), blocks, batch.shape[0]), torch.nan)
        for row, length in enumerate(lengths):
            for start in range(blocks - length + 1):
                runs[row, start] = _angle(units[start], units[start + length]).mean(1)
        columns.append(runs)
    return torch.cat(columns, dim=2)


def _angle(a: Tensor, b: Tensor) -> Tensor:
    # exact for small angles too, where the cosine rounds to 1: the arccos of a float32 is blind below 1e-4 pi
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)) / torch.pi
