"""The best plan when it is built: nearest once it is refitted, and within its limits of time, which are measured.

Blocks of a library were fitted one by one, on the teacher's stream; a run fits them on the student's own, where each
makes up for what those below it got wrong, and then refits what survives, which makes up for layers that are out. So
the best few plans are fitted and refitted as the run will do it, twice as many on little of the text first (successive
halving, arXiv 1502.07943), and the nearest one then is the best. What layers take does not add up to what the student
takes either: limits of time are measured on whole students, also at last.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from iskd.blocks import warm_start
from iskd.evaluation import measure_quality
from iskd.models import Stack, surgery
from iskd.plan import Convert, Record
from iskd.plan.budget_plan import KEEP, read_plan
from iskd.plan.run_files import BUDGET_FILE
from iskd.refits import Refit, Text, refit_survivors
from iskd.schedules.budget.calibration import Tried
from iskd.schedules.budget.choosing import Chooser
from iskd.schedules.budget.costs import Told, side_by_side
from iskd.schedules.budget.library import code_digest
from iskd.schedules.budget.settings import TIMES, Budget
from iskd.schedules.budget.students import Choice, edits_to, made
from iskd.schedules.budget.text import Texts

_SLACK = 1.02  # of a limit of time, which is never measured twice alike
_REFITTED = ("schedules/budget/keeping.py",)  # beside what binds a library
_TIGHTENED = 5  # times that a limit of time is drawn tighter
_ALIKE = 1e-9  # relative
_LITTLE = 0.25  # of the text, on which plans are refitted first
_ALIKE_IN = 1  # layer at most, in which plans differ that are alike
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """The best plan of a budget, what else was measured for it, what it was measured to take, and how long it took."""

    best: Tried
    tried: Sequence[Tried]
    measured: dict[str, float]
    seconds: float


@dataclass
class Finals:
    """Fits and refits the best plans, each once, on the text that the library's options are fitted to.

    Attributes:
        chooser: has found them.
        texts: of the budget.
        refits: those of the run, in order.
        seed: of fresh weights.
        told: called with what is being done, how much of it is done, and of how much.
        opened: whether a student may be: others are no plans, unless there is none; None = all may.
    """

    chooser: Chooser
    texts: Texts
    refits: Sequence[Refit]
    seed: int
    told: Told
    opened: Callable[[PreTrainedModel], bool] | None = None
    _known: dict[tuple[Choice, float], float | None] = field(default_factory=dict)

    def of(self, tried: Sequence[Tried]) -> list[Tried]:
        """Plans, the nearest after its refit first; behind these by KL the ones that were not refitted.

        Args:
            tried: the best by KL first.
        """
        if self.opened is not None:
            tried = [each for each in tried if self.opened(self._made(each.choice))] or tried
        count = self.chooser.budget.finalists
        chosen = entrants(tried, self.chooser.removes, 2 * count if count > 1 else 0)
        if len(chosen) > (few := (count + 1) // 2):
            first = self._refit(chosen, _LITTLE, "refitting the best plans on little text")
            chosen = sorted(chosen, key=lambda each: first[each.choice])[:few]
        final = self._refit(chosen, 1.0, "refitting the best plans") if len(tried) > 1 else {}
        known = {choice: kl for choice, kl in final.items() if kl < math.inf}
        found = [replace(each, refitted=known.get(each.choice)) for each in tried]
        return sorted(found, key=lambda each: each.rank)

    def _refit(self, chosen: Sequence[Tried], share: float, what: str) -> dict[Choice, float]:
        """KL of plans refitted on a share of the text of the fits; infinite where a plan cannot be."""
        for number, each in enumerate(chosen):
            self.told(what, number, len(chosen))
            if (each.choice, share) not in self._known:
                self._known[each.choice, share] = self._refitted(each.choice, share)
        kls = {each.choice: self._known[each.choice, share] for each in chosen}
        return {choice: math.inf if kl is None else kl for choice, kl in kls.items()}

    def _made(self, choice: Choice) -> PreTrainedModel:
        """The student of a choice, without memory."""
        scorer = self.chooser.scorer
        return made(scorer.teacher, edits_to(choice, scorer.options, self.seed))[0]

    def _refitted(self, choice: Choice, share: float) -> float | None:
        """KL on the text for scores, nats; None where the student of a choice cannot be refitted, which is told."""
        scorer = self.chooser.scorer
        name = scorer.name_of(choice, f"refitted on {share} by {self.refits} as {code_digest(_REFITTED)} does")
        if (known := scorer.known(name)) is not None:
            return known.item()
        try:
            found = self._distance(choice, share)
        except (ValueError, MemoryError, torch.OutOfMemoryError) as error:  # others may be, and hours were spent
            said = f"{' '.join(str(error).split()):.300}"
        else:
            if math.isfinite(found):
                scorer.keep({name: torch.tensor(found, dtype=torch.float64)})
                return found
            said = "its KL to the teacher is not finite afterwards"
        _log.warning("a plan with %s is not refitted: %s", ", ".join(sorted({*choice} - {KEEP})), said)
        return None

    def _distance(self, choice: Choice, share: float) -> float:
        """The same. Raises ValueError where a fit or a refit does."""
        scorer, budget, teacher = self.chooser.scorer, self.chooser.budget, self.chooser.scorer.teacher
        edits = edits_to(choice, scorer.options, self.seed)
        fit, held = (part[: max(1, round(share * len(part)))] for part in (self.texts.fit, self.texts.held))
        mixers = any(isinstance(edit, Convert) for edit in edits)
        tokens, held_tokens = (max(1, round(share * count)) for count in (budget.fit_tokens, budget.held_tokens))
        on_this = partial(replace, tokens=tokens, held_tokens=held_tokens)
        refits = [on_this(refit) for refit in self.refits if mixers or not refit.for_mixers]
        for refit in refits:
            refit.check(Stack(teacher), edits)
        student = copy.deepcopy(teacher)
        old, record = dict(enumerate(Stack(student).layers)), surgery.apply(student, Record(len(choice)), edits)

        def kl(windows: Sequence[Tensor]) -> float:
            return measure_quality(student, teacher, [{"input_ids": window} for window in windows])["kl"]

        warm_start(student, teacher, old, record, edits, self.texts.fit, self.texts.held, kl)
        refit_survivors(refits, student, teacher, record, edits, Text(torch.cat(fit), torch.cat(held)))
        return kl(self.texts.score)


def entrants(tried: Sequence[Tried], removes: Collection[str], count: int) -> list[Tried]:
    """The best plans that are not alike, and the best of those with the most layers out, in one gap or not.

    Args:
        tried: the best by KL first.
        removes: names of the options that leave no layer.
        count: how many at most.
    """
    depths = {each.choice: sum(name in removes for name in each.choice) for each in tried}
    deepest = dict[bool, Tried]()
    for each in tried:
        if depths[each.choice] == max(depths.values()) > 0:
            runs = sum(1 for gone, _ in groupby(name in removes for name in each.choice) if gone)
            deepest.setdefault(runs == 1, each)
    found = list[Tried]()
    for each in (*tried[:1], *deepest.values(), *tried):
        apart = min((_differ(each.choice, other.choice) for other in found), default=len(each.choice))
        if len(found) < count and apart > _ALIKE_IN:
            found.append(each)
    return found


def _differ(one: Choice, other: Choice) -> int:
    return sum(mine != theirs for mine, theirs in zip(one, other, strict=True))


def kept_within(
    budget: Budget, limits: dict[str, float], finals: Finals, dtype: torch.dtype | None, told: Told
) -> Found:
    """Search, and have the best few plans measured; where none of them keeps the limits of time, search within less.

    A limit is drawn tighter by as much as the best plan so far takes more than predicted, which leaves that plan out,
    until one keeps the limits or there is none left.

    Args:
        budget: one.
        limits: as amounts of a whole student, which can be met by what is predicted.
        finals: refits the plans that are found.
        dtype: in which times are measured; None = that of the teacher in memory.
        told: called with what is being done, how much of it is done, and of how much.
    """
    start, chooser = time.perf_counter(), finals.chooser
    if not budget.timed:
        every = finals.of(chooser.find(limits))
        return Found(every[0], every, {}, time.perf_counter() - start)
    tried, rows, bounds = dict[Choice, Tried](), dict[Choice, _Timed](), limits
    for _ in range(1 + _TIGHTENED):
        found = finals.of(chooser.find(bounds))
        tried |= {each.choice: each for each in found}
        best = _timed(budget, limits, found, rows, chooser, dtype, told)
        tighter = _tighter(best, limits, bounds, chooser) if best.over(limits) else None
        if tighter is None:
            break
        bounds = tighter
    best = min(rows.values(), key=lambda row: row.rank(limits))
    if over := best.over(limits):
        _log.warning(
            "budget.%s=%s is not kept: of %d plans that were built, the one that comes nearest takes %.4g ms, and the "
            "limit is %.4g ms; it is taken all the same",
            over[0], budget.asked[over[0]], len(rows), best.measured[over[0]], limits[over[0]],
        )  # fmt: skip
    every = sorted(tried.values(), key=lambda each: each.rank)
    return Found(best.plan, every, best.measured, time.perf_counter() - start)


@dataclass(frozen=True)
class _Timed:
    """A plan, and the ms that its student was measured to take."""

    plan: Tried
    measured: dict[str, float]

    def over(self, limits: dict[str, float]) -> list[str]:
        """The limits of time that it does not keep."""
        return [key for key in TIMES if key in limits and self.measured[key] > _SLACK * limits[key]]

    def rank(self, limits: dict[str, float]) -> tuple[bool, bool, float]:
        """Lower is better: of plans that keep the limits by KL, of others by how far they are over."""
        if not self.over(limits):
            return False, *self.plan.rank
        return True, False, max(self.measured[key] / limits[key] for key in TIMES if key in limits)


def _timed(
    budget: Budget,
    limits: dict[str, float],
    tried: Sequence[Tried],
    rows: dict[Choice, _Timed],
    chooser: Chooser,
    dtype: torch.dtype | None,
    told: Told,
) -> _Timed:
    """The best of a few plans, whose students are measured until one keeps its limits; `rows` gets all that were."""
    teacher, few = chooser.costs.of(chooser.scorer.whole), tried[: budget.plans]
    for number, each in enumerate(few):
        if each.choice not in rows:
            told("measuring the best plans", number, len(few))
            models = chooser.scorer.teacher, chooser.scorer.student(each.choice)
            assert budget.context is not None, "Budget.at comes first"
            rows[each.choice] = _Timed(
                each, _taken(teacher, *side_by_side(*models, budget.context, budget.batch, dtype))
            )
        if not rows[each.choice].over(limits):
            break
    return min((rows[each.choice] for each in few if each.choice in rows), key=lambda row: row.rank(limits))


def _taken(teacher: Mapping[str, float], mine: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Ms of a student that was measured beside its teacher, of which it is known what it takes."""
    return {key: teacher[key] * mine[at] / theirs[at] for at, key in enumerate(TIMES)}


