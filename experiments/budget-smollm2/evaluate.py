"""Score the finished students of a budget's runs, draw random plans of the same sizes, and print the table.

`score RUN` scores the student at the end of a run by `experiments/scoring.py`, beside what its plan predicted.
`again NAME PLAN` writes the row of a plan that chooses what a plan of another size or method does and has a row.
`random PLANS OUT` makes of every plan one with options drawn at random, as large as fits. `front PLANS` writes
front.csv of the plans in the folders of PLANS, one folder a method. `table` prints what was scored.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import scoring  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402
from tables import head, line  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from iskd.plan.budget_plan import KEEP, BudgetPlan, plan_of, read_plan  # noqa: E402
from iskd.plan.run_files import BUDGET_FILE  # noqa: E402
from iskd.schedules.budget import Budget, edits_of  # noqa: E402
from iskd.schedules.budget.calibration import Calibration, Promise  # noqa: E402
from iskd.schedules.budget.costs import Costs, counted, timed  # noqa: E402
from iskd.schedules.budget.library import Library  # noqa: E402
from iskd.schedules.budget.options import options_of  # noqa: E402
from iskd.system.precision import serving_dtype  # noqa: E402
from iskd.teacher import TeacherSpec, load_teacher  # noqa: E402

SCORES = HERE / "scores"
UNTRAINED = "untrained"
TASKS = {"lambada": "acc", "copy": "led"}
FRONT = ("method", "share", "params", "added_kl", "predicted_kl", "measured_kl", "refitted_kl", "found", "choice")
_COUNTED: dict[tuple[object, ...], Costs] = {}
_AROUND_THE_TEACHER = ("single scores", "next best", "random")


def score(run: Path, made: Path, data: Path, items: int, tokens: int) -> None:
    """Score the student of a run's last checkpoint, and write NAME.json; `made`: the run that carried out its plan."""
    [row] = scoring.score(run, None, scoring.Scorer(data, items, tokens, metrics=TASKS), SCORES)
    plan = read_plan(made / BUDGET_FILE)
    (SCORES / f"{run.name}.json").write_text(json.dumps({**row, **_facts(plan)}))


def again(name: str, plan: Path) -> None:
    """Write NAME.json if the row of the same student, found otherwise, is there: that one, with this plan's facts."""
    seed, asked = name.rpartition("-")[2], read_plan(plan)
    for other in sorted(plan.parent.parent.glob("*/plan-*.json")):
        row = SCORES / f"{other.parent.name}-{other.stem.rpartition('-')[2].rstrip('%')}-{seed}.json"
        if other != plan and row.exists() and read_plan(other).choice == asked.choice:
            (SCORES / f"{name}.json").write_text(json.dumps({**json.loads(row.read_text()), **_facts(asked)}))
            return


def _facts(plan: BudgetPlan) -> dict[str, Any]:
    return {
        "predicted_kl": plan.predicted_kl, "unhealed_kl": plan.measured_kl, "refitted_kl": plan.refitted_kl,
        "costs": plan.costs, "measured": plan.measured, "limits": plan.limits, "search_seconds": plan.seconds,
        "tried": [[each.predicted, each.measured] for each in plan.tried],
    }  # fmt: skip


def draw(plan: BudgetPlan, seed: int, costs: Costs, calibration: Calibration) -> BudgetPlan:
    """A plan of the same limit: layer after layer gets an option at random, until it fits; nobody builds it."""
    [(key, limit)] = plan.limits.items()
    rng, choice = random.Random(seed), [KEEP] * len(plan.choice)
    prices = costs.column(key)
    layers = list(range(len(choice)))
    rng.shuffle(layers)
    names = [name for name in plan.options if plan.options[name]["edit"] != "merge"]
    for layer in layers * len(names):  # each time a smaller one, so that the smallest of all are reached
        if costs.of(choice)[key] <= limit:
            break
        if smaller := [name for name in names if prices[layer, name] < prices[layer, choice[layer]]]:
            choice[layer] = rng.choice(smaller)
    added = sum(plan.scores[layer].get(name, 0.0) for layer, name in enumerate(choice) if name != KEEP)
    values = {**plan.to_json(), "choice": choice, "tried": [], "found": "random", "front": [], "added_kl": added}
    values |= {"costs": costs.of(choice), "measured": {}, "refitted_kl": None, "rank_correlation": None, "compared": 0}
    predicted = calibration.of(_promise(tuple(choice), added))
    drawn = plan_of({**values, "predicted_kl": predicted, "measured_kl": math.nan}, "a random plan")
    edits_of(drawn)
    return drawn


@cache
def _teacher() -> PreTrainedModel:
    return load_teacher(TeacherSpec("HuggingFaceTB/SmolLM2-135M-Instruct", bundled="smollm2")).model.eval()


def costs_of(plan: BudgetPlan, libraries: Path) -> Costs:
    """What options cost, as the search of a plan had it; times are read off its library."""
    teacher, options = _teacher(), options_of(plan.options)
    budget = Budget(**plan.asked, options=plan.options, context=plan.context)
    key = plan.context, *plan.options
    if key not in _COUNTED:
        _COUNTED[key] = counted(teacher, options, budget, itemsize=4, seed=plan.seed)
    costs = _COUNTED[key]
    if not budget.timed:
        return costs
    [folder] = {file.parent for file in libraries.glob(f"*/times-{plan.context}-{plan.batch}.json")}
    library = Library(folder, {}, teacher, plan.seed)
    return timed(costs, teacher, options, budget, library=library, seed=plan.seed, dtype=serving_dtype(teacher.device))


