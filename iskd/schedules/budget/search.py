"""From a budget to plans: text, options, library, scores, costs, the search, and what the best few really take.

Several processes share the work of fitting (`filling`); the first one does all the rest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from iskd.models import Stack
from iskd.models.weights import model_sha256
from iskd.plan.budget_plan import KEEP, BudgetPlan, TriedPlan
from iskd.refits import Refit
from iskd.schedules.budget.choosing import Chooser
from iskd.schedules.budget.costs import DECODED, Costs, counted, timed
from iskd.schedules.budget.filling import fill
from iskd.schedules.budget.fitting import fit_options
from iskd.schedules.budget.keeping import Finals, Found, kept_within
from iskd.schedules.budget.library import Library, recipe_of
from iskd.schedules.budget.options import Option, able, options_of
from iskd.schedules.budget.scores import Scorer
from iskd.schedules.budget.settings import LIMITS, TIMES, Amount, Budget, as_keys, limit_of
from iskd.schedules.budget.solver import problem_of, require
from iskd.schedules.budget.students import LOADERS, Choice, edits_of, made, natives
from iskd.schedules.budget.text import texts_of
from iskd.system.precision import ForwardContext
from iskd.teacher.cache import answering, autocast_of

_FRONT = tuple(round(0.95 - 0.05 * step, 2) for step in range(12))
_SEED = 0  # of fresh weights: runs of all seeds share a library and its plans
_ELSEWHERE = ("options", "use", "library", "plan")  # keys that decide nothing, or by what they describe
_OF_RUNS = ("tokens", "held_tokens", "streams")  # keys of refits that a search has its own of
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where and how a search is done.

    Attributes:
        folder: parent of all libraries.
        forward_context: the precision of passes.
        itemsize: bytes of a number in the exported weights.
        dtype: in which times are measured; None = that of the teacher in memory.
        process, processes: which one of how many this is.
        native: whether plain transformers, vLLM and llama.cpp open a student, as far as they open its teacher.
        refits: what a run does to the student of a plan, in order.
        told: called with what is being done, how much of it is done, and of how much.
        note: called with sentences for people.
    """

    folder: Path
    forward_context: ForwardContext
    native: Callable[[PreTrainedModel], bool]
    itemsize: int = 4
    dtype: torch.dtype | None = None
    process: int = 0
    processes: int = 1
    refits: Sequence[Refit] = ()
    told: Callable[[str, int, int], None] = lambda _what, _done, _of: None
    note: Callable[[str], None] = field(default=_log.info)


