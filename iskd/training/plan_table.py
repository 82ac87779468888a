"""The plan of a run: which stages it will have, how large the student will be and how long it will take."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel

from iskd.losses import Terms
from iskd.models import sharding, surgery
from iskd.plan import Convert, Record, Stage, to_json
from iskd.plan.run_files import PLAN_FILE
from iskd.report.terminal import print_table, terminal
from iskd.schedules import Schedule
from iskd.system import Json, Ranks, write_whole
from iskd.system.machine import PeakMemory, capacity, clock
from iskd.training.metrics.costs import Costs
from iskd.training.step import DistillModule, alignment
from iskd.training.step.trainable import new_parameters, trainable

ALIGN_STEPS = 20
"""An alignment stage with fewer optimizer steps is warned of: a tenth of them warm up, the last tenth falls."""


def plan_rows(
    teacher: PreTrainedModel,
    stages: Sequence[Stage],
    steps: Sequence[int],
    step_tokens: int,
    costs: Costs | float = 0.0,
    *,
    record: Record | None = None,
    losses: str = "",
    decay: str = "",
) -> list[Json]:
    """One row per stage with exact parameter counts, taken from shapes on the meta device.

    Args:
        teacher: of the run, on any device.
        stages: all stages.
        steps: optimizer steps of each.
        step_tokens: tokens of one of them.
        costs: what takes how long; a number = seconds of a training token, and nothing else is counted.
        record: edits from before the run.
        losses: what stages without an objective of their own minimise.
        decay: how rates fall in stages without a shape of their own.
    """
    costs = costs if isinstance(costs, Costs) else Costs(costs)
    record = record or Record(int(teacher.config.num_hidden_layers))
    rows: list[Json] = [_row(Stage("teacher"), surgery.rebuild(teacher, Record(record.num_layers), "meta"), 0, 0)]
    rows[0] |= {"measure_seconds": round(costs.begun, 1)}
    model = surgery.rebuild(teacher, record, "meta")
    done = 0
    for number, (stage, count) in enumerate(zip(stages, steps, strict=True)):
        record = surgery.apply(model, record, stage.edits)
        alignment.check(model, record, stage)
        tokens = count * step_tokens
        row = _row(stage, model, count, tokens)
        if count:
            minimises = losses if stage.objective == "loss" else stage.objective
            row |= {"train": stage.train, "losses": minimises, "lr": stage.lr, "decay": stage.shape or decay}
            row |= _trained(model, record, stage)
        rows.append({**row, **costs.of(number, stage, row, done)})
        done += tokens
    rows[-1]["end_seconds"] = round(costs.ends, 1)
    return rows


def _row(stage: Stage, model: PreTrainedModel, steps: int, tokens: int) -> Json:
    return {
        "stage": stage.name,
        "objective": stage.objective if tokens else "",
        "params": surgery.parameters(model),
        "block_params": surgery.block_parameters(model),
        "steps": steps,
        "tokens": tokens,
        "train_seconds": 0.0,
        "edits": to_json(stage)["edits"],
    }


def _trained(model: PreTrainedModel, record: Record, stage: Stage) -> Json:
    """How many parameters a stage trains, None of adapters, which are attached when it begins; the rate of new ones."""
    new = {id(parameter) for parameter in new_parameters(model, record, stage)}
    found = None if stage.train == "lora" else trainable(model, record, stage)
    row: Json = {"trained": None if found is None else sum(parameter.numel() for parameter in found)}
    if new and (found is None or any(id(parameter) in new for parameter in found)):
        row["lr_new"] = stage.lr_new
    return row


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
    costs: Costs,
    text: str = "",
    tokens_told: str = "",
    ends: Callable[[float], float] = lambda _token: 0.0,
    speedup: int = 1,
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
        costs: what is known of the rest; its `token` is measured here.
        text: batch, windows and data in words.
        tokens_told: what is said of a number of tokens that nobody asked for.
        ends: of the seconds of a training token those of the end of the run, where they go by them.
        speedup: how many times as fast as these the processes are that the run will have.
    """
    alignment.check_whole(module.student, *(stage.objective for stage in plan))
    seconds, memory = measured_step(module, windows)
    token = seconds / ranks.size / speedup
    costs = replace(costs, token=token, ends=costs.ends + ends(token))
    losses, decay = losses_text(module.terms), module.optim.decay
    rows = plan_rows(module.teacher, plan, steps, step_tokens, costs, record=module.record, losses=losses, decay=decay)
    check_plan(module.teacher, plan, module.record)
    if ranks.rank == 0:
        write_whole(run_dir / PLAN_FILE, json.dumps(rows, indent=1))
        print_plan(rows, text=text, memory=memory, capacity=capacity(module.device), tokens_told=tokens_told)
        if any(map(costs.refit_tokens, plan)) and not any(stage.edits for stage in plan):
            terminal().print("warning: nothing is edited, so that refit= does nothing", style="yellow", soft_wrap=True)


