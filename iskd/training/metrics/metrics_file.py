"""`metrics.csv` across kills and resumes: one row per step, none lost and none twice.

The file is whole at any moment but for its last line: rows are added at its end, and a new column has it written anew.
Where a run is taken up, it loses the rows past the checkpoint and whatever is no row of it.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from iskd.plan.metric_names import INSIDE, QUALITY, X_AXIS
from iskd.plan.run_files import KEPT_METRICS_FILE, METRICS_FILE
from iskd.system.files import clear_place
from iskd.system.tables import csv_text, read_csv, write_csv

_log = logging.getLogger(__name__)
_LOSS = "train/loss"
_RESULT = f"val/{QUALITY[0]}"
Row = dict[str, str]


class MetricsFile(Logger):
    """Rows of a run into its `metrics.csv`, each at once.

    A `metrics.csv` that is there is added to: where a run is taken up, `keep_metrics` has seen to it.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.path = run_dir / METRICS_FILE
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        """Empty: the file lies in the run's folder itself."""
        return ""

    @property
    def version(self) -> str:
        """Empty: a run has one."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.path.parent)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: they stand in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write a row of numbers."""
        row = {key: value.item() if hasattr(value, "item") else value for key, value in metrics.items()} | {
            "step": step
        }
        if not row.keys() <= set(self._columns) or not self.path.is_file():
            self._add_columns(row)
        with open(self.path, "a", encoding="utf-8", newline="", opener=_no_link) as file:
            file.write(csv_text([[row.get(column) for column in self._columns]]))

    def _add_columns(self, new: Iterable[str]) -> None:
        there = read_csv(self.path) if self.path.is_file() else None
        rows = [dict(zip(there.columns, cells, strict=True)) for cells in there.rows] if there else []
        self._columns = sorted({*self._columns, *new, *(there.columns if there else ())})
        _write(self.path, rows, self._columns)


def keep_metrics(run_dir: Path, *, below: int | None, results: int) -> None:
    """Before a run is resumed: drop the rows of `metrics.csv` past its checkpoint, at `below` tokens and `results`.

    The results are those of stages, the teacher's among them: at the tokens of the checkpoint a stage may have come to
    its end after it. `below` None: there is no checkpoint, and no row is kept. A line that is no row is dropped with a
    warning, as is a file that cannot be read: no state of it keeps a run from going on.
    """
    path, rows, columns = Path(run_dir) / METRICS_FILE, list[Row](), dict[str, None]()
    before = path.with_name(KEPT_METRICS_FILE)
    for file in (before, path):
        found, heads = _rows(file)
        rows += found
        columns |= dict.fromkeys(heads)
    kept = [row for row in rows if below is not None and _belongs(row, below, results)]
    if not kept or path.is_dir():
        clear_place(path)
    if kept:
        _write(path, kept, list(columns))
    clear_place(before)


def _rows(file: Path) -> tuple[list[Row], list[str]]:
    """The rows that a run wrote, and their columns."""
    if not file.is_symlink() and not file.exists():
        return [], []
    try:
        table = read_csv(file)
    except (OSError, ValueError) as error:
        _log.warning("%s is started anew: %s", file, error)
        return [], []
    rows = [dict(zip(table.columns, cells, strict=True)) for cells in table.rows]
    known = [row for row in rows if _is_row(row)]
    if skipped := table.skipped + len(rows) - len(known):
        _log.warning("%s: %d lines are no rows of a run and are left out", file, skipped)
    return known, table.columns if known else []


def _is_row(row: Mapping[str, str]) -> bool:
    try:
        numbers = {key: float(cell) for key, cell in row.items() if cell}
    except ValueError:
        return False
    return math.isfinite(numbers.get(X_AXIS, math.nan))


def _belongs(row: Mapping[str, str], below: int, results: int) -> bool:
    tokens = float(row[X_AXIS])
    if tokens != below:
        return tokens < below
    if row.get(INSIDE):  # before the checkpoint of its step is written
        return True
    if row.get(_RESULT):
        return float(row.get("stage") or 0) < results
    # a training row is logged before its step is counted, so the one at `below` belongs to the step that comes next
    return not row.get(_LOSS)


def _write(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    write_csv(path, [columns, *([row.get(column, "") for column in columns] for row in rows)])


def _no_link(path: str, flags: int) -> int:
    """Open without following a link: the folder may be somebody else's."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
