"""The report's sections about measurements on the finished student: tasks, and efficiency next to the teacher's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

from iskd.evaluation import Efficiency, Evaluation, Interval
from iskd.evaluation.results import AtContext, Measured
from iskd.plan import StageResult
from iskd.report import contexts, html
from iskd.report.figures.along_run import task_retention
from iskd.system import number
from iskd.system.text import ABSENT, byte_unit, percent


def tasks_section(evaluation: Evaluation | None) -> str:
    """Scores by task beside those of chance, their retention with its interval, and the rest; empty without any."""
    if evaluation is None:
        return ""
    rows = [
        [
            task.task,
            *_retention(task.retention),
            number(task.student),
            number(task.teacher),
            number(task.chance),
            ABSENT if math.isnan(task.items) else f"{task.items:.0f}",
        ]
        for task in evaluation.tasks
    ]
    rows += [[f"mean, {kind}", *_retention(mean), "", "", "", ""] for kind, mean in evaluation.retention.items()]
    if len(evaluation.retention) != 1 and math.isfinite(evaluation.mean.value):
        rows.append(["mean", *_retention(evaluation.mean), "", "", "", ""])
    columns = ("task", "retention %", "interval", "student", "teacher", "chance", "items")
    body = html.table("Scores by task", columns, rows, kind="named")
    caption = "Retention by task with its interval. Dashed: the teacher."
    if math.isfinite(evaluation.mean.value):
        caption += " Dotted: the mean over tasks."
    body = f'<div class="aside">{body}{html.figures([(task_retention(evaluation), caption)])}</div>' if body else ""
    return html.section("Tasks", body + html.details("How it was evaluated", html.properties("", evaluation.about)))


def lengths_section(evaluation: Evaluation | None) -> str:
    """What both models recall and predict by length; empty where nothing was asked at two lengths."""
    if evaluation is None:
        return ""
    drawn = html.figures([(contexts.lengths_of_run(evaluation), LENGTHS)])
    told = contexts.reads_less([evaluation])
    return html.section("By length", drawn + (f'<p class="hint">{escape(told)}</p>' if told else "")) if drawn else ""


LENGTHS = (
    "Recall: a fact, other words, its question; bars: 95 %. Loss: on the text of eval.text, from the position before "
    "up to this one, in windows of eval.window tokens. Dashed: the teacher."
)


def quantized_section(evaluation: Evaluation | None) -> str:
    """The student in fewer bits beside the student as it is; empty where nobody asked for it."""
    if evaluation is None or not evaluation.quantized:
        return ""
    unit, label = byte_unit(max((row.bytes for row in evaluation.quantized if math.isfinite(row.bytes)), default=0.0))
    rows = [
        [row.kind, number(row.bytes / unit), number(row.perplexity, 4), number(row.tokens_per_s), row.why]
        for row in evaluation.quantized
    ]
    columns = ("weights in", f"bytes ({label})", "perplexity", "tokens/s", "not measured, because")
    hint = (
        "Weight-only, by torchao: all linear maps but the head. tokens/s: one at a time, in turns with the first row."
    )
    body = html.table("Weights in fewer bits", columns, rows, kind="named")
    return html.section("Weights in fewer bits", f'{body}<p class="hint">{escape(hint)}</p>')


def efficiency_section(measured: Efficiency | None) -> str:
    """Size, latency and cache of student and teacher, and the machine they were measured on; empty without them."""
    if measured is None:
        return ""
    columns = ("", "teacher", "student", "student / teacher")
    body = html.table("Efficiency", columns, _efficiency_rows(measured), kind="named")
    caption = "What a token costs after a context, and what is held between two: keys and values, or mixers' states."
    body = f'<div class="aside">{body}{html.figures([(contexts.of_run(measured), caption)])}</div>'
    machine = "; ".join(f"{key} {text}" if key else text for key, text in html.flat("", measured.machine))
    hint = "Measured, not computed" + (f", on: {machine}." if machine else "; the machine is not named.")
    told = contexts.left_out((("teacher", measured.teacher), ("student", measured.student)))
    hint += f" {told}" if told else ""
    return html.section("Efficiency", f'{body}<p class="hint">{escape(hint)}</p>')


def speed_tile(
    measured: Efficiency | None, teacher: StageResult | None, student: StageResult
) -> list[tuple[str, str, str]]:
    """How fast the student writes, else how fast it was scored, beside its teacher; nothing where neither is known."""
    models = measured.models if measured else {}
    ours = models["student"].contexts if "student" in models else ()
    if ours and (context := ours[0].context) and math.isfinite(ours[0].decode_seconds_per_token):
        theirs = models["teacher"].at(context) if "teacher" in models else None
        speeds = [1 / at.decode_seconds_per_token for at in (ours[0], theirs) if at and at.decode_seconds_per_token > 0]
        if len(speeds) == 2:
            return [("Writing", f"{speeds[0] / speeds[1]:.2f} x", f"{_pair(speeds)} tokens/s after {context:,}")]
    scored = [row.tokens_per_s for row in (student, teacher) if row and row.tokens_per_s]
    if len(scored) == 2 and teacher is not student:
        return [("Scoring", f"{scored[0] / scored[1]:.2f} x", f"{_pair(scored)} tokens/s")]
    return []


def _pair(speeds: Sequence[float]) -> str:
    return f"{number(speeds[0])}, teacher {number(speeds[1])}"


def _efficiency_rows(measured: Efficiency) -> Iterator[list[str]]:
    teacher, student = measured.teacher, measured.student
    both = (teacher, student)
    yield _row("parameters (millions)", [model.params / 1e6 if model else math.nan for model in both])
    yield _bytes_row("weights", [model.bytes if model else math.nan for model in both])
    yield _bytes_row("peak memory", [model.peak_memory_bytes if model else math.nan for model in both])
    lengths = sorted({found.context for model in both if model for found in model.contexts})
    for length in lengths:
        values = _at(both, length, lambda found: 1e3 * found.prefill_seconds)
        yield _row(f"prefill of {length:,} tokens (ms)", values)
    for length in lengths:
        values = _at(both, length, lambda found: 1e3 * found.decode_seconds_per_token)
        yield _row(f"decoding after {length:,} (ms per token)", values)
    for length in lengths:
        yield _bytes_row(f"cache at {length:,}", _at(both, length, lambda found: found.cache_bytes))


def _at(models: tuple[Measured | None, ...], length: int, value: Callable[[AtContext], float]) -> list[float]:
    found = [model.at(length) if model else None for model in models]
    return [math.nan if at is None else value(at) for at in found]


def _bytes_row(name: str, values: list[float]) -> list[str]:
    unit, label = byte_unit(max((value for value in values if math.isfinite(value)), default=0.0))
    return _row(f"{name} ({label})", [value / unit for value in values])


def _row(name: str, values: list[float]) -> list[str]:
    teacher, student = values
    ratio = student / teacher if teacher > 0 else math.nan
    return [name, *map(number, values), ABSENT if math.isnan(ratio) else f"{ratio:.2f}"]


def _retention(found: Interval | None) -> list[str]:
    if found is None:
        return [ABSENT, ABSENT]
    known = math.isfinite(found.low) and math.isfinite(found.high)
    return [percent(found.value), f"{percent(found.low)} to {percent(found.high)}" if known else ABSENT]
