"""`report.html`: one self-contained page about a run, for people.

Everything is inline (CSS, SVG), nothing is loaded and nothing runs, so the page can be mailed, archived and opened
anywhere, on a phone too. A file the run did not write is named on the page; only a broken `stages.json` is an error.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from iskd import plots
from iskd.table import COLUMNS, kl_text, number, percent, stage_rows, student_of, teacher_of
from iskd.tracking import NOT_LOSSES, STAGES_FILE, X_AXIS, StageResult, read_stages

REPORT_FILE = "report.html"
_MOST_ITEMS = 12  # of a list in a manifest; hashes of windows run to thousands


@dataclass
class _Run:
    """A run directory's contents; what could not be read is told in `notes`."""

    name: str
    stages: list[StageResult] = field(default_factory=list)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    axis: str = X_AXIS
    config: str | None = None
    record: Any = None
    data: Any = None
    environment: Any = None
    model_bytes: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def num_layers(self) -> int:
        """The teacher's layers: from the record, else the highest layer that any stage names."""
        if isinstance(self.record, dict) and isinstance(self.record.get("num_layers"), int):
            return int(self.record["num_layers"])
        named = [edit["layer"] for stage in self.stages for edit in stage.edits]
        named += [int(layer) for stage in self.stages for layer in stage.scores or {}]
        return max(named, default=-1) + 1


def _read_run(run_dir: Path) -> _Run:
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a directory: pass the directory of a run, the one that holds {STAGES_FILE}")
    run = _Run(name=run_dir.resolve().name)
    if (run_dir / STAGES_FILE).exists():
        run.stages = read_stages(run_dir)
    else:
        run.notes.append(f"{STAGES_FILE} is missing: no stage table and no plots of stages")
    if run.stages and teacher_of(run.stages) is None:
        run.notes.append(f"{STAGES_FILE} has no stage 0 (the teacher): nothing to compare the student with")
    _read_curves(run_dir / "metrics.csv", run)
    run.config = _text(run_dir / "config.yaml", run)
    run.record, run.data, run.environment = (
        _json(run_dir / f"{name}.json", run) for name in ("record", "data", "environment")
    )
    if (run_dir / "model").is_dir():
        run.model_bytes = sum(path.stat().st_size for path in (run_dir / "model").rglob("*") if path.is_file())
    else:
        run.notes.append("model/ is missing: the student was not exported")
    return run


def _text(path: Path, run: _Run) -> str | None:
    if not path.exists():
        run.notes.append(f"{path.name} is missing")
        return None
    return path.read_text(encoding="utf-8", errors="replace")


def _json(path: Path, run: _Run) -> Any:
    text = _text(path, run)
    try:
        return None if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        run.notes.append(f"{path.name} is not valid JSON: {error}")
        return None


def _read_curves(path: Path, run: _Run) -> None:
    """Loss curves by metric; a row without a token count belongs to the last count before it."""
    if not path.exists():
        run.notes.append(f"{path.name} is missing: no loss curves")
        return
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        columns = [name for name in reader.fieldnames or [] if name]
        losses = [name for name in columns if name.startswith("train/") and name not in NOT_LOSSES]
        run.axis = X_AXIS if X_AXIS in columns else "step"
        if run.axis not in columns or not losses:
            run.notes.append(f"{path.name} has no column {X_AXIS!r} or no train/ column: no loss curves")
            return
        x = 0.0
        bad = 0
        for row in reader:
            x = _cell(row.get(run.axis), x)
            for name in losses:
                y = _cell(row.get(name), math.nan)
                bad += math.isnan(y) and bool(row.get(name))
                if not math.isnan(y):
                    run.curves.setdefault(name, []).append((x, y))
    if bad:
        run.notes.append(f"{path.name}: {bad} cells of loss columns are not numbers and are left out")


