"""Score the finished students of a budget's runs, draw random plans of the same sizes, and print the table.

`score RUN` scores the student at the end of a run by `experiments/scoring.py`, beside what its plan predicted.
`random PLANS OUT` makes of every plan one with options drawn at random, as large as fits. `front PLANS` writes
front.csv of the plans in the folders of PLANS, one folder a method. `table` prints what was scored.
"""

from __future__ import annotations

import argparse
import csv
import json
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

from iskd.models import surgery  # noqa: E402
from iskd.plan import Record  # noqa: E402
from iskd.plan.budget_plan import KEEP, BudgetPlan, plan_of, read_plan  # noqa: E402
from iskd.plan.run_files import BUDGET_FILE  # noqa: E402
from iskd.schedules.budget import edits_of  # noqa: E402
from iskd.schedules.budget.calibration import Calibration, Promise  # noqa: E402
from iskd.schedules.budget.options import options_of  # noqa: E402
from iskd.teacher import TeacherSpec, load_teacher  # noqa: E402

SCORES = HERE / "scores"
TASKS = {"lambada": "acc", "arc_easy": "acc", "copy": "led"}
FRONT = ("method", "share", "params", "added_kl", "predicted_kl", "measured_kl", "refitted_kl", "found", "choice")
_AROUND_THE_TEACHER = ("single scores", "next best", "random")


def score(run: Path, data: Path, items: int, tokens: int) -> None:
    """Score the student of a run's last checkpoint, and write NAME.json."""
    [row] = scoring.score(run, None, scoring.Scorer(data, items, tokens, metrics=TASKS), SCORES)
    plan = read_plan(run / BUDGET_FILE)
    facts = {
        "predicted_kl": plan.predicted_kl, "unhealed_kl": plan.measured_kl, "refitted_kl": plan.refitted_kl,
        "costs": plan.costs, "measured": plan.measured, "limits": plan.limits, "search_seconds": plan.seconds,
        "tried": [[each.predicted, each.measured] for each in plan.tried],
    }  # fmt: skip
    (SCORES / f"{run.name}.json").write_text(json.dumps({**row, **facts}))


def draw(plan: BudgetPlan, seed: int) -> BudgetPlan:
    """A plan of the same limit in parameters: layer after layer gets an option at random, until it fits."""
    rng, choice = random.Random(seed), [KEEP] * len(plan.choice)
    sizes = {name: _sizes(plan, name) for name in plan.options}
    layers = list(range(len(choice)))
    rng.shuffle(layers)
    size = plan.teacher_costs["params"]
    for layer in layers:
        if size <= plan.limits["params"]:
            break
        names = [name for name in plan.options if plan.options[name]["edit"] != "merge" and sizes[name] > 0]
        choice[layer] = rng.choice(names)
        size -= sizes[choice[layer]]
    added = sum(plan.scores[layer].get(name, 0.0) for layer, name in enumerate(choice) if name != KEEP)
    values = {**plan.to_json(), "choice": choice, "tried": [], "found": "random", "front": [], "added_kl": added}
    drawn = plan_of(
        {**values, "costs": {"params": size}, "predicted_kl": 0.0, "measured_kl": 0.0, "refitted_kl": None},
        "a random plan",
    )
    edits_of(drawn)
    return drawn


@cache
def _teacher() -> Any:
    return load_teacher(TeacherSpec("HuggingFaceTB/SmolLM2-135M-Instruct", bundled="smollm2")).model


def _sizes(plan: BudgetPlan, name: str) -> float:
    """Parameters that a layer loses by an option."""
    option = options_of({name: plan.options[name]})[0]
    record = Record(len(plan.choice)).extended([option.make(1, 0)])
    return float(surgery.parameters(_teacher()) - surgery.parameters(surgery.rebuild(_teacher(), record, "meta")))


def front(plans: Path) -> None:
    """Write front.csv: every method's plans, by share; and print the rank correlation over all that were measured."""
    found = [(file.parent.name, read_plan(file)) for file in sorted(plans.glob("*/plan-params-*.json"))]
    seen = {tried.choice: tried for _, plan in found for tried in plan.tried}
    calibration = _calibration(found)
    rows = []
    for method, plan in sorted(found, key=lambda pair: (-float(pair[1].asked["params"]), pair[0])):
        drawn = method == "random"
        predicted = calibration.of(_promise(plan.choice, plan.added_kl or 0.0)) if drawn else plan.predicted_kl
        measured = "" if drawn else round(plan.measured_kl, 5)
        refitted = "" if plan.refitted_kl is None else round(plan.refitted_kl, 5)
        kls = [round(plan.added_kl or 0.0, 5), round(predicted, 5), measured, refitted]
        rows.append([method, plan.asked["params"], int(plan.costs["params"]), *kls, plan.found, " ".join(plan.choice)])
    with (HERE / "front.csv").open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([FRONT, *rows])
    if len(seen) > 2:
        pairs = [(each.predicted, each.added, each.measured) for each in seen.values()]
        ranks = [spearmanr([pair[at] for pair in pairs], [pair[2] for pair in pairs]).statistic for at in (0, 1)]
        print(f"{len(seen)} plans measured: rank correlation {ranks[0]:.3f} predicted, {ranks[1]:.3f} by added scores")


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
    """A table for every size, the lowest KL first, means over seeds; then predicted against measured."""
    sizes: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    teacher = json.loads((SCORES / "teacher.json").read_text())
    tried: dict[tuple[float, float], None] = {}
    for file in sorted(SCORES.glob("*-[0-9].json")):
        method, _, size = file.stem.rpartition("-")[0].rpartition("-")
        found = json.loads(file.read_text())
        sizes[size][method].append(found)
        tried |= dict.fromkeys(map(tuple, found["tried"]))
    for size, methods in sorted(sizes.items(), reverse=True):
        print(f"\n**{size}**\n\n{head(teacher, 'mixed')}")
        print(line("teacher", [teacher], teacher, None))
        for name, rows in sorted(methods.items(), key=lambda pair: mean(row["kl"] for row in pair[1])):
            print(line(name, rows, teacher, methods.get("mixed")))
        print("\n| method | predicted KL | of the plan as built | limits |\n|---|---|---|---|")
        for name, rows in methods.items():
            plan = rows[0]
            print(f"| {name} | {plan['predicted_kl']:.3f} | {plan['unhealed_kl']:.3f} | {_limits(plan)} |")
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
    """`score RUN`, `random PLANS OUT`, `front PLANS` or `table`."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    scored = commands.add_parser("score")
    scored.add_argument("run", type=Path)
    scored.add_argument("--data", type=Path, required=True)
    scored.add_argument("--items", type=int, default=300)
    scored.add_argument("--tokens", type=int, default=8192)
    drawing = commands.add_parser("random")
    drawing.add_argument("plans", type=Path)
    drawing.add_argument("out", type=Path)
    commands.add_parser("front").add_argument("plans", type=Path)
    commands.add_parser("table")
    asked = parser.parse_args()
    if asked.command == "table":
        table()
    elif asked.command == "front":
        front(asked.plans)
    elif asked.command == "random":
        asked.out.mkdir(parents=True, exist_ok=True)
        for seed, file in enumerate(sorted(asked.plans.glob("plan-params-*.json"))):
            draw(read_plan(file), seed).write(asked.out / file.name)
    else:
        score(asked.run, asked.data, asked.items, asked.tokens)


if __name__ == "__main__":
    main()
