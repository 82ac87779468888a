"""Laws of the search: assembled students have the KL of real ones, costs are exact, plans keep every limit."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import PreTrainedModel

from iskd.blocks import warm_start
from iskd.evaluation import measure_quality
from iskd.export.student import native_config
from iskd.importance.sweep import leave_one_out_values
from iskd.models import Stack, scoring, surgery
from iskd.models.weights import cast_parameters, load_model_tensors, model_tensors
from iskd.plan import Edit, Record, Replace, Spec
from iskd.plan.budget_plan import KEEP, BudgetPlan, check_teacher, read_plan
from iskd.plan.run_files import BUDGET_FILE
from iskd.refits import Text, refit_survivors
from iskd.refits.calibrate import Calibrate
from iskd.refits.output import Output
from iskd.schedules.budget import RefusedError, edits_of, filling, keeping, steps_of
from iskd.schedules.budget import costs as costs_file
from iskd.schedules.budget import search as searching
from iskd.schedules.budget.calibration import Calibration, Promise, Tried
from iskd.schedules.budget.choosing import Chooser
from iskd.schedules.budget.costs import Costs, counted, timed
from iskd.schedules.budget.depth import Chain, Gap, coarse, possible
from iskd.schedules.budget.keeping import entrants
from iskd.schedules.budget.library import Library
from iskd.schedules.budget.options import Option, able, kinds_among, layers_of, options_of
from iskd.schedules.budget.scores import Scorer
from iskd.schedules.budget.settings import LIMITS, TIMES, Budget, limit_of
from iskd.schedules.budget.solver import problem_of, require, solve
from iskd.schedules.budget.students import AsPlanned, Choice, edits_to, places
from tests.factories import digest, louder, tiny
from tests.schedules.budget.test_library import BUDGET, OPTIONS, SMALL, fill, opened, place, text

USE = ["slim_50", "no_attention", "window", "merge", "remove"]
DEPTH = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Scorer, Costs]:
    """A teacher, what asks for KLs of its students, and costs; made once."""
    teacher = louder(tiny("llama", layers=DEPTH))
    options, _ = able(options_of(OPTIONS, USE), teacher, 0, named=True)
    library, texts = opened(teacher, tmp_path_factory.mktemp("library"))
    fill(library, texts, teacher, options)
    costs = counted(teacher, options, Budget(params=0.5, options=OPTIONS, context=32), itemsize=4, seed=0)
    return teacher, Scorer(teacher, library, options, texts.score, 2), costs


def apart(
    teacher: PreTrainedModel, choice: Choice, options: dict[str, Option], library: Library
) -> tuple[PreTrainedModel, Record, list[Edit]]:
    """A student at its own depth, of copies of the teacher's blocks and of a library's; its record and edits."""
    edits, student = edits_to(choice, options, 0), copy.deepcopy(teacher)
    record = surgery.apply(student, Record(len(choice)), edits)
    blocks = dict(zip(record.layers, Stack(student).layers, strict=True))
    for position, what in enumerate(places(choice, options)):
        if isinstance(what, tuple):
            fitted = library.block(what[0], options[what[1]])
            assert fitted is not None
            load_model_tensors(blocks[position], model_tensors(fitted))
    return student, record, edits


CHOICES = [
    ("slim_50", KEEP, "window", "no_attention", "remove"),
    (KEEP, "merge", "slim_50", "remove", KEEP),
    ("remove", "slim_50", KEEP, "merge", "window"),
    (KEEP,) * DEPTH,
]


@pytest.mark.parametrize("choice", CHOICES)
def test_an_assembled_student_is_the_real_one(world: Any, choice: tuple[str, ...]) -> None:
    teacher, scorer, costs = world
    student, record, edits = apart(teacher, choice, scorer.options, scorer.library)
    student.eval()
    assert record == Record(DEPTH).extended(edits)
    assert not {*student.parameters()} & {*teacher.parameters()}, "a refit changes what survives"
    ids = torch.cat(scorer.windows)
    with torch.no_grad():
        p, q = (model(ids).logits.double().log_softmax(-1) for model in (teacher, student))
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert scorer.kl(choice) == pytest.approx(expected, abs=2e-6)
    assert costs.of(choice)["params"] == surgery.parameters(student), "exact, not about"
    with torch.no_grad():
        cache = student(ids[:1], use_cache=True).past_key_values
    held = sum(
        tensor.nbytes
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), layer.values)
        if tensor is not None
    )
    if "window" not in choice and "no_attention" not in choice:
        assert costs.of(choice)["cache_bytes"] == held * 32 / ids.shape[1]


def test_changes_near_any_student_cost_what_they_do_by_themselves(world: Any) -> None:
    """The sweep over shared prefixes, from every base to choices one or two layers away."""
    _, scorer, _ = world
    for base in CHOICES:
        near = [choice for choice in CHOICES if choice != base]
        near.append(tuple("slim_50" if at == 4 else name for at, name in enumerate(base)))
        found = scorer.values(base, [base, *near], range(len(scorer.windows)), stride=1).mean((1, 2))
        for value, choice in zip(found.tolist(), [base, *near], strict=True):
            assert value == pytest.approx(scorer.kl(choice), abs=2e-6)


def test_removal_scores_are_those_of_leaving_one_out(world: Any) -> None:
    teacher, scorer, _ = world
    with scoring(teacher):
        values = [leave_one_out_values(teacher, teacher, window, stride=2)[:, 0] for window in scorer.windows]
    scores, _ = scorer.race({}, all_of_them=True)
    for layer, row in enumerate(torch.stack(values, 1).mean((1, 2)).tolist()):
        assert scores[layer, "remove"] == pytest.approx(row, abs=1e-6)


def test_a_race_puts_out_only_who_is_worse_and_no_cheaper(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By planted values: layer 1 has an option that is worse than a cheaper one, and a better one that costs more."""
    _, scorer, costs = world
    asked: list[int] = []
    noise = torch.Generator().manual_seed(0)
    means = dict.fromkeys(scorer.singles, 1.0) | {(1, "window"): 3.0, (1, "slim_50"): 0.2, (2, "merge"): 0.1}

    def planted(base: Any, changed: Any, windows: Any, **_: Any) -> torch.Tensor:
        asked.append(len(changed))
        found = [next((at, name) for at, name in enumerate(choice) if name != KEEP) for choice in changed]
        rows = torch.tensor([means[single] for single in found]).view(-1, 1, 1)
        return rows + 0.05 * torch.randn(len(found), len(windows), 8, generator=noise)

    monkeypatch.setattr(scorer, "values", planted)
    monkeypatch.setattr(Scorer, "_file", tmp_path / "planted.safetensors")  # never beside what was measured
    scores, alive = scorer.race(costs.layers)
    out = set(scorer.singles) - set(alive)
    assert (1, "window") in out
    assert not out & {(1, "slim_50"), (2, "remove"), (1, "remove")}, "a merge binds its neighbour; the smallest stay"
    assert asked[0] == len(scorer.singles) > asked[-1]
    assert scores[1, "window"] > 2.5
    (tmp_path / "planted.safetensors").unlink()
    everybody, all_alive = scorer.race(costs.layers, all_of_them=True)
    assert set(all_alive) == set(everybody) == set(scorer.singles)


