"""The profile of a run: the first stage that it would train, entered without a Trainer and without writing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from pydantic import PositiveInt

from iskd.data import StageLoader
from iskd.plan import Stage
from iskd.refits import Text
from iskd.system import Ranks
from iskd.system.files import scratch
from iskd.system.precision import ForwardContext, place
from iskd.teacher import TeacherCache
from iskd.training.deciding import decide
from iskd.training.editing import carry_out
from iskd.training.parts import Parts
from iskd.training.profile.profile import Profile
from iskd.training.profile.step_profile import Batch, optimizer_steps, profile_step
from iskd.training.runner import begun, make_module
from iskd.training.state import RunState
from iskd.training.step import DistillModule, make_optimizer


def profile_parts(
    parts: Parts,
    steps: PositiveInt = 5,
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
    device, context = place(parts.trainer)
    accumulate = int(parts.trainer["accumulate_grad_batches"])
    parts.data.prepare()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(parts.seed)
        state = begun(parts)
        module = make_module(parts, state)
        module.to(device)
        module.place_teacher()
        optimizer = make_optimizer(parts.optim)
        _enter_stage(parts, module, optimizer, state, context, edits)
        count = accumulate * optimizer_steps(steps, operators=operators)
        with _batches(parts, module, count, context) as batches:
            return profile_step(
                module,
                batches,
                optimizer,
                steps=steps,
                accumulate=accumulate,
                forward_context=context,
                operators=operators,
                progress=progress,
            )


@contextmanager
def _batches(parts: Parts, module: DistillModule, count: int, context: ForwardContext) -> Iterator[Iterator[Batch]]:
    """The first `count` micro-batches of the run.

    Where the run reads a teacher cache, they are of as many windows from the front of the split, and a cache of these
    alone is made for the profile: that of all windows can take hours.
    """
    data, spec = parts.data, module.teacher_cache_spec
    if spec is None:
        data.set_stage(0, count)
        yield iter(data.train_dataloader())
        return
    windows = data.windows("train")[: count * data.batch_size]
    with scratch("iskd-profile") as folder:
        with context():
            cache = TeacherCache.open(module.teacher, windows, folder, spec).fill(batch_size=data.batch_size)
        module.use_teacher_cache(cache)
        yield iter(StageLoader(windows, batch_size=data.batch_size, seed=data.seed, first_step=0, steps=count))


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
        decide(parts.schedule, parts.importance, state, module, windows, Ranks(), context, parts.data.pass_tokens)
        stage = state.stage
        if stage is None:
            raise ValueError("no stage of the schedule trains, so there is no step to profile; set schedule.tokens")
        edited = carry_out(module, optimizer, stage if edits else _bare(stage), Text(), context)
        if stage.tokens or not edits:
            return
        state.edit_made(edited.record, edited.events)
        state.stage_kept(0, 0)


def _bare(stage: Stage) -> Stage:
    """The stage on the student as it is, all of it in training."""
    return replace(stage, name=f"{stage.name}, without its edits", edits=(), train="all", objective="loss")