def front(plans: Path) -> None:
    """Write front.csv: every method's plans, by share; and print the rank correlation over all that were measured."""
    found = [(file.parent.name, read_plan(file)) for file in sorted(plans.glob("*/plan-*.json"))]
    seen = {tried.choice: tried for _, plan in found for tried in plan.tried}
    rows = []
    for method, plan in sorted(found, key=lambda pair: (_size(pair[1]), pair[0])):
        predicted, size = plan.predicted_kl, " ".join(_size(plan)[::2]).strip()
        measured = "" if math.isnan(plan.measured_kl) else round(plan.measured_kl, 5)
        refitted = "" if plan.refitted_kl is None else round(plan.refitted_kl, 5)
        kls = [round(plan.added_kl or 0.0, 5), round(predicted, 5), measured, refitted]
        rows.append([method, size, int(plan.costs["params"]), *kls, plan.found, " ".join(plan.choice)])
    with (HERE / "front.csv").open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([FRONT, *rows])
    if len(seen) > 2:
        pairs = [(each.predicted, each.added, each.measured) for each in seen.values()]
        ranks = [spearmanr([pair[at] for pair in pairs], [pair[2] for pair in pairs]).statistic for at in (0, 1)]
        print(f"{len(seen)} plans measured: rank correlation {ranks[0]:.3f} predicted, {ranks[1]:.3f} by added scores")


def _size(plan: BudgetPlan) -> tuple[str, float, str]:
    """The limit of a plan, shares of parameters first and the largest first."""
    [(key, value)] = plan.asked.items()
    return "" if key == "params" else key, -float(str(value).rstrip("%")), str(value)


def _calibration(found: list[tuple[str, BudgetPlan]]) -> Calibration:
    """Of added scores, by the plans whose scores were taken around the teacher."""
    tried = {
        each.choice: each
        for _, plan in found
        for each in plan.tried
        if each.added is not None and each.found.startswith(_AROUND_THE_TEACHER)
    }
    promises = [_promise(each.choice, each.added or 0.0) for each in tried.values()]
    return Calibration.fit(promises, [each.measured for each in tried.values()], len(found[0][1].choice))


def _promise(choice: tuple[str, ...], added: float) -> Promise:
    return Promise(added, sum(name != KEEP for name in choice))


def table() -> None:
    """For every size a table of students as refitted, one of trained ones, the lowest KL first, and the promises."""
    sizes: dict[tuple[str, bool], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    teacher = json.loads((SCORES / "teacher.json").read_text())
    tried: dict[tuple[float, float], None] = {}
    for file in sorted(SCORES.glob("*-*-*.json")):
        method, size, seed = file.stem.split("-")
        found = json.loads(file.read_text())
        sizes[size, seed != UNTRAINED][method].append(found)
        tried |= dict.fromkeys(map(tuple, found["tried"]))
    for (size, trained), methods in sorted(sizes.items(), key=lambda pair: (pair[0][0], not pair[0][1]), reverse=True):
        print(f"\n**{size}, {'trained' if trained else 'as refitted'}**\n\n{head(teacher, 'mixed')}")
        print(line("teacher", [teacher], teacher, None))
        for name, rows in sorted(methods.items(), key=lambda pair: mean(row["kl"] for row in pair[1])):
            print(line(name, rows, teacher, methods.get("mixed")))
        if trained:
            continue
        print("\n| method | predicted KL | of the plan as built | limits |\n|---|---|---|---|")
        for name, rows in methods.items():
            plan = rows[0]
            built = "" if math.isnan(plan["unhealed_kl"]) else f"{plan['unhealed_kl']:.3f}"
            print(f"| {name} | {plan['predicted_kl']:.3f} | {built} | {_limits(plan)} |")
    if len(tried) > 2:
        rank = spearmanr([each[0] for each in tried], [each[1] for each in tried]).statistic
        print(f"\n{len(tried)} plans built: rank correlation of predicted and measured KL {rank:.3f}")


def _limits(row: dict[str, Any]) -> str:
    """What was asked, what the plan promised and what its student was measured to cost."""
    measured = row["measured"] or {}
    return ", ".join(
        f"{name}: at most {limit:,.6g}, promised {row['costs'].get(name, float('nan')):,.6g}"
        + (f", measured {measured[name]:,.6g}" if name in measured else "")
        for name, limit in row["limits"].items()
    )


def main() -> None:
    """`score RUN`, `again NAME PLAN`, `random PLANS OUT`, `front PLANS` or `table`."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    scored = commands.add_parser("score")
    scored.add_argument("run", type=Path)
    scored.add_argument("--plan", type=Path, required=True)
    scored.add_argument("--data", type=Path, required=True)
    scored.add_argument("--items", type=int, default=300)
    scored.add_argument("--tokens", type=int, default=8192)
    once = commands.add_parser("again")
    once.add_argument("name")
    once.add_argument("plan", type=Path)
    drawing = commands.add_parser("random")
    drawing.add_argument("plans", type=Path)
    drawing.add_argument("out", type=Path)
    drawing.add_argument("--libraries", type=Path, required=True)
    commands.add_parser("front").add_argument("plans", type=Path)
    commands.add_parser("table")
    asked = parser.parse_args()
    if asked.command == "table":
        table()
    elif asked.command == "front":
        front(asked.plans)
    elif asked.command == "again":
        again(asked.name, asked.plan)
    elif asked.command == "random":
        asked.out.mkdir(parents=True, exist_ok=True)
        plans = {file.name: read_plan(file) for file in sorted(asked.plans.glob("plan-*.json"))}
        calibration = _calibration([("", plan) for plan in plans.values()])
        for seed, (name, plan) in enumerate(plans.items()):
            if not (asked.out / name).exists():
                draw(plan, seed, costs_of(plan, asked.libraries), calibration).write(asked.out / name)
    else:
        score(asked.run, asked.plan, asked.data, asked.items, asked.tokens)


if __name__ == "__main__":
    main()