def test_an_option_that_breaks_is_worse_than_any_other(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision may overflow in one block; that is no reason to end a search, and in all of them it is one."""
    teacher, scorer, costs = world
    options = list(scorer.options.values())
    library, texts = opened(teacher, tmp_path)
    fill(library, texts, teacher, options)
    original, broken = type(library).block, [(2, "slim_50")]

    def block(self: Any, layer: int, option: Any) -> Any:
        made = original(self, layer, option)
        if (layer, option.name) in broken:
            next(made.parameters()).fill_(torch.inf)
        return made

    monkeypatch.setattr(type(library), "block", block)
    mine = Scorer(teacher, library, options, texts.score, 2)
    chooser = Chooser(mine, costs, BUDGET)
    assert chooser.scores[2, "slim_50"] == pytest.approx(1e3)
    assert all(score < 100 for single, score in chooser.scores.items() if single not in broken)
    tried = chooser.find(limits_of(costs, params=0.6))
    assert all(each.measured < 100 for each in tried if each.choice[2] != "slim_50")
    assert tried[0].choice[2] != "slim_50"
    monkeypatch.setattr(Scorer, "_known", lambda _self: {})
    broken += [single for single in mine.singles if options_of(OPTIONS, [single[1]])[0].fitted]
    only = [option for option in options if option.fitted]
    with pytest.raises(ValueError, match="no option can be scored, as the KL to the teacher is not finite with any of"):
        Chooser(Scorer(teacher, library, only, texts.score, 2), costs, BUDGET)


def test_scores_are_read_off_the_library(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, scorer, costs = world
    first = scorer.race(costs.layers)
    monkeypatch.setattr(scorer, "values", None)
    assert scorer.race(costs.layers) == first


def test_scores_and_times_of_which_a_bit_is_flipped_are_taken_anew(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    teacher, scorer, costs = world
    first = scorer.race(costs.layers)
    content = bytearray(scorer._file.read_bytes())
    content[-3] ^= 64
    scorer._file.write_bytes(content)
    assert scorer._known() == {}
    assert "options are scored anew" in caplog.text
    scores, alive = scorer.race(costs.layers)  # the same sums, in batches of another make-up
    assert scores == pytest.approx(first[0], rel=1e-4, abs=1e-6)
    assert set(alive) == set(first[1])
    library, _ = opened(teacher, tmp_path)
    clock(monkeypatch)
    budget, options = Budget(decode_ms=4.0, options=OPTIONS, context=32), list(scorer.options.values())
    times = timed(costs, teacher, options, budget, library=library, seed=0)
    [file] = library.folder.glob("times-*.json")
    told = json.loads(file.read_text())
    told["times"][""][0][1] *= 2
    file.write_text(json.dumps(told))
    assert timed(costs, teacher, options, budget, library=library, seed=0) == times
    assert f"{file} is damaged: times are measured anew" in caplog.text
    monkeypatch.setattr(costs_file, "side_by_side", None)
    assert timed(costs, teacher, options, budget, library=library, seed=0) == times, "what is whole is read"


def test_scores_of_other_options_stay_and_single_ones_may_be_read_on_less(world: Any) -> None:
    """A search with some of the options, and more of the text, takes nothing from one with all of them."""
    teacher, scorer, costs = world
    others = [option for option in scorer.options.values() if option.name in ("slim_50", "remove")]
    again, some = (
        Scorer(teacher, scorer.library, each, scorer.windows, 4) for each in ([*scorer.options.values()], others)
    )
    window = len(scorer.windows[0][0])
    first, _ = again.race(costs.layers, window)
    assert {len(rows) for rows in again._known().values()} == {1}
    few, _ = some.race(costs.layers)
    known = again._known()
    assert set(known) == set(again.singles)
    assert len(known[1, "window"]) == 1 < len(known[1, "remove"]) <= len(scorer.windows)
    assert first[1, "window"] == known[1, "window"].mean().item()
    assert few[1, "remove"] == known[1, "remove"].mean().item()


def test_a_chain_takes_out_who_is_missed_least(world: Any) -> None:
    """By asking all of them at every step; who is asked fewer takes out the least missed of these."""
    _, scorer, costs = world
    scores, _ = scorer.race(costs.layers)
    chain, base = Chain(scorer, scores), scorer.whole
    for count in range(1, DEPTH - 1):
        near = [
            scorer.with_one(base, (layer, name))
            for layer in range(DEPTH)
            for name in ("merge", "remove")
            if base[layer] == KEEP
        ]
        near = [choice for choice in near if possible(choice, scorer.options)]
        kls = scorer.values(base, near, coarse(len(scorer.windows))).mean((1, 2)).tolist()
        base = near[kls.index(min(kls))]
        assert chain.without(count) == base
    first = Chain(scorer, scores, asked=1).without(1)
    assert first is not None
    assert min(scores[single] for single in scorer.singles if single[1] in ("merge", "remove")) == min(
        scores[layer, name] for layer, name in enumerate(first) if name != KEEP
    )
    assert Chain(scorer, scores, asked=3).without(DEPTH) is None


def test_a_gap_is_where_its_layers_are_missed_least_together(world: Any) -> None:
    _, scorer, _ = world
    gap = Gap(scorer)
    for count in (1, 3, DEPTH - 1):
        ranges = [range(start, start + count) for start in range(DEPTH - count + 1)]
        places = [tuple("remove" if at in gone else KEEP for at in range(DEPTH)) for gone in ranges]
        kls = scorer.values(scorer.whole, places, coarse(len(scorer.windows))).mean((1, 2)).tolist()
        assert gap.without(count) == places[kls.index(min(kls))]
    assert gap.without(DEPTH) is None
    others = Scorer(scorer.teacher, scorer.library, [scorer.options["slim_50"]], scorer.windows, 2)
    assert Gap(others).without(1) is None


@pytest.mark.parametrize("rounds", [0, 1])
def test_the_rest_is_spent_on_width_beside_a_gap(rounds: int, world: Any) -> None:
    """All depths, as a refit may put a worse one ahead; what is promised is what the gap costs, and single scores."""
    _, scorer, costs = world
    chooser = Chooser(scorer, costs, replace(BUDGET, rounds=rounds, finalists=4))
    chooser._chains = [Gap(scorer)]
    limits = limits_of(costs, params=0.5)
    every = {each.choice: each for each in chooser.find(limits)}
    base = Gap(scorer).without(2)
    assert base is not None
    alive = {*chooser.alive, *((layer, KEEP) for layer in range(DEPTH))}
    single = {one: score for one, score in chooser.scores.items() if one in alive} | dict.fromkeys(enumerate(base), 0.0)
    scores = chooser.around(base) if rounds else single
    gone = {at: name for at, name in enumerate(base) if name == "remove"}
    choice = solve(replace(chooser.problem(limits, scores), fixed=gone))
    assert choice is not None
    if every[choice].found == "2 neighbouring layers out, then width":
        width = [(at, name) for at, name in enumerate(choice) if name != base[at]]
        promised = scorer.kl(base) + sum(scores[single] for single in width)
        assert every[choice].promise == Promise(pytest.approx(promised), len(width))
    else:
        assert not rounds or every[choice].found == "single scores" or "alone" in every[choice].found, "found before"
    assert Gap(scorer).without(3) in every, "and layers alone, where they are enough"


def test_the_best_plans_that_are_not_alike_and_the_deepest_ones_are_refitted() -> None:
    def tried(*gone: int, measured: float, other: str = KEEP) -> Tried:
        choice = tuple("remove" if at in gone else other for at in range(8))
        return Tried(choice, Promise(measured, 1), measured, "")

    none, slim, alike = tried(measured=0.1), tried(measured=0.2, other="slim"), tried(3, measured=0.25)
    two, gap = tried(1, 4, measured=0.3), tried(5, 6, measured=0.4)
    four, deepest, other = (
        tried(1, 2, 5, 6, measured=0.6),
        tried(1, 2, 3, 4, measured=0.7),
        tried(3, 4, 5, 6, measured=0.8),
    )
    every = [none, slim, alike, two, gap, four, deepest, other]

    def names(count: int, among: list[Tried]) -> list[float]:
        return [each.measured for each in entrants(among, {"remove"}, count)]

    assert names(0, every) == []
    assert names(1, every) == [0.1]
    assert names(3, every) == [0.1, 0.6, 0.7], "the best, and the best of the deepest, scattered and in one gap"
    assert names(9, every) == [0.1, 0.6, 0.7, 0.2, 0.3, 0.4, 0.8], "all but the one that is one layer from the best"
    assert names(3, [none, slim]) == [0.1, 0.2]


def test_the_plan_that_is_nearest_once_refitted_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Fitted on its own stream and refitted as a run does it, on the text of the fits.

    What was refitted for one budget is known to the others, and told before these are searched for.
    """
    teacher = louder(tiny("llama", layers=DEPTH))
    refits = [Output(), Calibrate()]  # of which the latter has nothing to do here, as no plan converts a layer
    budget = Budget(params=[0.55, 0.5], options=OPTIONS, use=["slim_50", "remove"], epochs=0, **SMALL)
    said: list[str] = []
    plans = searching_for(budget, teacher, tmp_path, refits=refits, note=said.append)
    assert said[-2:] == [
        f"budget.params={plan.asked['params']}: a plan of KL {plan.measured_kl:.3f}, refitted {plan.refitted_kl:.3f}"
        for plan in plans
    ]
    before = digest(teacher)
    for plan in plans:
        final = [each for each in plan.tried if each.refitted is not None]
        assert len(final) == 2, "half of the finalists, after twice as many on little text"
        assert plan.tried[: len(final)] == tuple(final)
        assert (
            plan.refitted_kl == final[0].refitted == min(each.refitted for each in final if each.refitted is not None)
        )
        assert plan.choice == final[0].choice
        others = [each.measured for each in plan.tried[len(final) :]]
        assert others == sorted(others)
    options = {option.name: option for option in options_of(OPTIONS, budget.use)}
    library, texts = opened(teacher, tmp_path, budget)
    edits, student = edits_to(plans[0].choice, options, 0), copy.deepcopy(teacher)
    old = dict(enumerate(Stack(student).layers))
    record = surgery.apply(student, Record(DEPTH), edits)
    with torch.no_grad():
        warm_start(student, teacher, old, record, edits, texts.fit, texts.held)
        refit = Output(tokens=320, held_tokens=96)
        refit_survivors([refit], student, teacher, record, edits, Text(torch.cat(texts.fit), torch.cat(texts.held)))
        with scoring(teacher, student):
            kl = measure_quality(student, teacher, [{"input_ids": window} for window in texts.score])["kl"]
    assert plans[0].refitted_kl == pytest.approx(kl, abs=1e-6)
    assert digest(teacher) == before
    # one that cannot be refitted is none that ends hours of search, and no finalist
    tried, broken = keeping.Finals._distance, plans[0].choice

    def fails(self: Any, choice: Any, share: float) -> float:
        if choice == broken:
            raise ValueError("refit=output: not this one")
        return tried(self, choice, share)

    monkeypatch.setattr(keeping.Finals, "_distance", fails)
    [again] = searching_for(replace(budget, params=0.55), teacher, tmp_path, refits=refits)
    assert again.refitted_kl == plans[0].refitted_kl, "read off the library"
    (library.folder / "students.safetensors").unlink()
    [other] = searching_for(replace(budget, params=0.55), teacher, tmp_path, refits=refits)
    assert other.choice != broken
    assert next(each for each in other.tried if each.choice == broken).refitted is None
    assert "not refitted: refit=output: not this one" in caplog.text
    none = searching_for(replace(budget, params=0.55, finalists=0), teacher, tmp_path, refits=refits)[0]
    alone = searching_for(replace(budget, params=0.55), teacher, tmp_path)[0]
    assert none.refitted_kl is alone.refitted_kl is None
    assert none.choice == alone.choice == min(none.tried, key=lambda each: each.measured).choice
    assert none.request == alone.request != plans[0].request


def test_plans_keep_their_limits_and_rounds_find_no_worse_ones(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iskd.schedules.budget.choosing._REACHES", (3 / DEPTH, 1 / DEPTH))
    _, scorer, costs = world
    chooser = Chooser(scorer, costs, BUDGET)
    whole = costs.of(scorer.whole)
    for share in (0.9, 0.6, 0.3):
        others = dict(zip(costs.keys, costs.others, strict=True))
        limits = {"params": limit_of("params", share, whole["params"], whole["params"] - others["params"])}
        chooser.require(limits, {"params": share})
        tried = chooser.find(limits)
        assert [each.measured for each in tried] == sorted(each.measured for each in tried)
        for each in tried:
            assert costs.of(each.choice)["params"] <= limits["params"]
            assert each.measured == pytest.approx(scorer.kl(each.choice))
        single = next(each for each in tried if each.found == "single scores")
        assert tried[0].measured <= single.measured
        # around the best of the others few layers are changed as well as many
        best = next(each for each in tried if not each.found.startswith("round"))
        around = chooser.problem(limits, chooser.around(best.choice))
        for reach in (3, 1):
            changed_few = solve(replace(around, near=(best.choice, reach)))
            assert changed_few in {each.choice for each in tried}
        added = sum(chooser.scores[layer, name] for layer, name in enumerate(single.choice))
        changed = sum(name != KEEP for name in single.choice)
        assert single.promise == Promise(pytest.approx(added), changed)
    # predictions: of each plan by a curve through the others, whichever budget they were found for
    seen = chooser._seen
    assert {choice: pytest.approx(kl) for choice, kl in chooser.predicted().items()} == {
        choice: Calibration.fit(
            *zip(*[(one.promise, one.measured) for other, one in seen.items() if other != choice], strict=True), DEPTH
        ).of(each.promise)
        for choice, each in seen.items()
    }
    expected = spearmanr(list(chooser.predicted().values()), [each.measured for each in seen.values()]).statistic
    assert chooser.rank_correlation() == pytest.approx(expected)
    shares, kls = zip(*chooser.front(limits, "params", (0.9, 0.7, 0.5)), strict=True)
    assert shares == (0.9, 0.7, 0.5)
    assert list(kls) == sorted(kls)


def test_width_is_spent_on_a_student_whose_layers_went_by_a_merge_that_is_out_of_the_race(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, scorer, costs = world
    chooser = Chooser(scorer, costs, BUDGET)
    chooser.alive = [single for single in chooser.alive if single[1] != "merge"]
    bases = [tuple("merge" if at in gone else KEEP for at in range(DEPTH)) for gone in ([], [2], [2, 4])]
    chain, _ = chooser._chains
    monkeypatch.setattr(chain, "without", lambda count: bases[count] if count < len(bases) else None)
    tried = chooser.find(limits_of(costs, params=0.5))
    found = {each.found: each for each in tried}
    for count in (1, 2):
        each = found[f"{count} layers out, then width"]
        assert [at for at, name in enumerate(each.choice) if name == "merge"] == [2, 4][:count]
        assert each.measured == pytest.approx(scorer.kl(each.choice))


def limits_of(costs: Costs, **shares: float) -> dict[str, float]:
    others = dict(zip(costs.keys, costs.others, strict=True))
    whole = {
        key: sum(row[at] for (_, name), row in costs.layers.items() if name == KEEP)
        for at, key in enumerate(costs.keys)
    }
    return {key: others[key] + share * whole[key] for key, share in shares.items()}


def test_a_budget_that_cannot_be_met_is_told_the_smallest_that_can(world: Any) -> None:
    _, scorer, costs = world
    chooser = Chooser(scorer, costs, BUDGET)
    said = (
        r"budget\.params=0\.01 cannot be met .* smallest student has ([\d,]+) parameters, ([\d.]+) % of the teacher's b"
    )
    with pytest.raises(ValueError, match=said) as told:
        chooser.require(limits_of(costs, params=0.01), {"params": 0.01})
    number, share = re.findall(said, str(told.value))[0]
    chooser.require({"params": float(number.replace(",", ""))}, {"params": number})
    chooser.require(limits_of(costs, params=float(share) / 100), {"params": share})
    with pytest.raises(ValueError, match=r"cannot be met"):
        chooser.require(limits_of(costs, params=float(share) / 100 - 1e-3), {"params": share})
    with pytest.raises(ValueError, match=r"cannot be met"):
        chooser.require({"params": float(number.replace(",", "")) - 1}, {"params": number})


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("key", LIMITS)
def test_whoever_follows_the_advice_is_not_refused_again(key: str, seed: int) -> None:
    """Amounts and shares as they are told, of costs of any size; a share of time is one of the whole teacher."""
    draw = np.random.default_rng(seed)
    whole = key not in TIMES
    size = 10 ** draw.uniform(0.5, 9 if whole else 3)
    drawn = sorted((2 + size * draw.uniform(0.3, 1.0, 3)).tolist(), reverse=True)
    rows = [float(round(x)) if whole else x for x in (*drawn, 0.7 * drawn[-1])]
    layers = {
        (at, name): (row if name == KEEP else rows[3],) for at, row in enumerate(rows[:3]) for name in (KEEP, "x")
    }
    costs = Costs((key,), layers, (rows[3] + 1.0,))
    option = options_of({"x": OPTIONS["slim_50"]})
    least, teacher = costs.of(("x",) * 3)[key], costs.of((KEEP,) * 3)[key]

    def asked(value: float | str) -> dict[str, float]:
        return searching._limits({key: value}, costs, (KEEP,) * 3)

    def ask(value: float | str) -> None:
        limits = asked(value)
        problem = problem_of(option, 3, dict.fromkeys(layers, 0.0), costs, limits)
        require(problem, limits, {key: value}, costs, (KEEP,) * 3)

    with pytest.raises(ValueError, match="cannot be met") as told:
        ask(0.9 * least)
    amount, unit, share = re.findall(r"has ([\d,.]+) ?(\w*) ?[a-z ]*, ([\d.]+) % of the teacher's", str(told.value))[0]
    assert ("teacher's blocks;" in str(told.value)) == whole
    units = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
    value = float(amount.replace(",", "")) * units.get(unit, 1)
    assert least * (1 - 1e-9) <= value <= 1.01 * least
    ask(value)
    ask(f"{share}%")
    of = teacher if not whole else teacher - costs.others[0]
    assert float(share) / 100 * of == pytest.approx(least if not whole else least - costs.others[0], rel=1e-3)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"params": 0.01}, r"budget\.params=0\.01 cannot be met"),
        ({"bytes": [0.9, 0.01]}, r"budget\.bytes=0\.01 cannot be met"),
        ({"cache_bytes": 1000, "decode_ms": "90%"}, r"budget\.cache_bytes=1000 cannot be met"),
    ],
)
@pytest.mark.parametrize("process", [0, 1])
def test_an_exact_limit_that_cannot_be_met_is_refused_before_anything_is_fitted(
    limits: Any, said: str, process: int, tmp_path: Path
) -> None:
    budget = Budget(options=OPTIONS, use=["slim_50"], context=32, **limits, **SMALL)
    with pytest.raises(ValueError, match=said):
        searching_for(budget, tiny("llama", layers=4), tmp_path, process=process, processes=2)
    assert not list(tmp_path.iterdir())


