"""`iskd search`: plans for many budgets from one library of fitted options, and their front.

Imports: system, plan, models, report, schedules.budget, commands, commands.build, commands.values.
"""

from __future__ import annotations

from iskd.commands.search.front import FRONT, front_table, write_plans
from iskd.commands.search.searching import main

__all__ = ["FRONT", "front_table", "main", "write_plans"]
