"""Where the time of a training step goes: loader, teacher, student, loss, backward, clipping, optimizer.

A step is what Lightning does with `DistillModule`, in its order, by the same functions: `training_step`, `backward`,
`configure_gradient_clipping`, the optimizer. It is cut into named spans (`iskd.training.step.spans`),
timed where they are opened and closed, and on a GPU each waits for the device then, so a step with timers is a little
slower than one without; both are measured, in turns. Leading blocks that the teacher computes for both
(`iskd.training.step.shared_prefix`) are in its span, reading a teacher cache in the loader's. What Lightning's loops,
the callbacks, loggers and other processes add is not in it. The loss forms the gradients of the head in its forward
pass, so `backward` is that of the trunk. Under an alignment objective (`iskd.training.step.alignment`) teacher, student
and gradients are one walk over the layers, the span `alignment`.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext
from itertools import repeat

import torch
from torch import Tensor

from iskd.system import machine
from iskd.system.machine import clock
from iskd.system.precision import ForwardContext
from iskd.training.profile.operators import operator_seconds
from iskd.training.profile.profile import SPANS, Profile
from iskd.training.step import DistillModule
from iskd.training.step.flops import as_found, countable, counter, matmul_dtype, matmul_peak
from iskd.training.step.passes import wanted
from iskd.training.step.spans import StepSpan, span, watching

_WARM_UP = 2  # only the second one holds gradients and moments at the same time as activations

Batch = Mapping[str, Tensor]


def optimizer_steps(steps: int, *, operators: bool) -> int:
    """How many a profile makes: to warm up, one to count FLOPs, `steps` without timers and with, one by operator."""
    return _WARM_UP + 1 + 2 * steps + operators


def profile_step(
    module: DistillModule,
    batches: Batch | Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int = 5,
    accumulate: int = 1,
    forward_context: ForwardContext = nullcontext,
    operators: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Profile:
    """Profile optimizer steps of a module in the stage that it is in.

    Weights, gradients, random numbers, the optimizer's state and its rates are afterwards what they were: the steps are
    whole ones, at a rate of 0, with moments of their own (which take memory beside those that are there).

    Args:
        module: teacher, student and stage, outside a Trainer.
        batches: micro-batches as the loader makes them, at least `optimizer_steps` times `accumulate`; or one, again
            and again.
        optimizer: the module's, its groups filled.
        steps: measured steps with timers, and as many without.
        accumulate: micro-batches per step.
        forward_context: the precision under which training runs.
        operators: run one more step under torch's profiler.
        progress: told how far it is.

    Raises:
        ValueError: `steps` or `accumulate` below 1.
        RuntimeError: a span that the stage must have was never opened.
    """
    if steps < 1 or accumulate < 1:
        raise ValueError(f"a profile needs at least one step of one micro-batch, got {steps} of {accumulate}")
    device, expected, total = module.device, _expected(module), optimizer_steps(steps, operators=operators)
    source: Iterator[Batch] = repeat(batches) if isinstance(batches, Mapping) else batches
    tokens: list[int] = []

    def step() -> None:
        tokens.append(_step(module, source, optimizer, accumulate, forward_context))
        if progress is not None:
            progress("profiling", len(tokens), total)

    def seconds() -> float:
        return clock(device)

    watched: list[dict[str, float]] = []
    alone: list[float] = []
    with as_found(module), _own_state(optimizer), torch.enable_grad():
        with machine.PeakMemory(device) as memory:
            for _ in range(_WARM_UP):
                step()
        with countable(module), counter() as counted:
            flops = _by_span(counted.get_total_flops, step, expected)
        for _ in range(steps):
            start = seconds()
            step()
            alone.append(seconds() - start)
            watched.append(_by_span(seconds, step, expected))
        found = operator_seconds(step, device) if operators else {}
    with forward_context():
        dtype = matmul_dtype(device)
    middle = sorted(watched, key=lambda spans: sum(spans.values()))[(steps - 1) // 2]
    return Profile(
        stage=module.stage.name,
        tokens=tokens[-1],
        seconds=middle,
        step_seconds=statistics.median(alone),
        flops={name: int(count) for name, count in flops.items() if count},
        peak_flops=matmul_peak(device, dtype),
        dtype=str(dtype).removeprefix("torch."),
        memory_bytes=memory.peak,
        operators=found,
        machine=machine.describe(device),
        recomputed=bool(module.blocks.recompute),
    )


def _step(
    module: DistillModule,
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    accumulate: int,
    forward_context: ForwardContext,
) -> int:
    """One optimizer step as Lightning's automatic optimization makes it, at a rate of 0; returns its input tokens."""
    tokens = 0
    for index in range(accumulate):
        with span(StepSpan.LOADER):
            batch = module.transfer_batch_to_device(next(batches), module.device, 0)
        with forward_context():
            loss = module.training_step(batch, index)
        if not index:
            with span(StepSpan.OPTIMIZER):
                optimizer.zero_grad()
        with span(StepSpan.BACKWARD):
            (loss / accumulate).backward()
        tokens += batch["input_ids"].numel()
    with span(StepSpan.CLIPPING):
        module.on_before_optimizer_step(optimizer)
        module.configure_gradient_clipping(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with span(StepSpan.OPTIMIZER):
        optimizer.step()
    return tokens


def _expected(module: DistillModule) -> set[StepSpan]:
    """The spans without which no step of the module's stage is whole."""
    loop = {StepSpan.LOADER, StepSpan.BACKWARD, StepSpan.CLIPPING, StepSpan.OPTIMIZER}
    if module.stage.objective != "loss":
        return {*loop, StepSpan.ALIGNMENT}
    alive = (
        module.teacher_cache is None and wanted(module.terms, module.record, module.stage, of_teacher=True) is not None
    )
    return {*loop, StepSpan.STUDENT, StepSpan.LOSS, *([StepSpan.TEACHER] if alive else [])}


def _by_span(read: Callable[[], float], step: Callable[[], None], expected: Set[StepSpan]) -> dict[str, float]:
    """How much a reading grows during each span of one step and during the rest of it, in the order of `SPANS`.

    Raises RuntimeError for a span that is expected and was not opened: its work would be counted to the rest.
    """
    grown: dict[str, float] = defaultdict(float)

    @contextmanager
    def watch(name: StepSpan) -> Iterator[None]:
        start = read()
        yield
        grown[name] += read() - start

    start = read()
    with watching(watch):
        step()
    total = read() - start
    missing = sorted(expected - grown.keys())
    if missing:
        raise RuntimeError(
            f"no span {', '.join(missing)} was opened in a profiled step, only {', '.join(grown)}: its time would be "
            "lost in the rest; open span(StepSpan....) of iskd.training.step.spans where that work is done now"
        )
    grown["rest"] = total - sum(grown.values())
    return {name: grown[name] for name in SPANS if name in grown}


@contextmanager
def _own_state(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """An optimizer without moments, and afterwards its own moments and rates again."""
    state, rates = optimizer.state, [group["lr"] for group in optimizer.param_groups]
    optimizer.state = defaultdict(dict)
    try:
        yield
    finally:
        optimizer.state = state
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
