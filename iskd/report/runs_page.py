"""`iskd report runs/*`: one self-contained page over many runs, failures and rolled-back stages among them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from iskd.evaluation.results import AtContext
from iskd.plan import StageResult
from iskd.plan.run_files import REPORT_FILE, RUNS_FILE, RUNS_LENGTHS_FILE, RUNS_TABLE_FILE
from iskd.report import contexts, html
from iskd.report.beside import links, write_page, write_table
from iskd.report.figures.score_curves import MOST_LINES, asked_of, retention_curves, score_curve
from iskd.report.figures.tradeoff import Cost, Point, tradeoff
from iskd.report.measured import LENGTHS
from iskd.report.run_list import Run, differing, read_runs, telling
from iskd.system import number
from iskd.system.text import ABSENT, byte_unit, kl_text, percent

_LONGEST = 60  # characters of a setting in the table; the list of all settings has it whole

_RAW = (
    (RUNS_TABLE_FILE, "the table above, with every setting that differs"),
    (RUNS_LENGTHS_FILE, "recall by length, loss by position"),
)

#: Configurations by the number that table and figures call them, with their runs.
Numbered = Mapping[str, Sequence[Run]]


def write_runs_report(folders: Sequence[Path], out: Path) -> Path:
    """Write one page over many runs: Pareto plots, and a table with the settings that differ.

    Args:
        folders: Folders of runs, or folders that hold such (a sweep, all of runs/).
        out: The page to write; folders above it are made.

    Returns:
        `out`.

    Raises:
        ValueError: None of the folders is or holds a run, or what has the page's name is no page of ours.
    """
    out = Path(out)
    runs, problems = read_runs([Path(folder) for folder in folders])
    out.parent.mkdir(parents=True, exist_ok=True)
    lengths = contexts.length_rows({run.name: run.files.evaluation for run in runs if run.files.evaluation})
    for name, rows in ((RUNS_TABLE_FILE, _numbers(runs)), (RUNS_LENGTHS_FILE, lengths)):
        if len(rows) > 1 and not write_table(out.with_name(name), rows):
            problems = [*problems, f"{name} beside this page is not ours and was left alone"]
    return write_page(out, _page(runs, problems, out.parent))


def runs_file(folders: Sequence[Path]) -> Path:
    """Where the page goes when nobody says where: `runs.html` in the folder that holds all the given ones."""
    resolved = [Path(folder).resolve() for folder in folders]
    above = resolved[0] if len(resolved) == 1 else Path(os.path.commonpath([folder.parent for folder in resolved]))
    return above / RUNS_FILE


def _page(runs: Sequence[Run], problems: Sequence[str], home: Path) -> str:
    numbered = _numbered(runs)
    return html.page(
        "Runs compared",
        [
            _lead(runs, numbered),
            html.notes(problems),
            html.section("Retention against cost", _figures(runs, numbered)),
            html.section("Along the runs", _along(runs)),
            html.section("By length", _by_length(runs, numbered)),
            html.section("Cost against context", _against_context(runs, numbered)),
            _table(numbered, home),
            links(home, [raw for raw in _RAW if not any(problem.startswith(raw[0]) for problem in problems)]),
            _all_differences(runs),
        ],
    )


def _numbered(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in nothing but their seed share a number; a run whose config is not known has its own."""
    groups: dict[object, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.setting or run.name, []).append(run)
    return {str(number): group for number, group in enumerate(groups.values(), 1)}


def _lead(runs: Sequence[Run], numbered: Numbered) -> str:
    setbacks = sum(bool(run.marks) for run in runs)
    text = (
        f"<b>{len(runs)} run{'s' * (len(runs) != 1)}</b> of {len(numbered)} configuration{'s' * (len(numbered) != 1)}"
    )
    text += (
        f"; {setbacks} did not finish, had edits rolled back or ended otherwise than asked."
        if setbacks
        else ", all finished."
    )
    smaller = [
        (_mean([_retention(run) for run in done]), _mean([_params(run) for run in done]), label)
        for label, group in numbered.items()
        if (done := [run for run in group if run.finished and run.teacher and _params(run) < run.teacher.params / 1e6])
    ]
    smaller = [entry for entry in smaller if math.isfinite(entry[0])]
    if smaller:
        retention, params, label = max(smaller)
        text += (
            f" Of the students smaller than their teacher, configuration {label} keeps the most: "
            f"<b>{percent(retention)}&nbsp;%</b> with {params:.1f}&nbsp;M parameters."
        )
    return f'<p class="lead">{text}</p>'


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _params(run: Run) -> float:
    return math.nan if run.student is None else run.student.params / 1e6


def _retention(run: Run) -> float:
    return math.nan if run.student is None else run.student.retention


def _by_tasks(run: Run) -> float:
    return run.task_retention.value


