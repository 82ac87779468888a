"""`run.on_oom=halve`: a run that goes on with smaller micro-batches where memory ran out."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import distributed as dist

from iskd.report.terminal import terminal
from iskd.system.faults import is_out_of_memory
from iskd.training.parts import Parts, Result
from iskd.training.state import RunState


def with_smaller_batches(parts: Parts, run: Callable[[Parts], Result]) -> Result:
    """The run, with smaller and smaller micro-batches where `run.on_oom=halve`."""
    while True:
        try:
            return run(parts)
        except (RuntimeError, MemoryError) as error:
            smaller = halved(parts) if is_out_of_memory(error) else None
            if smaller is None:
                raise
            going_on = f"run.on_oom=halve: going on with data.batch_size={smaller.data.batch_size}"
            terminal().print(f"{error}\n{going_on}", soft_wrap=True)
        # the frames of the failed attempt are gone with its exception, and with them its tensors
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        parts = smaller


def halved(parts: Parts) -> Parts | None:
    """The same run with half the micro-batch and twice the accumulation, going on from its newest checkpoint.

    None when that was not asked for, when a micro-batch has an odd number of windows, or on several processes, which
    are broken off inside a collective and have to be started again.
    """
    size, several = parts.data.batch_size, dist.is_available() and dist.is_initialized()
    if parts.options.on_oom != "halve" or size < 2 or size % 2 or several:
        return None
    parts.data.trainer = None  # it holds the failed attempt and its tensors
    data = copy.copy(parts.data)
    data.batch_size = size // 2
    accumulate = 2 * int(parts.trainer["accumulate_grad_batches"])
    return replace(parts, data=data, trainer={**parts.trainer, "accumulate_grad_batches": accumulate}, resume=True)


def as_halved(parts: Parts, state: RunState) -> Parts:
    """The micro-batch that `run.on_oom=halve` came to before, instead of the configured one that was too large."""
    size, accumulate = (state.identity.get(key, 0) for key in ("batch_size", "accumulate"))
    now = int(parts.trainer["accumulate_grad_batches"])
    same_step = size * accumulate == parts.data.batch_size * now
    if parts.options.on_oom != "halve" or not same_step or size >= parts.data.batch_size:
        return parts
    data = copy.copy(parts.data)
    data.batch_size = size
    return replace(parts, data=data, trainer={**parts.trainer, "accumulate_grad_batches": accumulate})
