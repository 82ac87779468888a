"""What every layer becomes within a budget: a library of fitted options, their scores and costs, an exact solver.

Its plans are carried out by an ordinary schedule.

Imports: system, plan, models, teacher, blocks, evaluation, refits, importance, schedules.
"""

from __future__ import annotations

from iskd.schedules.budget.keeping import measure_finished
from iskd.schedules.budget.running import Asked, plan_for, plans_for
from iskd.schedules.budget.search import RefusedError
from iskd.schedules.budget.settings import Budget
from iskd.schedules.budget.students import edits_of, steps_of

__all__ = ["Asked", "Budget", "RefusedError", "edits_of", "measure_finished", "plan_for", "plans_for", "steps_of"]