def _speed(stage: StageResult | None) -> float:
    return math.nan if stage is None or stage.tokens_per_s is None else stage.tokens_per_s


def _at(run: Run, context: int | None, *, of_teacher: bool = False) -> AtContext | None:
    """What was measured at a context length, if it was."""
    files = run.files.efficiency
    model = None if files is None else files.teacher if of_teacher else files.student
    return model.at(context) if model and context else None


def _decode(run: Run, context: int | None, *, of_teacher: bool = False) -> float:
    """Milliseconds per token after `context` tokens; NaN where that was not measured."""
    found = _at(run, context, of_teacher=of_teacher)
    return math.nan if found is None else 1e3 * found.decode_seconds_per_token


def _held(run: Run, context: int | None) -> float:
    """Bytes of cache or state after `context` tokens; NaN where that was not measured."""
    found = _at(run, context)
    return math.nan if found is None else found.cache_bytes


def _common_context(runs: Sequence[Run]) -> int | None:
    """The longest context at which every measured run was measured."""
    measured = [{at.context for at in run.measured.contexts} for run in runs if run.measured]
    return max(set.intersection(*measured), default=None) if measured else None


def _figures(runs: Sequence[Run], numbered: Numbered) -> str:
    known = [run for run in runs if run.student]
    answered, asked = all(math.isfinite(_by_tasks(run)) for run in known), {run.asked for run in known if run.asked}
    by_tasks = answered and len(asked) == 1
    drawn = html.figures(_tradeoffs(runs, numbered, by_tasks))
    measure = "its mean over tasks" if by_tasks else "on validation text"
    hint = (
        f"Retention: {measure}, after the last kept stage. Numbers: configurations, as in the table below; bars: from "
        "least to most over seeds around their mean, or the interval of a single run where it has one. Grey line: the "
        "best that can be had at each cost."
    )
    if len(asked) > 1:
        hint += " Tasks are not drawn: the runs were asked different items (other tasks, limit, seed or files)."
    return f'{drawn}<p class="hint">{hint}</p>' if drawn else ""


def _tradeoffs(runs: Sequence[Run], numbered: Numbered, by_tasks: bool) -> Iterator[tuple[str | None, str]]:
    quality: Callable[[Run], float] = _by_tasks if by_tasks else _retention
    undone = [] if by_tasks else [stage for run in runs for stage in run.undone]
    teachers = [run.teacher for run in runs if run.teacher]

    cost = Cost("params", "parameters (millions)")
    tried = [(stage.params / 1e6, stage.retention) for stage in undone]
    originals = [(teacher.params / 1e6, 1.0) for teacher in teachers]
    yield tradeoff(_points(numbered, _params, quality), originals, tried, cost), "Retention against size."

    context = _common_context(runs)
    if context:
        cost = Cost("decode", f"decoding after {context:,} tokens (ms per token)")
        originals = [(_decode(run, context, of_teacher=True), 1.0) for run in runs]
        points = _points(numbered, lambda run: _decode(run, context), quality)
        without = sum(run.student is not None and math.isnan(_decode(run, context)) for run in runs)
        text = "Retention against decoding time." + (f" {without} runs without a measurement." if without else "")
        yield tradeoff(points, originals, [], cost), text + _care(_measured_on(runs))

    if any(run.student and math.isnan(_decode(run, context)) for run in runs):
        cost = Cost("speed", "scoring speed (tokens per second, more is better)", more_is_better=True)
        tried = [(_speed(stage), stage.retention) for stage in undone]
        # every run scored its teacher anew: one mark at the mean, for a cloud of marks would say nothing more
        speeds = [_speed(teacher) for teacher in teachers if math.isfinite(_speed(teacher))]
        originals = [(_mean(speeds), 1.0)] if speeds else []
        machines = {_hardware(run.files.environment) for run in runs if run.files.environment}
        points = _points(numbered, lambda run: _speed(run.student), quality)
        yield tradeoff(points, originals, tried, cost), f"Retention against scoring speed.{_care(machines)}"


