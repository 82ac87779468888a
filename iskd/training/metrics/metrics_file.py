"""`metrics.csv` across kills and resumes: one row per step, none lost and none twice."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from iskd.plan.metric_names import X_AXIS
from iskd.plan.run_files import KEPT_METRICS_FILE, METRICS_FILE
from iskd.system import write_whole


def keep_metrics(run_dir: Path, *, below: int | None) -> None:
    """Before a run is resumed: set `metrics.csv` aside, without the rows past the `below` tokens of its checkpoint.

    None: there is no checkpoint, and no row is kept.
    """
    path = Path(run_dir) / METRICS_FILE
    files = [*_set_aside(run_dir), *([path] if path.is_file() else [])]
    rows, columns = _read_rows(files)
    # a training row is logged before its step is counted, so the one at `below` belongs to the step that comes next
    kept = [row for row in rows if below is not None and _belongs(row, below)]
    if kept:
        _write_rows(path.with_name(KEPT_METRICS_FILE), kept, columns)
    for file in files:
        if file.name != KEPT_METRICS_FILE or not kept:
            file.unlink()


def merge_metrics(run_dir: Path) -> None:
    """After a resumed run: join what was set aside and what was added into one `metrics.csv`."""
    path, kept = Path(run_dir) / METRICS_FILE, _set_aside(run_dir)
    if not kept:
        return
    rows, columns = _read_rows([*kept, *([path] if path.is_file() else [])])
    _write_rows(path, rows, columns)
    for file in kept:
        file.unlink()


def _belongs(row: Mapping[str, str], below: int) -> bool:
    return _tokens(row) < below or (_tokens(row) == below and not row.get("train/loss"))


def _set_aside(run_dir: Path) -> list[Path]:
    return sorted(Path(run_dir).glob(KEPT_METRICS_FILE))


def _tokens(row: Mapping[str, str]) -> float:
    return float(row.get(X_AXIS) or 0)


def _read_rows(paths: Sequence[Path]) -> tuple[list[dict[str, str]], list[str]]:
    rows: list[dict[str, str]] = []
    columns: dict[str, None] = {}
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns |= dict.fromkeys(reader.fieldnames or ())
            rows += list(reader)
    return rows, list(columns)


def _write_rows(path: Path, rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())
