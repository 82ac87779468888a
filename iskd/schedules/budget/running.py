"""The plan of a run: found once, before it, and kept in its folder, where every process and every resume finds it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.models import Stack
from iskd.models.packing import Separator
from iskd.models.weights import model_sha256
from iskd.plan.budget_plan import KEEP, BudgetPlan, check_teacher, read_plan
from iskd.plan.run_files import BUDGET_FILE, work_in
from iskd.plan.trainer_settings import with_defaults
from iskd.refits import Refit
from iskd.schedules.budget.search import Place, request_of, search, settled
from iskd.schedules.budget.settings import LIMITS, Budget
from iskd.schedules.budget.students import edits_of, made
from iskd.schedules.budget.text import texts_of
from iskd.system import ProgressLine, global_rank
from iskd.system.precision import place as placed
from iskd.system.precision import serving_dtype
from iskd.system.ranks import started_together

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_WAIT_S = 1.0


@dataclass(frozen=True)
class Asked:
    """What a search needs of a run.

    Attributes:
        teacher: the original, wherever it is; it is put back there.
        windows: gives calibration windows [B, T] of so many tokens.
        separator: what keeps documents apart, or None.
        trainer: keys of the trainer, of which device and precision count.
        cache_dir: parent of all libraries.
        stored: type of the exported weights.
        native: whether plain transformers, vLLM and llama.cpp open a student, as far as they open its teacher.
        refits: of the run, in order.
        note: called with sentences for people.
    """

    teacher: PreTrainedModel
    windows: Callable[[int], Sequence[Tensor]]
    separator: Separator | None
    trainer: Mapping[str, Any]
    cache_dir: Path
    stored: str
    native: Callable[[PreTrainedModel], bool]
    refits: Sequence[Refit]
    note: Callable[[str], None]


def plans_for(budget: Budget, asked: Asked) -> list[BudgetPlan]:
    """Search on the device and in the precision of the run; nothing in a process that is not the first."""
    model = asked.teacher
    device, forward_context = placed(with_defaults(asked.trainer))
    before = next(model.parameters()).device
    training = [module for module in model.modules() if module.training]
    nn.Module.to(model.eval(), device)
    try:
        # kernels that are not torch's own run on the current device
        current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with current, _apart(asked), ProgressLine() as progress, torch.no_grad():
            return search(
                budget,
                model,
                asked.windows,
                Place(
                    asked.cache_dir / "budget", forward_context, asked.native, itemsize_of(asked.stored),
                    serving_dtype(device), process=global_rank(), processes=started_together(os.environ),
                    refits=asked.refits, told=progress, note=asked.note,
                ),
            )  # fmt: skip
    finally:
        nn.Module.to(model, before)
        for module in training:
            module.training = True


@contextmanager
def _apart(asked: Asked, *, check: bool = True) -> Iterator[None]:
    """The teacher tells documents apart as in the run: by what it says then its scores are, and its digest."""
    stack = Stack(asked.teacher)
    before = stack.separator
    stack.keep_apart(asked.separator, check=check)
    try:
        yield
    finally:
        stack.keep_apart(before, check=False)


def plan_for(budget: Budget, asked: Asked, run_dir: Path) -> BudgetPlan:
    """The plan of a run: the one in its folder, the one that `budget.plan` names, or a new one, which is kept there.

    Raises:
        ValueError: there is no such plan, it is another teacher's, it edits nothing, the budget's other keys say
            otherwise; the run is at work on another one; or as `search`.
    """
    file, stack = run_dir / BUDGET_FILE, Stack(asked.teacher)
    with _apart(asked, check=False):
        digest = model_sha256(asked.teacher)
    if budget.plan is not None:
        # a run that goes on has its own copy, wherever the file is by then
        gone = not Path(budget.plan).exists() and file.exists() and bool(work_in(run_dir))
        if gone:
            asked.note(f"budget.plan={budget.plan} is gone: the run goes on with its own copy, {file}")
        plan = read_plan(file if gone else Path(budget.plan))
        check_teacher(plan, digest, len(stack.layers), str(file) if gone else f"budget.plan={budget.plan}")
        _agrees(plan, budget, asked)
        if file.exists():
            if _alike(plan, own := read_plan(file)):
                return own
            _refuse_work(run_dir, f"budget.plan={budget.plan} is another plan")
        return _kept(replace(plan, finished={}), file)
    budget.asked  # noqa: B018 - refused before anything is read
    text = texts_of(budget, asked.windows).digest
    settings = settled(budget, stack, asked.refits)
    request = request_of(settings, text, itemsize_of(asked.stored), asked.refits)
    if file.exists():
        plan = read_plan(file)
        check_teacher(plan, digest, len(stack.layers), str(file))
        if plan.request == request:
            return plan
        _refuse_work(run_dir, "its budget, options, settings of the search, refits, text or export.dtype were others")
    found = plans_for(budget, asked)
    if found:
        return _kept(found[0], file)
    while True:  # the first process says what it has found, or ends, and whoever started all of them ends this one too
        if file.exists() and (plan := read_plan(file)).request == request:
            return plan
        time.sleep(_WAIT_S)


def _refuse_work(run_dir: Path, why: str) -> None:
    """A run that has come to something goes on with the plan that it has."""
    if work := work_in(run_dir):
        raise ValueError(
            f"{run_dir} holds {work[0]} of the plan in its {BUDGET_FILE}, and {why}: leave that as it was, or choose "
            "another hydra.run.dir"
        )


def _alike(one: BudgetPlan, other: BudgetPlan) -> bool:
    """Whether two plans do the same."""
    return (one.choice, one.options, one.seed) == (other.choice, other.options, other.seed)


def _agrees(plan: BudgetPlan, budget: Budget, asked: Asked) -> None:
    """Raise ValueError where other keys of a budget say otherwise than the plan that it names."""
    said = f"budget.plan={budget.plan} was searched for with"
    end = "leave that out, or search again without budget.plan"
    for key, value in budget.asked.items() if any(getattr(budget, key) is not None for key in LIMITS) else ():
        if plan.asked.get(key) != value:
            raise ValueError(f"{said} budget.{key}={plan.asked.get(key, 'null')}, not {value}: {end}")
    for key, mine, usual in (("context", plan.context, None), ("batch", plan.batch, 1)):
        if getattr(budget, key) not in (usual, mine):
            raise ValueError(f"{said} budget.{key}={mine}, not {getattr(budget, key)}: {end}")
    others = sorted({*plan.choice} - {KEEP, *(budget.use or plan.options)})
    if others:
        raise ValueError(f"budget.plan={budget.plan} has {', '.join(others)}, and budget.use does not: {end}")
    if budget.native and not asked.native(made(asked.teacher, edits_of(plan))[0]):
        raise ValueError(
            f"budget.plan={budget.plan} makes a student that plain transformers does not open, and "
            f"budget.native=true: {end}"
        )


def _kept(plan: BudgetPlan, file: Path) -> BudgetPlan:
    if not edits_of(plan):
        said = " and ".join(f"budget.{key}={value}" for key, value in plan.asked.items()) or "budget.plan"
        raise ValueError(f"{said}: every layer is kept, so nothing would be edited; ask for less, or use schedule=none")
    if global_rank() == 0:
        plan.write(file)
    return plan


def itemsize_of(stored: str) -> int:
    """Bytes of a number in weights of a type."""
    return _BYTES.get(stored, 4)
