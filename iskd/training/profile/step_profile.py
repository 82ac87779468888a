"""Where the time of a training step goes: loader, teacher, student, loss, backward, clipping, optimizer.

A step is what Lightning does with `DistillModule`, in its order, by the same functions: `training_step`, `backward`,
`configure_gradient_clipping`, the optimizer. Timers are put around the functions that these call, and on a GPU each
waits for the device, so a step with timers is a little slower than one without; both are measured, in turns. Leading
blocks that the teacher computes for both (`iskd.training.step.shared_prefix`) are in its part, reading a teacher cache
in the loader's. What Lightning's loops, the callbacks, loggers and other processes add is not in it. The loss forms the
gradients of the head in its forward pass, so `backward` is that of the trunk. Under an alignment objective
(`iskd.training.step.alignment`) teacher, student and gradients are one walk over the layers, the part `alignment`.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iskd.data import StageLoader
from iskd.models import Stack
from iskd.plan import Record, Stage
from iskd.system import Ranks, machine
from iskd.system.machine import clock
from iskd.teacher import TeacherCache
from iskd.training.deciding import decide
from iskd.training.editing import carry_out
from iskd.training.parts import Parts
from iskd.training.profile.operators import operator_seconds
from iskd.training.profile.profile import PARTS, Profile
from iskd.training.runner import make_module
from iskd.training.state import RunState
from iskd.training.step import DistillModule, Position, make_optimizer, passes
from iskd.training.step import module as module_file
from iskd.training.step.flops import ForwardContext, as_found, countable, counter, matmul_dtype, matmul_peak

_FUNCTIONS = {"total_loss": "loss", "topk_loss": "loss", "align": "alignment"}  # of iskd.training.step.module
_WARM_UP = 2  # only the second one holds gradients and moments at the same time as activations

Batch = Mapping[str, Tensor]


class _Meter:
    """Adds up by part how much a reading grows while the part runs."""

    def __init__(self, read: Callable[[], float]) -> None:
        self.read, self.parts = read, defaultdict[str, float](float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self.read()
        try:
            yield
        finally:
            self.parts[name] += self.read() - start

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, metered."""

        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return metered

    def whole(self, step: Callable[[_Meter], None]) -> dict[str, float]:
        """Parts of one step, and the rest of it."""
        start = self.read()
        step(self)
        total = self.read() - start
        return {**self.parts, "rest": total - sum(self.parts.values())}


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
        module: teacher, student and stage.
        batches: micro-batches as the loader makes them, at least `2 * steps + 4` times `accumulate`; or one, again and
            again.
        optimizer: the module's, its groups filled.
        steps: measured steps with timers, and as many without.
        accumulate: micro-batches per step.
        forward_context: the precision under which training runs.
        operators: run one more step under torch's profiler.
        progress: told how far it is.

    Raises:
        ValueError: `steps` or `accumulate` below 1.
    """
    if steps < 1 or accumulate < 1:
        raise ValueError(f"a profile needs at least one step of one micro-batch, got {steps} of {accumulate}")
    device, total = module.device, _WARM_UP + 1 + 2 * steps + operators
    source: Iterator[Batch] = repeat(batches) if isinstance(batches, Mapping) else batches
    tokens: list[int] = []
    done = iter(range(1, total + 1))

    def step(meter: _Meter) -> None:
        tokens.append(_step(module, source, optimizer, meter, accumulate, forward_context))
        if progress is not None:
            progress("profiling", next(done), total)

    def unwatched() -> float:
        start = clock(device)
        step(_Meter(lambda: 0.0))
        return clock(device) - start

    with as_found(module), _own_state(optimizer), torch.enable_grad():
        module.enter(module.stage, Position(rate=0.0))
        with _silent(module), machine.PeakMemory(device) as memory:
            for _ in range(_WARM_UP):
                unwatched()
        with _silent(module), countable(module), counter() as counted:
            flops_meter = _Meter(lambda: float(counted.get_total_flops()))
            with _watched(module, flops_meter):
                flops = flops_meter.whole(step)
        watched: list[dict[str, float]] = []
        alone: list[float] = []
        with _silent(module):
            for _ in range(steps):
                alone.append(unwatched())
                meter = _Meter(lambda: clock(device))
                with _watched(module, meter):
                    watched.append(meter.whole(step))
            found = operator_seconds(unwatched, device) if operators else {}
    with forward_context():
        dtype = matmul_dtype(device)
    middle = sorted(watched, key=lambda parts: sum(parts.values()))[(steps - 1) // 2]
    return Profile(
        stage=module.stage.name,
        tokens=tokens[-1],
        seconds={name: middle[name] for name in PARTS if name in middle},
        step_seconds=statistics.median(alone),
        flops={name: int(flops[name]) for name in PARTS if flops.get(name)},
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
    meter: _Meter,
    accumulate: int,
    forward_context: ForwardContext,
) -> int:
    """One optimizer step as Lightning's automatic optimization makes it; returns its input tokens."""
    tokens = 0
    for index in range(accumulate):
        with meter.part("loader"):
            batch = module.transfer_batch_to_device(next(batches), module.device, 0)
        with forward_context():
            loss = module.training_step(batch, index)
        if not index:
            with meter.part("optimizer"):
                optimizer.zero_grad()
        with meter.part("backward"):
            (loss / accumulate).backward()
        tokens += batch["input_ids"].numel()
    with meter.part("clipping"):
        module.on_before_optimizer_step(optimizer)
        module.configure_gradient_clipping(optimizer)
    with meter.part("optimizer"):
        optimizer.step()
    return tokens


