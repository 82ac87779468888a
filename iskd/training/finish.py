"""The end of a run: the student, its evaluation and efficiency, results and report."""

from __future__ import annotations

import dataclasses
import json
import logging
import resource
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import lightning as L
import torch
from torch import nn
from transformers import PreTrainedModel

from iskd.data import framing_of
from iskd.evaluation import EvalSpec, efficiency
from iskd.evaluation.speaking import samples, write_samples
from iskd.export import export
from iskd.export.card_measured import refresh_card
from iskd.models import Stack, sharding
from iskd.models.weights import weights_sha256
from iskd.plan import Record, StageResult
from iskd.plan.results import write_stages
from iskd.plan.run_files import ENDED, EVALUATION_FILE, MODEL, PLAN_FILE, REPORT_FILE, write_record
from iskd.report import stage_table, write_report
from iskd.report.stage_rows import SPARE
from iskd.report.terminal import print_table, terminal
from iskd.schedules.budget import measure_finished
from iskd.system import Busy, Preempted, ProgressLine, Ranks, global_rank, read_json, write_whole
from iskd.system.faults import mendable
from iskd.system.precision import serving_dtype
from iskd.system.stop_signals import StopSignals
from iskd.system.text import hydra_text
from iskd.training.editing import BrokenOffError
from iskd.training.facts import selected, write_data
from iskd.training.live import AgreedStop
from iskd.training.metrics import log_end
from iskd.training.metrics.along import AlongTheRun
from iskd.training.parts import Parts, Result
from iskd.training.state import RunState, gathered, stored_in
from iskd.training.step import DistillModule
from iskd.training.strategies import ranks_of

log = logging.getLogger(__name__)


def finish(
    parts: Parts,
    trainer: L.Trainer,
    module: DistillModule,
    state: RunState,
    stop_signals: StopSignals,
    along: AlongTheRun | None = None,
) -> Result:
    """Write what the run leaves, tables, student and report, and measure the student. Called on every rank.

    What cannot be had again without training comes first. A measurement that fails is named with the command that
    repeats it, and the run ends well; an export that fails is an error, raised when everything else is written.

    Raises:
        Preempted: a stop signal came. What was finished stays, nothing is half-written, and a resume does it again.
    """
    run_dir, start = parts.run_dir, time.perf_counter()
    if parts.options.plan_only:
        return Result(state.results, module.student, state.record, run_dir, None, None)
    ranks, in_shards = ranks_of(trainer), sharding.is_sharded(module.teacher)
    student = gathered(module, state.record, ranks)
    if not trainer.is_global_zero:
        trainer.strategy.barrier("finish")
        if in_shards:
            _ask_in_shards(parts, module, ranks, stop_signals, along)
        return Result(state.results, student, state.record, run_dir, None, None)
    written = False
    try:
        try:
            with stop_signals.at_once(run_dir):
                model_dir, failed = _write(parts, student, state)
            written = True
        finally:
            # where models are whole the others are done: measuring may last longer than they would wait
            trainer.strategy.barrier("finish")
            if in_shards and not written:
                _leave(ranks)
        if in_shards:
            _ask_in_shards(parts, module, ranks, stop_signals, along, model_dir)
        with stop_signals.at_once(run_dir):
            if in_shards:
                _tell_unmeasured(parts, model_dir)
            else:
                _measure(parts, module, student, model_dir, along)
            if model_dir is not None:
                with _guarded("the scores in the model card", f"They are in {run_dir} too"):
                    refresh_card(model_dir, run_dir)
            _tell_end(run_dir, time.perf_counter() - start)
            stop_signals.obey()
            report = _report(run_dir)
            _print_end(state.results, report, model_dir)
            with _guarded("what the logger shows at the end", f"Every file is in {run_dir}"):
                log_end(parts.loggers, run_dir, state.results)
    except Preempted:
        stop_signals.hand_on()
        raise
    if failed is not None:
        raise failed
    return Result(state.results, student, state.record, run_dir, model_dir, report)


