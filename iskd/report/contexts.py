"""What depends on the length of a context, in the reports: efficiency, recall and loss.

Lines of one run and its teacher, or of many; what was left out; rows of the csv beside the page.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

from iskd.evaluation import Efficiency, Evaluation
from iskd.evaluation.results import AtContext, Measured
from iskd.report.figures import short_label
from iskd.report.figures.by_length import ByLength, by_length, lines_of
from iskd.report.figures.context import TEACHER, Line, against_context, look_of
from iskd.report.run_list import Run, differing, telling

_LONGEST = 22  # characters of a label


def of_run(measured: Efficiency) -> str | None:
    """Teacher and student of one run."""
    models = (("teacher", measured.teacher, TEACHER), ("student", measured.student, look_of(0)))
    return against_context([Line(name, model.contexts, look) for name, model, look in models if model])


def of_runs(numbered: Mapping[str, Sequence[Run]]) -> str | None:
    """Every run's student, one colour per configuration, and the teachers.

    A teacher that several runs measured is one line: the median over these runs at every context.
    """
    lines = list(_teachers([run.files.efficiency for group in numbered.values() for run in group]))
    names = _names(numbered)
    for index, (label, group) in enumerate(numbered.items()):
        students = [run.measured for run in group if run.measured and run.measured.contexts]
        for place, student in enumerate(students):
            name = "" if place else short_label(f"{label} {names[label]}", _LONGEST)
            lines.append(Line(name, student.contexts, look_of(index)))
    return against_context(lines)


def lengths_of_run(evaluation: Evaluation) -> str | None:
    """Recall and loss by length, of teacher and student of one run."""
    return by_length(list(lines_of(evaluation).values()))


def lengths_of_runs(numbered: Mapping[str, Sequence[Run]]) -> str | None:
    """Every run's student, one colour per configuration, and every teacher whose numbers differ."""
    names, teachers, students = _names(numbered), list[ByLength](), list[ByLength]()
    for index, (label, group) in enumerate(numbered.items()):
        found = [lines_of(run.files.evaluation, index) for run in group if run.files.evaluation]
        for place, lines in enumerate(lines for lines in found if "student" in lines):
            students.append(lines["student"].named("" if place else f"{label} {names[label]}"))
        teachers += [lines["teacher"] for lines in found if "teacher" in lines]
    alike = {(tuple(line.recall), tuple(line.loss)): line for line in teachers}
    several = len(alike) > 1
    told = [line.named(f"teacher {at}" if several else "teacher") for at, line in enumerate(alike.values(), 1)]
    return by_length([*told, *students])


def length_rows(evaluations: Mapping[str, Evaluation]) -> list[list[object]]:
    """Head and rows of a csv: run, what was measured, tokens, who, value, and its standard error where it is known.

    Recall is a share of items, loss nats per token; what a model cannot read at once has no row.
    """
    rows: list[list[object]] = [["iskd_run", "measure", "tokens", "model", "value", "standard_error"]]
    for run, evaluation in evaluations.items():
        for who, line in lines_of(evaluation).items():
            errors = ((length, score, error if math.isfinite(error) else None) for length, score, error in line.recall)
            rows += [[run, "recall", length, who, score, error] for length, score, error in errors]
            rows += [[run, "loss", last, who, nats, None] for last, nats in line.loss]
    return rows


def reads_less(evaluations: Iterable[Evaluation]) -> str:
    """Whose curves end before what was asked, in a sentence; "" if nobody's do."""
    ends: dict[str, set[int]] = {}
    for each in evaluations:
        lines = lines_of(each).values()
        longest = max([at for line in lines for at, *_ in (*line.recall, *line.loss)], default=0)
        for who in ("teacher", "student"):
            if (limit := each.limit(who)) < longest:
                ends.setdefault(who, set()).add(int(limit))
    return " ".join(
        f"The {who} reads at most {' or '.join(f'{limit:,}' for limit in sorted(limits))} tokens at once: its curve "
        "ends there, and longer texts are in no mean."
        for who, limits in ends.items()
    )


def left_out(models: Iterable[tuple[str, Measured | None]]) -> str:
    """Which contexts were not measured, or not read as a prompt, of whom and why, in a sentence each; "" if none."""
    reasons: dict[str, dict[int, list[str]]] = {}
    filled = set()
    for name, model in models:
        for context, why in model.left_out.items() if model else ():
            reasons.setdefault(why, {}).setdefault(context, []).append(name)
        filled |= {at.context for at in model.contexts if _was_filled(at)} if model else set()
    told = []
    for why, contexts in reasons.items():
        groups: dict[str, list[int]] = {}
        for context, names in contexts.items():
            groups.setdefault(", ".join(names) if len(names) < 4 else f"{len(names)} runs", []).append(context)
        where = "; ".join(f"{names} at {_listed(lengths)} tokens" for names, lengths in groups.items())
        told.append(f"Not measured: {where} ({why}).")
    if filled:
        told.append(
            f"At {_listed(filled)} tokens no prompt of that length was read: the cache was filled, then decoding timed."
        )
    return " ".join(told)


def _was_filled(at: AtContext) -> bool:
    return math.isnan(at.prefill_seconds) and math.isfinite(at.decode_seconds_per_token)


def _listed(contexts: Iterable[int]) -> str:
    return ", ".join(f"{context:,}" for context in sorted(contexts))


def _teachers(measured: Iterable[Efficiency | None]) -> Iterator[Line]:
    """A line per teacher; teachers of one size count as one and the same."""
    teachers: dict[str, list[Measured]] = {}
    for each in measured:
        if each and each.teacher and each.teacher.contexts:
            teachers.setdefault(f"{each.teacher.params / 1e6:.1f} M", []).append(each.teacher)
    for size, group in teachers.items():
        lengths = sorted({at.context for model in group for at in model.contexts})
        points = [_median([at for model in group if (at := model.at(length))]) for length in lengths]
        yield Line("teacher" if len(teachers) == 1 else f"teacher {size}", points, TEACHER)


def _median(found: Sequence[AtContext]) -> AtContext:
    """What several measurements at one context say together."""

    def middle(values: Sequence[float]) -> float:
        known = [value for value in values if math.isfinite(value)]
        return statistics.median(known) if known else math.nan

    return AtContext(
        found[0].context,
        middle([at.prefill_seconds for at in found]),
        middle([at.decode_seconds_per_token for at in found]),
        middle([at.cache_bytes for at in found]),
    )


def _names(numbered: Mapping[str, Sequence[Run]]) -> dict[str, str]:
    """A configuration by the parts in which it differs from the others (its mixer), else by its first run."""
    configs = [run.config for group in numbered.values() for run in group if run.config]
    parts = [key for key in telling(configs, differing(configs)) if key.endswith("_target_")]
    names = {}
    for label, group in numbered.items():
        told = [group[0].config[key].rsplit(".", 1)[-1] for key in parts if key in group[0].config]
        names[label] = " ".join(told) or group[0].name
    return names
