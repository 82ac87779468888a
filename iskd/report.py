"""`report.html`: one self-contained page about a run, for people.

Everything is inline (CSS, SVG), nothing is loaded and nothing runs, so the page can be mailed, archived and opened
anywhere, on a phone too. A file the run did not write is named on the page; only a broken `stages.json` is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from iskd import plots
from iskd.edit_map import edit_map
from iskd.picture import write_picture
from iskd.report_style import css
from iskd.run_files import RunFiles, read_run
from iskd.table import COLUMNS, kl_text, number, percent, stage_rows, student_of, teacher_of
from iskd.tracking import STAGES_FILE, StageResult

REPORT_FILE = "report.html"
_MOST_ITEMS = 12  # of a list in a manifest; hashes of windows run to thousands


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory; the same files give the same bytes.

    Args:
        run_dir: A run's directory; every file in it is optional.

    Returns:
        Path of the page.

    Raises:
        ValueError: `run_dir` is no directory, `stages.json` is broken, or an edit names a layer outside the teacher.
    """
    run = read_run(Path(run_dir))
    out = Path(run_dir) / REPORT_FILE
    out.write_text(_page(run), encoding="utf-8")
    return out


def picture(run_dir: Path, out: Path) -> None:
    """Write the run as one 1200 x 600 PNG for a README: retention against parameters, and the edit map.

    Raises:
        ValueError: The run has no kept stage to draw.
    """
    run = read_run(Path(run_dir))
    if student_of(run.stages) is None:
        raise ValueError(f"{run_dir} has no kept stage in {STAGES_FILE}, so nothing to draw: finish a stage first")
    write_picture(run.stages, run.num_layers, Path(out))


def _page(run: RunFiles) -> str:
    sections = [
        _headline(run),
        _notes(run.notes),
        _stages(run.stages),
        "".join(_figures(run)),
        _section("Data", _properties(run.data)),
        _section("Environment", _properties(run.environment)),
        _details("Resolved config", run.config),
        _details("Record of edits", None if run.record is None else json.dumps(run.record, indent=2)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(run.name)} - iskd report</title>\n<style>{css()}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(run.name)}</h1>\n" + "\n".join(filter(None, sections)) + "\n</main>\n</body>\n</html>\n"
    )


def _headline(run: RunFiles) -> str:
    student, teacher = student_of(run.stages), teacher_of(run.stages)
    if student is None:
        return '<p class="lead">No stage was kept, so there is no student to describe.</p>'
    lead = _lead(run.stages, teacher, student)
    base = teacher or student
    tiles = [
        _tile("Parameters", f"{student.params / 1e6:.1f} M", f"teacher {base.params / 1e6:.1f} M", teacher),
        _tile("Blocks", f"{student.block_params / 1e6:.1f} M", f"teacher {base.block_params / 1e6:.1f} M", teacher),
        _tile("Perplexity", number(student.ppl, 4), f"teacher {number(base.ppl, 4)}", teacher),
        _tile("Retention", f"{percent(student.retention)} %", "of the teacher's score", teacher),
        _tile("Top-1 agreement", f"{percent(student.top1)} %", f"KL {kl_text(student.kl)} nats per token", teacher),
        _tile("Training", f"{run.stages[-1].tokens / 1e6:.2f} M tokens", _duration(run.stages), run.stages[-1]),
    ]
    if run.model_bytes is not None:
        tiles.append(_tile("Exported model", f"{run.model_bytes / 1e6:.1f} MB", "on disk", student))
    return f'<p class="lead">{lead}</p>\n<dl class="tiles">' + "".join(tiles) + "</dl>"