def _write(parts: Parts, student: PreTrainedModel, state: RunState) -> tuple[Path | None, Exception | None]:
    """Tables, record, a first report and the student; what the export failed with is kept for later."""
    write_stages(parts.run_dir, state.results)
    write_data(parts)  # again: now with every calibration window that was used
    write_record(parts.run_dir, state.record)
    _report(parts.run_dir)
    try:
        return (_export(parts, student, state.record) if parts.export else None), None
    except Exception as error:
        log.error("the export failed (%s: %s); what else the run leaves is written first", type(error).__name__, error)
        return None, error


def _report(run_dir: Path) -> Path | None:
    with _guarded(REPORT_FILE, f"Again: {shlex.join(['iskd', 'report', str(run_dir)])}"):
        return write_report(run_dir)
    return None


def _export(parts: Parts, student: PreTrainedModel, record: Record) -> Path:
    teacher = parts.teacher
    with Busy("writing the student and reopening it in a fresh process"):
        return export(
            parts.run_dir / MODEL, student, record, teacher.model.config, teacher.tokenizer,
            teacher=teacher.source, run_dir=parts.run_dir, max_shard_bytes=parts.options.max_shard_bytes,
            dtype=stored_in(parts.export_dtype, teacher), text=parts.data.validation_windows(), code=parts.export_code,
        )  # fmt: skip


def _measure(
    parts: Parts,
    module: DistillModule,
    student: PreTrainedModel,
    model_dir: Path | None,
    along: AlongTheRun | None,
) -> None:
    """Latency, memory and cache beside the teacher's (efficiency.json), then tasks and samples."""
    teacher, seconds = module.teacher, parts.options.efficiency_seconds
    if seconds:
        with _guarded("efficiency", f"Again: {again(parts, model_dir, None)}"), ProgressLine() as line:
            nn.Module.to(student, device := next(teacher.parameters()).device)
            models, dtype = {"teacher": teacher, "student": student}, serving_dtype(device)
            with _guarded("times within the budget", "The report has those of the plan alone"):
                seconds -= measure_finished(parts.run_dir, teacher, student, dtype, seconds / 4)
            efficiency.write(parts.run_dir, efficiency.measure(models, seconds=seconds, dtype=dtype, progress=line))
    _ask(parts, module, student, model_dir, along, () if parts.asked is None else parts.asked.quantize)
    _speak(parts, module, student)


def _ask_in_shards(
    parts: Parts,
    module: DistillModule,
    ranks: Ranks,
    signals: StopSignals,
    along: AlongTheRun | None,
    model_dir: Path | None = None,
) -> None:
    """Tasks and samples of models in shards: all make every pass, and leave together (`Preempted`) where one has to."""
    try:
        stopped = AgreedStop(ranks, lambda: signals.received is not None, BrokenOffError)
        with stopped.inside(module.student, module.teacher):
            _ask(parts, module, module.student, model_dir, along)
            _speak(parts, module, module.student)
    except BrokenOffError:
        raise Preempted(parts.run_dir, number=signals.received) from None


def _ask(
    parts: Parts,
    module: DistillModule,
    student: PreTrainedModel,
    model_dir: Path | None,
    along: AlongTheRun | None,
    quantize: Sequence[str] = (),
) -> None:
    """What the run's tasks and text say of the student (evaluation.json), if they are asked."""
    if (spec := parts.asked) is None:
        return
    with _guarded("evaluation", f"Again: {again(parts, model_dir, spec)}"):
        nn.Module.to(student, next(module.teacher.parameters()).device)
        exported = {} if model_dir is None else {"sha256": weights_sha256(model_dir)}
        asks = along or along_the_run(parts, spec)
        found = asks.ask(student, {"kind": "student", **exported}, quantize=quantize)
        if not global_rank():
            write_whole(parts.run_dir / EVALUATION_FILE, found.to_json())


def _leave(ranks: Ranks) -> None:
    """Tell the other processes, which are about to ask, that this one will not."""
    with suppress(BrokenOffError):
        AgreedStop(ranks, lambda: True, BrokenOffError).look()


def _tell_unmeasured(parts: Parts, model_dir: Path | None) -> None:
    """What models in shards are not measured by, and the command for it."""
    told, spec = "%s was not measured, as the models lie in shards. On one device: %s", parts.asked
    if parts.options.efficiency_seconds:
        log.warning(told, "efficiency", again(parts, model_dir, None))
    if spec is not None and spec.quantize:
        log.warning(told, "the student in fewer bits", again(parts, model_dir, spec))