def test_plans_come_with_the_refusal_of_other_limits_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch)
    values: dict[str, Any] = {"context": 32, "options": OPTIONS, "use": ["remove"], "rounds": 0, "plans": 1, **SMALL}
    with pytest.raises(
        RefusedError, match=r"^budget\.decode_ms=1\.0 cannot be met[^;]* 50 % of the teacher's; "
    ) as told:
        searching_for(Budget(decode_ms=[5.5, 1.0, "70%"], **values), louder(tiny("llama", layers=4)), tmp_path)
    assert [plan.asked["decode_ms"] for plan in told.value.plans] == [5.5, "70%"]
    assert [plan.costs["decode_ms"] for plan in told.value.plans] == pytest.approx([5.0, 4.0])


def test_a_limit_of_time_that_nothing_meets_is_refused_before_anything_is_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as times are measured; 0.7 written for 70 % is 0.7 ms."""
    clock(monkeypatch)
    monkeypatch.setattr(searching, "fit_options", None)
    budget = Budget(decode_ms=[0.7, 0.1], context=32, options=OPTIONS, use=["slim_50", "remove"], **SMALL)
    with pytest.raises(
        ValueError, match=r"^budget\.decode_ms=0\.7 cannot be met.*; budget\.decode_ms=0\.1 cannot be met"
    ):
        searching_for(budget, louder(tiny("llama", layers=4)), tmp_path)


def test_layers_of_several_kinds_have_prices_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted clock: a global layer takes 10 ms of a token, a local one 1 ms, half of it without attention."""
    teacher = louder(tiny("gemma3_text", layers=6, layer_types=["sliding_attention", "full_attention"] * 3))

    def clocked(theirs: PreTrainedModel, mine: PreTrainedModel, *_: Any) -> tuple[list[float], list[float]]:
        def taken(model: PreTrainedModel) -> float:
            kinds = [type(getattr(block, "self_attn", None)).__name__ for block in Stack(model).layers]
            share = [{"NoneType": 0.0, "_Map": 0.5}.get(kind, 1.0) for kind in kinds]
            return 2e-3 + 1e-3 * sum(part * (10.0 if layer % 2 else 1.0) for layer, part in enumerate(share))

        return [taken(mine)] * 2, [taken(theirs)] * 2

    monkeypatch.setattr(costs_file, "side_by_side", clocked)
    options, _ = able(options_of(OPTIONS, ["no_attention", "remove"]), teacher, 0, named=True)
    library, _ = opened(teacher, tmp_path)
    budget = Budget(decode_ms=4.0, options=OPTIONS, context=32)
    costs = counted(teacher, options, budget, itemsize=4, seed=0)
    found = timed(costs, teacher, options, budget, library=library, seed=0).column("decode_ms")
    for layer in range(6):
        each = 10.0 if layer % 2 else 1.0
        assert found[layer, KEEP] == pytest.approx(each)
        assert found[layer, "remove"] == 0.0
        assert found[layer, "no_attention"] == pytest.approx(each / 2)


