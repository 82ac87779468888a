"""Score the finished students of a budget's runs, draw random plans of the same sizes, and print the table.

`score RUN` scores as `experiments/ild-smollm2/evaluate.py` does, the last checkpoint of a run, beside what its plan
predicted. `random PLANS OUT` makes of every plan one with options drawn at random, as large as fits. `table` prints.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import random
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from scipy.stats import spearmanr

from iskd.models import surgery, weights
from iskd.plan import Record
from iskd.plan.budget_plan import KEEP, BudgetPlan, plan_of, read_plan
from iskd.plan.run_files import BUDGET_FILE
from iskd.schedules.budget import edits_of
from iskd.schedules.budget.options import options_of
from iskd.teacher import TeacherSpec, load_teacher
from iskd.training.state import checkpoint

HERE = Path(__file__).parent
SCORES = HERE / "scores"
COLUMNS = ("params", "kl", "ppl_wikitext", "lambada_nll", "predicted_kl", "unhealed_kl")


def _of_ild() -> Any:
    """The scores that both comparisons share."""
    spec = importlib.util.spec_from_file_location("ild_evaluate", HERE.parent / "ild-smollm2" / "evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def score(run: Path, data: Path, items: int, tokens: int) -> None:
    """Score the student of a run's last checkpoint, and write NAME.json."""
    scorer = _of_ild().Scorer(data, items, tokens)
    SCORES.mkdir(exist_ok=True)
    if not (SCORES / "teacher.json").exists():
        teacher = {"params": surgery.parameters(scorer.teacher.model), **scorer.score(scorer.teacher.model)}
        (SCORES / "teacher.json").write_text(json.dumps(teacher))
    last = max((run / "checkpoints").glob("*-boundary"), key=lambda path: int(path.name.partition("-")[0]))
    state, model = checkpoint.read_state(last), copy.deepcopy(scorer.teacher.model)
    surgery.apply(model, Record(state.record.num_layers), state.record.edits)
    weights.load_model_tensors(model, checkpoint.Stored(last, "student"))
    plan = read_plan(run / BUDGET_FILE)
    facts = {
        "params": surgery.parameters(model), "tokens": state.tokens, "predicted_kl": plan.predicted_kl,
        "unhealed_kl": plan.measured_kl, "costs": plan.costs, "measured": plan.measured, "limits": plan.limits,
        "seconds": plan.seconds, "tried": [[each.predicted, each.measured] for each in plan.tried],
    }  # fmt: skip
    (SCORES / f"{run.name}.json").write_text(json.dumps({**facts, **scorer.score(model)}))


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
    values = {**plan.to_json(), "choice": choice, "tried": [], "found": "random", "front": []}
    drawn = plan_of({**values, "costs": {"params": size}, "predicted_kl": 0.0, "measured_kl": 0.0}, "a random plan")
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


def table() -> None:
    """One row for every method and size, means over seeds; then predicted against measured."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    tried: list[list[float]] = []
    for file in sorted(SCORES.glob("*-[0-9].json")):
        found = json.loads(file.read_text())
        rows[file.stem.rpartition("-")[0]].append(found)
        tried += found["tried"]
    print(f"| method, share | seeds | {' | '.join(COLUMNS)} |")
    print(f"|{'---|' * (len(COLUMNS) + 2)}")
    for name, found in rows.items():
        means = [mean(row[column] for row in found) for column in COLUMNS]
        print(f"| {name} | {len(found)} | " + " | ".join(f"{value:,.4g}" for value in means) + " |")
    if len(tried) > 2:
        rank = spearmanr([each[0] for each in tried], [each[1] for each in tried]).statistic
        print(f"\n{len(tried)} plans built: rank correlation of predicted and measured KL {rank:.3f}")


def main() -> None:
    """`score RUN`, `random PLANS OUT` or `table`."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    scoring = commands.add_parser("score")
    scoring.add_argument("run", type=Path)
    scoring.add_argument("--data", type=Path, required=True)
    scoring.add_argument("--items", type=int, default=300)
    scoring.add_argument("--tokens", type=int, default=8192)
    drawing = commands.add_parser("random")
    drawing.add_argument("plans", type=Path)
    drawing.add_argument("out", type=Path)
    commands.add_parser("table")
    asked = parser.parse_args()
    if asked.command == "table":
        table()
    elif asked.command == "random":
        asked.out.mkdir(parents=True, exist_ok=True)
        for seed, file in enumerate(sorted(asked.plans.glob("plan-params-*.json"))):
            draw(read_plan(file), seed).write(asked.out / file.name)
    else:
        score(asked.run, asked.data, asked.items, asked.tokens)


if __name__ == "__main__":
    main()
