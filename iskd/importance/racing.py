"""Successive elimination of blocks: leave-one-out scores on ever more windows, only for those that may be the lowest.

A race (Maron and Moore 1993, "Hoeffding races") with paired statistics, as in F-race (Birattari et al.
2002): what makes a window hard is hard for every block, so blocks are compared by their differences on the same tokens.

1. Windows are cut into pieces: a race can then end after a few hundred tokens.
2. One pass on one piece sets aside the blocks that build or undo the attention sink, and orders the others by block
   influence (ShortGPT, arXiv 2403.03853); both are free of the head. The order decides ties and nothing else.
3. All others are scored on the first piece, then on ever more pieces. The more blocks are left, the fewer positions are
   scored: every 8th at first, all of them at the end.
4. To beat is the `number`-th lowest mean, where so many blocks are asked for; that of the leader where one is. A block
   is out when its mean difference to it is more than `z` paired standard errors, which shrink to zero as the pieces run
   out.
5. The race ends when `number` blocks are left or there are no more pieces. In the latter case the pieces that were
   scored at some positions only are read again for those left, and their scores are the exact ones of `ablation`.

Who takes part and how many are asked for is what the schedule says (`choosing`): layers that may not be edited do not
race. Right is which blocks are the lowest; the order among them and behind them is an estimate. Models in shards do not
race: the processes would drop out of each other's collectives as soon as two races went differently.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from iskd.importance.base import WindowImportance
from iskd.importance.sweep import PrefixCache, check_metric, leave_one_out_values
from iskd.models import Stack, scoring

# SmolLM2-135M, windows of 512 tokens of docstrings, the best block against the 19 next ones: the spread between windows
# gives 1.5 times the standard error of independent tokens in the median, 2.5 times at most
BETWEEN_TO_INSIDE = 2.5
PRIOR_WEIGHT = 2

Measure = Callable[[Sequence[int], int, int, int], list[Tensor]]
"""`measure(candidates, start, stop, stride)`: values at the scored positions of pieces start..stop-1, [C, P] each."""

# as many blocks as are scored at all positions; with 6 left at every 2nd, with 12 at every 4th: the head's share of the
# work stays about the same
AT_ALL_POSITIONS = 3
COARSEST = 8


@dataclass(frozen=True)
class Race:
    """How a race went.

    Attributes:
        scores: score of every raced block by position, in nats, lower = costs less. Of those left at the end the mean
            over all pieces that were read; of the others the score of the last of the winners plus the mean difference
            to the one to beat in the round in which they went out, which is positive. So the winners' are the lowest.
        rows: values per piece of the blocks that were left at the end, by position, over the pieces read [W'].
        left: who was left at the end, best first.
        rounds: pieces read by the end of each round, stride of the scored positions, and how many blocks ran in it.
    """

    scores: dict[int, float]
    rows: dict[int, Tensor]
    left: list[int]
    rounds: list[tuple[int, int, int]]


class Racing(WindowImportance):
    """Leave-one-out scores whose lowest are right; the rest is as good as the race had to find out.

    Args:
        metric: `kl` or `loss`, as in `ablation`.
        stride: every `stride`-th position is scored in the end; 1 = all.
        tokens: windows are cut into equal pieces of about so many tokens; None = not cut.
        pieces: pieces in the first round.
        growth: factor by which their number grows from round to round, by one at least.
        z: paired standard errors by which a block must be worse than the leader to be out: 2.3 = one chance in a
            hundred that it is not worse on all pieces. With few pieces read it takes more, by Student's t.
        veto: a block is set aside when its update of position 0 is more than `veto` times as long as the median
            token's: it builds the attention sink or undoes it, and cosines do not see that (in SmolLM2-135M blocks 2,
            11 and 28 are at 25 to 720, all others below 15).
        width: branches run as one batch; None = 8 on a GPU, 1 on a CPU.
        cache_mb: host memory for the streams of calibration windows from one scoring to the next; 0 = none.

    Source: Hoeffding races (Maron and Moore 1993), F-race (Birattari et al. 2002); on blocks, ours
    Needs: many calibration windows (`run.score_tokens`); a model that is not in shards
    Costs: 1.43 CPU s for 256 tokens through SmolLM2-135M, all scores in full 10.14 (benchmarks/leave_one_out.md)
    Measured: 20 of 20 picks within one standard error of the best (benchmarks/leave_one_out.md); 12.35 times as fast as
        deleting block after block (benchmarks/leave_one_out.md); ILD with it: KL 0.327 and 0.320 at 26 layers of 30
        (experiments/ild-smollm2/README.md)
    """

    def __init__(
        self,
        metric: str = "kl",
        stride: int = 1,
        tokens: int | None = 256,
        pieces: int = 1,
        growth: float = 1.25,
        z: float = 2.3,
        veto: float = 20.0,
        width: int | None = None,
        cache_mb: int = 256,
    ) -> None:
        check_metric(metric)
        for key, value in (("stride", stride), ("tokens", tokens), ("pieces", pieces), ("width", width)):
            least = 2 if key == "tokens" else 1
            if value is not None and value < least:
                raise ValueError(f"importance.{key} must be at least {least}, got {value}")
        if not growth >= 1:
            raise ValueError(f"importance.growth must be at least 1, got {growth}")
        if not z >= 0:
            raise ValueError(f"importance.z must not be negative, got {z}")
        if veto <= 1:
            raise ValueError(f"importance.veto must be above 1 (it multiplies the median update), got {veto}")
        self.metric, self.stride, self.tokens, self.pieces = metric, stride, tokens, pieces
        self.growth, self.z, self.veto, self.width = growth, z, veto, width
        self.prefix_cache = PrefixCache(cache_mb)
        self.candidates: tuple[int, ...] | None = None  # who races; None = every block
        self.number = 1

    def choosing(self, candidates: Sequence[int], number: int, layers: Sequence[int]) -> Racing:
        """This race among some positions, for the `number` lowest of them; the kept streams are shared."""
        chosen = copy.copy(self)
        chosen.candidates, chosen.number = tuple(candidates), number
        return chosen

    def rows(self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]) -> Tensor:
        """Values [L, pieces] of the blocks left at the end of the race; nan for all others and for pieces not read."""
        return self.scored(student, teacher, batches)[1]

    def __call__(self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]) -> Tensor:
        """Scores [L] of all blocks: `Race.scores`, and for those that did not race the highest plus block influence."""
        return self.scored(student, teacher, batches)[0]

    def scored(
        self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Scores [L] and rows [L, pieces] of one race, as `__call__` and `rows` give them."""
        result, turns = self.race(student, teacher, batches)
        highest, count = max(result.scores.values()), sum(len(batch) for batch in self.cut(batches))
        scores = torch.tensor([result.scores.get(position, highest + turn) for position, turn in enumerate(turns)])
        rows = torch.full((len(turns), count), torch.nan)
        for position, values in result.rows.items():
            rows[position, : len(values)] = values
        return scores, rows

    def race(
        self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]
    ) -> tuple[Race, list[float]]:
        """The race, and the block influence [L] of every block on the first piece.

        Raises:
            ValueError: the student is in shards, or the windows have one token.
        """
        if isinstance(student, FSDPModule):
            raise ValueError("importance=racing does not work on a model in shards; use importance=ablation")
        pieces = self.cut(batches)

        def measure(candidates: Sequence[int], start: int, stop: int, stride: int) -> list[Tensor]:
            found = [
                leave_one_out_values(
                    student,
                    teacher,
                    windows,
                    metric=self.metric,
                    stride=stride,
                    candidates=candidates,
                    width=self.width,
                    prefix_cache=self.prefix_cache,
                )
                for windows in _between(pieces, start, stop)
            ]
            return [piece for values in found for piece in values.unbind(1)]

        with scoring(student, teacher):
            turns, sinks = _scout(Stack(student), pieces[0][:1], self.prefix_cache)
            order = sorted(range(len(turns)) if self.candidates is None else self.candidates, key=turns.__getitem__)
            harmless = [position for position in order if sinks[position] <= self.veto]
            # where more are asked for than are harmless, builders of the sink have to race too
            order = harmless if len(harmless) >= self.number else order
            return self.decide(measure, order, sum(len(batch) for batch in pieces)), turns

    def cut(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Windows [B, T] in pieces of equal length, one below the other [B * n, T / n]; a remainder is dropped."""
        cut = []
        for batch in batches:
            windows, length = batch.shape
            number = 1 if self.tokens is None else max(1, round(length / self.tokens))
            cut.append(batch[:, : length // number * number].reshape(windows * number, -1))
        return cut

    def decide(self, measure: Measure, order: Sequence[int], pieces: int) -> Race:
        """Race the blocks `order` on so many pieces with these settings, whoever measures."""
        return race(
            measure, order, pieces,
            stride=self.stride, first=self.pieces, growth=self.growth, z=self.z, number=self.number,
        )  # fmt: skip


def race(
    measure: Measure,
    order: Sequence[int],
    pieces: int,
    *,
    stride: int,
    first: int,
    growth: float,
    z: float,
    number: int = 1,
) -> Race:
    """Race the blocks `order` on `pieces` pieces, `first` of them in the first round, in the end at `stride`.

    Asked for are the `number` lowest; as many as there are blocks: all are scored on everything.
    """
    alive, read = list(order), 0
    rounds: list[tuple[int, int, int]] = []
    values: dict[int, list[Tensor]] = {position: [] for position in alive}
    gaps: dict[int, float] = {}  # of those that are out: how far they were behind the one to beat
    coarse: list[tuple[int, int]] = []  # pieces of which only some of the positions were scored
    while True:
        # the next pieces, growing geometrically: a close race takes few rounds, a clear one ends early
        start, read = read, min(pieces, max(first, read + 1, int(growth * read)))
        now = stride * coarsening(len(alive))
        for piece in measure(alive, start, read, now):  # [C, P] of the C that are left
            for position, tokens in zip(alive, piece, strict=True):
                values[position].append(tokens)
        rounds.append((read, now, len(alive)))
        if now > stride:
            coarse.append((start, read))
        if read == pieces:
            break
        if len(order) <= number:
            continue  # nobody can be out: it is no race but a reading of everything
        out = _beaten(alive, values, z, pieces, number)
        gaps |= out
        alive = [position for position in alive if position not in out]
        if len(alive) == number:
            break
    # undecided on all pieces: the rest is told apart by exact scores. A race that was won stops short of them
    if len(alive) > number or len(order) <= number:
        for start, stop in coarse:
            for index, piece in enumerate(measure(alive, start, stop, stride), start):
                for position, tokens in zip(alive, piece, strict=True):
                    values[position][index] = tokens
    rows = {position: _means(values[position]) for position in alive}
    scores = {position: rows[position].mean().item() for position in alive}
    left = sorted(alive, key=scores.__getitem__)  # stable: ties stay in the order of the proxy
    scores |= {position: scores[left[number - 1]] + gap for position, gap in gaps.items()}
    return Race(scores, rows, left, rounds)


def coarsening(left: int) -> int:
    """How many times coarser than in the end positions are scored while `left` blocks are left; a power of 2."""
    return min(COARSEST, 1 << max(0, (left // AT_ALL_POSITIONS).bit_length() - 1))


def _beaten(alive: Sequence[int], values: dict[int, list[Tensor]], z: float, of: int, number: int) -> dict[int, float]:
    """Mean difference to the `number`-th lowest of every block that is, beyond doubt, worse on all `of` pieces."""
    standing = sorted(alive, key=lambda position: _means(values[position]).mean().item())
    last = standing[number - 1]  # to be out is to be behind the last of the winners, not behind the first
    out = {}
    for position in standing[number:]:
        # token by token: what makes a text hard is in both and goes out of the difference
        pairs = [mine - best for mine, best in zip(values[position], values[last], strict=True)]
        gap = _means(pairs).mean().item()
        if gap > doubt(pairs, z, of):
            out[position] = gap
    return out


def _means(pieces: Sequence[Tensor]) -> Tensor:
    return torch.stack([tokens.double().mean() for tokens in pieces])


def doubt(pieces: Sequence[Tensor], z: float, of: int) -> float:
    """How far from zero the mean over pieces of differences [P] each must be to be believed; `z` standard errors.

    The question is who is best on all `of` pieces, not on text at large: with the pieces that are still to be read the
    doubt goes to zero (the finite population correction, Cochran 1977, section 2.6).

    The spread between few pieces is a rough guess, often far too small, and one piece has none. It is therefore shrunk
    to what the spread inside the pieces suggests, as if PRIOR_WEIGHT more pieces had shown that. Tokens of a piece are
    alike: taken for independent, they make the error too small by up to BETWEEN_TO_INSIDE.
    """
    count = len(pieces)
    rest = math.sqrt(1 - count / of)  # the finite population correction, as a factor on the standard error
    # two guesses at the variance of the mean: from the spread between pieces, with count - 1 degrees of freedom, and
    # from the spread of tokens inside them, which is there from the first piece on
    between = _means(pieces).var().item() / count if count > 1 else 0.0
    inside = [tokens.double().var().item() / len(tokens) for tokens in pieces if len(tokens) > 1]
    if not inside:  # one position a piece
        return rest * student_t(z, count - 1) * math.sqrt(between) if count > 1 else math.inf
    # mean variance of a piece's own mean, widened for tokens that are alike, then of the mean over `count` pieces
    prior = BETWEEN_TO_INSIDE**2 * sum(inside) / len(inside) / count
    # pooled by degrees of freedom, of which the second guess counts as PRIOR_WEIGHT
    freedom = PRIOR_WEIGHT + count - 1
    return rest * student_t(z, freedom) * math.sqrt((PRIOR_WEIGHT * prior + (count - 1) * between) / freedom)


def student_t(z: float, freedom: int) -> float:
    """The quantile of Student's t where the normal distribution has `z`."""
    from scipy.special import ndtr, stdtrit  # at the first call: its import takes a while

    tail = ndtr(-z)  # the lower one, where a large z is still a number
    return -float(stdtrit(freedom, tail)) if tail else z


def _between(batches: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Pieces start..stop-1 of all batches, [B', T] each."""
    found, offset = [], 0
    for batch in batches:
        some = batch[max(0, start - offset) : max(0, stop - offset)]
        found += [some] if len(some) else []
        offset += len(batch)
    return found


def _scout(stack: Stack, window: Tensor, prefix_cache: PrefixCache) -> tuple[list[float], list[float]]:
    """Block influence, and update of position 0 over that of the median token, of every block [L]; one pass, no head.

    Raises ValueError on a window of one token: position 0 is left out of the one and compared with others in the other.
    """
    if window.shape[1] < 2:
        raise ValueError(f"importance needs windows of at least 2 tokens, got a batch {list(window.shape)}")
    last = len(stack.layers) - 1
    # a trunk holds what goes into blocks; what comes out of the last one is one call more: L + 1 states [1, T, D]
    trunk = prefix_cache.trunk(stack, window, last)
    states = [state.float() for state in (*trunk.states, trunk.run(last, stack.layers[last], trunk.states[last]))]
    turns, sinks = [], []
    for before, after in pairwise(states):
        turns.append((1 - torch.cosine_similarity(before, after, dim=-1))[:, 1:].mean().item())
        update = (after - before).norm(dim=-1)[0]  # [T]
        sinks.append((update[0] / update[1:].median().clamp_min(torch.finfo(torch.float32).tiny)).item())
    return turns, sinks
