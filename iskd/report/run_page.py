"""`report.html`: one self-contained page about a run, for people.

Everything is inline (CSS, SVG), nothing is loaded and nothing runs, so the page can be mailed, archived and opened
anywhere, on a phone too; links lead to the raw data beside it. A file the run did not write is named on the page; only
a broken `stages.json` is an error.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, ParamSpec

from iskd.plan import StageResult
from iskd.plan.results import student_of, teacher_of
from iskd.plan.run_files import (
    BUDGET_FILE,
    CONFIG_FILE,
    DATA_FILE,
    EFFICIENCY_FILE,
    ENVIRONMENT_FILE,
    EVALUATION_FILE,
    LENGTHS_TABLE_FILE,
    METRICS_FILE,
    RECORD_FILE,
    REPORT_FILE,
    SAMPLES_FILE,
    STAGES_FILE,
    STAGES_TABLE_FILE,
)
from iskd.report import html
from iskd.report.beside import links, write_page, write_stage_table, write_table
from iskd.report.budget import budget_section
from iskd.report.contexts import length_rows
from iskd.report.figures import along_run, edit_map, score_curves, timeline
from iskd.report.figures.importance_rounds import importance_rounds
from iskd.report.figures.layer_dynamics import layer_dynamics
from iskd.report.figures.picture import write_picture
from iskd.report.measured import efficiency_section, lengths_section, quantized_section, speed_tile, tasks_section
from iskd.report.origin import made_by, words_section
from iskd.report.promised import promised_section
from iskd.report.read_run import RunFiles, read_run
from iskd.report.stage_rows import COLUMNS, stage_rows
from iskd.system import number
from iskd.system.text import duration, kl_text, percent

_P = ParamSpec("_P")
_RAW = (
    (METRICS_FILE, "every logged step"),
    (STAGES_TABLE_FILE, "every stage, with the bounds of what was measured"),
    (STAGES_FILE, "the same with edits, scores and events"),
    (EVALUATION_FILE, "tasks"),
    (LENGTHS_TABLE_FILE, "recall by length, loss by position"),
    (EFFICIENCY_FILE, "size, latency, memory"),
    (SAMPLES_FILE, "what both models said"),
    (BUDGET_FILE, "what every layer becomes within the budget, all scores and plans"),
    (RECORD_FILE, "the edits"),
    (CONFIG_FILE, "all settings"),
    (DATA_FILE, "the text"),
    (ENVIRONMENT_FILE, "teacher, machine, versions"),
)


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory; the same files give the same bytes.

    Args:
        run_dir: A run's directory; every file in it is optional.

    Returns:
        Path of the page.

    Raises:
        ValueError: `run_dir` is no directory, `stages.json` is broken, an edit names a layer outside the teacher, or
            what is called `report.html` there is no page of ours.
    """
    folder = Path(run_dir)
    run = read_run(folder)
    if run.stages and not write_stage_table(folder, run.stages):
        run.notes.append(f"{STAGES_TABLE_FILE} in this folder is not ours and was left alone")
    rows = length_rows({run.name: run.evaluation}) if run.evaluation else []
    if len(rows) > 1 and not write_table(folder / LENGTHS_TABLE_FILE, rows):
        run.notes.append(f"{LENGTHS_TABLE_FILE} in this folder is not ours and was left alone")
    return write_page(folder / REPORT_FILE, _page(run, folder))


def picture(run_dir: Path, out: Path) -> None:
    """Write the run as one 1200 x 600 PNG for a README: retention against parameters, and the edit map.

    Raises:
        ValueError: The run has no kept stage to draw.
    """
    run = read_run(Path(run_dir))
    if student_of(run.stages) is None:
        raise ValueError(f"{run_dir} has no kept stage in {STAGES_FILE}, so nothing to draw: finish a stage first")
    write_picture(run.stages, run.num_layers, Path(out))


