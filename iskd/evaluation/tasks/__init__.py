"""What tasks ask: items of local files, items that are made here, and which metrics the harness reports of its own.

Imports: system, data.
"""

from __future__ import annotations

from iskd.evaluation.tasks.choosing import check_choosable, file_of, items_of, metric_of
from iskd.evaluation.tasks.task_items import COPY, TASKS, Item, read_task, subset

__all__ = [
    "COPY",
    "TASKS",
    "Item",
    "check_choosable",
    "file_of",
    "items_of",
    "metric_of",
    "read_task",
    "subset",
]