@contextmanager
def _watched(module: DistillModule, meter: _Meter) -> Iterator[None]:
    """Meter the functions that a step is made of, where the files that call them find them."""
    read = vars(passes)["read"]

    def metered_read(stack: Stack, *args: Any, **kwargs: Any) -> Any:
        with meter.part("teacher" if stack.model is module.teacher else "student"):
            return read(stack, *args, **kwargs)

    with ExitStack() as patches:
        patches.enter_context(_replaced(passes, "read", metered_read))
        patches.enter_context(_replaced(module, "cached", meter.around("loader", module.cached)))
        for name, part in _FUNCTIONS.items():
            patches.enter_context(_replaced(module_file, name, meter.around(part, getattr(module_file, name))))
        yield


@contextmanager
def _silent(module: DistillModule) -> Iterator[None]:
    """Log nothing: there is no logger, and a profile is no part of a run."""

    def nothing(*_: Any, **__: Any) -> None:
        return None

    with _replaced(module, "_log", nothing):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Another value for an attribute of a module, while the context lasts."""
    own, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


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


# ---- of a run --------------------------------------------------------------------------------------------------------


def profile_parts(
    parts: Parts,
    steps: int = 5,
    *,
    edits: bool = True,
    operators: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Profile:
    """Profile the first stage that a run would train, without running it: no Trainer, one process, nothing written.

    Blocks are not fitted before: the speed of a step does not depend on weights. Scores that the schedule asks for are
    computed as in the run, since they decide which layers are edited.

    Args:
        parts: what the run is made of; the accumulation and the precision of its trainer count.
        steps: see `profile_step`.
        edits: carry out the stage's edits first; otherwise the whole unedited student trains.
        operators: see `profile_step`.
        progress: see `profile_step`.

    Raises:
        ValueError: no stage trains, the schedule wants scores and there is no importance, or an unknown precision.
    """
    device, context = _place(parts)
    accumulate = int(parts.trainer.get("accumulate_grad_batches", 1))
    parts.data.prepare()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(parts.seed)
        state = RunState(record=Record(int(parts.teacher.model.config.num_hidden_layers)))
        module = make_module(parts, state)
        module.to(device)
        module.place_teacher()
        optimizer = make_optimizer(parts.optim)
        _enter_stage(parts, module, optimizer, state, context, edits)
        options: dict[str, Any] = {"steps": steps, "accumulate": accumulate, "operators": operators}
        with _batches(parts, module, (2 * steps + _WARM_UP + 2) * accumulate, context) as batches:
            return profile_step(module, batches, optimizer, forward_context=context, progress=progress, **options)


@contextmanager
def _batches(parts: Parts, module: DistillModule, count: int, context: ForwardContext) -> Iterator[Iterator[Batch]]:
    """The first `count` micro-batches of the run.

    Where the run reads a teacher cache, they are of as many windows from the front of the split, and a cache of these
    alone is made for the profile: that of all windows can take hours.
    """
    data, spec = parts.data, module.cache_spec
    if spec is None:
        data.set_stage(0, count)
        yield iter(data.train_dataloader())
        return
    windows = data.windows("train")[: count * data.batch_size]
    with tempfile.TemporaryDirectory() as folder:
        with context():
            cache = TeacherCache.build(module.teacher, windows, Path(folder), spec, batch_size=data.batch_size)
        module.use_cache(cache)
        yield iter(StageLoader(windows, batch_size=data.batch_size, seed=data.seed, first_step=0, steps=count))


def _place(parts: Parts) -> tuple[torch.device, ForwardContext]:
    """Device and precision of the run's trainer."""
    on_gpu = parts.trainer.get("accelerator", "auto") != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    precision = str(parts.trainer.get("precision", "32-true"))
    if precision == "bf16-mixed":
        return device, partial(torch.autocast, device.type, torch.bfloat16)
    if precision not in ("32-true", "32"):
        raise ValueError(f"trainer.precision={precision}: a profile knows bf16-mixed and 32-true")
    return device, nullcontext


def _enter_stage(
    parts: Parts,
    module: DistillModule,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    context: ForwardContext,
    edits: bool,
) -> None:
    """Carry out the schedule up to the edits of its first stage that trains."""
    if parts.schedule.scoring != "never" and parts.importance is None:
        raise ValueError("schedule.order=importance needs scores; choose one: importance=bi_veto, ablation, ...")
    windows = partial(parts.data.calibration, parts.options.score_tokens)
    while True:
        decide(parts.schedule, parts.importance, state, module, windows, Ranks(), context)
        stage = state.stage
        if stage is None:
            raise ValueError("no stage of the schedule trains, so there is no step to profile; set schedule.tokens")
        carry_out(module, optimizer, stage if edits else _bare(stage), [], context)
        if stage.tokens or not edits:
            return
        state.record = module.record
        state.finished = (*state.finished, stage)


def _bare(stage: Stage) -> Stage:
    """The stage on the student as it is, all of it in training."""
    return replace(stage, name=f"{stage.name}, without its edits", edits=(), train="all", objective="loss")