def losses_text(terms: Terms) -> str:
    """Losses and their weights: `kl + 0.1 ce`."""
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, (_, weight) in terms.items())


def check_plan(teacher: PreTrainedModel, stages: Sequence[Stage], record: Record) -> None:
    """Raise ValueError when blocks are to be replaced or removed and the student would not get smaller by that.

    A mixer may be larger than the attention in whose place it stands: conversions are left out of the sum.

    Args:
        teacher: of the run, on any device.
        stages: all stages.
        record: edits from before the run.
    """
    edits = [*record.edits, *(edit for stage in stages for edit in stage.edits)]
    shrinking = [edit for edit in edits if not isinstance(edit, Convert)]
    if not any(not isinstance(edit, Convert) for stage in stages for edit in stage.edits):
        return
    records = Record(record.num_layers), Record(record.num_layers, tuple(shrinking))
    before, after = (surgery.block_parameters(surgery.rebuild(teacher, each, "meta")) for each in records)
    if after >= before:
        mixers = "" if len(shrinking) == len(edits) else ", mixers left out"
        raise ValueError(
            f"the edits remove nothing: {before:,} block parameters before them and {after:,} after{mixers}; choose a "
            "smaller block (block.ratio), or schedule=none"
        )


def print_plan(
    rows: Sequence[Json],
    console: Console | None = None,
    *,
    text: str = "",
    unknown: str = "",
    memory: int = 0,
    capacity: int = 0,
    tokens_told: str = "",
) -> None:
    """The plan as a table, what was decided for the user, and warnings.

    Args:
        rows: of `plan_rows`.
        console: None = standard output.
        text: batch, windows and data in words.
        unknown: why times are left open; "" = they are known.
        memory: bytes that training is expected to take; 0 = not known.
        capacity: bytes that the device has; 0 = not known.
        tokens_told: see `announce`.
    """
    table = Table(title="plan")
    columns = ("stage", "objective", "trains", "rates", "parameters", "of the blocks", "steps", "tokens", "about")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:4] else "right")
    for row in rows:
        share = f"{100 * row['block_params'] / max(1, rows[0]['block_params']):.1f} %"
        steps, tokens = (row.get("budget") or f"{row[key]:,}" for key in ("steps", "tokens"))
        amounts = (f"{row['params']:,}", share, steps, tokens)
        about = "open" if unknown else f"{seconds_of(row):.0f} s"
        words = (Text(row["stage"]), Text(row.get("losses") or row["objective"]), _trains(row), _rates(row))
        table.add_row(*words, *amounts, about)
    total, passes = sum(map(seconds_of, rows)), next((row["budget"] for row in rows if row.get("budget")), None)
    trained = f"{sum(row['tokens'] for row in rows):,} training tokens" if passes is None else f"{passes} in a stage"
    time = f"times are left open: {unknown}" if unknown else f"about {_duration(total)} (by one measured step)"
    room = f"{memory / 2**30:.1f} GiB of memory" if memory else ""
    table.caption = Text("; ".join(filter(None, (trained, text, time, room))))
    console = console or terminal()
    print_table(table, spare=("of the blocks", "trains", "rates", "objective"), console=console)
    if tokens_told:
        console.print(tokens_told, soft_wrap=True)
    warnings = too_short(rows) if passes is None else []
    if 0 < capacity < memory:
        warnings.append(
            f"{memory / 2**30:.1f} GiB are more than the {capacity / 2**30:.1f} GiB of this device: lower "
            "data.batch_size, or set run.gradient_checkpointing=selective, schedule.train=lora or trainer=fsdp"
        )
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def _trains(row: Json) -> str:
    if "train" not in row:
        return ""
    return row["train"] if row["trained"] is None else f"{row['train']:.20}, {row['trained'] / 1e6:.2f} M"


def _rates(row: Json) -> str:
    if "lr" not in row:
        return ""
    new = f", new {row['lr_new']:g}" if row.get("lr_new", row["lr"]) != row["lr"] else ""
    return f"{row['lr']:g}{new} {row['decay']}".rstrip()


def seconds_of(row: Json) -> float:
    """All of a row's times, and those of the end of the run."""
    return float(sum(value for key, value in row.items() if key.endswith("_seconds")))


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
