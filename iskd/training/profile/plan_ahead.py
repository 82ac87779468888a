"""A plan without weights and without text: from a model's config alone, with times and unknown budgets left open."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig

from iskd.export.loading import describe, record_of
from iskd.losses import Terms
from iskd.models import surgery
from iskd.plan import Record
from iskd.plan.reading import record_from_json
from iskd.plan.run_files import PLAN_FILE, RECORD_FILE
from iskd.schedules import History, Schedule, forecast, planned_steps
from iskd.schedules.mixed import parts_of
from iskd.system import read_json, write_whole
from iskd.system.version import CONF, options
from iskd.teacher import TeacherSpec
from iskd.teacher.load import build_config
from iskd.teacher.origin import find_teacher
from iskd.training.deciding import check_edits
from iskd.training.metrics.costs import check_every
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
        record: of the student that the run goes on from; None = it starts from the teacher.
        every: `eval.every` of the run.
    """

    config: PreTrainedConfig
    schedule: Schedule
    terms: Terms
    optim: OptimSpec
    windows: Mapping[str, int]
    text: str
    why: str
    tokens_told: str = ""
    record: Record | None = None
    every: int | str | None = None


def plan_ahead(ahead: Ahead, run_dir: Path) -> list[dict[str, Any]]:
    """Print and write the plan: exact parameters, stages and rates; layers that scores would choose are stand-ins.

    Raises:
        ValueError: as a run does of its plan.
    """
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(ahead.config, trust_remote_code=False)
    record = ahead.record or Record(int(ahead.config.num_hidden_layers))
    sizes, others = surgery.sizes(surgery.rebuild(teacher, record, "meta"), record)
    scores = dict.fromkeys(record.layers, 0.0)
    epochs = [getattr(each.schedule, "epochs", None) for each in parts_of(ahead.schedule)]
    before = len(record.edits)
    history = History(record, (), scores, sizes, others, _A_PASS if any(epochs) else None, before)
    check_edits(ahead.schedule, teacher, history)
    stages = forecast(ahead.schedule, history)
    step_tokens = 1
    for size in ahead.windows.values():
        step_tokens *= size
    steps = planned_steps(stages, step_tokens)
    losses, decay = losses_text(ahead.terms), ahead.optim.decay
    if not any(epochs):
        check_every(ahead.every, sum(steps) * step_tokens)
    rows = plan_rows(teacher, stages, steps, step_tokens, record=record, losses=losses, decay=decay)
    for row, stage in zip(rows[1:], stages, strict=True):
        passes = _epochs_of(ahead.schedule, stage.step)
        if passes and stage.tokens:
            said = f"{passes:g} pass" + "es" * (passes != 1)
            row |= {"budget": said if stage.tokens == round(passes * _A_PASS) else "a share", "steps": 0, "tokens": 0}
    check_plan(teacher, stages, record)
    write_whole(run_dir / PLAN_FILE, json.dumps(rows, indent=1))
    layout = " x ".join(f"{value:,} {name}" for name, value in ahead.windows.items() if value > 1)
    print_plan(rows, text=f"steps of {layout}, on {ahead.text}", unknown=ahead.why, tokens_told=ahead.tokens_told)
    return rows


def chained(folder: Path, reference: str | None = None) -> tuple[PreTrainedConfig, Record]:
    """The config of a student's teacher and the student's record, from what lies on this machine, without weights.

    Raises:
        ValueError: the folder holds no student, or nothing here tells its teacher's sizes.
    """
    described = describe(folder)
    own = _sizes_of(folder, reference)
    if own is not None:
        return own, record_of(folder, int(own.num_hidden_layers))
    record = described.record
    if not described.native:
        return described.config, record
    record = record_from_json(read_json(folder / RECORD_FILE, links=True))
    # a teacher's own class builds such a student: but for its depth, and what is said by layer, its sizes are the
    # teacher's
    values = described.config.to_dict()
    depth = values.pop("num_hidden_layers")
    lists = [key for key, value in values.items() if isinstance(value, list) and len(value) == depth != 1]
    for key in lists:
        values.pop(key)
    kind: Any = type(described.config)
    return kind(**values, num_hidden_layers=record.num_layers), record


def _sizes_of(folder: Path, reference: str | None) -> PreTrainedConfig | None:
    """The config of a student's teacher where it is at hand: of its run, its folder, or a preset of that name."""
    try:
        found = find_teacher(folder, reference)
        if found.config is None and found.path is None:
            presets = [
                yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text("utf-8")) for name in options("model")
            ]
            told = next((each for each in presets if each.get("name") == found.name and each.get("config")), None)
            if told is None:
                return None
            found = TeacherSpec(found.name, config=told["config"])
        return build_config(replace(found, pretrained=False))
    except ValueError:
        return None


def _epochs_of(schedule: Schedule, step: int) -> float | None:
    epochs: float | None = getattr(parts_of(schedule)[step].schedule, "epochs", None)
    return epochs


def first_sentence(error: BaseException) -> str:
    """What an error says, up to its first full stop that ends a sentence."""
    return " ".join(str(error).split()).split(". ")[0].split(" What works offline")[0][:300]
