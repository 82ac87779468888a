"""Leave-one-out scores of SmolLM2-135M's 30 blocks: deleting one after the other, one shared sweep, racing.

Three things in one process. Exactness: in float32, the naive way against the sweep. Time: bf16 autocast, as training
runs; one window of 256 tokens (batch 1) per repeat, the ways interleaved, CPU seconds of the process (one thread), so
that other programs on the machine count little; the naive way is linear in the number of windows, and its seconds for a
race's windows are those of one window times their number. Choice: 20 draws of calibration windows from a pool; is the
block that a race picks one whose full score is within one standard error of the best? Asked of the draw itself (all
blocks on all its windows; what racing promises) and of the whole pool, for full scoring of the draw as well. Races are
replayed from one table of values by token, made by the sweep; the timed races are real and must agree with that.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from iskd.system.allocator import tune

tune()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from iskd.data.sources import Docstrings  # noqa: E402
from iskd.importance.block_influence import BlockInfluence  # noqa: E402
from iskd.importance.racing import Race, Racing  # noqa: E402
from iskd.importance.sweep import leave_one_out_rows, leave_one_out_values  # noqa: E402
from iskd.models import (  # noqa: E402
    Stack,
    scoring,
)
from iskd.system.precision import fast_bf16  # noqa: E402
from iskd.teacher import TeacherSpec, load_teacher  # noqa: E402

DRAWS = 20
TOKENS = 256  # of a window
T = TypeVar("T")


def naive(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Loss without each block [L]: take the block out of the list, call the model with labels, put it back."""
    stack = Stack(model)
    blocks = list(stack.layers)
    losses = []
    for position in range(len(blocks)):
        kept = [index for index in range(len(blocks)) if index != position]
        stack.set_layers([blocks[index] for index in kept], kept)
        losses.append(model(window, labels=window).loss.float())
        stack.set_layers(blocks)
        model.config.num_hidden_layers = len(blocks)
    return torch.stack(losses)


def sweep(model: PreTrainedModel, window: Tensor, stride: int) -> Tensor:
    """The same less the whole model's loss [L], by the sweep."""
    return leave_one_out_rows(model, model, [window], metric="loss", stride=stride)[:, 0]