def test_a_teacher_with_a_compact_layer_has_all_options_at_the_others(tmp_path: Path) -> None:
    """A student taken for a teacher: its compact layer, lowest, in the middle or topmost, can be kept or go."""
    for layer in (0, 2, 3):
        teacher = louder(tiny("llama", layers=4))
        surgery.apply(teacher, Record(4), [Replace(layer, Spec("iskd.blocks.tokenwise.Tokenwise", {}))])
        options, told = able(options_of(OPTIONS), teacher.eval(), 0, named=False)
        assert {option.name for option in options} == {*OPTIONS}
        others = [at for at in range(4) if at != layer]
        by_name = {option.name: option for option in options}
        assert layers_of(by_name["slim_50"], Stack(teacher)) == layers_of(by_name["window"], Stack(teacher)) == others
        assert layers_of(by_name["remove"], Stack(teacher)) == [0, 1, 2, 3]
        merges = [at for at in range(1, 4) if layer not in (at - 1, at)]
        assert layers_of(by_name["merge"], Stack(teacher)) == merges
        assert any(said.startswith(f"option slim_50 cannot be had on cpu in layers {layer}: ") for said in told)
        use = ["slim_50", "merge", "remove"]
        budget = Budget(params=0.7, options=OPTIONS, use=use, context=32, epochs=0, rounds=1, plans=2, **SMALL)
        [plan] = searching_for(budget, teacher, tmp_path / str(layer))
        assert plan.choice[layer] in (KEEP, "remove")
        assert plan.costs["params"] <= plan.limits["params"]


