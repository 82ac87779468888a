"""The best choice of one option for every layer within several limits: an exact grouped knapsack.

Minimise the sum of the layers' scores over binary x[l, o], one o for every layer l, so that the sum of every cost stays
within its limit. Beside that, a merge needs the layer below to be kept, a student needs a layer, students for plain
transformers have one width, and pairs of neighbours may have a correction of their own. HiGHS' branch and bound
(`scipy.optimize.milp`) finds the optimum; whole numbers are divided by what they have in common and checked again
without rounding, so that a limit in parameters is kept exactly. Limits that no student keeps are refused, with the
least that there is, or with those that contradict each other.

Source: Puzzle (arXiv 2411.19146, section 3.3) chooses blocks so; corrections for pairs, merges and one width, ours.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import ROUND_CEILING, Context, Decimal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from iskd.plan.budget_plan import KEEP, amount
from iskd.schedules.budget.costs import Costs
from iskd.schedules.budget.options import Option
from iskd.schedules.budget.scores import Single
from iskd.schedules.budget.settings import TIMES, as_keys
from iskd.schedules.budget.students import Choice

Pair = tuple[Single, Single]
_ROUNDING = 1e-9  # relative, of limits that are no whole numbers
_SHARE = 1e-12  # relative: 0.29 of 100 is less than 29 in floating point
_TRIES = 5
_OF = {"params": " parameters", "bytes": "", "cache_bytes": " of cache"}
_OF |= {"prefill_ms": " to read the context", "decode_ms": " to decode a token"}
"""What a limit is an amount of."""


@dataclass(frozen=True)
class Problem:
    """What there is to choose from, and what binds the choice.

    Attributes:
        depth: layers of the teacher.
        scores: of every option of every layer, lower = better; keeping has a score too.
        costs: by key of a limit, of every option of every layer.
        limits: by key, the most that the layers together may cost.
        merges, removes: names of options that need the layer below kept, and after which the layer is gone.
        widths: where students have to be uniform, the names of the options that change a layer's width; None = they
            need not be.
        pairs: what two options together cost more than each by itself.
        fixed: layers whose option is given.
        refused: choices from which the answer has to differ in so many layers at least.
        near: a choice from which it may differ in so many layers at most; None = in any number.
    """

    depth: int
    scores: Mapping[Single, float]
    costs: Mapping[str, Mapping[Single, float]]
    limits: Mapping[str, float]
    merges: frozenset[str] = frozenset()
    removes: frozenset[str] = frozenset()
    widths: frozenset[str] | None = None
    pairs: Mapping[Pair, float] = field(default_factory=dict)
    fixed: Mapping[int, str] = field(default_factory=dict)
    refused: Sequence[tuple[Choice, int]] = ()
    near: tuple[Choice, int] | None = None

    @property
    def options(self) -> list[Single]:
        """Every option of every layer that may be chosen, from below."""
        return sorted(
            (single for single in self.scores if self.fixed.get(single[0], single[1]) == single[1]),
            key=lambda single: (single[0], single[1] != KEEP, single[1]),
        )

    def score(self, choice: Sequence[str]) -> float:
        """What a choice is predicted to cost: its scores and the corrections of its pairs."""
        chosen = set(enumerate(choice))
        return sum(self.scores[single] for single in chosen) + sum(
            more for (one, other), more in self.pairs.items() if {one, other} <= chosen
        )

    def allows(self, choice: Sequence[str]) -> bool:
        """Whether a choice keeps everything that binds it."""
        return self.fits(choice) and self.stands(choice)

    def fits(self, choice: Sequence[str]) -> bool:
        """Whether it is within its limits."""
        chosen = list(enumerate(choice))
        return all(
            math.fsum(self.costs[key][single] for single in chosen) <= limit * (1 + _ROUNDING)
            for key, limit in self.limits.items()
        )

    def stands(self, choice: Sequence[str]) -> bool:
        """Whether such a student can be, apart from the limits."""
        widths = {name for name in choice if name not in self.removes}
        return (
            any(name not in self.removes for name in choice)
            and all(name not in self.merges or (at > 0 and choice[at - 1] == KEEP) for at, name in enumerate(choice))
            and (self.widths is None or len(widths) <= 1)
            and all(choice[layer] == name for layer, name in self.fixed.items())
            and all(_apart(choice, other) >= least for other, least in self.refused)
            and (self.near is None or _apart(choice, self.near[0]) <= self.near[1])
        )


def _apart(one: Sequence[str], other: Sequence[str]) -> int:
    """In how many layers two choices differ."""
    return sum(map(str.__ne__, one, other))


def solve(problem: Problem) -> Choice | None:
    """The choice with the lowest score; None where none is within the limits."""
    limits = dict(problem.limits)
    for _ in range(_TRIES):
        choice = _solved(problem, limits)
        if choice is None or problem.fits(choice):
            return choice
        # the solver's own tolerance has let a limit slip by a hair
        limits = {key: limit * (1 - 1e-6) if not _whole(problem, key) else limit - 1 for key, limit in limits.items()}
    raise RuntimeError("the solver returns choices that are not within their limits")


def smallest(problem: Problem, key: str) -> float:
    """The least that a student can cost in `key`, all other limits kept; infinite where nothing keeps them."""
    limits = {other: limit for other, limit in problem.limits.items() if other != key}
    scores = {single: problem.costs[key][single] for single in problem.scores}
    whole = Problem(problem.depth, scores, problem.costs, limits, problem.merges, problem.removes, problem.widths)
    choice = solve(whole)
    return math.inf if choice is None else math.fsum(problem.costs[key][at] for at in enumerate(choice))


def _whole(problem: Problem, key: str) -> bool:
    return all(float(value).is_integer() for value in problem.costs[key].values())


def _solved(problem: Problem, limits: Mapping[str, float]) -> Choice | None:
    options = problem.options
    number = {single: at for at, single in enumerate(options)}
    widths = sorted({KEEP, *problem.widths}) if problem.widths is not None else []
    pairs = [pair for pair in problem.pairs if number.keys() >= set(pair)]
    count = len(options) + len(widths) + len(pairs)
    rows: list[tuple[dict[int, float], float, float]] = []
    layers = range(problem.depth)
    for layer in layers:
        rows.append(({number[single]: 1.0 for single in options if single[0] == layer}, 1.0, 1.0))
    for key, limit in limits.items():
        rows.append(_limit(problem, key, limit, options))
    gone = {at: 1.0 for at, single in enumerate(options) if single[1] in problem.removes}
    rows.append((gone, -math.inf, problem.depth - 1.0))
    for at, (layer, name) in enumerate(options):
        if name in problem.merges:  # x[l, merge] <= x[l - 1, keep]
            below = number.get((layer - 1, KEEP))
            rows.append(({at: 1.0} | ({} if below is None else {below: -1.0}), -math.inf, 0.0))
    for place, width in enumerate(widths, len(options)):  # x[l, w] <= y[w], one y
        for at in (at for at, single in enumerate(options) if single[1] == width):
            rows.append(({at: 1.0, place: -1.0}, -math.inf, 0.0))
    if widths:
        rows.append((dict.fromkeys(range(len(options), len(options) + len(widths)), 1.0), 1.0, 1.0))
    for place, pair in enumerate(pairs, len(options) + len(widths)):
        one, other = (number[single] for single in pair)
        if problem.pairs[pair] > 0:  # z >= x + x' - 1
            rows.append(({place: 1.0, one: -1.0, other: -1.0}, -1.0, math.inf))
        else:  # z <= x, z <= x'
            rows += [({place: 1.0, at: -1.0}, -math.inf, 0.0) for at in (one, other)]
    for choice, least in problem.refused:
        same = {number[single]: 1.0 for single in enumerate(choice) if single in number}
        rows.append((same, -math.inf, float(problem.depth - least)))
    if problem.near is not None:
        choice, most = problem.near
        same = {number[single]: 1.0 for single in enumerate(choice) if single in number}
        rows.append((same, float(problem.depth - most), math.inf))
    weights = [problem.scores[single] for single in options] + [0.0] * len(widths)
    weights += [problem.pairs[pair] for pair in pairs]
    cells = [(row, column, x) for row, (entries, _, _) in enumerate(rows) for column, x in entries.items()]
    down, across, values = zip(*cells, strict=True)
    matrix = csr_matrix((values, (down, across)), shape=(len(rows), count))
    found = milp(
        np.asarray(weights),
        integrality=np.array([1] * (len(options) + len(widths)) + [0] * len(pairs)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows]),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    chosen = {single[0]: single[1] for at, single in enumerate(options) if found.x[at] > 0.5}
    return tuple(chosen[layer] for layer in layers)


def _limit(
    problem: Problem, key: str, limit: float, options: Sequence[Single]
) -> tuple[dict[int, float], float, float]:
    """A limit in the units in which the solver's tolerance means nothing."""
    costs = [problem.costs[key][single] for single in options]
    unit = float(math.gcd(*(int(cost) for cost in costs)) or 1) if _whole(problem, key) else max(*costs, 1e-300)
    most = math.floor(limit / unit * (1 + _SHARE)) if _whole(problem, key) else limit / unit
    return {at: cost / unit for at, cost in enumerate(costs) if cost}, -math.inf, float(most)


# ---- limits of whole students ----------------------------------------------------------------------------------------


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
        rest = as_keys({other: shown[other] for other in limits if other != key})
        if math.isfinite(least) and least > limit:
            raise ValueError(
                f"budget.{key}={shown[key]} and {rest} contradict each other: within the latter the smallest "
                f"student has {_enough(key, least)}{_OF[key]}; raise one of them"
            )
    raise ValueError(f"{as_keys(shown)} contradict each other: no student keeps all of them; raise one")


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
