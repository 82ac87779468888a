"""What a run tells while it trains.

Rows and values for its loggers, metrics.csv that outlives kills, and the time of a stage.

Imports: system, plan, teacher, data, schedules, evaluation, report, report.figures, training.step, training.state.
"""

from __future__ import annotations

from iskd.training.metrics.chosen import loggers_of, sweep_of
from iskd.training.metrics.loggers import log_end, log_row, log_start, log_values, tracked_as
from iskd.training.metrics.metrics_file import MetricsFile, keep_metrics
from iskd.training.metrics.stage_clock import StageClock

__all__ = [
    "MetricsFile",
    "StageClock",
    "keep_metrics",
    "log_end",
    "log_row",
    "log_start",
    "log_values",
    "loggers_of",
    "sweep_of",
    "tracked_as",
]
