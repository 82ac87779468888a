"""The step with a live teacher and with its cached last hidden states or likeliest tokens: times, bytes, losses.

A random model of SmolLM2-135M's sizes is the teacher; the student lacks some layers and trains whole, under AdamW.
The cache holds the windows of the measured steps. Every repeat makes one step of each way on the same windows, reading
from the memory map included; a ratio is the median over the repeats of the ratio within one. A random model's next
tokens are nearly equally likely, so the likeliest show little of its KL here: their bias is for a real teacher to show.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path

from iskd.allocator import tune

tuned = tune()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from shared_prefix import random_teacher  # noqa: E402
from torch import Tensor  # noqa: E402

from iskd import surgery  # noqa: E402
from iskd.losses.kl import KL  # noqa: E402
from iskd.module import DistillModule, clock  # noqa: E402
from iskd.optim import OptimSpec, make_optimizer, regroup  # noqa: E402
from iskd.plan import Record, Remove  # noqa: E402
from iskd.teacher_cache import TeacherCache  # noqa: E402
from iskd.teacher_rows import KINDS, CacheSpec  # noqa: E402

Times = list[tuple[float, float, float]]


def step(
    module: DistillModule, optimizer: torch.optim.Optimizer, ids: Tensor, index: Tensor, mixed: bool
) -> tuple[float, float, float]:
    """Wall and CPU seconds of one step, and its loss."""
    wall, cpu = clock(ids.device), time.process_time()
    given = (
        () if module.cache is None else ({k: v.to(ids.device) for k, v in module.cache.read(index.tolist()).items()},)
    )
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=mixed):
        loss = module.step(ids, *given).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return clock(ids.device) - wall, time.process_time() - cpu, float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--removed", type=int, default=4)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4, help="windows")
    parser.add_argument("--tokens", type=int, default=512, help="per window")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    teacher = random_teacher(options.layers, options.width, options.vocabulary, options.tokens).to(device)
    student, first = copy.deepcopy(teacher), (options.layers - options.removed) // 2
    record = surgery.apply(student, Record(options.layers), [Remove(first + i) for i in range(options.removed)])
    module = DistillModule(student, teacher, {"kl": (KL(), 1.0)}, OptimSpec(), record).to(device)
    module.place_teacher()
    optimizer = make_optimizer(module.optim)
    regroup(optimizer, student, record, module.stage)  # rates stay 0: every way sees the same weights
    shape = (options.batch * (options.repeats + 1), options.tokens)
    texts = np.random.default_rng(0).integers(0, options.vocabulary, shape)
    with tempfile.TemporaryDirectory() as folder:
        caches: dict[str, TeacherCache | None] = {"live": None}
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            for kind in KINDS:
                start, spec = time.perf_counter(), CacheSpec(kind, top_k=options.top_k)
                caches[kind] = TeacherCache.build(teacher, texts, Path(folder), spec, batch_size=options.batch)
                print(f"{kind}: built in {time.perf_counter() - start:.1f} s for {texts.size} tokens")
        taken: dict[str, Times] = {name: [] for name in caches}
        for repeat in range(options.repeats + 1):
            index = torch.arange(options.batch) + repeat * options.batch
            ids = torch.from_numpy(texts[index.numpy()]).to(device)
            for name, module.cache in caches.items():
                found = step(module, optimizer, ids, index, options.bf16)
                if repeat:  # the first warms up
                    taken[name].append(found)
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} thread(s), "
        f"{'bf16 autocast' if options.bf16 else 'float32'}, {'tuned' if tuned else 'stock'} allocator, "
        f"{options.layers} layers of width {options.width}, {options.removed} removed, "
        f"vocabulary {options.vocabulary}, top {options.top_k}, {options.batch} x {options.tokens} tokens, "
        f"median of {options.repeats}"
    )
    print("\n| teacher | seconds per step | times faster (wall) | (CPU time) | bytes per token | KL |")
    print("|---|---|---|---|---|---|")
    for name, cache in caches.items():
        wall = statistics.median(row[0] for row in taken[name])
        pairs = list(zip(taken["live"], taken[name], strict=True))
        by_wall, by_cpu = (statistics.median(live[i] / row[i] for live, row in pairs) for i in (0, 1))
        size = "-" if cache is None else str(cache.nbytes_per_token)
        kl = statistics.fmean(row[2] for row in taken[name])
        print(f"| {name} | {wall:.3f} | {by_wall:.2f} | {by_cpu:.2f} | {size} | {kl:.5f} |")


if __name__ == "__main__":
    main()