def _lead(stages: Sequence[StageResult], teacher: StageResult | None, student: StageResult) -> str:
    undone = sum(stage.status == "rolled_back" for stage in stages)
    ran = sum(stage.index > 0 for stage in stages)
    after = f"After {ran} stage{'s' * (ran != 1)}" + (f" ({undone} rolled back)" if undone else "")
    if teacher is None or not teacher.params:
        return f"{after} the student has {student.params / 1e6:.1f} million parameters."
    if student is teacher:
        return f"The teacher has {teacher.params / 1e6:.1f} million parameters. {after}, no edit was kept."
    change = student.params / teacher.params - 1
    size = f"{abs(100 * change):.1f} % {'smaller' if change < 0 else 'larger'} than" if change else "as large as"
    return (
        f"{after} the student is <b>{size}</b> the teacher and keeps <b>{percent(student.retention)} %</b> of its "
        f"score; perplexity goes from {number(teacher.ppl, 4)} to {number(student.ppl, 4)}."
    )


def _tile(name: str, value: str, below: str, known: StageResult | None) -> str:
    small = f"<small>{escape(below)}</small>" if known else ""
    return f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{small}</dd></div>"


def _duration(stages: Sequence[StageResult]) -> str:
    seconds = sum(stage.seconds for stage in stages if math.isfinite(stage.seconds))
    return f"in {seconds / 3600:.1f} h" if seconds >= 5400 else f"in {seconds / 60:.1f} min"


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<section class="notes"><h2>Not in this report</h2><ul>{items}</ul></section>' if notes else ""


def _stages(stages: Sequence[StageResult]) -> str:
    if not stages:
        return ""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in COLUMNS)
    body, arrow = "", COLUMNS.index("perplexity")
    for stage, row in zip(stages, stage_rows(stages), strict=True):
        row[arrow] = row[arrow].replace("->", "\N{RIGHTWARDS ARROW}")
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        body += f'<tr class="{escape(stage.status)}">{cells}</tr>\n'
    told = "".join(f"<li><b>Stage {s.index}</b> {escape(event)}</li>" for s in stages for event in s.events)
    events = f'<h3>Events</h3><ul class="events">{told}</ul>' if told else ""
    table = f'<table class="stages"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>'
    hint = "Perplexity: before &rarr; after healing. tokens/s: scoring speed. tokens: of training, cumulative."
    return _section("Stages", f'<div class="scroll">{table}</div><p class="hint">{hint}</p>{events}')


def _figures(run: RunFiles) -> Iterator[str]:
    mapped = run.stages and run.num_layers
    drawn = [
        (
            plots.progress(run.stages) if run.stages else None,
            "Retention and size along the stages. Dashed: the teacher.",
        ),
        (plots.healing(run.stages), "What each edit cost, and what healing won back."),
        (
            edit_map(run.stages, run.num_layers) if mapped else None,
            "What sits at each layer after each stage. Dot: changed by the stage; cross: tried, then rolled back.",
        ),
        (plots.losses(run.curves, run.stages, run.axis), "Training losses. Dotted lines: edits of the model."),
        (
            plots.importance(run.stages, run.num_layers) if mapped else None,
            "Scores when first taken; circles, where drawn, are the latest ones.",
        ),
    ]
    figures = [(svg, text) for svg, text in drawn if svg]
    if figures:
        yield '<section><h2>Figures</h2><div class="figures">'
        for svg, text in figures:
            yield f"<figure>{svg}<figcaption>{escape(text)}</figcaption></figure>\n"
        yield "</div></section>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _details(title: str, text: str | None) -> str:
    return "" if text is None else f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _properties(value: Any) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(text)}</td></tr>\n' for key, text in _flat("", value)
    )
    return f'<div class="scroll"><table class="properties"><tbody>{rows}</tbody></table></div>' if rows else ""


def _flat(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """A JSON value as (dotted key, text) rows; long lists are cut and say so."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(f"{key}.{name}" if key else str(name), item)
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value[:_MOST_ITEMS]):
        for i, item in enumerate(value[:_MOST_ITEMS]):
            yield from _flat(f"{key}[{i}]", item)
        if len(value) > _MOST_ITEMS:
            yield f"{key}[...]", f"{len(value)} in all"
    elif isinstance(value, list):
        more = f", ... ({len(value)} in all)" if len(value) > _MOST_ITEMS else ""
        yield key, ", ".join(map(str, value[:_MOST_ITEMS])) + more
    elif value is not None:
        yield key, f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)
