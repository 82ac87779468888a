"""The step with a frozen prefix, shared with the teacher and not: times of whole steps, in turns.

    python -m benchmarks.shared_prefix

A random model of SmolLM2-135M's sizes is the teacher; the student lacks the layers right above the prefix, its upper
blocks train under AdamW, embedding, tied head and prefix are frozen. Every repeat makes one step of each way on the
same windows; a ratio is the median over the repeats of the ratio within one. Before that one step of each is compared:
gradients must be equal bit for bit.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from benchmarks.common import (
    Taken,
    backward,
    distilled,
    in_turns,
    setting,
    size_options,
    sizes,
    spread,
    timed,
    update,
)
from iskd.models import Stack
from iskd.training.step import DistillModule, make_optimizer

WAYS = {"apart": False, "shared": True}


def frozen_below(module: DistillModule, layer: int) -> None:
    """Let the student's blocks from `layer` on train, and nothing else."""
    module.student.requires_grad_(False)
    for block in list(Stack(module.student).layers)[layer:]:
        block.requires_grad_(True)


def optimizer_of(module: DistillModule) -> torch.optim.Optimizer:
    optimizer = make_optimizer(module.optim)
    optimizer.param_groups[0]["params"] = [p for p in module.student.parameters() if p.requires_grad]
    optimizer.param_groups[0]["lr"] = 1e-5
    return optimizer


def gradients(module: DistillModule, ids: Tensor, mixed: bool | None) -> list[Tensor]:
    backward(module, ids, mixed)
    found = [p.grad for p in module.student.parameters() if p.grad is not None]
    module.student.zero_grad()
    return found


def main() -> None:
    parser = size_options(__doc__)
    parser.add_argument("--frozen", type=int, default=20, help="blocks of the prefix")
    options: argparse.Namespace = parser.parse_args()
    device = torch.device(options.device)
    module = distilled(options, options.frozen, device)
    frozen_below(module, options.frozen)
    told = module.student, module.teacher, module.terms, module.optim, module.record
    ways = {name: DistillModule(*told, share_prefix=on) for name, on in WAYS.items()}
    optimizer = optimizer_of(module)
    generator = torch.Generator().manual_seed(0)
    shape = (options.repeats + 1, options.batch, options.tokens)
    windows = torch.randint(0, options.vocabulary, shape, generator=generator).to(device)
    both = [gradients(way, windows[0], options.bf16) for way in ways.values()]
    equal = all(torch.equal(a, b) for a, b in zip(*both, strict=True))

    def step(repeat: int, way: DistillModule) -> Taken:
        def work() -> None:
            backward(way, windows[repeat], options.bf16)
            update(optimizer)

        return timed(device, work)[0]

    apart, shared = in_turns(
        {name: lambda repeat, way=way: step(repeat, way) for name, way in ways.items()}, options.repeats
    ).values()
    print(f"{setting(device)}\n\n{sizes(options, device)}, first {options.frozen} layers frozen\n")
    print("| shared is faster by (wall) | (CPU time) | gradients equal bit for bit | goal |\n|---|---|---|---|")
    wall = spread([taken.wall for taken in apart], [taken.wall for taken in shared])
    cpu = spread([taken.cpu for taken in apart], [taken.cpu for taken in shared])
    print(f"| {wall} | {cpu} | {'yes' if equal else 'NO'} | 1.3 and yes |")


if __name__ == "__main__":
    main()
