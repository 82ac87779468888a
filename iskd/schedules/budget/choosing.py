"""From scores to the best plans: added single scores, then depth before width, then rounds around the best one.

Added scores of single layers mispredict whole blocks that leave together. So beside the choice that they suggest (with
the common cost of neighbours measured and added) there are the best ones of each kind of option alone, and layers are
taken out, one by one or as one gap (`depth`), and at several depths the rest of the budget is spent on width, by scores
that are taken anew around that student. All these plans are built from the library and measured; around the best one
scores are taken again, and a better plan is looked for within some changes. What was measured also puts right what
scores promise (`calibration`).

Source: "depth first, then width" after Puzzle's experience with dropped blocks (arXiv 2411.19146); chain, pairs and
rounds, ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from iskd.plan.budget_plan import KEEP
from iskd.schedules.budget.calibration import Calibration, Promise, Tried, left_out, rank_correlation
from iskd.schedules.budget.costs import Costs
from iskd.schedules.budget.depth import Chain, Gap, coarse, possible
from iskd.schedules.budget.options import kinds_among
from iskd.schedules.budget.scores import Scorer, Single
from iskd.schedules.budget.settings import Budget
from iskd.schedules.budget.solver import Pair, Problem, problem_of, require, smallest, solve
from iskd.schedules.budget.students import Choice

_APART = 2  # layers in which the next best plans have to differ
_STEP = 0.1  # of the teacher's layers, between two depths that are tried
_REACHES = 0.25, 0.15, 0.07  # of the layers, that a round may change: scores of few positions promise too much of many
_HOPELESS = 3.0  # times the best KL so far, at which taking out layers ends


class Chooser:
    """Finds plans within limits, for any number of budgets, from one library; what was scored is not scored again.

    Args:
        scorer: asks for KLs.
        costs: of all options of all layers.
        budget: how much is spent on the search.
        alike: options that a student for plain transformers may have, where it is to be one; None = any.
    """

    def __init__(self, scorer: Scorer, costs: Costs, budget: Budget, alike: Collection[str] | None = None) -> None:
        self.scorer, self.costs, self.budget, self.alike = scorer, costs, budget, alike
        self.depth = scorer.depth
        self.removes = frozenset(option.name for option in scorer.options.values() if option.removes)
        scores, alive = scorer.race(costs.layers, budget.race_tokens)
        self.alive = alive if alike is None else scorer.singles  # one width for all may be the best nowhere
        self.scores: dict[Single, float] = scores | {(layer, KEEP): 0.0 for layer in range(self.depth)}
        self._around: dict[Choice, dict[Single, float]] = {}
        self._pairs: dict[Pair, float] = {}
        self._kl: dict[Choice, float] = {}
        self._seen: dict[Choice, Tried] = {}
        self._chains: list[Chain | Gap] = [Chain(scorer, scores)]
        if alike is not None and any(option.merges for option in scorer.options.values()):
            # a layer below a merge is kept, so that of one width for all nothing else could be spent on width
            self._chains.append(Chain(scorer, scores, merges=False))
        self._chains.append(Gap(scorer))

    # ---- what there is ----------------------------------------------------------------------------------------------

    def problem(self, limits: Mapping[str, float], scores: Mapping[Single, float] | None = None) -> Problem:
        """The choice within limits on a whole student.

        Args:
            limits: amounts of it.
            scores: of what may be chosen; None = single ones, of who is not out of the race.
        """
        if scores is None:
            alive = {*self.alive, *((layer, KEEP) for layer in range(self.depth))}
            scores = {single: score for single, score in self.scores.items() if single in alive}
        return problem_of(self.scorer.options.values(), self.depth, scores, self.costs, limits, self.alike)

    def require(self, limits: Mapping[str, float], shown: Mapping[str, object]) -> None:
        """Raise ValueError where no student keeps the limits, given as `shown`, with the least that there is."""
        require(self.problem(limits), limits, shown, self.costs, self.scorer.whole)

    def least(self, limits: Mapping[str, float], key: str) -> float:
        """The least that a whole student costs in `key`, all other limits kept; infinite where nothing keeps them."""
        return smallest(self.problem(limits), key) + self.costs.others[self.costs.keys.index(key)]

    # ---- the search -------------------------------------------------------------------------------------------------

    def find(self, limits: Mapping[str, float]) -> list[Tried]:
        """Plans within the limits, the best by measured KL first. Raises nothing that `require` has let pass."""
        tried: dict[Choice, Tried] = {}

        def note(choice: Choice | None, problem: Problem, found: str, base: Choice | None = None) -> Tried | None:
            if choice is None or choice in tried:
                return None if choice is None else tried[choice]
            if choice not in self._seen:
                self._seen[choice] = Tried(choice, self._promise(choice, problem, base), self.kl(choice), found)
            tried[choice] = self._seen[choice]
            return tried[choice]

        problem = self.problem(limits)
        note(solve(problem), problem, "single scores")
        for choice, paired in self._paired(problem):
            note(choice, paired, "single scores and pairs")
            problem = paired
        # added scores of many kinds of options are wrong in many ways, those of one kind rather in one
        for names in kinds_among(self.scorer.options.values()) if self.alike is None else []:
            few = {single: score for single, score in self.scores.items() if single[1] in (*names, KEEP)}
            alone = self.problem(limits, few)
            note(solve(alone), alone, f"{', '.join(names)} alone")
            for choice, paired in self._paired(alone):
                note(choice, paired, f"{', '.join(names)} alone, and pairs")
        while len(tried) < self.budget.plans:
            problem = replace(problem, refused=[(choice, _APART) for choice in tried])
            if note(solve(problem), problem, "next best by single scores") is None:
                break
        for chain in self._chains:
            self._depth_first(chain, limits, note, tried)
        best = min(tried.values(), key=_measured)
        for turn in range(self.budget.rounds):
            base, around = best.choice, self.problem(limits, self.around(best.choice))
            for reach in dict.fromkeys(max(1, round(share * self.depth)) for share in _REACHES):
                problem = replace(around, near=(base, reach))
                best = min(best, note(solve(problem), problem, f"round {turn + 1}", base) or best, key=_measured)
            if best.choice == base:
                break
        return sorted(tried.values(), key=_measured)

    def kl(self, choice: Choice) -> float:
        """Measured KL of a plan; once."""
        if choice not in self._kl:
            self._kl[choice] = self.scorer.kl(choice)
        return self._kl[choice]

    def _promise(self, choice: Choice, problem: Problem, base: Choice | None = None) -> Promise:
        """KL by the scores of a problem, which were taken around a student; None = the teacher."""
        start = self.scorer.whole if base is None else base
        count = sum(name != other for name, other in zip(choice, start, strict=True))
        # an option that is out of the race has a score all the same, and a chain of layers may have taken it
        scores = problem.scores if base is not None else self.scores
        added = sum(scores[single] for single in enumerate(choice)) + sum(
            more for pair, more in problem.pairs.items() if all(choice[layer] == name for layer, name in pair)
        )
        return Promise(added + (self.kl(base) if base is not None else 0.0), count)

    # ---- predictions ------------------------------------------------------------------------------------------------

    def predicted(self) -> dict[Choice, float]:
        """KL of every plan that was measured so far, for any budget, as the other plans let expect it."""
        seen = list(self._seen.values())
        found = left_out([each.promise for each in seen], [each.measured for each in seen], self.depth)
        return dict(zip(self._seen, found, strict=True))

    def calibration(self) -> Calibration:
        """From promises to predictions, by all plans that were measured so far."""
        seen = self._seen.values()
        return Calibration.fit([each.promise for each in seen], [each.measured for each in seen], self.depth)

    def rank_correlation(self) -> float | None:
        """Of predicted and measured KL, over all plans that were measured so far; None where they are too few."""
        predicted = self.predicted()
        return rank_correlation(list(predicted.values()), [self._seen[choice].measured for choice in predicted])

    def front(self, limits: Mapping[str, float], key: str, shares: Sequence[float]) -> list[tuple[float, float]]:
        """Predicted KL of the best plans by single scores, at other shares of the teacher's blocks in one limit."""
        calibration, least = self.calibration(), math.inf
        whole, others = self.costs.of(self.scorer.whole), dict(zip(self.costs.keys, self.costs.others, strict=True))
        found = []
        for share in sorted(shares):
            limit = others[key] + share * (whole[key] - others[key])
            problem = replace(self.problem({**limits, key: limit}), pairs=self._pairs)
            choice = solve(problem)
            if choice is not None:  # a plan that keeps a tighter limit keeps this one too
                least = min(least, calibration.of(self._promise(choice, problem)))
                found.append((share, least))
        return found[::-1]

    # ---- pairs ------------------------------------------------------------------------------------------------------

    def _paired(self, problem: Problem) -> Iterator[tuple[Choice, Problem]]:
        """Better choices, with what neighbouring edits of the choice before cost together."""
        problem = replace(problem, pairs=self._pairs)
        for _ in range(2):
            choice = solve(problem)
            if choice is None or not self._measure_pairs(choice):
                break
            problem = replace(problem, pairs=dict(self._pairs))
            choice = solve(problem)
            if choice is not None:
                yield choice, problem

    def _measure_pairs(self, choice: Choice) -> bool:
        """Measure the pairs of neighbours of a choice that are not known yet, as far as they are allowed."""
        edited = [layer for layer, name in enumerate(choice) if name != KEEP]
        pairs = [
            ((below, choice[below]), (above, choice[above]))
            for below, above in pairwise(edited)
            if all(name == KEEP for name in choice[below + 1 : above])
        ]
        # those that are nearest, and cost most, are those that are least likely to add up
        pairs.sort(key=lambda pair: (pair[1][0] - pair[0][0], -self.scores[pair[0]] - self.scores[pair[1]]))
        new = [pair for pair in pairs if pair not in self._pairs][: self.budget.pairs]
        whole = self.scorer.whole
        changed = [self.scorer.with_one(self.scorer.with_one(whole, one), other) for one, other in new]
        if not new:
            return False
        windows = range(self.scorer.raced(self.budget.race_tokens))  # those of the scores that are taken off
        found = self.scorer.values(whole, changed, windows, what="scoring pairs")
        for (one, other), together in zip(new, found, strict=True):
            alone = [self.scorer.rows[single] for single in (one, other)]
            read = min(map(len, (together, *alone)))  # of the same windows, on which what is difficult is so for all
            both, *each = (rows[:read].mean().item() for rows in (together, *alone))
            self._pairs[one, other] = both - sum(each)
        return True

    # ---- around a student -------------------------------------------------------------------------------------------

    def around(self, base: Choice) -> dict[Single, float]:
        """How much a student's KL changes with another option at one of its layers; its own options are 0."""
        if base not in self._around:
            singles = [
                single
                for single in [*self.alive, *((layer, KEEP) for layer in range(self.depth))]
                if base[single[0]] != single[1] and possible(self.scorer.with_one(base, single), self.scorer.options)
            ]
            changed = [base, *(self.scorer.with_one(base, single) for single in singles)]
            windows = coarse(len(self.scorer.windows))
            found = self.scorer.values(base, changed, windows, what="scoring around a plan").mean((1, 2)).tolist()
            around = {single: kl - found[0] for single, kl in zip(singles, found[1:], strict=True)}
            self._around[base] = around | dict.fromkeys(enumerate(base), 0.0)
        return self._around[base]

    # ---- depth first ------------------------------------------------------------------------------------------------

    def _depth_first(
        self,
        chain: Chain | Gap,
        limits: Mapping[str, float],
        note: Callable[..., Tried | None],
        tried: Mapping[Choice, Tried],
    ) -> None:
        """Plans that take out some layers of the chain and spend the rest of the budget on the others.

        Where finalists are refitted worse ones may be ahead then, and all depths are tried that are not hopeless.
        """
        step, worse, count = max(1, round(_STEP * self.depth)), 0, 0
        while self.removes and (worse < 2 or self.budget.finalists > 1):
            count += step
            best = min(found.measured for found in tried.values())
            base, enough = self._taken_out(chain, count, limits, _HOPELESS * best)
            if base is None:
                return
            if enough:  # layers alone are enough
                note(base, self.problem(limits), f"{_gone(base, self.removes)} {chain.said} out")
                return
            fixed = {layer: name for layer, name in enumerate(base) if name in self.removes}
            alive = {*self.alive, *((layer, KEEP) for layer in range(self.depth))}
            scores = {one: score for one, score in self.scores.items() if one in alive} | dict.fromkeys(
                enumerate(base), 0.0
            )
            if solve(replace(self.problem(limits, scores), fixed=fixed)) is None:
                continue  # no width is small enough: more layers have to go
            scores = self.around(base) if self.budget.rounds else scores
            problem = replace(self.problem(limits, scores), fixed=fixed)
            found = note(solve(problem), problem, f"{len(fixed)} {chain.said} out, then width", base)
            worse = worse + 1 if found is None or found.measured > best else 0

    def _taken_out(
        self, chain: Chain | Gap, count: int, limits: Mapping[str, float], hopeless: float
    ) -> tuple[Choice | None, bool]:
        """The student without `count` layers, or fewer where that is within the limits; None where it is no use."""
        base: Choice | None = None
        enough = False
        for fewer in range(count, 0, -1):
            student = chain.without(fewer)
            if student is None:
                continue  # fewer may be all that can go, and enough
            if not self._keeps(student, limits):
                base = student if fewer == count else base
                break
            base, enough = student, True
        return (None, False) if base is None or not (enough or self.kl(base) <= hopeless) else (base, enough)

    def _keeps(self, choice: Choice, limits: Mapping[str, float]) -> bool:
        """Whether a student is within the limits, by what is predicted."""
        costs = self.costs.of(choice)
        return all(costs[key] <= limit for key, limit in limits.items())


def _measured(tried: Tried) -> float:
    return tried.measured


def _gone(choice: Choice, removes: Collection[str]) -> int:
    return sum(name in removes for name in choice)
