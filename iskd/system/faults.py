"""Faults of a running run (numbers that are not finite, memory, disk), and what is said about each.

What a user can mend is told in a sentence, and everything else with its traceback: `mendable` is where that is decided.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from iskd.system.text import argument

# what torch says when the CPU's memory is used up; there is no class of its own for it
_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad allocation",
    "bad_alloc",
    "ALLOC_FAILED",
)


@dataclass(frozen=True)
class Verdict:
    """The ranks' common answer about optimizer step `number`: was it skipped, is the run asked to stop."""

    number: int
    skipped: bool
    stopping: bool


class RunError(RuntimeError):
    """A run, or what it made, came to a stop for a reason that its user can mend; the message says how."""


class NonFiniteError(RunError):
    """The loss, a gradient or a weight is not finite, and skipping steps did not help."""


class UnavailableError(ValueError):
    """A model or a text is neither on this machine nor can it be fetched; what does not need it can go on."""


class UnfinishedError(RunError):
    """Training came to an end before the schedule did."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is used up, on a GPU or on the CPU."""
    torch = sys.modules.get("torch")  # where nobody imported it the error is not its own
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def mendable(error: BaseException) -> bool:
    """Whether an error is its user's to mend, in its own words: values, files, memory, a `RunError`; else ours."""
    return isinstance(error, OSError | ValueError | RunError) or is_out_of_memory(error)


def advice(error: BaseException, where: str, sizes: Mapping[str, int], last_good: Path | None) -> str:
    """The message of a NonFiniteError or an out-of-memory error with what helps.

    Args:
        error: what was raised.
        where: the place in the run.
        sizes: the knobs that decide the memory, with their values.
        last_good: the newest whole checkpoint, if there is one.
    """
    if isinstance(error, NonFiniteError):
        return (
            f"{error} {where}. Last good checkpoint: {last_good}. Start a new run with a lower schedule.lr and "
            "schedule.lr_new, or with trainer.precision=32-true"
        )
    go_on = "start again" if last_good is None else f"go on with {argument('resume', last_good.parents[1])}"
    values = ", ".join(f"{key}={value}" for key, value in sizes.items())
    return (
        f"{error} {where}, out of memory with {values}: {go_on} and a smaller data.batch_size with "
        "trainer.accumulate_grad_batches as many times larger (the same training; run.on_oom=halve does that itself), "
        "or trainer=fsdp on several devices; in a new run also a smaller chunk (tokens whose logits exist at a time), "
        "a smaller data.seq_len or schedule.train=edited"
    )