def _tell_end(run_dir: Path, seconds: float) -> None:
    """Write beside what the plan promised of the end of the run how long it took."""
    with _guarded(PLAN_FILE, "The report says nothing of the end's time"):
        if (run_dir / PLAN_FILE).is_file() and (rows := read_json(run_dir / PLAN_FILE)):
            rows[-1][ENDED] = round(seconds, 1)
            write_whole(run_dir / PLAN_FILE, json.dumps(rows, indent=1))


def _speak(parts: Parts, module: DistillModule, student: PreTrainedModel) -> None:
    """What both models make of the same prompts (samples.json)."""
    teacher, count = module.teacher, parts.options.samples
    if not count:
        return
    again = f"Again: {shlex.join(['iskd', 'train', f'resume={parts.run_dir}'])}"
    with _guarded("what the models say", again), Busy("letting teacher and student continue prompts"):
        nn.Module.to(student, next(teacher.parameters()).device)
        models = [Stack(model) for model in (student, teacher)]
        for stack in models:
            stack.keep_apart(None)
        try:
            front = framing_of(parts.teacher.tokenizer, parts.data.bos).front
            found = samples(student, teacher, parts.teacher.tokenizer, front, count)
            if not global_rank():
                write_samples(parts.run_dir, found)
        finally:
            for stack in models:
                stack.keep_apart(parts.data.separator, check=False)


def along_the_run(parts: Parts, spec: EvalSpec) -> AlongTheRun:
    """Who asks the run's students what the spec says, but for the items that layers are chosen by."""
    chosen = [sha for items in selected(*parts.importances, start=parts.start).values() for sha in items]
    return AlongTheRun(spec, parts.teacher, chosen, framing_of(parts.teacher.tokenizer, parts.data.bos))


@contextmanager
def _guarded(what: str, then: str) -> Iterator[None]:
    """Name what failed, and `then` what to do, and go on: hours of training must not end in a minute's error."""
    try:
        yield
    except Exception as error:
        log.error(
            "FAILED: %s (%s: %s). Nothing else of the run is lost. %s",
            *(what, type(error).__name__, error, then),
            exc_info=not mendable(error),
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def again(parts: Parts, model_dir: Path | None, spec: EvalSpec | None) -> str:
    """The command that measures a run's student once more: its tasks by `spec`, or with None its efficiency."""
    if model_dir is None:
        keys = [] if spec is None else _keys(spec)
        sharded = ["trainer=auto"] if "fsdp" in str(parts.trainer["strategy"]).lower() else []
        return shlex.join(["iskd", "train", f"resume={parts.run_dir}", *sharded, *keys])
    keys = _keys(spec) if spec else ["eval.tasks=[]", f"eval.efficiency_seconds={parts.options.efficiency_seconds:g}"]
    in_memory = parts.teacher.source.get("kind") == "memory"
    reference = ["reference=TEACHER"] if in_memory else []  # nothing on disk says where that teacher is
    return shlex.join(["iskd", "evaluate", f"model={parts.run_dir}", *keys, *reference])


def _keys(spec: EvalSpec) -> list[str]:
    """Overrides of eval=quick that make it this spec."""
    found, usual = [f"eval.tasks={hydra_text(spec.tasks)}"], EvalSpec()
    for field in dataclasses.fields(EvalSpec):
        value = getattr(spec, field.name)
        if field.name not in ("tasks", "every") and value != getattr(usual, field.name):
            found.append(f"eval.{field.name}={hydra_text(value)}")
    return ["eval=quick", *found]


def _print_end(results: list[StageResult], report: Path | None, model_dir: Path | None) -> None:
    console = terminal()
    print_table(stage_table(results), spare=SPARE, console=console)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform != "darwin" else 1 << 30)
    console.print(f"peak memory {peak:.2f} GiB")
    for name, place in (("report: ", report), ("model:  ", model_dir)):
        if place is not None:
            console.print(f"{name}{place}", soft_wrap=True)
