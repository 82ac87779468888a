"""The solver against all choices counted out: the same optimum under every limit and every other tie."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from typing import Any

import pytest

from iskd.plan.budget_plan import KEEP
from iskd.schedules.budget.scores import Single
from iskd.schedules.budget.solver import Problem, smallest, solve
from iskd.schedules.budget.students import Choice

NAMES = ("slim", "window", "merge", "remove")
MERGES, REMOVES = frozenset({"merge"}), frozenset({"merge", "remove"})


def problem(seed: int, depth: int = 5, **others: Any) -> Problem:
    """Random scores and costs; whole numbers for parameters, none for time."""
    rng = random.Random(seed)
    singles = [
        (layer, name) for layer in range(depth) for name in (KEEP, *NAMES) if not (name == "merge" and layer == 0)
    ]
    scores = {single: 0.0 if single[1] == KEEP else round(rng.uniform(0.01, 1), 4) for single in singles}
    params = {(at, name): {KEEP: 4800, "slim": 2400, "window": 4803}.get(name, 0) * 1.0 for at, name in singles}
    times = {(at, name): 0.0 if name in REMOVES else rng.uniform(0.5, 1.5) for at, name in singles}
    limits = others.pop(
        "limits", {"params": 4800.0 * depth * rng.uniform(0.4, 0.9), "decode_ms": rng.uniform(2.0, 5.0)}
    )
    return Problem(depth, scores, {"params": params, "decode_ms": times}, limits, MERGES, REMOVES, **others)


def counted_out(asked: Problem, better: Mapping[Single, float] | None = None) -> tuple[float, list[Choice]]:
    """The lowest score, and every choice that has it, by trying all of them."""
    by_layer = [[name for at, name in asked.options if at == layer] for layer in range(asked.depth)]
    found: dict[Choice, float] = {}
    for choice in itertools.product(*by_layer):
        if asked.allows(choice):
            found[choice] = asked.score(choice)
    best = min(found.values(), default=math.inf)
    return best, [choice for choice, score in found.items() if score < best + 1e-9]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "parameters alone": {"limits": {"params": 9_600.0}},
    "no limit": {"limits": {}},
    "fixed": {"fixed": {1: "remove", 3: KEEP}},
    "one width": {"widths": frozenset({"slim", "window"})},
    "pairs": {
        "pairs": {((0, "slim"), (1, "slim")): 0.7, ((1, "remove"), (2, "remove")): -0.4, ((2, "slim"), (4, KEEP)): 1}
    },
    "refused": {"refused": [((KEEP,) * 5, 3), (("slim", KEEP, "slim", KEEP, "remove"), 2)]},
    "near": {"near": (("slim", KEEP, "slim", "remove", "slim"), 2)},
    "nearly nothing": {"limits": {"params": 4799.0}},
    "nothing": {"limits": {"params": -1.0}},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(4))
def test_the_answer_is_the_best_of_all_choices(name: str, seed: int) -> None:
    asked = problem(seed, **CASES[name])
    best, choices = counted_out(asked)
    found = solve(asked)
    if found is None:
        assert not choices
    else:
        assert asked.allows(found)
        assert asked.score(found) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_smallest_student_is_the_smallest_of_all(seed: int) -> None:
    asked = problem(seed, limits={"params": 12_000.0, "decode_ms": 3.0})
    for key in ("params", "decode_ms"):
        rest = Problem(
            asked.depth, asked.costs[key], asked.costs,
            {other: limit for other, limit in asked.limits.items() if other != key}, MERGES, REMOVES,
        )  # fmt: skip
        assert smallest(asked, key) == pytest.approx(counted_out(rest)[0])
    assert smallest(problem(seed, limits={"params": -1.0, "decode_ms": 1.0}), "decode_ms") == math.inf


def test_a_limit_in_parameters_is_kept_to_the_last_one() -> None:
    """Numbers so large that the tolerance of a solver is many parameters."""
    depth, size = 12, 7_077_889.0
    scores = {
        (layer, name): {KEEP: 0.0, "slim": 0.1 + layer / 100}[name] for layer in range(depth) for name in (KEEP, "slim")
    }
    params = {(layer, name): size if name == KEEP else size - 1 for layer, name in scores}
    for less in (1, 5, 11):
        asked = Problem(depth, scores, {"params": params}, {"params": size * depth - less})
        found = solve(asked)
        assert found is not None
        assert found.count("slim") == less
        assert found[:less] == ("slim",) * less