def _along(runs: Sequence[Run]) -> str:
    """Retention against blocks edited, layers left and tokens, a line per run; which runs have none, and why."""
    curves = {run.name: score_curve(run.name, run.files.stages, run.files.num_layers) for run in runs}
    drawn = [run for run in runs if run.student and len(curves[run.name].points) > 1]
    asked = {_asked_along(run) for run in drawn if curves[run.name].by_tasks}
    ended = {run.asked for run in drawn if run.asked and curves[run.name].by_tasks}
    by_tasks = len(asked) == 1 and len(ended) < 2 and all(curves[run.name].by_tasks for run in drawn)
    if not by_tasks:  # one measure for all
        without = {run.name: [replace(stage, evaluation=None) for stage in run.files.stages] for run in drawn}
        curves = {run.name: score_curve(run.name, without[run.name], run.files.num_layers) for run in drawn}
    lines = [curves[run.name] for run in drawn]
    measure = "its mean over the tasks that every run was asked" if by_tasks else "on the validation text of each run"
    text = f"Retention after every kept stage, {measure}; bars: 95 %."
    if len(lines) > MOST_LINES:
        text += f" {MOST_LINES} of {len(lines)} runs in a figure, in the order of the table."
    told = []
    if not by_tasks and (len(asked) > 1 or len(ended) > 1):
        told.append("Tasks are not drawn: the runs were asked different items (other tasks, metrics, limit or seed).")
    elif not by_tasks and asked:
        some = [run.name for run in drawn if not score_curve(run.name, run.files.stages, run.files.num_layers).by_tasks]
        told.append(f"Tasks are not drawn: not asked after every stage (eval.every=stage) were {', '.join(some)}.")
    if lines and (missing := [run.name for run in runs if run not in drawn]):
        told.append(f"Without a line, as no stage after the teacher was kept: {', '.join(missing)}.")
    parts = [lines[at : at + MOST_LINES] for at in range(0, len(lines), MOST_LINES)]
    figures = html.figures([(retention_curves(part, number), text) for number, part in enumerate(parts)])
    return figures + (f'<p class="hint">{escape(" ".join(told))}</p>' if figures and told else "")


def _asked_along(run: Run) -> tuple[object, ...]:
    """What a run was asked after its stages: equal where the items are the same."""
    found = next((asked for stage in run.files.stages if (asked := asked_of(stage)) is not None), None)
    tasks = [] if found is None else [(task.task, task.metric, str(task.items)) for task in found.tasks]
    keys = ("seed", "limit", "data_dir", "task_dir", "fewshot", "lengths")
    settings = [run.config.get(f"eval.{key}", "") for key in keys]
    return (*sorted(tasks), *settings)


def _against_context(runs: Sequence[Run], numbered: Numbered) -> str:
    text = (
        "What a token costs after a context, and what is held between two tokens: keys and values, or mixers' states. "
        "A line per run, in one colour where they share a configuration; dashed: the teacher, its median over the runs."
    )
    told = contexts.left_out((run.name, run.measured) for run in runs)
    drawn = html.figures([(contexts.of_runs(numbered), text + _care(_measured_on(runs)))])
    return drawn + (f'<p class="hint">{escape(told)}</p>' if told else "")


def _by_length(runs: Sequence[Run], numbered: Numbered) -> str:
    text = f"{LENGTHS} A line per run, in one colour where they share a configuration."
    drawn = html.figures([(contexts.lengths_of_runs(numbered), text)])
    told = contexts.reads_less(run.files.evaluation for run in runs if run.files.evaluation)
    return drawn + (f'<p class="hint">{escape(told)}</p>' if drawn and told else "")


def _measured_on(runs: Sequence[Run]) -> set[str]:
    """The machines on which latencies were measured."""
    return {_hardware(run.files.efficiency.machine) for run in runs if run.files.efficiency}


def _hardware(facts: Any) -> str:
    """What of a machine's description makes times comparable; its load and versions do not tell machines apart."""
    keys = ("name", "device", "cpu", "cores", "threads", "precision", "system")
    return json.dumps([facts.get(key) for key in keys] if isinstance(facts, dict) else facts, default=str)


def _care(machines: set[str]) -> str:
    return f" From {len(machines)} different machines: compare with care." if len(machines) > 1 else ""


def _points(numbered: Numbered, cost: Callable[[Run], float], quality: Callable[[Run], float]) -> list[Point]:
    points = []
    for label, group in numbered.items():
        runs = [run for run in group if math.isfinite(cost(run)) and math.isfinite(quality(run))]
        done = [run for run in runs if run.finished]
        if done:
            found = done[0].task_retention
            alone = len(done) == 1 and quality is _by_tasks and math.isfinite(found.low) and math.isfinite(found.high)
            interval = (found.low, found.high) if alone else None
            points.append(Point(label, tuple(map(cost, done)), tuple(map(quality, done)), interval=interval))
        points += [Point(label, (cost(run),), (quality(run),), finished=False) for run in runs if not run.finished]
    return points


@dataclass(frozen=True)
class _Column:
    head: str
    value: Callable[[Run], float]
    text: Callable[[float], str]


