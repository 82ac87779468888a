"""Evaluation and efficiency as tables on a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich.table import Table
from rich.text import Text

from iskd.evaluation import Efficiency, Evaluation, Interval
from iskd.evaluation.results import TextScore
from iskd.report.terminal import caption
from iskd.system import number
from iskd.system.text import ABSENT, percent

# ---- the table -------------------------------------------------------------------------------------------------------


def efficiency_table(found: Efficiency) -> Table:
    """What `measure` found of teacher and student, and their ratio, or of one of them, for the terminal."""
    facts, models = found.machine, list(found.models.values())
    table = Table(title="efficiency, measured")
    for head in ("", *found.models, *(["student / teacher"] if len(models) > 1 else [])):
        table.add_column(Text(head), justify="right" if head else "left")

    def add(name: str, values: Sequence[float], scale: float, digits: int) -> None:
        cells = ["-" if math.isnan(value) else f"{value * scale:,.{digits}f}" for value in values]
        if len(values) > 1:
            teacher, student = values
            cells.append(f"{student / teacher:.2f}" if teacher > 0 and not math.isnan(student) else "-")
        table.add_row(name, *cells)

    for key, name, scale in (
        ("params", "parameters (M)", 1e-6),
        ("bytes", "weights (MiB)", 2**-20),
        ("peak_memory_bytes", "peak memory (MiB)", 2**-20),
    ):
        add(name, [getattr(model, key) for model in models], scale, 1)
    for context in sorted({at.context for model in models for at in model.contexts}):
        for key, name, scale in (
            ("prefill_seconds", "prefill of {:,} tokens (ms)", 1e3),
            ("decode_seconds_per_token", "a token after {:,} (ms)", 1e3),
            ("cache_bytes", "cache after {:,} (MiB)", 2**-20),
        ):
            add(name.format(context), [getattr(model.at(context), key, math.nan) for model in models], scale, 2)
    left = {f"{context}: {why}" for model in models for context, why in model.left_out.items()}
    where = f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {models[-1].dtype}"
    if any(math.isnan(at.prefill_seconds) for model in models for at in model.contexts):
        left.add("no prefill where the cache was filled without a prompt of that length")
    table.caption = caption("; ".join([where, facts["note"], *sorted(left)]))
    return table


def evaluation_table(evaluation: Evaluation) -> Table:
    """One row per task, then the means; shares in percent, tasks' perplexities as they are, the text's below."""
    compared = any(score.teacher is not None for score in evaluation.tasks)
    table = Table(title="evaluation", caption=_below(evaluation), caption_justify="left")
    table.add_column("task")
    heads = ("teacher %", "student %", "difference (95 %)", "retention % (95 %)") if compared else ("score %", "error")
    for head in ("items", "metric", "chance %", *heads):
        table.add_column(head, justify="right")
    for score in evaluation.tasks:
        shown: Callable[[float | None], str] = percent if score.per_cent else number
        cells = [score.task, f"{score.items:,}", score.metric, shown(score.chance)]
        if compared:
            cells += [
                shown(score.teacher),
                shown(score.student),
                _signed(score.difference, 100 if score.per_cent else 1),
                _interval(score.retention),
            ]
        else:
            cells += [shown(score.student), shown(score.student_error)]
        table.add_row(*map(Text, cells))
    if evaluation.retention:
        table.add_section()
    means = {f"mean, {kind}": mean for kind, mean in evaluation.retention.items()}
    if len(means) > 1 and evaluation.mean_retention is not None:
        means["mean, all"] = evaluation.mean_retention
    for name, mean in means.items():
        table.add_row(Text(name), "", "", "", "", "", "", _interval(mean))
    return table


def _interval(estimate: Interval | None) -> str:
    if estimate is None or not math.isfinite(estimate.value):
        return ABSENT
    return f"{percent(estimate.value)} ({percent(estimate.low)} .. {percent(estimate.high)})"


def _signed(estimate: Interval | None, unit: float) -> str:
    if estimate is None:
        return ABSENT
    value, low, high = (f"{unit * bound:+.1f}" for bound in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} .. {high})"


def _below(evaluation: Evaluation) -> str | None:
    """The text's line, and one for every kind of weights in fewer bits."""
    lines = [line] if (line := _text_line(evaluation.text)) else []
    for row in evaluation.quantized:
        said = f"perplexity {number(row.perplexity, 4)}, {number(row.tokens_per_s)} tokens/s"
        lines.append(f"weights in {row.kind}: " + (row.why or f"{number(row.bytes / 2**20)} MiB, {said}"))
    return "\n".join(lines) or None


def _text_line(text: TextScore | None) -> str | None:
    if text is None:
        return None

    def both(student: float, teacher: float | None) -> str:
        return number(student, 4) + ("" if teacher is None else f" (teacher {number(teacher, 4)})")

    perplexity, bits = (
        both(text.perplexity, text.teacher_perplexity),
        both(text.bits_per_byte, text.teacher_bits_per_byte),
    )
    return f"perplexity {perplexity}, bits per byte {bits}, on {text.tokens:,} tokens"
