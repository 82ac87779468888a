"""What tasks ask: items of local files, items that are made here, and which metrics the harness reports of its own.

Imports: system, data.
"""

from __future__ import annotations

from iskd.evaluation.tasks.task_items import COPY, TASKS, Item, check_task, read_task, subset

__all__ = ["COPY", "TASKS", "Item", "check_task", "read_task", "subset"]
