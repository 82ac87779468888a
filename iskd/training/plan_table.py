"""The plan of a run: which stages it will have, how large the student will be and how long it will take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel

from iskd.models import surgery
from iskd.plan import Record, Stage, to_json
from iskd.plan.run_files import PLAN_FILE
from iskd.report.terminal import print_table, terminal
from iskd.schedules import Schedule
from iskd.system import Json, Ranks, write_whole
from iskd.system.machine import clock
from iskd.training.step import DistillModule, alignment

ALIGN_STEPS = 20
"""An alignment stage with fewer optimizer steps is warned of: a tenth of them warm up, the last tenth falls."""


def plan_rows(
    teacher: PreTrainedModel, stages: Sequence[Stage], steps: Sequence[int], step_tokens: int, seconds_per_token: float
) -> list[Json]:
    """One row per stage with exact parameter counts, taken from shapes on the meta device.

    `steps` are the optimizer steps of each stage, of `step_tokens` tokens.
    """
    record = Record(int(teacher.config.num_hidden_layers))
    model = surgery.rebuild(teacher, record, "meta")
    rows: list[Json] = [_row(Stage("teacher"), model, 0, 0, 0.0)]
    for stage, count in zip(stages, steps, strict=True):
        record = surgery.apply(model, record, stage.edits)
        alignment.check(model, record, stage)
        rows.append(_row(stage, model, count, count * step_tokens, seconds_per_token))
    return rows


def _row(stage: Stage, model: PreTrainedModel, steps: int, tokens: int, seconds_per_token: float) -> Json:
    return {
        "stage": stage.name,
        "objective": stage.objective if tokens else "",
        "params": surgery.parameters(model),
        "block_params": surgery.block_parameters(model),
        "steps": steps,
        "tokens": tokens,
        "train_seconds": round(tokens * seconds_per_token, 1),
        "edits": to_json(stage)["edits"],
    }


def measured_step(module: DistillModule, input_ids: Tensor) -> float:
    """Seconds per token of one training step on windows [B, T], forward and backward, after one to warm up."""
    elapsed = 0.0
    with torch.enable_grad():
        for _ in range(2):
            start = clock(module.device)
            module.step(input_ids).loss.backward()
            elapsed = clock(module.device) - start
            for parameter in module.student.parameters():
                parameter.grad = None
    return elapsed / input_ids.numel()


def check_alignment(student: PreTrainedModel, schedule: Schedule) -> None:
    """Refuse a student in shards that the schedule is going to align: at the start, before anything is measured.

    Raises ValueError; of a schedule that does not list its `stages`, `announce` asks the same of the plan.
    """
    alignment.check_whole(student, *(stage.objective for stage in getattr(schedule, "stages", ())))


def announce(
    module: DistillModule,
    plan: Sequence[Stage],
    steps: Sequence[int],
    step_tokens: int,
    windows: Tensor,
    ranks: Ranks,
    run_dir: Path,
    refit_tokens: float = 0.0,
) -> None:
    """Stages, exact parameter counts, steps and the time that one measured step predicts, before the first step.

    Args:
        module: the run's, before its first edit.
        plan: all stages.
        steps: optimizer steps of each.
        step_tokens: tokens of one of them over all ranks.
        windows: token windows [B, T] for the measured step.
        ranks: rank 0 writes and prints.
        run_dir: gets `plan.json`.
        refit_tokens: training tokens that take as long as the refits of one stage's edits, on all of their text.
    """
    alignment.check_whole(module.student, *(stage.objective for stage in plan))
    seconds = measured_step(module, windows) / ranks.size
    rows = plan_rows(module.teacher, plan, steps, step_tokens, seconds)
    for row, stage in zip(rows[1:], plan, strict=True):
        tokens = stage.refit_share * (stage.refit_budget or refit_tokens) if refit_tokens and stage.edits else 0.0
        row["refit_seconds"] = round(tokens * seconds, 1)
    check_plan(rows, plan)
    if ranks.rank == 0:
        write_whole(run_dir / PLAN_FILE, json.dumps(rows, indent=1))
        print_plan(rows)
        if refit_tokens and not any(stage.edits for stage in plan):
            terminal().print("warning: nothing is edited, so that refit= does nothing", style="yellow", soft_wrap=True)


def check_plan(rows: Sequence[Json], stages: Sequence[Stage]) -> None:
    """Raise ValueError when blocks are to be replaced or removed and the student would not get smaller."""
    if (
        any(edit.op != "convert" for stage in stages for edit in stage.edits)
        and rows[-1]["block_params"] >= rows[0]["block_params"]
    ):
        raise ValueError(
            f"the edits remove nothing: {rows[0]['block_params']:,} block parameters before them and "
            f"{rows[-1]['block_params']:,} after; choose a smaller block (block.ratio), or schedule=none"
        )


def print_plan(rows: Sequence[Json], console: Console | None = None) -> None:
    """The plan as a table, and a warning for every alignment stage that is too short to align anything."""
    table = Table(title="plan")
    for column in ("stage", "objective", "parameters", "of the blocks", "steps", "tokens", "about"):
        table.add_column(column, justify="left" if column in ("stage", "objective") else "right")
    for row in rows:
        share = f"{100 * row['block_params'] / max(1, rows[0]['block_params']):.1f} %"
        amounts = (f"{row['params']:,}", share, f"{row['steps']:,}", f"{row['tokens']:,}")
        table.add_row(Text(row["stage"]), row["objective"], *amounts, f"{_seconds(row):.0f} s")
    total = sum(_seconds(row) for row in rows)
    table.caption = (
        f"{sum(row['tokens'] for row in rows):,} training tokens, about {total / 60:.1f} min (by one measured step)"
    )
    console = console or terminal()
    print_table(table, spare=("of the blocks", "objective"), console=console)
    for warning in too_short(rows):
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)


def _seconds(row: Json) -> float:
    """Of a stage's training and of the refits before it."""
    return float(row["train_seconds"] + row.get("refit_seconds", 0.0))


def too_short(rows: Sequence[Json]) -> list[str]:
    """A sentence for every alignment stage of a plan with fewer than `ALIGN_STEPS` optimizer steps."""
    mixers, hidden = "schedule.mixers_share", "schedule.hidden_share"
    shares = {"matrix": mixers, "mixer_output": mixers, "hidden": hidden}
    return [
        f"stage {row['stage']!r} ({row['objective']}) has {row['steps']} optimizer steps, and fewer than {ALIGN_STEPS} "
        f"align little: raise schedule.tokens, or {shares[row['objective']]}, its share of them"
        for row in rows
        if row["objective"] in shares and row["steps"] < ALIGN_STEPS
    ]
