"""Limits that no student keeps are refused, with the least that there is, or with those that contradict each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from iskd.plan.budget_plan import amount
from iskd.schedules.budget.costs import Costs
from iskd.schedules.budget.solver import Problem, smallest, solve
from iskd.schedules.budget.students import Choice

_OF = {"params": " parameters", "bytes": "", "cache_bytes": " of cache"}
_OF |= {"prefill_ms": " to read the context", "decode_ms": " to decode a token"}
"""What a limit is an amount of."""


def require(
    problem: Problem, limits: Mapping[str, float], shown: Mapping[str, object], costs: Costs, teacher: Choice
) -> None:
    """Raise ValueError where no student keeps the limits.

    Args:
        problem: the choice within them.
        limits: amounts of a whole student.
        shown: as they were given.
        costs: of all options of all layers.
        teacher: the choice that is the teacher itself.
    """
    if solve(problem) is not None:
        return
    whole, others = costs.of(teacher), dict(zip(costs.keys, costs.others, strict=True))
    for key, limit in limits.items():
        least = smallest(replace(problem, limits={key: problem.limits[key]}), key) + others[key]
        if least > limit:
            blocks = whole[key] - others[key]
            share = (least - others[key]) / blocks if blocks else math.nan
            raise ValueError(
                f"budget.{key}={shown[key]} cannot be met with these options: the smallest student has "
                f"{amount(key, least)}{_OF[key]}, {100 * share:.4g} % of the teacher's blocks; raise it to that, or "
                "give options that cost less"
            )
    for key, limit in limits.items():
        least = smallest(problem, key) + others[key]
        rest = " and ".join(f"budget.{other}={shown[other]}" for other in limits if other != key)
        if math.isfinite(least) and least > limit:
            raise ValueError(
                f"budget.{key}={shown[key]} and {rest} contradict each other: within the latter the smallest "
                f"student has {amount(key, least)}{_OF[key]}; raise one of them"
            )
    listed = " and ".join(f"budget.{key}={value}" for key, value in shown.items())
    raise ValueError(f"{listed} contradict each other: no student keeps all of them; raise one")
