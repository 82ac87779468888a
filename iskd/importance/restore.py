"""Restoring: what the student gains where one layer gets its attention back and all others are converted.

    score = KL(teacher || all converted) - KL(teacher || all converted but this layer)

What a layer's attention is worth depends on what the others still have: leaving attention out of a whole teacher asks
another question than a student that has none left. So the all-converted student is the trunk of one sweep, and a branch
is the teacher's own block on the trunk's stream, carried on through the converted blocks above it
(`iskd.importance.sweep`). Greedy rounds measure again with the best layers restored for good.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.importance.base import AttentionImportance, Conversions, refuse_not_finite, repeated, standing_in
from iskd.importance.sweep import PrefixCache, branch_values, goal_of
from iskd.models import Stack, scoring

METRICS = ("kl", "loss", "recall")


class Restore(AttentionImportance):
    """What the all-converted student gains from one layer's attention, in nats a token; higher = keep the attention.

    Args:
        metric: `kl`, KL to the teacher; `loss`, cross-entropy of the next token; `recall`, the same on windows whose
            second half says the first again, in that half.
        rounds: how often it is measured; after each round an equal share of the layers that keep their attention is
            chosen for good. The scores of a round stand above all of the later ones.
        stride: every `stride`-th position is scored; 1 = all.
        width: branches run as one batch; None = 8 on a GPU, 1 on a CPU.
        cache_mb: host memory for the trunk's streams, which spare the next round the blocks below the first restored.
        convert: the kind of edit that makes the mixers. seed: of the run.
        stand_in: windows of so many tokens stand for recurrent mixers, which have yet to learn; None = they themselves.

    Source: restore-one KL: arXiv 2512.20569; the sweep: ours
    Needs: calibration tokens (`run.score_tokens`), `edit=convert` and a mixer
    Costs: L (L - 1) / 2 block calls and L heads a window and round
    Measured: KL 0.066, retention 98.4, a quarter of SmolLM2-135M's layers with attention and windows with sinks in the
        rest, no training (experiments/subquadratic-smollm2/README.md)
    """

    def __init__(
        self,
        metric: str = "kl",
        rounds: PositiveInt = 1,
        stride: PositiveInt = 4,
        width: PositiveInt | None = None,
        cache_mb: NonNegativeInt = 256,
        convert: Conversions | None = None,
        seed: int = 0,
        stand_in: PositiveInt | None = None,
    ) -> None:
        if metric not in METRICS:
            raise ValueError(f"importance.metric={metric!r} is unknown: choose {', '.join(METRICS)}")
        for key, value in (("rounds", rounds), ("stride", stride), ("width", width)):
            if value is not None and value < 1:
                raise ValueError(f"importance.{key} must be at least 1, got {value}")
        self.metric, self.rounds, self.stride, self.width = metric, rounds, stride, width
        self.convert, self.seed, self.stand_in = convert, seed, stand_in
        self.prefix_cache = PrefixCache(cache_mb)

    def choosing(self, candidates: Sequence[int], number: int, layers: Sequence[int]) -> Restore:
        """This importance for a choice of the `number` lowest among some positions: the others keep their attention."""
        chosen = copy.copy(self)
        chosen.candidates, chosen.number, chosen.layers = tuple(candidates), number, tuple(layers)
        return chosen

    def rows(self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]) -> Tensor:
        """Scores [L, W] of the student's blocks on each of the W windows in `batches`, token ids [B, T] each.

        Blocks that are not in question keep what they have and get the highest score. Raises ValueError as
        `AttentionImportance.in_question` does, and for windows too short for the metric.
        """
        stack = Stack(student)
        longest = max(batch.shape[1] for batch in batches)
        positions, blocks = self.in_question(student, longest, recall=self.metric == "recall")
        if self.metric == "recall":
            batches = repeated(batches, None if stack.separator is None else stack.separator.token, self.begin)
        # to keep: all but those that will be converted; nobody said: an order of all of them
        keep = max(0, len(positions) - (self.number or 0))
        each = math.ceil(keep / self.rounds)
        kept: list[list[int]] = []
        found: list[dict[int, Tensor]] = []
        own = list(stack.layers)
        with scoring(student, teacher):
            # before other blocks stand in: the student may be the teacher itself
            texts = [self._text(batch, teacher) for batch in batches]
            for _ in range(self.rounds):
                done = {position for some in kept for position in some}
                left = [position for position in positions if position not in done]
                if not left or (found and len(done) >= keep):
                    break
                with standing_in(stack, {position: blocks[position] for position in left}):
                    now = torch.cat([self._gains(stack, own, left, text) for text in texts], dim=1)
                refuse_not_finite(now, left, "blocks")
                found.append(dict(zip(left, now, strict=True)))
                best = sorted(left, key=lambda position: (-found[-1][position].mean().item(), position))
                kept.append(best[: min(each, keep - len(done))])
        return _joined(found, kept, len(stack.layers))

    def _text(self, batch: Tensor, teacher: PreTrainedModel) -> _Text:
        """A batch, where it is scored and what the teacher says there."""
        tokens = batch.shape[1] - (self.metric != "kl")
        if tokens < 1:
            raise ValueError(f"importance.metric={self.metric} needs windows of at least 2 tokens, got one of 1")
        at = slice((batch.shape[1] + len(self.begin)) // 2 if self.metric == "recall" else 0, tokens, self.stride)
        return _Text(batch, at, goal_of(teacher, batch, at) if self.metric == "kl" else None)

    def _gains(self, stack: Stack, own: Sequence[nn.Module], left: Sequence[int], text: _Text) -> Tensor:
        """What each position in `left`, converted now, gains by its `own` block on the windows of a batch [C, B]."""
        top = len(stack.layers) - 1
        trunk = self.prefix_cache.trunk(stack, text.batch, top)
        branches = [(position + 1, trunk.run(position, own[position], trunk.states[position])) for position in left]
        branches.append((top, trunk.states[top]))
        values = branch_values(stack, trunk, branches, text.batch, at=text.at, goal=text.goal, width=self.width).mean(2)
        return values[-1] - values[:-1]


class _Text(NamedTuple):
    """Windows, and how they are scored."""

    batch: Tensor  # token ids [B, T]
    at: slice
    goal: tuple[PreTrainedModel, Tensor] | None


def _joined(found: Sequence[dict[int, Tensor]], kept: Sequence[Sequence[int]], blocks: int) -> Tensor:
    """Rows [L, W] of all rounds: what an early round has kept stands above all that later ones have measured."""
    rows = dict(found[-1])
    for gains, chosen in reversed(list(zip(found[:-1], kept[:-1], strict=True))):
        highest = max(row.mean().item() for row in rows.values()) if rows else 0.0
        lowest = min(gains[position].mean().item() for position in chosen)
        rows |= {position: gains[position] + max(0.0, highest - lowest) for position in chosen}
    most = max(row.mean().item() for row in rows.values())
    windows = len(next(iter(rows.values())))
    return torch.stack([rows.get(position, torch.full((windows,), most)) for position in range(blocks)])
