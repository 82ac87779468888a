"""The step with a live teacher and with its cached last hidden states or likeliest tokens: times, bytes, losses.

    python -m benchmarks.teacher_cache

A random model of SmolLM2-135M's sizes is the teacher; the student lacks some layers and trains whole, under AdamW.
The cache holds the windows of the measured steps. Every repeat makes one step of each way on the same windows, reading
from the memory map included; a ratio is the median over the repeats of the ratio within one. A random model's next
tokens are nearly equally likely, so the likeliest show little of its KL here: their bias is for a real teacher to show.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import (
    Taken,
    backward,
    distilled,
    in_turns,
    low,
    setting,
    size_options,
    sizes,
    spread,
    timed,
    update,
)
from iskd.module import DistillModule
from iskd.optim import make_optimizer, regroup
from iskd.shards import Tokens
from iskd.teacher_cache import TeacherCache
from iskd.teacher_rows import KINDS, CacheSpec

Rounds = dict[str, list[tuple[Taken, float]]]


def built(
    module: DistillModule, windows: Tokens, folder: Path, options: argparse.Namespace
) -> dict[str, tuple[TeacherCache | None, float]]:
    """Every kind of cache and the seconds that it took; the live teacher first."""
    found: dict[str, tuple[TeacherCache | None, float]] = {"live": (None, 0.0)}
    for kind in KINDS:
        spec = CacheSpec(kind, top_k=options.top_k)
        with low(module.device, options.bf16):
            taken, cache = timed(
                module.device,
                lambda spec=spec: TeacherCache.build(module.teacher, windows, folder, spec, batch_size=options.batch),
            )
        found[kind] = (cache, taken.wall)
    return found


def measured(
    module: DistillModule, windows: Tokens, caches: dict[str, TeacherCache | None], options: argparse.Namespace
) -> Rounds:
    """Seconds and loss of a step of every way, by repeat."""
    optimizer = make_optimizer(module.optim)
    # rates stay 0: every way sees the same weights
    regroup(optimizer, module.student, module.record, module.stage)

    def step(repeat: int, cache: TeacherCache | None) -> tuple[Taken, float]:
        module.cache = cache
        rows = list(range(repeat * options.batch, (repeat + 1) * options.batch))
        ids = torch.from_numpy(windows[rows]).to(module.device)

        def work() -> torch.Tensor:
            read = {} if cache is None else {k: v.to(ids.device) for k, v in cache.read(rows).items()}
            loss = backward(module, ids, options.bf16, *([read] if read else []))
            update(optimizer)
            return loss

        taken, loss = timed(module.device, work)
        return taken, float(loss)

    ways = {name: lambda repeat, cache=cache: step(repeat, cache) for name, cache in caches.items()}
    return in_turns(ways, options.repeats)


def main() -> None:
    parser = size_options(__doc__)
    parser.add_argument("--top-k", type=int, default=64)
    options = parser.parse_args()
    device = torch.device(options.device)
    module = distilled(options, (options.layers - options.removed) // 2, device)
    shape = (options.batch * (options.repeats + 1), options.tokens)
    windows = np.random.default_rng(0).integers(0, options.vocabulary, shape)
    with tempfile.TemporaryDirectory() as folder:
        caches = built(module, windows, Path(folder), options)
        found = measured(module, windows, {name: cache for name, (cache, _) in caches.items()}, options)
    live = found["live"]
    step_seconds = statistics.median(taken.wall for taken, _ in live)
    print(f"{setting(device)}\n\n{sizes(options, device)}, top {options.top_k}\n")
    print("| teacher | faster by (wall) | (CPU time) | bytes per token | building it / live steps on its text | KL |")
    print("|---|---|---|---|---|---|")
    for name, (cache, seconds) in caches.items():
        wall = spread([taken.wall for taken, _ in live], [taken.wall for taken, _ in found[name]])
        cpu = spread([taken.cpu for taken, _ in live], [taken.cpu for taken, _ in found[name]])
        size = "-" if cache is None else str(cache.nbytes_per_token)
        price = "-" if cache is None else f"{seconds / (step_seconds * len(windows) / options.batch):.2f}"
        kl = statistics.fmean(loss for _, loss in found[name])
        print(f"| {name} | {wall} | {cpu} | {size} | {price} | {kl:.5f} |")


if __name__ == "__main__":
    main()
