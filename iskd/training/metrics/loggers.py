"""Loggers of a run: rows and values to all of them, and what W&B gets besides."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import wandb
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from iskd.evaluation.results import evaluation_of
from iskd.plan import StageResult
from iskd.plan.metric_names import INSIDE, QUALITY, X_AXIS
from iskd.plan.results import student_of
from iskd.plan.run_files import (
    CONFIG_FILE,
    DATA_FILE,
    EFFICIENCY_FILE,
    ENVIRONMENT_FILE,
    EVALUATION_FILE,
    LENGTHS_TABLE_FILE,
    METRICS_FILE,
    MODEL,
    PICTURE_FILE,
    RECORD_FILE,
    REPORT_FILE,
    SAMPLES_FILE,
    STAGES_FILE,
    STAGES_TABLE_FILE,
    TRACKING_FILE,
)
from iskd.plan.saved_config import read_config
from iskd.plan.summary import summary
from iskd.report.contexts import length_rows
from iskd.report.figures.score_curves import score_curve
from iskd.report.read_run import read_run
from iskd.report.run_page import picture
from iskd.system import Json, read_json, write_whole
from iskd.system.reading import is_integer

#: Columns of the table of stages; the fields of `StageResult`, numbers as numbers.
COLUMNS = (
    *("index", "name", "status", "params", "block_params", "ppl", "kl", "top1", "retention"),
    *("tokens", "seconds", "train_tokens_per_s", "tokens_per_s"),
)
_ALONG = ("blocks edited", "layers left", "tokens")  # what changes along a run
_ID = re.compile(r"[\w-]{1,64}", re.ASCII)
_MOST = 100  # resumes that are listed
_LIGHTNINGS_AXIS = "trainer/global_step"
_FILES = (
    *(STAGES_FILE, REPORT_FILE, PICTURE_FILE, CONFIG_FILE, RECORD_FILE, DATA_FILE, ENVIRONMENT_FILE),
    *(EVALUATION_FILE, EFFICIENCY_FILE, SAMPLES_FILE, METRICS_FILE, STAGES_TABLE_FILE),
    LENGTHS_TABLE_FILE,
)


@rank_zero_only
def log_start(loggers: Iterable[Logger], run_dir: Path, resumed_at: int | None = None) -> None:
    """Name the axis of every curve and hand over the run's config; to be called before the first row.

    Args:
        loggers: those of the trainer.
        run_dir: the run's.
        resumed_at: tokens of the checkpoint that the run goes on from. What W&B has beyond it, of a session that was
            killed, comes again: a row `resumed_at` stands between the two, and the config lists all of them.
    """
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        run = logger.experiment
        for counter in (X_AXIS, _LIGHTNINGS_AXIS):
            run.define_metric(counter, summary="none", hidden=True)
        run.define_metric("*", step_metric=X_AXIS, summary="none")
        logger.log_hyperparams(_config(run_dir))
        if resumed_at is not None:
            places = [*resumed(run_dir), resumed_at]
            write_whole(run_dir / TRACKING_FILE, json.dumps({"wandb": run.id, "resumed_at": places}))
            run.config.update({"resumed_at": places}, allow_val_change=True)
            run.log({X_AXIS: float(resumed_at), "resumed_at": float(resumed_at)})


def tracked_as(run_dir: Path, asked: str | None = None) -> str:
    """Id of the W&B run that a run is: the one it had before, else `asked` or a new one; kept in its folder."""
    known = _tracking(run_dir).get("wandb")
    if isinstance(known, str) and _ID.fullmatch(known):
        return known
    found = asked or uuid4().hex[:8]
    write_whole(run_dir / TRACKING_FILE, json.dumps({"wandb": found, "resumed_at": []}))
    return found


def resumed(run_dir: Path) -> list[int]:
    """Tokens at which a tracked run was resumed so far."""
    places = _tracking(run_dir).get("resumed_at")
    return [place for place in places if is_integer(place)][-_MOST:] if isinstance(places, list) else []


def _tracking(run_dir: Path) -> Json:
    """What anybody may have written about the W&B run; empty where it cannot be read."""
    try:
        found = read_json(run_dir / TRACKING_FILE, max_bytes=1 << 16)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@rank_zero_only
def log_end(loggers: Iterable[Logger], run_dir: Path, results: Sequence[StageResult]) -> None:
    """Log the summary, tables, the picture, the report, the run's files and the student.

    Args:
        loggers: those of the trainer; what is no W&B or TensorBoard logger is left alone.
        run_dir: `stages.json` and `report.html` are in it already; `run.png` is written into it.
        results: all stages, the teacher's row first.
    """
    chosen = [logger for logger in loggers if isinstance(logger, WandbLogger | TensorBoardLogger)]
    if not chosen or student_of(results) is None:
        return
    values = summary(results)
    picture(run_dir, run_dir / PICTURE_FILE)
    for logger in chosen:
        if isinstance(logger, WandbLogger):
            _to_wandb(logger.experiment, run_dir, results, values)
        else:
            _to_tensorboard(logger, run_dir, results, values)


def _to_wandb(run: Any, run_dir: Path, results: Sequence[StageResult], values: Mapping[str, float]) -> None:
    shown: dict[str, Any] = {
        "stages": wandb.Table(columns=list(COLUMNS), data=_rows(results)),
        "picture": wandb.Image(str(run_dir / PICTURE_FILE)),
    }
    curve = score_curve("", results, read_run(run_dir, curves=False).num_layers)
    names = list(dict.fromkeys(name for point in curve.points for name in point.tasks or {}))
    if scores := [[r.index, int(layer), score] for r in results for layer, score in (r.scores or {}).items()]:
        shown["importance"] = wandb.Table(columns=["stage", "layer", "score"], data=scores)
    rows = [
        [p.edited, p.layers, p.tokens, p.retention, *((p.tasks or {}).get(name, (None,))[0] for name in names)]
        for p in curve.points
    ]
    shown["scores"] = wandb.Table(columns=[*_ALONG, "retention", *names], data=rows)
    for at, axis in enumerate(_ALONG):
        if len({row[at] for row in rows}) > 1:
            points = wandb.Table(columns=[axis, "retention"], data=[[row[at], row[3]] for row in rows])
            shown[f"retention by {axis}"] = wandb.plot.line(points, axis, "retention", title=f"Retention by {axis}")
    if (run_dir / REPORT_FILE).is_file():
        shown["report"] = wandb.Html(run_dir / REPORT_FILE, inject=False)
    said = read_run(run_dir, curves=False)
    if said.samples:
        words = [[sample.prompt, sample.teacher, sample.student, sample.same] for sample in said.samples]
        shown["samples"] = wandb.Table(columns=["prompt", "teacher", "student", "tokens alike"], data=words)
    if said.evaluation is not None:
        tasks = [[task.task, task.items, task.chance, task.student, task.teacher] for task in said.evaluation.tasks]
        head, *by_length = length_rows({"": said.evaluation})
        if by_length:
            shown["lengths"] = wandb.Table(columns=[*map(str, head[1:])], data=[row[1:] for row in by_length])
        shown["tasks"] = wandb.Table(columns=["task", "items", "chance", "student", "teacher"], data=tasks)
    run.log({X_AXIS: values["final/tokens"], **shown})
    run.summary.update(dict(values))
    files = wandb.Artifact(f"run-{run.id}", type="run", metadata=dict(values))
    for name in _FILES:
        if (run_dir / name).is_file():
            files.add_file(str(run_dir / name))
    run.log_artifact(files, aliases=_aliases(run_dir))
    if (run_dir / MODEL).is_dir() and _wants_model(_config(run_dir)):
        student = wandb.Artifact(f"student-{run.id}", type="model", metadata=dict(values))
        student.add_dir(str(run_dir / MODEL))
        run.log_artifact(student, aliases=_aliases(run_dir))


def _aliases(run_dir: Path) -> list[str]:
    """`latest` comes by itself; `final`, as nothing follows; and the folder's name, as far as W&B takes its signs."""
    name = re.sub(r"[^\w.-]+", "-", run_dir.resolve().name).strip("-")
    return ["final", *([name] if name and not re.fullmatch(r"v\d+|latest|final", name) else [])]


