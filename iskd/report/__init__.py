"""What people read: the page of a run, the page over runs, tables on a terminal.

`figures` draws.

Imports: system, plan, evaluation, importance, report.figures.
"""

from __future__ import annotations

from iskd.report.curves import read_curve, write_curves
from iskd.report.run_list import is_run
from iskd.report.run_page import write_report
from iskd.report.runs_page import write_runs_report
from iskd.report.scores import score_table, write_scores
from iskd.report.stage_rows import stage_table
from iskd.report.tables import efficiency_table, evaluation_table

__all__ = [
    "efficiency_table",
    "evaluation_table",
    "is_run",
    "read_curve",
    "score_table",
    "stage_table",
    "write_curves",
    "write_report",
    "write_runs_report",
    "write_scores",
]