def search(
    budget: Budget, teacher: PreTrainedModel, windows: Callable[[int], Sequence[Tensor]], place: Place
) -> list[BudgetPlan]:
    """A plan for every budget that is asked for; none in a process that is not the first.

    Args:
        budget: limits, options, and how much is spent.
        teacher: the original, on its device, in evaluation mode; it stays as it is.
        windows: gives calibration windows [B, T] of so many tokens, the same on every process.
        place: where and how.

    Raises:
        RefusedError: nothing meets a limit of time of some budget; those of others come with it.
        ValueError: nothing meets an exact limit, or there is no option, too little text, another library in the folder.
    """
    start = time.perf_counter()
    _ = [each.asked for each in budget.each]  # refused before hours of work
    stack = Stack(teacher)
    budget = settled(budget, stack, place.refits)
    named = budget.use is not None
    options, told = able(options_of(budget.options, budget.use), teacher, _SEED, named=named)
    if budget.native:
        options, left_out = natives(options, teacher, place.native, _SEED, named=named)
        told += left_out
    itself, alike = (KEEP,) * len(stack.layers), [option.name for option in options] if budget.native else None
    begun, size, dtype = time.perf_counter(), place.itemsize, place.dtype
    costs = counted(teacher, options, budget, itemsize=size, seed=_SEED, dtype=dtype, told=place.told)
    for each in budget.each:
        if said := refusal(each, costs, options, itself, alike):
            raise ValueError(said)
    counting = time.perf_counter() - begun
    texts = texts_of(budget, windows).to(teacher.device)
    requests = [request_of(each, texts.digest, place.itemsize, place.refits) for each in budget.each]
    with place.forward_context():
        recipe = recipe_of(budget, answering(teacher, autocast_of(teacher)), texts.digest, _SEED)
        library = Library.open(budget, place.folder, recipe, teacher, _SEED)
        if place.process == 0:
            for sentence in (*told, *texts.short_of(budget), f"library of fitted options: {library.folder}"):
                place.note(sentence)
        prices = partial(
            timed, teacher=teacher, options=options, budget=budget, library=library, seed=_SEED, dtype=dtype,
            told=place.told,
        )  # fmt: skip
        begun, alone = time.perf_counter(), place.processes == 1
        if alone and budget.timed:  # beside others that fit nothing can be timed
            costs = prices(costs)
            over = [refusal(each, costs, options, itself, alike) for each in budget.each]
            if all(over):
                raise ValueError("; ".join(over))
        counting += time.perf_counter() - begun
        fill(
            library, options, place.process, place.processes, place.told, place.note,
            lambda jobs, tell: fit_options(teacher, texts, jobs, budget, _SEED, library.keep, tell),
        )  # fmt: skip
        if place.process:
            return []
        fitted = time.perf_counter()
        if budget.timed and not alone:
            costs = prices(costs)
        priced = time.perf_counter()
        scorer = Scorer(teacher, library, options, texts.score, budget.stride, place.told)
        chooser = Chooser(scorer, costs, budget, alike)
        finals = Finals(chooser, texts, place.refits, _SEED, place.told, place.native if budget.native else None)
        scored = time.perf_counter()
        spent = {
            "library": fitted - start - counting,
            "costs": counting + priced - fitted,
            "scores": scored - priced,
        }
        found, refused = list[tuple[Budget, str, dict[str, float], Found]](), list[str]()
        for each, request in zip(budget.each, requests, strict=True):
            limits = _limits(each.asked, costs, itself)
            try:
                chooser.require(limits, each.asked)
            except ValueError as error:
                refused.append(str(error))
            else:
                kept = kept_within(each, limits, finals, place.dtype, place.told)
                found.append((each, request, limits, kept))
                if len(requests) > 1:  # it may be hours until all of them are told
                    refitted = "" if kept.best.refitted is None else f", refitted {kept.best.refitted:.3f}"
                    place.note(f"{as_keys(each.asked)}: a plan of KL {kept.best.measured:.3f}{refitted}")
        # what was measured for one budget tells how to read the scores for all
        plans = [_plan(*each, chooser, costs, spent, place) for each in found]
    for plan in [plan for plan in plans if budget.native and not place.native(made(teacher, edits_of(plan))[0])]:
        plans.remove(plan)
        refused.append(_closed(plan))
    if refused:
        raise RefusedError("; ".join(refused), plans)
    return plans


def _closed(plan: BudgetPlan) -> str:
    """What is said of a plan that not all loaders open, as none of the others of its budget."""
    return (
        f"{as_keys(plan.asked)} with budget.native=true: {LOADERS} open students with each option alone, and none of "
        f"the {len(plan.tried)} that were built within the budget, with {', '.join(sorted({*plan.choice} - {KEEP}))}: "
        "leave one of these out of budget.use, or set budget.native=false"
    )


def settled(budget: Budget, stack: Stack, refits: Sequence[Refit]) -> Budget:
    """A budget at the context that a teacher has, without finalists where nothing is refitted.

    Raises ValueError where a longer context was asked for.
    """
    budget = budget if refits else replace(budget, finalists=0)
    # a table of learned positions ends for the tokens that are decoded behind the context too
    behind = DECODED * bool(stack.family.positions)
    return budget.at(None if stack.limit is None else stack.limit - behind, stack.bound)


