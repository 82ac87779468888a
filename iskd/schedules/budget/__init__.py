"""What every layer becomes within a budget: a library of fitted options, their scores and costs, an exact solver.

Its plans are carried out by an ordinary schedule.

Imports: system, plan, models, teacher, blocks, evaluation, refits, importance, schedules.
"""

from __future__ import annotations

from iskd.schedules.budget.plan import Plan, check_teacher, plan_of, read_plan
from iskd.schedules.budget.search import Place, search
from iskd.schedules.budget.settings import Budget

__all__ = ["Budget", "Place", "Plan", "check_teacher", "plan_of", "read_plan", "search"]
