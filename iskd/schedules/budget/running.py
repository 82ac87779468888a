"""The plan of a run: found once, before it, and kept in its folder, where every process and every resume finds it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.models import Stack
from iskd.models.packing import Separator
from iskd.models.weights import model_sha256
from iskd.plan.budget_plan import BudgetPlan, check_teacher, read_plan
from iskd.plan.run_files import BUDGET_FILE
from iskd.plan.trainer_settings import with_defaults
from iskd.schedules.budget.options import edits_of
from iskd.schedules.budget.search import Place, search
from iskd.schedules.budget.settings import Budget
from iskd.system import ProgressLine, global_rank
from iskd.system.precision import place as placed
from iskd.system.precision import serving_dtype

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
        seed: of the run.
        native: whether plain transformers opens a student.
        note: called with sentences for people.
    """

    teacher: PreTrainedModel
    windows: Callable[[int], Sequence[Tensor]]
    separator: Separator | None
    trainer: Mapping[str, Any]
    cache_dir: Path
    stored: str
    seed: int
    native: Callable[[PreTrainedModel], bool]
    note: Callable[[str], None]


def plans_for(budget: Budget, asked: Asked) -> list[BudgetPlan]:
    """Search on the device and in the precision of the run; nothing in a process that is not the first."""
    model = asked.teacher
    device, forward_context = placed(with_defaults(asked.trainer))
    before = next(model.parameters()).device
    training = [module for module in model.modules() if module.training]
    stack = Stack(model.eval())
    kept_apart = stack.separator
    nn.Module.to(model, device)
    stack.keep_apart(asked.separator)
    try:
        with ProgressLine() as progress, torch.no_grad():
            return search(
                budget,
                model,
                asked.windows,
                Place(
                    asked.cache_dir / "budget", forward_context, asked.native, _BYTES.get(asked.stored, 4),
                    serving_dtype(device), asked.seed, global_rank(), processes(os.environ), progress, asked.note,
                ),
            )  # fmt: skip
    finally:
        stack.keep_apart(kept_apart, check=False)
        nn.Module.to(model, before)
        for module in training:
            module.training = True


def plan_for(budget: Budget, asked: Asked, run_dir: Path) -> BudgetPlan:
    """The plan of a run: the one in its folder, the one that `budget.plan` names, or a new one, which is kept there.

    Raises:
        ValueError: there is no such plan, it is another teacher's, it edits nothing; or as `search`.
    """
    file, digest, layers = run_dir / BUDGET_FILE, model_sha256(asked.teacher), len(Stack(asked.teacher).layers)
    if budget.plan is not None:
        plan = read_plan(Path(budget.plan))
        check_teacher(plan, digest, layers, f"budget.plan={budget.plan}")
        return _kept(plan, file)
    wanted = budget.asked  # refused before anything is read
    if file.exists():
        plan = read_plan(file)
        check_teacher(plan, digest, layers, str(file))
        if _same(plan, budget, wanted, asked.seed):
            return plan
    found = plans_for(budget, asked)
    if found:
        return _kept(found[0], file)
    while True:  # the first process says what it has found, or ends, and whoever started all of them ends this one too
        if file.exists() and _same(plan := read_plan(file), budget, wanted, asked.seed):
            return plan
        time.sleep(_WAIT_S)


def _kept(plan: BudgetPlan, file: Path) -> BudgetPlan:
    if not edits_of(plan):
        said = " and ".join(f"budget.{key}={value}" for key, value in plan.asked.items()) or "budget.plan"
        raise ValueError(f"{said}: every layer is kept, so nothing would be edited; ask for less, or use schedule=none")
    if global_rank() == 0:
        plan.write(file)
    return plan


def _same(plan: BudgetPlan, budget: Budget, wanted: Mapping[str, Any], seed: int) -> bool:
    """Whether a plan answers this very budget."""
    said = (plan.asked, plan.seed, plan.native, plan.batch)
    known = all(name in plan.options for name in budget.use or ())
    there = budget.context in (None, plan.context)
    return said == (dict(wanted), seed, budget.native, budget.batch) and known and there


def processes(environment: Mapping[str, str]) -> int:
    """How many processes were started together: by torchrun, or as tasks of SLURM."""
    for key in ("WORLD_SIZE", "SLURM_NTASKS"):
        if environment.get(key, "").isdigit():
            return max(1, int(environment[key]))
    return 1