def _page(run: RunFiles, folder: Path) -> str:
    record = None if run.record is None else json.dumps(run.record, indent=2)
    return html.page(
        run.name,
        [
            _headline(run),
            html.notes(run.notes),
            made_by(run.environment),
            tasks_section(run.evaluation),
            lengths_section(run.evaluation),
            _stages(run.stages),
            _budget(run),
            html.section("Figures", html.figures(_figures(run))),
            efficiency_section(run.efficiency),
            quantized_section(run.evaluation),
            promised_section(run.plan, run.stages),
            words_section(run.samples),
            links(folder, [raw for raw in _RAW if not any(note.startswith(raw[0]) for note in run.notes)]),
            html.details("Data", html.properties("Data", run.data)),
            html.details("Environment", html.properties("Environment", run.environment)),
            html.details("Resolved config", html.preformatted(run.config)),
            html.details("Record of edits", html.preformatted(record)),
        ],
    )


def _headline(run: RunFiles) -> str:
    student, teacher = student_of(run.stages), teacher_of(run.stages)
    if student is None:
        return '<p class="lead">No stage was kept, so there is no student to describe.</p>'
    lead = _lead(run.stages, teacher, student, _teacher_name(run.environment))
    base = teacher or student
    seconds = sum(stage.seconds for stage in run.stages if math.isfinite(stage.seconds))
    tiles: list[tuple[str, str, str]] = [
        ("Parameters", f"{student.params / 1e6:.1f} M", f"teacher {base.params / 1e6:.1f} M"),
        ("Blocks", f"{student.block_params / 1e6:.1f} M", f"teacher {base.block_params / 1e6:.1f} M"),
        ("Perplexity", number(student.ppl, 4), f"teacher {number(base.ppl, 4)}"),
        ("Retention", f"{percent(student.retention)} %", "of the teacher's accuracy"),
        ("Top-1 agreement", f"{percent(student.top1)} %", f"KL {kl_text(student.kl)} nats per token"),
    ]
    if teacher is None:
        tiles = [(name, value, "") for name, value, _ in tiles]
    tiles[2:] = [(name, value, _with_bounds(below, student, name)) for name, value, below in tiles[2:]]
    tiles += speed_tile(run.efficiency, teacher, student)
    tiles.append(("Training", _count(run.stages[-1].tokens), f"tokens in {duration(seconds)}"))
    if run.evaluation is not None and math.isfinite(run.evaluation.mean.value):
        tasks = len(run.evaluation.tasks)
        mean = run.evaluation.mean
        known = math.isfinite(mean.low) and math.isfinite(mean.high)
        sure = f"; 95 %: {percent(mean.low)} to {percent(mean.high)}" if known else ""
        tiles.append(("Tasks", f"{percent(mean.value)} %", f"mean retention, {tasks} tasks{sure}"))
    if run.model_bytes is not None:
        tiles.append(("Exported model", f"{run.model_bytes / 1e6:.1f} MB", "on disk"))
    return f'<p class="lead">{lead}</p>\n' + html.tiles(tiles)


_BOUNDED: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "Perplexity": ("ppl", lambda value: number(value, 4)),
    "Retention": ("retention", percent),
    "Top-1 agreement": ("top1", percent),
}


def _with_bounds(below: str, student: StageResult, name: str) -> str:
    """The small print of a tile, and how sure its number is where that was measured."""
    key, text = _BOUNDED[name]
    bounds = (student.intervals or {}).get(key, [])
    if not bounds or not all(map(math.isfinite, bounds)):
        return below
    return "; ".join(filter(None, [below, f"95 %: {text(bounds[0])} to {text(bounds[1])}"]))


def _count(tokens: int) -> str:
    return f"{tokens / 1e6:.2f} M" if tokens >= 1e6 else f"{tokens / 1e3:.0f} k"


def _teacher_name(environment: Any) -> str:
    """What stands behind "the student": whose, where environment.json says it; owner and folders are left out."""
    source = environment.get("teacher") if isinstance(environment, dict) else None
    name = source.get("name") if isinstance(source, dict) else None
    short = name.rstrip("/").rsplit("/", 1)[-1] if isinstance(name, str) else ""
    return f" of <b>{escape(short)}</b>" if short else ""


