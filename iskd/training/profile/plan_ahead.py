"""A plan without weights and without text: from a model's config alone, with times and unknown budgets left open."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig

from iskd.losses import Terms
from iskd.models import surgery
from iskd.plan import Record
from iskd.plan.run_files import PLAN_FILE
from iskd.schedules import History, Schedule, forecast, planned_steps
from iskd.system import write_whole
from iskd.training.plan_table import check_plan, losses_text, plan_rows, print_plan
from iskd.training.step import OptimSpec

_A_PASS = 10**9  # tokens that stand for a text of unknown length


@dataclass(frozen=True)
class Ahead:
    """What a plan is made of where the run itself cannot be.

    Attributes:
        config: of the teacher.
        schedule, terms, optim: of the run.
        windows: tokens of a window, windows of a micro-batch, micro-batches of a step, processes.
        text: the text in words.
        why: what cannot be had, in a sentence.
        tokens_told: what is said of a number of tokens that nobody asked for.
    """

    config: PreTrainedConfig
    schedule: Schedule
    terms: Terms
    optim: OptimSpec
    windows: Mapping[str, int]
    text: str
    why: str
    tokens_told: str = ""


def plan_ahead(ahead: Ahead, run_dir: Path) -> list[dict[str, Any]]:
    """Print and write the plan: exact parameters, stages and rates; layers that scores would choose are stand-ins.

    Raises:
        ValueError: as a run does of its plan.
    """
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(ahead.config, trust_remote_code=False)
    record = Record(int(ahead.config.num_hidden_layers))
    sizes, others = surgery.sizes(teacher, record)
    scores = dict.fromkeys(range(record.num_layers), 0.0)
    epochs = [getattr(each, "epochs", None) for each in _schedules(ahead.schedule)]
    stages = forecast(ahead.schedule, History(record, (), scores, sizes, others, _A_PASS if any(epochs) else None))
    step_tokens = 1
    for size in ahead.windows.values():
        step_tokens *= size
    steps = planned_steps(stages, step_tokens)
    losses, decay = losses_text(ahead.terms), ahead.optim.decay
    rows = plan_rows(teacher, stages, steps, step_tokens, losses=losses, decay=decay)
    for row, stage in zip(rows[1:], stages, strict=True):
        passes = _epochs_of(ahead.schedule, stage.step)
        if passes and stage.tokens:
            said = f"{passes:g} pass" + "es" * (passes != 1)
            row |= {"budget": said if stage.tokens == round(passes * _A_PASS) else "a share", "steps": 0, "tokens": 0}
    check_plan(rows, stages)
    write_whole(run_dir / PLAN_FILE, json.dumps(rows, indent=1))
    layout = " x ".join(f"{value:,} {name}" for name, value in ahead.windows.items() if value > 1)
    print_plan(rows, text=f"steps of {layout}, on {ahead.text}", unknown=ahead.why, tokens_told=ahead.tokens_told)
    return rows


def _schedules(schedule: Schedule) -> list[Any]:
    return [step.schedule for step in getattr(schedule, "parts", ())] or [schedule]


def _epochs_of(schedule: Schedule, step: int) -> float | None:
    epochs: float | None = getattr(_schedules(schedule)[step], "epochs", None)
    return epochs


def first_sentence(error: BaseException) -> str:
    """What an error says, up to its first full stop that ends a sentence."""
    return " ".join(str(error).split()).split(". ")[0].split(" What works offline")[0][:300]
