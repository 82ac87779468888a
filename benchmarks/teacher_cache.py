"""The step with a live teacher and with its cached last hidden states or likeliest tokens: times, bytes, losses.

    python -m benchmarks.teacher_cache

The task of `benchmarks.step`: SmolLM2-135M and the student that lacks layers 12-15, which trains whole, under AdamW.
The cache holds the windows of the measured steps. Every repeat makes one step of each way on the same windows, reading
the rows included; a ratio is the median over the repeats of the ratio within one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.common import Taken, backward, in_turns, low, setting, spread, timed, update
from benchmarks.step_setup import DEVICE, TASKS, Task, prepared
from iskd.data.shards import Tokens
from iskd.losses.kl import KL
from iskd.teacher import TeacherCache, TeacherCacheSpec
from iskd.teacher.cache_rows import KINDS
from iskd.training.step import DistillModule, OptimSpec, make_optimizer, regroup

Rounds = dict[str, list[tuple[Taken, float]]]


def built(
    module: DistillModule, windows: Tokens, folder: Path, task: Task, top_k: int
) -> dict[str, tuple[TeacherCache | None, float]]:
    """Every kind of cache and the seconds that it took; the live teacher first."""
    found: dict[str, tuple[TeacherCache | None, float]] = {"live": (None, 0.0)}
    for kind in KINDS:
        spec = TeacherCacheSpec(kind, top_k=top_k)
        with low(module.device, task.mixed):
            taken, cache = timed(
                module.device,
                lambda spec=spec: TeacherCache.open(module.teacher, windows, folder, spec).fill(batch_size=task.rows),
            )
        found[kind] = (cache, taken.wall)
    return found


def measured(
    module: DistillModule, windows: Tokens, caches: dict[str, TeacherCache | None], task: Task, repeats: int
) -> Rounds:
    """Seconds and loss of a step of every way, by repeat."""
    optimizer = make_optimizer(module.optim)
    # rates stay 0: every way sees the same weights
    regroup(optimizer, module.student, module.record, module.stage, {})

    def step(repeat: int, cache: TeacherCache | None) -> tuple[Taken, float]:
        rows = list(range(repeat * task.rows, (repeat + 1) * task.rows))
        ids = torch.from_numpy(windows[rows]).to(module.device)

        def work() -> torch.Tensor:
            read = {} if cache is None else {k: v.to(ids.device) for k, v in cache.read(rows).items()}
            loss = backward(module, ids, task.mixed, *([read] if read else []))
            update(optimizer)
            return loss

        taken, loss = timed(module.device, work)
        return taken, float(loss)

    ways = {name: lambda repeat, cache=cache: step(repeat, cache) for name, cache in caches.items()}
    return in_turns(ways, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--model", choices=TASKS, default="smollm2", help="tiny: random weights, to try it out")
    options = parser.parse_args()
    task = TASKS[options.model]
    with prepared(task, options.repeats + 1) as setup, tempfile.TemporaryDirectory() as folder:
        module = DistillModule(setup.student, setup.teacher, {"kl": (KL(), 1.0)}, OptimSpec(), setup.record).to(DEVICE)
        windows = setup.ids_NBT.flatten(0, 1).numpy()
        caches = built(module, windows, Path(folder), task, options.top_k)
        ways = {name: cache for name, (cache, _) in caches.items()}
        found = measured(module, windows, ways, task, options.repeats)
    live = found["live"]
    step_seconds = statistics.median(taken.wall for taken, _ in live)
    print(
        f"{setting(DEVICE)}\n\n{options.model}, layers {list(task.removed)} removed, {task.rows} x {task.length} "
        f"tokens, {'bf16 autocast' if task.mixed else 'float32'}, top {options.top_k}, median of {options.repeats} "
        "(least-greatest)\n"
    )
    print("| teacher | faster by (wall) | (CPU time) | bytes per token | building it / live steps on its text | KL |")
    print("|---|---|---|---|---|---|")
    for name, (cache, seconds) in caches.items():
        wall = spread([taken.wall for taken, _ in live], [taken.wall for taken, _ in found[name]])
        cpu = spread([taken.cpu for taken, _ in live], [taken.cpu for taken, _ in found[name]])
        size = "-" if cache is None else str(cache.nbytes_per_token)
        price = "-" if cache is None else f"{seconds / (step_seconds * len(windows) / task.rows):.2f}"
        kl = statistics.fmean(loss for _, loss in found[name])
        print(f"| {name} | {wall} | {cpu} | {size} | {price} | {kl:.5f} |")


if __name__ == "__main__":
    main()
