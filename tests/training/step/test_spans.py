"""Spans are in a trace of torch's profiler, are told to one who watches, and change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from iskd.losses.hidden import HiddenMatch
from iskd.losses.kl import KL
from iskd.plan import Record, Stage
from iskd.training.profile.operators import operator_seconds
from iskd.training.step import DistillModule, OptimSpec
from iskd.training.step.spans import StepSpan, span, watching
from tests.factories import tiny, windows


class Seen:
    """A watcher that notes what begins and ends."""

    def __init__(self) -> None:
        self.told: list[str] = []

    @contextmanager
    def __call__(self, name: StepSpan) -> Iterator[None]:
        self.told.append(f"{name} begins")
        yield
        self.told.append(f"{name} ends")


def module_of(objective: str) -> DistillModule:
    terms = {"kl": (KL(), 1.0), "hidden": (HiddenMatch("normalized"), 0.1)}
    module = DistillModule(tiny("llama"), tiny("llama"), terms, OptimSpec(), Record(4), share_prefix=False)
    module.enter(Stage("step", objective=objective, tokens=1))
    return module


@pytest.mark.parametrize(("objective", "names"), [("loss", ["teacher", "student", "loss"]), ("hidden", ["alignment"])])
def test_a_step_opens_its_spans_one_after_another(objective: str, names: list[str]) -> None:
    module, seen = module_of(objective), Seen()
    expected = module.step(windows(2, 8)).loss
    with watching(seen):
        found = module.step(windows(2, 8)).loss
    assert seen.told == [f"{name} {what}" for name in names for what in ("begins", "ends")]
    assert torch.equal(found, expected)
    module.step(windows(2, 8))
    assert len(seen.told) == 2 * len(names)  # nobody watches any more


def test_spans_are_named_in_a_trace_and_are_no_operators() -> None:
    module = module_of("loss")
    with torch.autograd.profiler.profile(use_kineto=True) as profiler:
        module.step(windows(2, 8))
    assert {"teacher", "student", "loss"} <= {event.key for event in profiler.key_averages()}

    @span(StepSpan.LOADER)
    def nothing() -> None:
        return None

    assert operator_seconds(nothing, torch.device("cpu")) == {}