def test_a_search_that_was_stopped_measures_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = louder(tiny("llama", layers=4))
    budget = Budget(params=0.6, options=OPTIONS, use=["slim_50", "merge", "remove"], epochs=0, **SMALL)
    refits = [Output()]
    [first] = searching_for(budget, teacher, tmp_path, refits=refits)
    monkeypatch.setattr(Scorer, "_fresh", None)
    monkeypatch.setattr(keeping.Finals, "_distance", None)
    [again] = searching_for(budget, teacher, tmp_path, refits=refits)
    assert (again.choice, again.tried) == (first.choice, first.tried)


def test_the_best_of_each_kind_of_option_alone_is_among_the_plans(world: Any) -> None:
    """So a search is never behind one that has these options alone, but for what that one finds by its rounds."""
    _, scorer, costs = world
    names = ["slim_50", "mlp_50", "slim_30", "no_attention", "linear_attention", "window", "remove"]
    kinds = [["slim_50", "slim_30"], ["mlp_50"], ["no_attention"], ["linear_attention"], ["window"], ["remove"]]
    assert kinds_among(options_of(OPTIONS, names)) == kinds
    budget = replace(BUDGET, rounds=0, plans=1)
    limits = limits_of(costs, params=0.6)
    every = Chooser(scorer, costs, budget).find(limits)
    for name in ("slim_50", "remove"):
        few = Scorer(scorer.teacher, scorer.library, [scorer.options[name]], scorer.windows, 2)
        alone = [each for each in Chooser(few, costs, budget).find(limits) if each.found.startswith("single scores")]
        assert {each.choice for each in alone} <= {each.choice for each in every}
        assert every[0].measured <= min(each.measured for each in alone) + 1e-6
    assert kinds_among([scorer.options["remove"]]) == []


def test_budgets_that_contradict_each_other_are_told_so(world: Any) -> None:
    _, scorer, costs = world
    # slim halves both; without attention there is no cache, but more parameters than removal leaves
    keys = {"params": 0.3, "cache_bytes": 0.2}
    options, _ = able(options_of(OPTIONS, ["slim_50"]), scorer.teacher, 0, named=True)
    fewer = Chooser(Scorer(scorer.teacher, scorer.library, options, scorer.windows, 2), costs, BUDGET)
    with pytest.raises(ValueError, match=r"budget\.params=0\.3 cannot be met"):
        fewer.require(limits_of(costs, **keys), keys)
    both = {"params": 0.7, "cache_bytes": 0.7}
    made = {single: (row[0], row[1], 1e6 - row[0]) for single, row in costs.layers.items()}
    opposed = Costs(costs.keys, made, costs.others)
    chooser = Chooser(scorer, opposed, BUDGET, None)
    limits = {
        "params": 0.6 * opposed.of(scorer.whole)["params"],
        "cache_bytes": opposed.of(scorer.whole)["cache_bytes"],
    }
    with pytest.raises(
        ValueError, match=r"budget\.params=0\.7 and budget\.cache_bytes=0\.7 contradict each other: within the latter"
    ):
        chooser.require(limits, both)


@pytest.mark.parametrize("native", [False, True])
def test_a_plan_is_carried_out_by_edits_and_says_what_it_is(native: bool, tmp_path: Path) -> None:
    teacher = louder(tiny("llama", layers=4))
    budget = Budget(
        params=[0.8, "50%"],
        options=OPTIONS,
        use=["slim_50", "merge", "remove"],
        native=native,
        rounds=1,
        epochs=0,
        **SMALL,
    )
    plans = searching_for(budget, teacher, tmp_path)
    assert [plan.asked for plan in plans] == [{"params": 0.8}, {"params": "50%"}]
    for plan in plans:
        student = surgery.rebuild(teacher, Record(4).extended(edits_of(plan)), "meta")
        assert surgery.parameters(student) == plan.costs["params"] <= plan.limits["params"]
        assert (native_config(student) is not None) >= native
        assert read_plan(plan.write(tmp_path / "plan.json")) == plan
        [step] = steps_of(plan)
        assert sorted(step["layers"]) == [at for at, name in enumerate(plan.choice) if name != KEEP]
        edit = AsPlanned(step["edit"]["options"], step["edit"]["choice"])
        assert [edit.make(layer, plan.seed) for layer in step["layers"]] == edits_of(plan)
    again = searching_for(budget, teacher, tmp_path)
    assert [plan.choice for plan in again] == [plan.choice for plan in plans]
    assert [plan.measured_kl for plan in again] == [plan.measured_kl for plan in plans]


def searching_for(budget: Budget, teacher: PreTrainedModel, folder: Path, **others: Any) -> list[BudgetPlan]:
    with torch.no_grad():
        return searching.search(budget, teacher, text, place(folder, **others))


def test_processes_share_the_layers_and_the_first_one_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = louder(tiny("llama", layers=4))
    budget = Budget(params=0.6, options=OPTIONS, use=["slim_50", "remove"], rounds=0, epochs=0, **SMALL)
    assert searching_for(budget, teacher, tmp_path, process=1, processes=2) == []
    [folder] = tmp_path.iterdir()
    assert sorted(file.name[:3] for file in folder.glob("*.safetensors")) == ["001", "003"]
    monkeypatch.setattr(filling, "_PATIENCE_S", 0.0)
    for file in folder.glob("003-*.safetensors"):
        file.unlink()
    said: list[str] = []
    [plan] = searching_for(budget, teacher, tmp_path, process=0, processes=2, note=said.append)
    assert said[-1] == "waiting for 1 options, which the other 1 of 2 processes fit"
    [alone] = searching_for(budget, teacher, tmp_path / "alone")
    assert (plan.choice, plan.measured_kl) == (alone.choice, alone.measured_kl)


def clock(monkeypatch: pytest.MonkeyPatch, mixed: float = 1.0) -> None:
    """A clock of our own: a layer takes 1 ms of a token, one without attention half of it, the rest 2 ms.

    Args:
        monkeypatch: puts it in.
        mixed: how many times longer students take whose layers are of several kinds.
    """

    def clocked(
        teacher: PreTrainedModel, student: PreTrainedModel, context: int, batch: int, dtype: Any
    ) -> tuple[list[float], list[float]]:
        def seconds(model: PreTrainedModel) -> list[float]:
            kinds = [type(getattr(block, "self_attn", None)).__name__ for block in Stack(model).layers]
            token = 2e-3 + sum({"NoneType": 0.0, "_Map": 0.5e-3}.get(kind, 1e-3) for kind in kinds)
            token *= mixed if len(set(kinds)) > 1 else 1.0
            return [10 * token, token]

        return seconds(student), seconds(teacher)

    monkeypatch.setattr(costs_file, "side_by_side", clocked)
    monkeypatch.setattr(keeping, "side_by_side", clocked)


