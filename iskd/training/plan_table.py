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

from iskd.models import sharding, surgery
from iskd.plan import Record, Stage, to_json
from iskd.plan.run_files import PLAN_FILE
from iskd.report.terminal import print_table, terminal
from iskd.schedules import Schedule
from iskd.system import Json, Ranks, write_whole
from iskd.system.machine import PeakMemory, capacity, clock
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


def measured_step(module: DistillModule, input_ids: Tensor) -> tuple[float, int]:
    """One training step on windows [B, T], forward and backward, after one to warm up.

    Returns:
        Seconds per token, and the bytes that training takes on this device: the most in use during the step (on a CPU
        by the whole process), and the optimizer's two moments of what trains, which come later.
    """
    elapsed = 0.0
    with torch.enable_grad(), PeakMemory(module.device) as memory:
        for _ in range(2):
            start = clock(module.device)
            module.step(input_ids).loss.backward()
            elapsed = clock(module.device) - start
            for parameter in module.student.parameters():
                parameter.grad = None
    trained = [sharding.local(p) for p in module.student.parameters() if p.requires_grad]
    return elapsed / input_ids.numel(), memory.peak + sum(2 * p.nbytes for p in trained)


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
    budget: str = "",
) -> None:
    """Stages, exact parameter counts, steps, and the time and memory that one measured step predicts.

    Args:
        module: the run's, before its first edit.
        plan: all stages.
        steps: optimizer steps of each.
        step_tokens: tokens of one of them over all ranks.
        windows: token windows [B, T] for the measured step.
        ranks: rank 0 writes and prints.
        run_dir: gets `plan.json`.
        refit_tokens: training tokens that take as long as the refits of one stage's edits, on all of their text.
        budget: what is said of a number of tokens that nobody asked for.
    """
    alignment.check_whole(module.student, *(stage.objective for stage in plan))
    seconds, memory = measured_step(module, windows)
    seconds /= ranks.size
    rows = plan_rows(module.teacher, plan, steps, step_tokens, seconds)
    for row, stage in zip(rows[1:], plan, strict=True):
        row["refit_seconds"] = round(stage.refit_share * refit_tokens * seconds, 1) if stage.edits else 0.0
    check_plan(rows, plan)
    if ranks.rank == 0:
        write_whole(run_dir / PLAN_FILE, json.dumps(rows, indent=1))
        print_plan(rows, memory=memory, capacity=capacity(module.device), budget=budget)
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


def print_plan(
    rows: Sequence[Json], console: Console | None = None, *, memory: int = 0, capacity: int = 0, budget: str = ""
) -> None:
    """The plan as a table, what was decided for the user, and warnings.

    Args:
        rows: see `plan_rows`.
        console: None = standard output.
        memory: bytes that training is expected to take; 0 = not known.
        capacity: bytes that the device has; 0 = not known.
        budget: see `announce`.
    """
    table = Table(title="plan")
    for column in ("stage", "objective", "parameters", "of the blocks", "steps", "tokens", "about"):
        table.add_column(column, justify="left" if column in ("stage", "objective") else "right")
    for row in rows:
        share = f"{100 * row['block_params'] / max(1, rows[0]['block_params']):.1f} %"
        amounts = (f"{row['params']:,}", share, f"{row['steps']:,}", f"{row['tokens']:,}")
        table.add_row(Text(row["stage"]), row["objective"], *amounts, f"{_seconds(row):.0f} s")
    total = sum(_seconds(row) for row in rows)
    amounts = [f"{sum(row['tokens'] for row in rows):,} training tokens", f"about {_duration(total)}"]
    if memory:
        amounts.append(f"{memory / 2**30:.1f} GiB of memory")
    table.caption = f"{', '.join(amounts)} (by one measured step)"
    console = console or terminal()
    print_table(table, spare=("of the blocks", "objective"), console=console)
    if budget:
        console.print(budget, soft_wrap=True)
    warnings = too_short(rows)
    if 0 < capacity < memory:
        warnings.append(
            f"{memory / 2**30:.1f} GiB are more than the {capacity / 2**30:.1f} GiB of this device: lower "
            "data.batch_size, or set run.gradient_checkpointing=selective, schedule.train=lora or trainer=fsdp"
        )
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


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