def _wants_model(config: Json) -> bool:
    """`logger.model` of W&B's keys, wherever they stand; true where nothing is said."""
    logger = config.get("logger")
    places = [logger, *logger.values()] if isinstance(logger, dict) else []
    named = [each for each in places if isinstance(each, dict) and str(each.get("_target_")).endswith("WandbLogger")]
    return all(each.get("model", True) is True for each in named)


def _to_tensorboard(
    logger: TensorBoardLogger, run_dir: Path, results: Sequence[StageResult], values: Mapping[str, float]
) -> None:
    writer = logger.experiment
    step = int(values["final/tokens"])
    head = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in _rows(results)]
    writer.add_text("stages", "\n".join([*head, *lines]), step)
    writer.add_image("picture", _pixels(run_dir / PICTURE_FILE), step, dataformats="HWC")
    logger.log_hyperparams(_config(run_dir), dict(values))
    writer.flush()


def _pixels(file: Path) -> Any:
    """A PNG as an array [height, width, 3] of bytes."""
    from matplotlib.image import imread

    return (imread(file)[..., :3] * 255).round().astype("uint8")


def _rows(results: Sequence[StageResult]) -> list[list[Any]]:
    return [[getattr(result, column) for column in COLUMNS] for result in results]


def _config(run_dir: Path) -> dict[str, Any]:
    """The run's config as nested dicts; empty where the run was put together by hand."""
    file = run_dir / CONFIG_FILE
    return read_config(file) if file.is_file() else {}


def log_inside(loggers: Iterable[Any], quality: Mapping[str, float], tokens: int, stage: int, step: int) -> None:
    """Give what was measured inside a stage to every logger."""
    log_values(loggers, {**{f"val/{key}": quality[key] for key in QUALITY}, INSIDE: 1.0}, tokens, stage, step)


def log_row(loggers: Iterable[Any], row: StageResult, step: int) -> None:
    """Give a stage's result to every logger (`log_metrics(values, step)`), against cumulative tokens."""
    values = {f"val/{key}": getattr(row, key) for key in QUALITY}
    values |= {"model/params": row.params, "model/block_params": row.block_params}
    speeds = {"val/tokens_per_s": row.tokens_per_s, "train/tokens_per_s": row.train_tokens_per_s}
    values |= {name: speed for name, speed in speeds.items() if speed is not None}
    log_values(loggers, {**values, **task_values(row.evaluation)}, row.tokens, row.index, step)


def task_values(evaluation: Json | None) -> dict[str, float]:
    """The student's scores of an evaluation by task, its mean retention, and the perplexity of its text."""
    if evaluation is None:
        return {}
    found = evaluation_of(evaluation)
    values = {f"task/{task.task}": task.student for task in found.tasks} | {"task/retention": found.mean.value}
    if found.text is not None:
        values["task/perplexity"] = found.text.perplexity
    return {name: value for name, value in values.items() if math.isfinite(value)}


def log_values(loggers: Iterable[Any], values: Mapping[str, float], tokens: int, stage: int, step: int) -> None:
    """Give values of a stage to every logger, with their place on the axes."""
    for logger in loggers:
        logger.log_metrics({**values, X_AXIS: float(tokens), "stage": float(stage)}, step=step)