def test_a_limit_of_time_is_measured_and_checked_on_whole_students(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch)
    teacher = louder(tiny("llama", layers=4))
    budget = Budget(
        decode_ms=4.6, context=32, options=OPTIONS, use=["no_attention", "remove"], rounds=1, epochs=0, **SMALL
    )
    [plan] = searching_for(budget, teacher, tmp_path)
    assert plan.teacher_costs["decode_ms"] == pytest.approx(6.0)
    assert plan.costs["decode_ms"] == pytest.approx(plan.measured["decode_ms"])
    assert plan.costs["decode_ms"] <= 4.6 + 1e-9
    assert plan.costs["prefill_ms"] == pytest.approx(10 * plan.costs["decode_ms"])
    with pytest.raises(ValueError, match=r"budget\.decode_ms=1\.0 cannot be met .* has [\d.]+ ms to decode a token"):
        searching_for(Budget(decode_ms=1.0, context=32, options=OPTIONS, use=["remove"], **SMALL), teacher, tmp_path)
    with pytest.raises(ValueError, match=r"budget\.context=65 is longer than the context of 64: lower it"):
        searching_for(Budget(params=0.6, context=65, options=OPTIONS, use=["remove"], **SMALL), teacher, tmp_path)


def test_students_that_take_longer_than_predicted_are_left_out_until_one_keeps_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Students of several kinds of layers take 15 % more: the plan of 4.5 ms takes 5.2, and that of 4.0 takes 4.6."""
    clock(monkeypatch, mixed=1.15)
    asked: list[dict[str, float]] = []
    find = Chooser.find
    monkeypatch.setattr(Chooser, "find", lambda self, limits: asked.append(dict(limits)) or find(self, limits))
    teacher = louder(tiny("llama", layers=4))
    values: dict[str, Any] = {"context": 32, "options": OPTIONS, "rounds": 0, "plans": 1, "pairs": 0, "epochs": 0}
    budget = Budget(decode_ms=4.9, prefill_ms=60, use=["no_attention"], **values, **SMALL)
    with pytest.raises(ValueError, match="cannot be met"):
        searching_for(Budget(decode_ms=3.9, use=["no_attention"], **values, **SMALL), teacher, tmp_path)
    with torch.no_grad():
        [plan] = searching_for(budget, teacher, tmp_path)
    assert plan.measured["decode_ms"] <= 1.02 * 4.9
    assert not caplog.messages
    assert len(asked) > 1
    assert {limits["prefill_ms"] for limits in asked} == {60.0}, "what is kept is drawn neither tighter nor looser"
    decode = [limits["decode_ms"] for limits in asked]
    assert decode == sorted(set(decode), reverse=True)
    assert plan.limits == {"prefill_ms": 60.0, "decode_ms": 4.9}, "told as they were asked for"


def test_a_limit_of_time_that_no_student_keeps_is_told_and_the_nearest_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of students that take three times what is predicted, the smallest."""
    clock(monkeypatch, mixed=3.0)
    teacher = louder(tiny("llama", layers=4))
    budget = Budget(decode_ms=4.6, context=32, options=OPTIONS, use=["remove"], rounds=0, plans=1, **SMALL)
    [plan] = searching_for(budget, teacher, tmp_path)
    assert plan.choice.count("remove") == 3
    assert plan.measured["decode_ms"] == pytest.approx(9.0)
    [said] = caplog.messages
    assert said == (
        "budget.decode_ms=4.6 is not kept: of 2 plans that were built, the one that comes nearest takes 9 ms, and the "
        "limit is 4.6 ms; it is taken all the same"
    )


