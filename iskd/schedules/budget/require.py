"""Limits that no student keeps are refused, with the least that there is, or with those that contradict each other."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from decimal import ROUND_CEILING, Context, Decimal

from iskd.plan.budget_plan import amount
from iskd.schedules.budget.costs import Costs
from iskd.schedules.budget.options import Option
from iskd.schedules.budget.scores import Single
from iskd.schedules.budget.settings import TIMES
from iskd.schedules.budget.solver import Problem, smallest, solve
from iskd.schedules.budget.students import Choice

_OF = {"params": " parameters", "bytes": "", "cache_bytes": " of cache"}
_OF |= {"prefill_ms": " to read the context", "decode_ms": " to decode a token"}
"""What a limit is an amount of."""


def problem_of(
    options: Iterable[Option],
    depth: int,
    scores: Mapping[Single, float],
    costs: Costs,
    limits: Mapping[str, float],
    alike: Collection[str] | None = None,
) -> Problem:
    """The choice of one option for every layer within limits on a whole student.

    Args:
        options: what there is beside keeping a layer.
        depth: layers of the teacher.
        scores: of what may be chosen.
        costs: of all options of all layers.
        limits: amounts of a whole student.
        alike: see `Chooser`.
    """
    kinds, others = list(options), dict(zip(costs.keys, costs.others, strict=True))
    removes = frozenset(option.name for option in kinds if option.removes)
    return Problem(
        depth, scores, {key: costs.column(key) for key in limits},
        {key: limit - others[key] for key, limit in limits.items()},
        frozenset(option.name for option in kinds if option.merges), removes,
        None if alike is None else frozenset(alike) - removes,
    )  # fmt: skip


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
            raise ValueError(
                f"budget.{key}={shown[key]} cannot be met with these options: the smallest student has "
                f"{_enough(key, least)}{_OF[key]}{_share(key, least, whole[key], others[key])}; raise it to that, or "
                "give options that cost less"
            )
    for key, limit in limits.items():
        least = smallest(problem, key) + others[key]
        rest = " and ".join(f"budget.{other}={shown[other]}" for other in limits if other != key)
        if math.isfinite(least) and least > limit:
            raise ValueError(
                f"budget.{key}={shown[key]} and {rest} contradict each other: within the latter the smallest "
                f"student has {_enough(key, least)}{_OF[key]}; raise one of them"
            )
    listed = " and ".join(f"budget.{key}={value}" for key, value in shown.items())
    raise ValueError(f"{listed} contradict each other: no student keeps all of them; raise one")


def _enough(key: str, least: float) -> str:
    """An amount that is not below the least one: who follows the advice is not refused again."""
    return amount(key, least if key == "params" else _up(least, 3 if key in TIMES else 4))


def _share(key: str, least: float, whole: float, others: float) -> str:
    """A share that is not below the least one, of what shares of this limit are of."""
    part, of = (least, whole) if key in TIMES else (least - others, whole - others)
    return f", {_up(100 * part / of, 4):.10g} % of the teacher's{'' if key in TIMES else ' blocks'}" if of else ""


def _up(value: float, digits: int) -> float:
    """The number of so many digits that is next, from `value` up."""
    return float(Context(prec=digits, rounding=ROUND_CEILING).create_decimal(Decimal(value)))
