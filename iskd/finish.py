"""What a run writes down: facts at its start, results, report and the student at its end."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from iskd import checkpoint, efficiency, sharding, surgery
from iskd.distributed import Ranks
from iskd.evaluate import evaluate
from iskd.export import export
from iskd.module import DistillModule
from iskd.parts import Parts, Result
from iskd.plan import Record, to_json
from iskd.progress_line import ProgressLine
from iskd.report import write_report
from iskd.state import RunState
from iskd.table import stage_table
from iskd.tracking import StageResult, write_stages
from iskd.tracking_wandb import log_end

EVALUATION = "evaluation.json"


def write_facts(parts: Parts, trainer: L.Trainer) -> None:
    """What identifies data, teacher and machine, beside the results."""
    facts = {
        "teacher": parts.teacher.source,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "precision": str(trainer.precision),
        "processes": trainer.world_size,
    }
    (parts.run_dir / "environment.json").write_text(json.dumps(facts, indent=1))
    write_data(parts)


def write_data(parts: Parts) -> None:
    """What identifies the data, and what layers were selected by."""
    data = {**parts.data.manifest(), "selection_sha256": _selected(parts)}
    (parts.run_dir / "data.json").write_text(json.dumps(data, indent=1))


def _selected(parts: Parts) -> dict[str, list[str]]:
    """Hashes of the items of tasks that layers are chosen by."""
    selection = getattr(parts.importance, "selection", {})
    return {task: [item.sha256 for item in items] for task, items in selection.items()}


def finish(parts: Parts, trainer: L.Trainer, module: DistillModule, state: RunState) -> Result:
    """Measure the student that the run ended with, and write what others read: tables, report, model.

    Called on every rank after the fit.
    """
    run_dir, model_dir, report = parts.run_dir, None, None
    if parts.options.plan_only:
        return Result(state.results, module.student, state.record, run_dir, None, None)
    student = _gathered(module, state.record, Ranks(trainer))
    if trainer.is_global_zero:
        write_stages(run_dir, state.results)
        write_data(parts)  # again: now with every calibration window that was used
        (run_dir / "record.json").write_text(json.dumps(to_json(state.record), indent=1))
        _measure(parts, module, student)
        report = write_report(run_dir)
        _print_end(state.results, report)  # before the export: what was measured stands even if that fails
        log_end(parts.loggers, run_dir, state.results)
        if parts.export:
            teacher = parts.teacher
            model_dir = export(
                run_dir / "model", student, state.record, teacher.model.config, teacher.tokenizer,
                teacher=teacher.source, run_dir=run_dir, max_shard_bytes=parts.options.max_shard_bytes,
            )  # fmt: skip
            Console().print(f"model:  {model_dir}", highlight=False, soft_wrap=True)
    trainer.strategy.barrier("finish")
    return Result(state.results, student, state.record, run_dir, model_dir, report)


def _measure(parts: Parts, module: DistillModule, student: PreTrainedModel) -> None:
    """Latency, memory and cache beside the teacher's (efficiency.json), and tasks if asked for (evaluation.json)."""
    teacher, seconds = module.teacher, parts.options.efficiency_seconds
    if sharding.is_sharded(teacher) or not (seconds or parts.evaluation):
        return  # shards generate no text: `iskd evaluate` on the export does
    device = next(teacher.parameters()).device
    nn.Module.to(student, device)
    low = torch.bfloat16 if device.type == "cuda" else None  # as it will be served
    with ProgressLine() as line:
        if seconds:
            found = efficiency.compare(teacher, student, seconds=seconds, dtype=low, progress=line)
            efficiency.write(parts.run_dir, found)
        if parts.evaluation:
            with torch.autocast(device.type, torch.bfloat16, enabled=low is not None):
                evaluation = evaluate(
                    student, parts.teacher.tokenizer, parts.evaluation, parts.teacher,
                    exclude=[sha for items in _selected(parts).values() for sha in items],
                )  # fmt: skip
            (parts.run_dir / EVALUATION).write_text(evaluation.to_json())


def _gathered(module: DistillModule, record: Record, ranks: Ranks) -> Any:
    """The student with whole weights: itself, or of one in shards a copy on rank 0's CPU."""
    if not sharding.is_sharded(module.student):
        return module.student
    tensors = checkpoint.held(checkpoint.model_tensors(module.student), ranks)
    if ranks.rank:
        return module.student
    student = surgery.rebuild(module.teacher, record)
    checkpoint.load_model_tensors(student, tensors)
    return student


def _print_end(results: list[StageResult], report: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(stage_table(results))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform != "darwin" else 1 << 30)
    console.print(f"peak memory {peak:.2f} GiB", highlight=False)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)