def test_one_width_for_all_is_spent_on_students_without_merges(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below a merge a layer is kept, so that a chain which merges leaves nothing for width."""
    _, scorer, costs = world
    alike = ["slim_50", "no_attention", "merge", "remove"]
    chooser = Chooser(scorer, costs, BUDGET, alike)
    merging, removing, _ = chooser._chains
    for chain, names in ((merging, {KEEP, "merge", "remove"}), (removing, {KEEP, "remove"})):
        for count in range(1, DEPTH - 1):
            made = chain.without(count)
            assert made is None or {*made} <= names
    monkeypatch.setattr("iskd.schedules.budget.choosing._HOPELESS", 1e9)
    singles = [*scorer.singles, *((layer, KEEP) for layer in range(DEPTH))]
    price = {"slim_50": 0.01, KEEP: 0.0}
    monkeypatch.setattr(
        chooser, "around",
        lambda base: {at: 0.0 if base[at[0]] == at[1] else price.get(at[1], 1.0) for at in singles},
    )  # fmt: skip
    tried = chooser.find(limits_of(costs, params=0.5))
    spent = [each.choice for each in tried if each.found == "1 layers out, then width"]
    assert [choice for choice in spent if choice.count("remove") == 1 and choice.count("slim_50") == DEPTH - 1], spent


def test_more_layers_go_where_no_width_is_small_enough(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifteen in a hundred of the blocks of five layers: with one or two layers out no width keeps the limit."""
    _, scorer, costs = world
    chooser = Chooser(scorer, costs, BUDGET)
    asked: list[int] = []
    without = Chain.without
    monkeypatch.setattr(Chain, "without", lambda self, count: asked.append(count) or without(self, count))
    monkeypatch.setattr("iskd.schedules.budget.choosing._HOPELESS", 1e9)
    tried = chooser.find(limits_of(costs, params=0.15))
    assert max(asked) > 3
    assert all(costs.of(each.choice)["params"] <= limits_of(costs, params=0.15)["params"] for each in tried)


def test_pairs_are_compared_with_their_singles_on_the_same_windows(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a library that knows more windows of some options than this budget reads; later windows are harder."""
    _, scorer, costs = world
    whole, width = len(scorer.windows), scorer.windows[0].shape[1]
    easy = [1.0 if window < whole // 2 else 9.0 for window in range(whole)]
    known = {single: torch.tensor(easy).view(-1, 1).expand(-1, len(range(0, width, 2))) for single in scorer.singles}

    def planted(base: Any, changed: Any, windows: Any, **_: Any) -> torch.Tensor:
        """Two options cost 0.5 more than both by themselves, on every window."""
        count = torch.tensor([[sum(map(str.__ne__, choice, base))] for choice in changed])
        rows = count * torch.tensor([easy[window] for window in windows]) + 0.5 * (count > 1)
        return rows.unsqueeze(-1).expand(-1, -1, 8)

    monkeypatch.setattr(scorer, "_known", lambda: dict(known))
    monkeypatch.setattr(scorer, "values", planted)
    chooser = Chooser(scorer, costs, Budget(params=0.5, options=OPTIONS, race_tokens=width * (whole // 2), **SMALL))
    assert {round(score, 6) for score in chooser.scores.values()} == {0.0, 1.0}
    assert chooser._measure_pairs(("slim_50", "slim_50", KEEP, "window", "remove"))
    assert list(chooser._pairs.values()) == pytest.approx([0.5] * 3)


@pytest.mark.parametrize("interval", [2, 3])
def test_a_merge_is_offered_where_two_attentions_are_alike(interval: int, tmp_path: Path) -> None:
    """Elsewhere a run removes the layer and trains nothing, so that a fitted block would never be carried out."""
    teacher = louder(tiny("smollm3", layers=6, no_rope_layer_interval=interval))
    if interval == 2:
        with pytest.raises(ValueError, match=r"merge cannot be had .* no two neighbours whose attentions see the same"):
            able(options_of(OPTIONS, ["merge"]), teacher, 0, named=True)
        return
    options, _ = able(options_of(OPTIONS, ["merge", "remove"]), teacher, 0, named=True)
    library, texts = opened(teacher, tmp_path)
    fill(library, texts, teacher, options)
    scorer = Scorer(teacher, library, options, texts.score, 2)
    costs = counted(teacher, options, Budget(params=0.5, options=OPTIONS, context=32), itemsize=4, seed=0)
    assert [layer for layer, name in scorer.singles if name == "merge"] == [1, 4]
    assert {single for single in costs.layers if single[1] == "merge"} == {(1, "merge"), (4, "merge")}
    for each in Chooser(scorer, costs, BUDGET).find(limits_of(costs, params=0.5)):
        assert {at for at, name in enumerate(each.choice) if name == "merge"} <= {1, 4}


def test_native_is_asked_of_low_layers_and_of_whole_plans(tmp_path: Path) -> None:
    """Attention of this GPT-2 goes by the number of its layer: only what is taken off the top is like another one."""
    teacher = louder(tiny("gpt2", layers=4, scale_attn_by_inverse_layer_idx=True))
    values: dict[str, Any] = {"options": OPTIONS, "native": True, "epochs": 0, "rounds": 0, "plans": 1, **SMALL}
    with pytest.raises(
        ValueError, match=r"not all of plain transformers, vLLM and llama\.cpp open a student with remove: leave it out"
    ):
        searching_for(Budget(params=0.6, use=["remove"], context=32, **values), teacher, tmp_path)
    teacher = louder(tiny("llama", layers=4))
    budget = Budget(params=[0.8, 0.3], use=["remove", "slim_50"], context=32, **values)
    where, opens = place(tmp_path), place(tmp_path).native

    def picky(student: PreTrainedModel) -> bool:
        """As if some other family could not say that it has two layers."""
        return opens(student) and len(Stack(student).layers) > 2

    with pytest.raises(
        RefusedError, match=r"open students with each option alone, and none of the [0-9]+ that were built"
    ) as e:
        searching.search(budget, teacher, text, replace(where, native=picky))
    assert [plan.asked["params"] for plan in e.value.plans] == [0.8]


def test_what_was_timed_is_timed_anew_by_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch)
    teacher = louder(tiny("llama", layers=3))
    budget = Budget(decode_ms=0.9, context=32, options=OPTIONS, use=["remove"], rounds=0, plans=1, epochs=0, **SMALL)
    budget = Budget(**{**vars(budget), "decode_ms": 4.5})
    searching_for(budget, teacher, tmp_path)
    monkeypatch.setattr(costs_file, "side_by_side", None)
    monkeypatch.setattr(keeping, "side_by_side", lambda *_: ([0.01, 2e-3], [0.05, 5e-3]))
    searching_for(budget, teacher, tmp_path)
    monkeypatch.setattr(costs_file, "code_digest", lambda _names: "another")
    with pytest.raises(TypeError):
        searching_for(budget, teacher, tmp_path)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_finished_student_is_timed_as_its_plan_was(batch: int, tmp_path: Path) -> None:
    teacher, student = tiny("llama", layers=3), tiny("llama", layers=2)
    plan = BudgetPlan("a", (KEEP, KEEP, "remove"), {"remove": {"edit": "remove"}}, context=24, batch=batch)
    plan = replace(plan, predicted_kl=0.5, measured_kl=0.6)
    plan.write(tmp_path / BUDGET_FILE)
    assert keeping.measure_finished(tmp_path, teacher, student, None, 60.0) < 1
    assert read_plan(tmp_path / BUDGET_FILE) == plan, "no limit of time was asked for"
    times = {"prefill_ms": 6.0, "decode_ms": 3.0}
    plan = replace(plan, teacher_costs=times, measured=times)
    plan.write(tmp_path / BUDGET_FILE)
    took = keeping.measure_finished(tmp_path, teacher, student, None, 60.0)
    found = read_plan(tmp_path / BUDGET_FILE)
    assert found == replace(plan, finished=found.finished)
    assert all(0 < found.finished[key] < 3 * times[key] for key in times)
    assert 0 < took < 60
    assert keeping.measure_finished(tmp_path / "none", teacher, student, None, 1.0) < 1


def test_native_refuses_options_that_are_not(tmp_path: Path) -> None:
    teacher = louder(tiny("llama", layers=3))
    asked: dict[str, Any] = {
        "params": 0.6,
        "options": OPTIONS,
        "native": True,
        "context": 32,
        "epochs": 0,
        "rounds": 0,
        **SMALL,
    }
    with pytest.raises(
        ValueError,
        match=r"native=true, and not all of plain transformers, vLLM and llama\.cpp open a student with window: leave",
    ):
        searching_for(Budget(use=["remove", "window"], **asked), teacher, tmp_path)
    only = {name: OPTIONS[name] for name in ("window", "no_attention")}
    with pytest.raises(ValueError, match=r"open a student with any of window, no_attention: give other options"):
        searching_for(Budget(**{**asked, "options": only}), teacher, tmp_path)


@pytest.mark.parametrize(
    ("options", "use", "said"),
    [
        ({}, None, r"budget\.options=\{\} leaves nothing that could be done to a layer"),
        (OPTIONS, [], r"budget\.use=\[\] leaves nothing"),
        (OPTIONS, ["slim50"], r"budget\.use names 'slim50' \(did you mean slim_50\?\)"),
        (OPTIONS, ["remove", "remove"], r"names 'remove' twice"),
        ({"keep": {"edit": "remove"}}, None, r"budget\.options\.keep: a layer can always be kept"),
        ([], None, r"budget\.options=\[\]|options=\{\} leaves nothing"),
        (["remove"], None, r"budget\.options=\['remove'\] are no options: give them by name, as \{NAME: "),
        ("remove", None, "budget.options=remove are no options"),
        ({"x": {"edit": "drop"}}, None, r"budget\.options\.x\.edit=drop is no edit: say .* with edit: replace, remove"),
        ({"x": {"edit": ["remove"]}}, None, r"budget\.options\.x\.edit=\['remove'\] is no edit"),
        ({"x": {"edit": {"remove": 1}}}, None, "is no edit"),
        ({"x": {}}, None, r"budget\.options\.x=\{\} says nothing of an edit: say what is done"),
        ({"x": []}, None, r"budget\.options\.x=\[\] says nothing of an edit"),
        ({"x": "remove"}, None, r"budget\.options\.x=remove says nothing of an edit"),
        (
            {"x": {"edit": "replace"}},
            None,
            r"budget\.options\.x\.block is not given: name the class, as in \{_target_: ",
        ),
        ({"x": {"edit": "convert", "mixer": 5}}, None, r"budget\.options\.x\.mixer is 5: name the class"),
        ({"x": {"edit": "convert", "mixer": []}}, None, r"x\.mixer is \[\]: name the class"),
        ({"x": {"edit": "convert", "mixer": {"rank": 4}}}, None, r"x\.mixer is \{'rank': 4\}: name the class"),
        (
            {"x": {"edit": "convert", "mixer": {"_target_": "iskd.mixers.gla.Gla"}}},
            None,
            r"x\.mixer: cannot import 'iskd\.mixers\.gla\.Gla'",
        ),
        ({"x": {"edit": "convert", "mixer": {"_target_": "os.system"}}}, None, "outside the allow-list"),
        (
            {"x": {"edit": "convert", "mixer": {"_target_": "iskd.blocks.slim.Slim"}}},
            None,
            r"x\.mixer=iskd\.blocks\.slim\.Slim is no mixer: name one, as in",
        ),
        (
            {"x": {"edit": "replace", "block": {"_target_": "iskd.mixers.gla.GLA"}}},
            None,
            r"x\.block=iskd\.mixers\.gla\.GLA is no block",
        ),
        (
            {"x": {**OPTIONS["window"], "mixers": {"gla": "odd"}}},
            None,
            r"budget\.options\.x\.mixers: an option has one mixer; make an option of each",
        ),
        ({"x": {**OPTIONS["window"], "mixers": {"gla": {"layers": [1], "rank": 4}}}}, None, "has one mixer"),
        (
            {"x": {"edit": "remove", "block": OPTIONS["slim_50"]["block"]}},
            None,
            r"x\.block does not go with edit: remove",
        ),
        ({"x": {"edit": "merge", "rigde": 1}}, None, r"x\.rigde is no key \(did you mean ridge\?\)"),
        ({"x": {"edit": "merge", "ridge": "much"}}, None, r"budget\.options\.x\.ridge=much must be a finite number"),
        ({"x": {"edit": "merge", "ridge": {"a": 1}}}, None, r"budget\.options\.x\.ridge=\{'a': 1\} must be"),
        (
            {"x": {"edit": "merge", "fit": False}},
            None,
            r"budget\.options\.x: edit\.fit=false: layers are merged by a fit",
        ),
        ({"x": {"edit": "remove", 5: 1}}, None, r"budget\.options\.x\.5 is no key"),
        ({"x": {"edit": "remove", "layers": [1]}}, None, r"budget\.options\.x\.layers is no key"),
        (
            {**OPTIONS, "gone": {"edit": "remove"}},
            None,
            r"budget\.options\.gone is the same as budget\.options\.remove",
        ),
        ({**OPTIONS, "keep": {"edit": "remove"}}, ["remove"], r"budget\.options\.keep: a layer can always be kept"),
        ({**OPTIONS, "remove": None}, ["remove"], r"budget\.use names 'remove', and budget\.options\.remove is null"),
        ({"x": None}, None, "every option is null"),
    ],
)
def test_options_that_cannot_work_are_told(options: Any, use: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        options_of(options, use)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "say how large or fast the student may be"),
        ({"params": 0}, r"budget\.params=0 is no budget: give 0\.75, 75% or a number above 1"),
        ({"params": "120%"}, "is no budget"),
        (
            {"decode_ms": "fast"},
            r"budget\.decode_ms=fast is no budget: give milliseconds, or a share of the teacher's as 75%",
        ),
        ({"params": [0.5, 0.4]}, "iskd search solves several from one library"),
        ({"params": [0.5], "bytes": [0.5]}, "are both lists"),
        ({"params": []}, "is no budget: give at least one value"),
        ({"params": 0.5, "rounds": -1}, r"budget\.rounds must not be negative"),
        ({"params": 0.5, "batch": 0}, r"budget\.batch must be at least 1"),
    ],
)
def test_budgets_that_mean_nothing_are_told(values: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _ = Budget(options=OPTIONS, **values).asked


def test_amounts_are_read_as_people_write_them() -> None:
    assert limit_of("params", 0.75, 200.0, 100.0) == 175.0
    assert limit_of("params", "75%", 200.0, 100.0) == 175.0
    assert limit_of("params", "10k", 0.0, 0.0) == 10_000
    assert limit_of("decode_ms", 0.75, 200.0, 200.0) == 0.75
    assert limit_of("decode_ms", "75 %", 200.0, 200.0) == 150.0


def test_an_option_that_the_device_cannot_have_is_told_or_left_out() -> None:
    """Kernels that are missing fail in their own ways."""
    teacher = tiny("llama", layers=2)
    broken = {
        "broken": {"edit": "convert", "mixer": {"_target_": "iskd.mixers.sliding.Sliding", "window": -3}},
        "remove": OPTIONS["remove"],
    }
    found, told = able(options_of(broken), teacher, 0, named=False)
    assert [option.name for option in found] == ["remove"]
    assert told[0].startswith("option broken cannot be had on cpu: ")
    with pytest.raises(ValueError, match=r"option broken cannot be had on cpu: .*; leave it out of budget\.use"):
        able(options_of(broken), teacher, 0, named=True)
    with pytest.raises(ValueError, match="none of the options can be had here"):
        able(options_of({"broken": broken["broken"]}), teacher, 0, named=False)


def test_a_plan_of_another_teacher_is_refused(tmp_path: Path) -> None:
    plan = BudgetPlan("abc", (KEEP, "remove"), {"remove": {"edit": "remove"}})
    check_teacher(plan, "abc", 2, "it")
    with pytest.raises(ValueError, match="it was made for a teacher of 2 layers, and this one has 3"):
        check_teacher(plan, "abc", 3, "it")
    with pytest.raises(ValueError, match="it was made for another teacher"):
        check_teacher(plan, "abd", 2, "it")
    with pytest.raises(ValueError, match="there is no such file"):
        read_plan(tmp_path / "none.json")
    with pytest.raises(ValueError, match="layer 0 gets 'x', which is no option of the plan"):
        BudgetPlan("", ("x",), {})
    (tmp_path / "odd.json").write_text('{"teacher": "a", "choice": ["keep"], "options": {}, "extra": 1}')
    with pytest.raises(ValueError, match="unknown key 'extra'"):
        read_plan(tmp_path / "odd.json")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_caches_and_weights_are_counted_as_they_are_served(dtype: torch.dtype | None) -> None:
    """In half precision keys and values take half, a mixer's float32 state as much, and its decays are stored wide."""
    teacher, mixer = tiny("llama", layers=2), {"_target_": "iskd.mixers.gated_deltanet.GatedDeltaNet"}
    options = options_of({"slim": OPTIONS["slim_50"], "mixer": {"edit": "convert", "mixer": mixer}})
    itemsize = 4 if dtype is None else 2
    budget = Budget(params=0.5, options=OPTIONS, context=512)
    before = digest(teacher)
    wide = counted(teacher, options, budget, itemsize=4, seed=0)
    found = counted(teacher, options, budget, itemsize=itemsize, seed=0, dtype=dtype)
    assert digest(teacher) == before
    for choice in ((KEEP, KEEP), ("slim", KEEP), ("mixer", "mixer")):
        student = copy.deepcopy(teacher)
        plan = BudgetPlan("", choice, {option.name: option.described() for option in options})
        surgery.apply(student, Record(2), edits_of(plan))
        cast_parameters(student, dtype or torch.float32)
        assert found.of(choice)["bytes"] == sum(p.nbytes for p in student.parameters())
        assert found.of(choice)["params"] == wide.of(choice)["params"]
        if "mixer" not in choice:
            assert found.of(choice)["cache_bytes"] == wide.of(choice)["cache_bytes"] * itemsize / 4
    mixers = ("mixer", "mixer")
    assert found.of(mixers)["cache_bytes"] > wide.of(mixers)["cache_bytes"] / 2, "states stay float32"