def _lead(stages: Sequence[StageResult], teacher: StageResult | None, student: StageResult, of: str) -> str:
    undone = sum(stage.status == "rolled_back" for stage in stages)
    ran = sum(stage.index > 0 for stage in stages)
    after = f"After {ran} stage{'s' * (ran != 1)}" + (f" ({undone} rolled back)" if undone else "")
    if teacher is None or not teacher.params:
        return f"{after} the student{of} has {student.params / 1e6:.1f} million parameters."
    if student is teacher:
        return f"The teacher has {teacher.params / 1e6:.1f} million parameters. {after}, no edit was kept."
    change = student.params / teacher.params - 1
    grown = f"{abs(100 * change):.1f}&nbsp;% {'smaller' if change < 0 else 'larger'}"
    size = f"<b>{grown}</b> than" if change else "as large as"
    return (
        f"{after} the student{of} is {size} its teacher and keeps <b>{percent(student.retention)}&nbsp;%</b> of "
        f"its next-token accuracy; perplexity goes from {number(teacher.ppl, 4)} to {number(student.ppl, 4)}."
    )


def _budget(run: RunFiles) -> str:
    student = student_of(run.stages)
    measured = {} if student is None else {"params": student.params, "kl": student.kl}
    return budget_section(run.budget, measured)


def _stages(stages: Sequence[StageResult]) -> str:
    if not stages:
        return ""
    rows, arrow = stage_rows(stages), COLUMNS.index("perplexity")
    for row in rows:
        row[arrow] = row[arrow].replace("->", "\N{RIGHTWARDS ARROW}")
    table = html.table("Stages", COLUMNS, rows, kind="stages", classes=[stage.status for stage in stages])
    told = "".join(f"<li><b>Stage {s.index}</b> {escape(event)}</li>" for s in stages for event in s.events)
    events = f'<h3>Events</h3><ul class="events">{told}</ul>' if told else ""
    hint = (
        "Perplexity: before &rarr; after healing, on text that was not trained on. Top-1: how often teacher and "
        "student prefer the same token. Retention: the student's next-token accuracy over the teacher's. tokens/s: of "
        "scoring. tokens: trained so far."
    )
    return html.section("Stages", f'{table}<p class="hint">{hint}</p>{events}')


def _figures(run: RunFiles) -> Iterator[tuple[str | None, str]]:
    if not run.stages:
        return
    stages, layers = run.stages, run.num_layers
    yield _once(along_run.progress, stages), "Retention and size along the stages. Dashed: the teacher."
    if layers:
        curve = score_curves.score_curve("student", stages, layers)
        text = "Scores of every stage's student on the tasks of eval=, on the same items."
        yield _once(score_curves.task_curves, curve), text
        text = "Retention against what changes along the run; bars: 95 %. Points without one: measured inside a stage."
        yield _once(score_curves.retention_curves, [curve]), text
    yield _once(along_run.healing, stages), "What each edit cost, and what healing won back."
    if layers:
        text = "What sits at each layer after each stage. Dot: changed by the stage; cross: tried, then rolled back."
        yield _once(edit_map.edit_map, stages, layers), text
    yield (
        _once(along_run.losses, run.curves, stages, run.axis),
        "Training losses, every logged point; the bold line is their mean. Dotted lines: edits of the model.",
    )
    text = "Training dynamics: one line per layer, pale at the bottom of the stack and dark at its top."
    yield _once(layer_dynamics, run.layers, stages), text
    if layers:
        text = "Scores when first taken; circles, where drawn, are the latest ones."
        yield _once(along_run.importance, stages, layers), text
        text = (
            "Importance by round: the rank of each layer among those that were left, pale the least important, dark "
            "the most. Ranks, because scores of different rounds have different scales. Blank: removed before."
        )
        yield _once(importance_rounds, stages, layers), text
    yield _once(timeline.timeline, stages), "When each stage ran, and the tokens it trained on."


_DRAWN: dict[Callable[..., str | None], tuple[bytes, str | None]] = {}


def _once(draw: Callable[_P, str | None], *values: _P.args, **named: _P.kwargs) -> str | None:
    """`draw(*values)`, kept until it is asked for other values: a run writes its page twice at its end."""
    seen = hashlib.sha256(repr((values, named)).encode()).digest()
    if draw not in _DRAWN or _DRAWN[draw][0] != seen:
        _DRAWN[draw] = seen, draw(*values, **named)
    return _DRAWN[draw][1]