def request_of(budget: Budget, text: str, itemsize: int, refits: Sequence[Refit]) -> str:
    """Hex SHA-256 of all that decides what is found for a teacher; where it is searched, and by whom, does not.

    Args:
        budget: one, settled.
        text: digest of the calibration text.
        itemsize: bytes of a number in the exported weights.
        refits: of the run.
    """
    values = {key: value for key, value in vars(budget).items() if key not in (*LIMITS, *_ELSEWHERE)}
    asked = budget.asked
    options = {option.name: option.described() for option in options_of(budget.options, budget.use)}
    keys = [{key: value for key, value in vars(each).items() if key not in _OF_RUNS} for each in refits]
    final = [(each.name(), own) for each, own in zip(refits, keys, strict=True)] if budget.finalists > 1 else []
    every = [asked, values, options, text, itemsize if "bytes" in asked else None, final]
    return hashlib.sha256(json.dumps(every, sort_keys=True, default=str).encode()).hexdigest()


class RefusedError(ValueError):
    """Some of several budgets cannot be met.

    Attributes:
        plans: for all the others.
    """

    def __init__(self, said: str, plans: Sequence[BudgetPlan]) -> None:
        super().__init__(said)
        self.plans = list(plans)


def refusal(
    budget: Budget, costs: Costs, options: Sequence[Option], teacher: Choice, alike: Sequence[str] | None
) -> str:
    """Why no student keeps the limits whose costs are known; "" where one does. Asked before anything is fitted.

    Args:
        budget: one.
        costs: those that are known.
        options: to choose from.
        teacher: the choice that is the teacher itself.
        alike: see `Chooser`.
    """
    asked = {key: value for key, value in budget.asked.items() if key in costs.keys}
    limits = _limits(asked, costs, teacher)
    problem = problem_of(options, len(teacher), dict.fromkeys(costs.layers, 0.0), costs, limits, alike)
    try:
        require(problem, limits, asked, costs, teacher)
    except ValueError as error:
        return str(error)
    return ""


def _limits(asked: Mapping[str, Amount], costs: Costs, whole: Choice) -> dict[str, float]:
    """Limits as amounts of a whole student."""
    teacher, others = costs.of(whole), dict(zip(costs.keys, costs.others, strict=True))
    blocks = {key: teacher[key] - (0.0 if key in TIMES else others[key]) for key in teacher}
    return {key: limit_of(key, value, teacher[key], blocks[key]) for key, value in asked.items()}


def _plan(
    budget: Budget,
    request: str,
    limits: dict[str, float],
    found: Found,
    chooser: Chooser,
    costs: Costs,
    spent: dict[str, float],
    place: Place,
) -> BudgetPlan:
    """What was found, for people and for the run."""
    scorer, best, predicted = chooser.scorer, found.best, chooser.predicted()
    return BudgetPlan(
        teacher=model_sha256(scorer.teacher),
        choice=best.choice,
        options={name: option.described() for name, option in scorer.options.items()},
        seed=_SEED,
        asked=dict(budget.asked),
        limits=limits,
        request=request,
        teacher_costs=costs.of(scorer.whole),
        costs=costs.of(best.choice),
        others=dict(zip(costs.keys, costs.others, strict=True)),
        measured=found.measured,
        predicted_kl=predicted[best.choice],
        added_kl=best.promise.added,
        measured_kl=best.measured,
        refitted_kl=best.refitted,
        found=best.found,
        scores=tuple(
            {name: chooser.scores[layer, name] for name in scorer.options if (layer, name) in chooser.scores}
            for layer in range(chooser.depth)
        ),
        tried=tuple(
            TriedPlan(each.choice, predicted[each.choice], each.measured, each.found, each.promise.added, each.refitted)
            for each in found.tried
        ),
        rank_correlation=chooser.rank_correlation(),
        compared=len(predicted),
        front=tuple(chooser.front(limits, next(iter(limits)), _FRONT)),
        seconds={**spent, "search": found.seconds},
        context=budget.context or 1,
        batch=budget.batch,
        native=budget.native,
    )