def _cell(text: str | None, otherwise: float) -> float:
    try:
        return float(text) if text else otherwise
    except ValueError:
        return otherwise


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory; the same files give the same bytes.

    Args:
        run_dir: A run's directory; every file in it is optional.

    Returns:
        Path of the page.

    Raises:
        ValueError: `run_dir` is no directory, `stages.json` is broken, or an edit names a layer outside the teacher.
    """
    run = _read_run(Path(run_dir))
    out = Path(run_dir) / REPORT_FILE
    out.write_text(_page(run), encoding="utf-8")
    return out


def picture(run_dir: Path, out: Path) -> None:
    """Write the run as one 1200 x 600 PNG for a README: retention against parameters, and the edit map.

    Raises:
        ValueError: The run has no kept stage to draw.
    """
    run = _read_run(Path(run_dir))
    if student_of(run.stages) is None:
        raise ValueError(f"{run_dir} has no kept stage in {STAGES_FILE}, so nothing to draw: finish a stage first")
    plots.write_picture(run.stages, run.num_layers, Path(out))


def _page(run: _Run) -> str:
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
        f"<title>{escape(run.name)} - iskd report</title>\n<style>{_css()}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(run.name)}</h1>\n" + "\n".join(filter(None, sections)) + "\n</main>\n</body>\n</html>\n"
    )


def _headline(run: _Run) -> str:
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


def _figures(run: _Run) -> Iterator[str]:
    mapped = run.stages and run.num_layers
    drawn = [
        (
            plots.progress(run.stages) if run.stages else None,
            "Retention and size along the stages. Dashed: the teacher.",
        ),
        (plots.healing(run.stages), "What each edit cost, and what healing won back."),
        (
            plots.edit_map(run.stages, run.num_layers) if mapped else None,
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


_DARK = {
    "ink": "#e6e9ed",
    "muted": "#98a2ad",
    "grid": "#2b3138",
    "surface": "#14171b",
    "cell": "#434b55",
    "blue": "#56a8e0",
    "vermillion": "#f0813a",
    "green": "#2fc39b",
    "orange": "#f0b429",
    "purple": "#d893b8",
    "sky": "#8accf2",
}


def _css() -> str:
    light, dark = ("".join(f"--{name}:{colour};" for name, colour in p.items()) for p in (plots.PALETTE, _DARK))
    return f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{_RULES}"


_RULES = """
:root{--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
*{box-sizing:border-box}
body{margin:0;background:var(--surface);color:var(--ink);font:16px/1.55 var(--sans);-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.7rem;line-height:1.2;letter-spacing:-.015em;margin:0 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:0 0 .9rem}
h3{font-size:.95rem;margin:1.4rem 0 .4rem}
section{margin-top:3rem}
.lead{font-size:1.1rem;max-width:46rem;margin:0 0 1.6rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(145px,1fr));gap:1.1rem 1.5rem;margin:0;
border-top:1px solid var(--grid);border-bottom:1px solid var(--grid);padding:1.1rem 0}
dt{font-size:.8rem;color:var(--muted)}
dd{margin:0;font-size:1.35rem;font-variant-numeric:tabular-nums;letter-spacing:-.01em}
small,.hint,figcaption{display:block;font-size:.8rem;color:var(--muted);letter-spacing:0}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
.stages{width:100%}
th,td{padding:.4rem .55rem;border-bottom:1px solid var(--grid);text-align:right;vertical-align:top;white-space:nowrap}
th:first-child,td:first-child{padding-left:0}
th{font-weight:500;color:var(--muted)}
thead th{vertical-align:bottom;white-space:normal;min-width:4rem}
thead th:first-child{min-width:0}
.stages td:nth-child(2){min-width:9rem;white-space:normal}
.stages :is(th,td):is(:first-child,:nth-child(2),:last-child),.properties :is(th,td){text-align:left}
.properties td{white-space:normal;overflow-wrap:anywhere}
.rolled_back td{color:var(--muted)}
.rolled_back td:last-child{color:var(--vermillion);font-weight:600}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:2.4rem 2.5rem}
figure{margin:0;min-width:0}
svg{display:block;width:100%;max-width:100%;height:auto;margin-bottom:.5rem}
.events,.notes ul{margin:0;padding-left:1.1rem;font-size:.9rem;overflow-wrap:anywhere}
.notes{border-left:3px solid var(--orange);padding-left:1rem;margin-top:2rem}
details{margin-top:1.5rem;border-top:1px solid var(--grid);padding-top:.9rem}
summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font:.8rem/1.5 var(--mono);margin:.8rem 0 0}
"""
