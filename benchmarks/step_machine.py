"""What `benchmarks.step` needs beside the ways: the matrix peak, the FLOPs of the step, and where our step's time goes.

Each is asked for in a process of its own, like a way, so that no figure depends on what ran before it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.common import low, setting
from benchmarks.step_setup import DEVICE, Task, configured, prepared
from iskd.losses.kl import KL
from iskd.training.profile import profile_parts
from iskd.training.step import DistillModule, OptimSpec
from iskd.training.step.flops import matmul_peak, step_flops


def peak(task: Task) -> dict[str, Any]:
    """FLOP/s of the fastest matmul in the precision that the mixed ways train in, and what it ran on."""
    dtype = torch.bfloat16 if task.mixed else torch.float32
    found = matmul_peak(DEVICE, dtype, repeats=40, seconds=3.0)
    return {"flops_per_s": found, "dtype": str(dtype).removeprefix("torch."), "setting": setting(DEVICE)}


def flops(task: Task) -> dict[str, Any]:
    """FLOPs of one step on all positions: teacher forward, student forward and backward, both heads."""
    with prepared(task, 1) as setup:
        module = DistillModule(setup.student, setup.teacher, {"kl": (KL(), 1.0)}, OptimSpec(), setup.record)
        window = setup.ids_NBT[0, :1].to(DEVICE)
        return {"flops": step_flops(module, window, partial(low, DEVICE, task.mixed)) * task.rows}


def profile(task: Task, steps: int) -> dict[str, Any]:
    """`iskd profile` on our run: spans of the step, FLOPs and kinds of operators."""
    with configured(task, 2 * steps + 8) as parts:
        return profile_parts(parts, steps).to_json()
