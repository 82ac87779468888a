"""Named spans of a training step: what a trace of torch's profiler shows, and whoever measures a step goes by.

A span is opened where the work is done, so nobody need know the functions that do it. Those of the loop (loader,
backward, clipping, optimizer) are opened by a profile, which takes Lightning's place there; in a run Lightning gives
that work names of its own. Spans do not nest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from enum import Enum

from torch.profiler import record_function


class StepSpan(str, Enum):
    """The spans of a step, in the order in which they run; each is its own text (StrEnum needs Python 3.11)."""

    LOADER = "loader"
    TEACHER = "teacher"
    STUDENT = "student"
    LOSS = "loss"
    ALIGNMENT = "alignment"
    BACKWARD = "backward"
    CLIPPING = "clipping"
    OPTIMIZER = "optimizer"

    def __str__(self) -> str:
        return str(self.value)


Watcher = Callable[[StepSpan], AbstractContextManager[object]]
_watcher: ContextVar[Watcher] = ContextVar("watcher", default=nullcontext)


@contextmanager
def span(name: StepSpan) -> Iterator[None]:
    """Name the work inside the context, or that of the function it decorates; costs 10 microseconds on the host."""
    with record_function(name.value), _watcher.get()(name):
        yield


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Enter `watcher(name)` around the work of every span that this thread opens inside the context."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)
