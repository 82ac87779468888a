"""The folder of a run, read for people: every file is optional, and what cannot be read is told."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from iskd.evaluation import Efficiency, Evaluation
from iskd.evaluation.results import efficiency_of, evaluation_of
from iskd.evaluation.speaking import Sample, samples_of
from iskd.plan import StageResult
from iskd.plan.budget_plan import BudgetPlan, read_plan
from iskd.plan.edits import MAX_LAYERS
from iskd.plan.failure import read_failure
from iskd.plan.metric_names import ALIGN, NOT_LOSSES, X_AXIS
from iskd.plan.results import read_stages, teacher_of
from iskd.plan.run_files import (
    BUDGET_FILE,
    CONFIG_FILE,
    DATA_FILE,
    EFFICIENCY_FILE,
    ENVIRONMENT_FILE,
    EVALUATION_FILE,
    METRICS_FILE,
    MODEL,
    PLAN_FILE,
    RECORD_FILE,
    SAMPLES_FILE,
    STAGES_FILE,
)
from iskd.report.promised import Promise, promises_of
from iskd.system import read_json
from iskd.system.files import leads_out, read_plain
from iskd.system.tables import read_csv

_LAYER = re.compile(ALIGN + r"[0-9]{1,4}")
_Read = TypeVar("_Read")
_LONGEST_TEXT = 1 << 20  # bytes; a config has about 5,000
_MOST_CURVES = 50
_MOST_LAYERS = 512


@dataclass
class RunFiles:
    """A run directory's contents; `notes` tells what is missing or cannot be read, `faults` the latter alone."""

    name: str
    stages: list[StageResult] = field(default_factory=list)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    layers: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    axis: str = X_AXIS
    config: str | None = None
    record: Any = None
    data: Any = None
    environment: Any = None
    failure: str | None = None
    model_bytes: int | None = None
    efficiency: Efficiency | None = None
    evaluation: Evaluation | None = None
    samples: list[Sample] = field(default_factory=list)
    budget: BudgetPlan | None = None
    plan: list[Promise] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def num_layers(self) -> int:
        """The teacher's layers: from the record, else the highest layer that any stage names."""
        count = self.record.get("num_layers") if isinstance(self.record, dict) else None
        if isinstance(count, int) and not isinstance(count, bool) and 1 <= count <= MAX_LAYERS:
            return count
        named = [edit["layer"] for stage in self.stages for edit in stage.edits]
        named += [int(layer) for stage in self.stages for layer in stage.scores or {}]
        return max(named, default=-1) + 1


def read_run(run_dir: Path, *, curves: bool = True) -> RunFiles:
    """Read what a run left.

    Args:
        run_dir: The run's directory.
        curves: Whether to read the loss curves, by far the longest file.

    Raises:
        ValueError: `run_dir` is no directory, or its `stages.json` is broken.
    """
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a directory: pass the directory of a run, the one that holds {STAGES_FILE}")
    run = RunFiles(name=run_dir.resolve().name)
    if (run_dir / STAGES_FILE).exists():
        run.stages = read_stages(run_dir)
    else:
        run.notes.append(f"{STAGES_FILE} is missing: no stage table and no plots of stages")
    run.failure = read_failure(run_dir)
    if run.failure is not None:
        run.notes.append(f"the run failed: {run.failure}")
    if run.stages and teacher_of(run.stages) is None:
        run.notes.append(f"{STAGES_FILE} has no stage 0 (the teacher): nothing to compare the student with")
    if curves:
        _read_curves(run_dir / METRICS_FILE, run)
    run.config = _read(run_dir / CONFIG_FILE, _text, run)
    run.record, run.data, run.environment = (
        _read(run_dir / name, read_json, run) for name in (RECORD_FILE, DATA_FILE, ENVIRONMENT_FILE)
    )
    if leads_out(run_dir / MODEL):
        _tell_fault(run, f"{MODEL}/ is a link out of the folder: its size is not counted")
    elif (run_dir / MODEL).is_dir():
        run.model_bytes = sum(path.stat().st_size for path in (run_dir / MODEL).rglob("*") if path.is_file())
    else:
        run.notes.append(f"{MODEL}/ is missing: the student was not exported")
    # Made by commands of their own after the run, so their absence is nothing to tell.
    run.efficiency = _read(run_dir / EFFICIENCY_FILE, lambda path: efficiency_of(read_json(path)), run, expected=False)
    run.evaluation = _read(run_dir / EVALUATION_FILE, lambda path: evaluation_of(read_json(path)), run, expected=False)
    run.budget = _read(run_dir / BUDGET_FILE, read_plan, run, expected=False)
    run.samples = _read(run_dir / SAMPLES_FILE, lambda path: samples_of(read_json(path)), run, expected=False) or []
    run.plan = _read(run_dir / PLAN_FILE, lambda path: promises_of(read_json(path)), run, expected=False) or []
    return run


def _read(path: Path, reader: Callable[[Path], _Read], run: RunFiles, *, expected: bool = True) -> _Read | None:
    """What a file holds; None where it is missing, told if it was `expected`, or cannot be read, always told."""
    if not path.exists():
        run.notes += [f"{path.name} is missing"] if expected else []
        return None
    try:
        return reader(path)
    except (OSError, ValueError) as error:
        _tell_fault(run, f"{path.name} cannot be shown: {error}")
        return None


def _tell_fault(run: RunFiles, text: str) -> None:
    run.notes.append(text)
    run.faults.append(text)


def _text(path: Path) -> str:
    return read_plain(path, max_bytes=_LONGEST_TEXT).decode("utf-8", errors="replace")


def _read_curves(path: Path, run: RunFiles) -> None:
    """Loss curves by metric; a row without a token count belongs to the last count before it."""
    if not path.exists():
        run.notes.append(f"{path.name} is missing: no loss curves")
        return
    try:
        table = read_csv(path)
    except (OSError, ValueError) as error:
        _tell_fault(run, f"{path.name} cannot be shown: {error}")
        return
    losses = [name for name in table.columns if name.startswith("train/") and name not in NOT_LOSSES]
    run.axis = X_AXIS if X_AXIS in table.columns else "step"
    if run.axis not in table.columns or not losses:
        run.notes.append(f"{path.name} has no column {X_AXIS!r} or no train/ column: no loss curves")
        return
    if len(losses) > _MOST_CURVES:
        run.notes.append(f"{path.name} has {len(losses)} train/ columns: the first {_MOST_CURVES} are drawn")
    x, bad = 0.0, 0
    axis, drawn = table.columns.index(run.axis), [(name, table.columns.index(name)) for name in losses[:_MOST_CURVES]]
    aligned = [(int(name.removeprefix(ALIGN)), at) for at, name in enumerate(table.columns) if _LAYER.fullmatch(name)]
    for row in table.rows:
        x = _cell(row[axis], x)
        for layer, at in aligned[:_MOST_LAYERS]:
            if not math.isnan(y := _cell(row[at], math.nan)):
                run.layers.setdefault(layer, []).append((x, y))
        for name, at in drawn:
            y = _cell(row[at], math.nan)
            bad += math.isnan(y) and bool(row[at])
            if not math.isnan(y):
                run.curves.setdefault(name, []).append((x, y))
    if table.skipped:
        run.notes.append(f"{path.name}: {table.skipped} lines are no rows and are left out")
    if bad:
        run.notes.append(f"{path.name}: {bad} cells of loss columns are not numbers and are left out")


def _cell(text: str, otherwise: float) -> float:
    try:
        return float(text) if text else otherwise
    except ValueError:
        return otherwise