def measure_finished(
    run_dir: Path, teacher: PreTrainedModel, student: PreTrainedModel, dtype: torch.dtype | None, seconds: float
) -> float:
    """Time the finished student of a run whose budget limits time, as its plan was; it is written into the plan.

    Args:
        run_dir: of the run, with its plan where it has one.
        teacher: whole, on its device.
        student: the finished one, beside it.
        dtype: in which times are measured; None = as they are.
        seconds: for all of it, roughly.

    Returns:
        The seconds that it took.

    Raises:
        ValueError: the plan cannot be read, or there is no memory.
    """
    file, start = run_dir / BUDGET_FILE, time.perf_counter()
    if file.is_file() and (plan := read_plan(file)).measured:
        both = side_by_side(teacher, student, plan.context, plan.batch, dtype, seconds)
        replace(plan, finished=_taken(plan.teacher_costs, *both)).write(file)
    return time.perf_counter() - start


def _tighter(
    row: _Timed, limits: dict[str, float], bounds: dict[str, float], chooser: Chooser
) -> dict[str, float] | None:
    """Bounds that leave out a plan that takes too long, and no further down than there are plans; None = nothing is."""
    predicted, bounds = chooser.costs.of(row.plan.choice), dict(bounds)
    for key in row.over(limits):
        wanted, least = limits[key] * predicted[key] / row.measured[key], chooser.least(bounds, key)
        if least >= predicted[key] * (1 - _ALIKE):
            return None
        bounds[key] = min(bounds[key], max(wanted, least))
    return bounds