def _columns(runs: Sequence[Run]) -> list[_Column]:
    """The columns of results; those without a single number are left out."""
    context = _common_context(runs)
    sizes = [size for run in runs if math.isfinite(size := _held(run, context))]
    unit, label = byte_unit(max(sizes, default=0.0))
    columns = [
        _Column("retention %", _retention, percent),
        _Column("task retention %", _by_tasks, percent),
        _Column("params (M)", _params, lambda value: f"{value:.2f}"),
        _Column("perplexity", lambda run: run.student.ppl if run.student else math.nan, lambda value: number(value, 4)),
        _Column("KL (nats)", lambda run: run.student.kl if run.student else math.nan, kl_text),
        _Column(f"decode at {context} (ms/token)", lambda run: _decode(run, context), number),
        _Column(f"cache or state at {context} tokens ({label})", lambda run: _held(run, context) / unit, number),
        _Column("scoring (tokens/s)", lambda run: _speed(run.student), number),
        _Column("tokens (k)", lambda run: run.tokens / 1e3, lambda value: f"{value:.0f}"),
        _Column("time (min)", lambda run: run.seconds / 60, number),
    ]
    return [column for column in columns if not all(math.isnan(column.value(run)) for run in runs)]


def _table(numbered: Numbered, home: Path) -> str:
    runs = [run for group in numbered.values() for run in group]
    configs = [run.config for run in runs if run.config]
    keys, columns = telling(configs, differing(configs)), _columns(runs)
    rows: list[list[str]] = []
    classes: list[str] = []
    for label, group in numbered.items():
        for run in group:
            settings = [_setting(key, run.config.get(key)) for key in keys]
            rows.append([_name(label, run, home), *(_cell(c, c.value(run)) for c in columns), *settings])
            classes.append("setback" if run.marks else "")
        done = [run for run in group if run.finished]
        if len(done) > 1:
            shared = [{run.config.get(key) for run in done} for key in keys]
            settings = [_setting(key, *v) if len(v) == 1 else "" for key, v in zip(keys, shared, strict=True)]
            name = html.Markup(f'<span class="name"><b>{label}</b> mean of {len(done)}</span>')
            rows.append([name, *(_spread(c, done) for c in columns), *settings])
            classes.append("mean")
    heads = ["run", *(column.head for column in columns), *(key.removesuffix("._target_") for key in keys)]
    table = html.table("Runs", heads, rows, kind="runs", classes=classes)
    hint = (
        "Results of the last kept stage; coloured words tell what went wrong. The columns after the time are the "
        "settings in which the runs differ; runs that share a number differ in their seed alone, and brackets hold the "
        "least and the most of them. Settings that come and go with a part are in the list below."
    )
    return html.section("Runs", f'{table}<p class="hint">{hint}</p>')


def _numbers(runs: Sequence[Run]) -> list[list[object]]:
    """The table for other programs: numbers as they are, every setting that differs."""
    keys, columns = differing([run.config for run in runs if run.config]), _columns(runs)
    rows: list[list[object]] = [["iskd_run", "marks", *(column.head for column in columns), *keys]]
    for run in runs:
        values = (column.value(run) for column in columns)
        numbers = [None if math.isnan(value) else value for value in values]
        rows.append([run.name, "; ".join(run.marks), *numbers, *(run.config.get(key) for key in keys)])
    return rows


def _name(label: str, run: Run, home: Path) -> str:
    text = escape(run.name)
    page_of_run = run.folder.resolve() / REPORT_FILE
    if page_of_run.is_file() and page_of_run.is_relative_to(home.resolve()):
        text = f'<a href="{quote(page_of_run.relative_to(home.resolve()).as_posix())}">{text}</a>'
    mark = f'<span class="mark">{escape(", ".join(run.marks))}</span>' if run.marks else ""
    return html.Markup(f'<span class="name"><b>{label}</b> {text}{mark}</span>')


def _cell(column: _Column, value: float) -> str:
    return ABSENT if math.isnan(value) else column.text(value)


def _spread(column: _Column, runs: Sequence[Run]) -> str:
    values = [column.value(run) for run in runs]
    if not all(map(math.isfinite, values)):
        return ABSENT
    least, mean, most = (column.text(value) for value in (min(values), _mean(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"


def _setting(key: str, value: str | None) -> str:
    if value is None:
        return ABSENT
    text = value.rsplit(".", 1)[-1] if key.endswith("_target_") else value
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    return html.Markup(f'<span class="value">{escape(text)}</span>')


def _all_differences(runs: Sequence[Run]) -> str:
    """Every key that differs, keys by runs: nothing is left out of it."""
    known = [run for run in runs if run.config]
    keys = differing([run.config for run in known])
    rows = [[html.Markup(f'<span class="name">{escape(key)}</span>')] for key in keys]
    for key, row in zip(keys, rows, strict=True):
        row += [html.Markup(f'<span class="value">{escape(run.config.get(key, ABSENT))}</span>') for run in known]
    table = html.table("Settings that differ", ["setting", *(run.name for run in known)], rows, kind="runs")
    return html.details(f"All {len(keys)} settings that differ", table)