def timed(function: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds and result."""
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16()):
        result = function()
    return time.process_time() - start, result


def exactness(model: PreTrainedModel, window: Tensor) -> None:
    """Print the largest difference of scores in float32."""
    expected = naive(model, window) - model(window, labels=window).loss
    for width in (1, 4):
        rows = leave_one_out_rows(model, model, [window], metric="loss", width=width)
        worst = (rows[:, 0] - expected).abs().max().item()
        print(f"float32, {window.shape[1]} tokens, width {width}: largest difference {worst:.1e} nats", flush=True)


def speed(
    model: PreTrainedModel, pool: list[Tensor], draws: list[list[int]], repeats: int
) -> tuple[list[Race], list[int]]:
    """Print the table of times; return the races that were run, on the first draws, and the blocks that were vetoed."""
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "naive: delete, call the model with labels, put back": lambda window: naive(model, window),
        "shared prefix, exact": lambda window: sweep(model, window, 1),
        "shared prefix, head on every 8th token": lambda window: sweep(model, window, 8),
        "block influence (another score)": lambda window: BlockInfluence()(model, model, [window]),
    }
    first, exact, strided, _ = ways
    racing = f"racing on {len(draws[0])} windows (KL, default settings)"
    seconds: dict[str, list[float]] = {name: [] for name in (*ways, racing)}
    worst = dict.fromkeys((exact, strided), 0.0)
    races: list[Race] = []
    vetoed: list[int] = []
    for window, draw in zip(pool[:repeats], draws, strict=False):
        results = {}
        for name, way in ways.items():
            spent, results[name] = timed(partial(way, window))
            seconds[name].append(spent)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16()):
            expected = results[first] - model(window, labels=window).loss
        for name, before in worst.items():
            worst[name] = max(before, (results[name] - expected).abs().max().item())
        spent, (result, _, vetoed) = timed(partial(Racing().race, model, model, [pool[index] for index in draw]))
        races.append(result)
        seconds[racing].append(spent / len(draw))
        print("CPU s per window: " + ", ".join(f"{values[-1]:.2f}" for values in seconds.values()), flush=True)
    print("\n| way | CPU s per window | naive / this | largest difference, bf16 |\n|---|---|---|---|")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[first], values, strict=True))
        difference = f"{worst[name]:.1e}" if name in worst else "-"
        print(f"| {name} | {statistics.median(values):.2f} | {ratio:.2f} | {difference} |", flush=True)
    return races, vetoed


def replay(table: Tensor, draw: list[int], vetoed: list[int]) -> tuple[Race, float]:
    """A race with default settings on windows of the table [L, W, P], and naive's block calls over those it costs."""
    racing, blocks = Racing(), len(table)
    calls = 1  # the pass that orders and vetoes is remembered but for its last block

    def measure(candidates: Sequence[int], start: int, stop: int, stride: int) -> list[Tensor]:
        nonlocal calls
        branches = sum(blocks - 1 - position for position in candidates)
        calls += (stop - start) * (blocks + branches)  # the student is the teacher: one pass of either, the branches
        return [table[list(candidates), index][:, ::stride] for index in draw[start:stop]]

    order = [position for position in range(blocks) if position not in vetoed]
    result = racing.decide(measure, order, len(draw))
    return result, len(draw) * blocks * (blocks - 1) / calls


def behind(rows: Tensor, picked: int) -> tuple[float, bool, bool]:
    """How much worse a block is than the best on rows [L, W]; is it within one standard error of the best?

    Judged twice: by the standard error of the best block's own score (the usual one-standard-error rule, Breiman et al.
    1984, section 3.4.3), and by that of the difference between the two, window by window.
    """
    best = rows[rows.mean(1).argmin()]
    difference, root = rows[picked] - best, best.numel() ** 0.5
    gap = difference.mean().item()
    return gap, gap <= (best.std() / root).item(), gap <= (difference.std() / root).item()


def choice(
    model: PreTrainedModel, pool: list[Tensor], draws: list[list[int]], races: list[Race], vetoed: list[int]
) -> None:
    """Print what races on the draws pick, against the full scores of the draw and of the pool."""
    with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16()):
        table = torch.cat([leave_one_out_values(model, model, window, stride=1) for window in pool], 1)
    rows = table.double().mean(2)
    full, error = rows.mean(1), rows.std(1) / len(pool) ** 0.5
    best = [f"{index}: {full[index]:.4f} +- {error[index]:.4f}" for index in full.argsort()[:6].tolist()]
    print(f"\nfull scores on {len(pool)} windows: {', '.join(best)}; vetoed: {vetoed}\n")
    print("| draw | race picks | full scores pick | race worse by | blocks left by round | block calls |")
    print("|---|---|---|---|---|---|")
    judged: list[tuple[bool, ...]] = []
    ratios: list[float] = []
    agreed = 0
    for number, draw in enumerate(draws):
        result, ratio = replay(table, draw, vetoed)
        picked, whole = result.left[0], int(rows[:, draw].mean(1).argmin())
        gap, near, near_paired = behind(rows[:, draw], picked)
        judged.append((near, near_paired, picked == whole, behind(rows, picked)[1], behind(rows, whole)[1]))
        ratios.append(ratio)
        agreed += number < len(races) and races[number].left[0] == picked
        left = " ".join([*(str(count) for _, _, count in result.rounds[1:]), str(len(result.left))])
        print(f"| {number} | {picked} | {whole} | {gap:.4f} | {left} | 1 / {ratio:.1f} |")
    near, paired, same, pool_race, pool_full = (sum(column) for column in zip(*judged, strict=True))
    print(f"\nwithin one standard error of the draw's best: {near} of {len(draws)}; of the difference: {paired}")
    print(f"the very best: {same}; timed races that pick what their replay picks: {agreed} of {len(races)}")
    print(f"within one standard error of the pool's best: racing {pool_race}, full scores of the draw {pool_full}")
    middle, least = statistics.median(ratios), min(ratios)
    print(f"naive's block calls / the race's: median {middle:.1f}, least {least:.1f}", flush=True)


def main() -> None:
    """Measure all three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--windows", type=int, default=64, help="calibration windows of a race")
    parser.add_argument("--pool", type=int, default=96, help="windows that races draw from; full scores are over all")
    arguments = parser.parse_args()
    began = time.process_time()
    loaded = load_teacher(TeacherSpec("HuggingFaceTB/SmolLM2-135M-Instruct", bundled="smollm2"))
    text = "\n\n".join(text for text, _ in Docstrings().documents())
    ids = torch.tensor(loaded.tokenizer(text[:1_500_000]).input_ids)
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(ids) - TOKENS, (arguments.pool,), generator=generator).tolist()
    pool = [ids[None, start : start + TOKENS] for start in starts]
    draws = [torch.randperm(len(pool), generator=generator)[: arguments.windows].tolist() for _ in range(DRAWS)]
    with scoring(loaded.model):
        exactness(loaded.model, pool[0][:, :64])
        races, vetoed = speed(loaded.model, pool, draws, arguments.repeats)
        choice(loaded.model, pool, draws, races, vetoed)
    print(f"{time.process_time() - began:.0f} CPU seconds in all")


if __name__ == "__main__":
    main()
