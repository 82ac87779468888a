"""Time of the operators in a piece of work, by kind, from torch's profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch.autograd import DeviceType

from iskd.training.step.spans import StepSpan

_MATMULS = {"mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "_scaled_mm"}
_COPIES = {"copy_", "_to_copy", "clone", "contiguous", "cat", "stack", "fill_", "zero_", "index_select", "gather"}


def group_of(operator: str) -> str:
    """Kind of an operator by its name in torch's profiler.

    `element-wise` is everything of aten that is nothing else: arithmetic, reductions, norms, the optimizer's kernel.
    """
    library, _, name = operator.rpartition("::")
    if library != "aten":
        return "other"
    if "attention" in name:
        return "SDPA"
    if name in _MATMULS:
        return "matmul"
    return "copies and casts" if name in _COPIES else "element-wise"


def operator_seconds(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds of the operators in one call of `work` by kind, the longest first; of the GPU's own time on a GPU."""
    on_gpu = device.type == "cuda"
    with torch.autograd.profiler.profile(use_device="cuda" if on_gpu else None, use_kineto=True) as profiler:
        work()
    found: dict[str, float] = defaultdict(float)
    spans = set(StepSpan)  # named work, and no operators
    for event in profiler.key_averages():
        # a kernel's time is also that of the operator that launched it
        if event.device_type == DeviceType.CPU and event.key not in spans:
            microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            found[group_of(event.key)] += 1e-6 * microseconds
    return dict(sorted(found.items(), key=lambda item: -item[1]))
