"""What the stage loop needs of whatever trains: a Lightning trainer, or a few lines in a test."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from iskd.models import Stack
from iskd.system import Ranks
from iskd.training.step import DistillModule

_OFTEN_MS, _SELDOM_MS = 100, 400
_MOST_CALLS = 4096


@dataclass(frozen=True)
class Live:
    """The objects that live as long as a fit.

    Attributes:
        module: teacher, student and the step.
        optimizer: the running one; edits rewrite its groups in place.
        ranks: the processes of the run.
        accumulate: micro-batches of an optimizer step.
        forward_context: the precision of passes outside a step.
        rewrap: puts the student anew into what spreads it over processes, after its structure or groups changed.
        loggers: what is told of every row. precision: of the run, as its configuration says.
        stop_wanted: whether this process was asked to end the run; it does at the next stage or step.
        breaking_off: inside, a stop signal raises `BrokenOffError`: at once where one process works alone, else on all
            of them, between two modules of the models that it is given, or of any where it is given none. They have to
            run as many of these on every process.
        alone: the same for what not every process does alike; of several processes none is broken off.
        planned: processes of the run whose plan this one makes by itself; 0 = those that there are.
        look: raises it between two steps of work that several processes do alike, where one was asked to stop.
    """

    module: DistillModule
    optimizer: torch.optim.Optimizer
    ranks: Ranks = field(default_factory=Ranks)
    accumulate: int = 1
    forward_context: Callable[[], AbstractContextManager[None]] = nullcontext
    rewrap: Callable[[], None] = lambda: None
    loggers: Sequence[Any] = ()
    precision: str = "32-true"
    stop_wanted: Callable[[], bool] = lambda: False
    breaking_off: Callable[..., AbstractContextManager[None]] = lambda *_models: nullcontext()
    alone: Callable[[], AbstractContextManager[None]] = nullcontext
    look: Callable[[], None] = lambda: None
    planned: int = 0

    @property
    def processes(self) -> int:
        """Those among which the run's windows are shared out."""
        return self.planned or self.ranks.size

    @property
    def speedup(self) -> int:
        """How many times as fast as this process those of a plan will be together: on a CPU they share its cores."""
        return self.planned if self.planned and self.module.device.type != "cpu" else 1


class AgreedStop:
    """Ends what several processes do alike where one of them was asked to stop: all of them at the same place.

    Every so many calls of modules they ask each other, which is a collective. How many calls lie between two questions
    is agreed too, so that they are asked a few times in a second, whatever a module takes.

    Args:
        ranks: the processes.
        wanted: whether this one was asked to stop.
        error: what is raised.
    """

    def __init__(self, ranks: Ranks, wanted: Callable[[], bool], error: type[BaseException]) -> None:
        self.ranks, self.wanted, self.error = ranks, wanted, error
        self._between, self._calls, self._asked = 1, 0, time.monotonic()

    def look(self) -> None:
        """Ask now. Raises `error` on every process where one was asked to stop."""
        now = time.monotonic()
        votes = torch.tensor([int(self.wanted()), int(1e3 * (now - self._asked))])
        stop, passed = self.ranks.highest(votes).tolist()
        self._asked, self._calls = now, 0
        if passed < _OFTEN_MS:
            self._between = min(2 * self._between, _MOST_CALLS)
        elif passed > _SELDOM_MS:
            self._between = max(1, self._between // 2)
        if stop:
            raise self.error

    @contextmanager
    def inside(self, *models: nn.Module) -> Iterator[None]:
        """Look at the beginning, between calls of the models' layers or of any module, and at the end."""

        def called(*_: Any) -> None:
            self._calls += 1
            if self._calls >= self._between:
                self.look()

        layers = [layer for model in models for layer in Stack(model).layers]  # type: ignore[arg-type]
        self._between, self._asked = 1, time.monotonic()
        self.look()
        if models:
            hooks = [layer.register_forward_pre_hook(called) for layer in layers]
        else:
            hooks = [register_module_forward_pre_hook(called)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.look()
