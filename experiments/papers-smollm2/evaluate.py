"""Score students on data that neither training nor selection saw, and make the tables of the README.

`score RUN...` scores the last student of a run as `experiments/scoring.py` does, and writes
scores/NAME.json with what was asked after every stage. `table` prints a table for every part of the comparison, and
the scores along the runs that have them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
SCORES = HERE / "scores"
TASKS = {"curve": ("lambada", "hellaswag", "cbt_sentence", "copy")}
USUAL = ("lambada", "piqa", "arc_easy", "copy")
AGAINST = {"loss": "kl", "importance": "kl", "curve": "iskd", "edits": "all"}
"""Of every part, the method that the others are held against."""
sys.path.insert(0, str(HERE.parent))

import scoring  # noqa: E402
from tables import head, line  # noqa: E402

from iskd.evaluation.results import evaluation_of  # noqa: E402

METRICS = scoring.METRICS | scoring.GAPS


def score(run: Path, scorer: scoring.Scorer) -> None:
    """Score the student at the end of a run; scores/NAME.json also holds what its stages were asked."""
    [row] = scoring.score(run, None, scorer, SCORES)
    stages = json.loads((run / "stages.json").read_text())
    along = [
        {
            "edited": at,
            "params": stage["params"],
            **{task.task: [task.student, task.teacher] for task in evaluation_of(stage["evaluation"]).tasks},
        }
        for at, stage in enumerate(stages)
        if stage.get("evaluation")
    ]
    (SCORES / f"{run.name}.json").write_text(json.dumps([{**row, "along": along}]))


def table() -> None:
    """A table for every part, the lowest KL first, and the scores along its runs, means over seeds."""
    parts: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    teacher = json.loads((SCORES / "teacher.json").read_text())
    for file in sorted(SCORES.glob("*-[0-9]*.json")):
        part, _, name = file.stem.rpartition("-")[0].partition("-")
        parts[part][name].append(json.loads(file.read_text())[0])
    for part, methods in parts.items():
        of_part = {key: value for key, value in teacher.items() if key not in METRICS or key in TASKS.get(part, USUAL)}
        print(f"\n**{part}**\n\n{head(of_part, AGAINST[part])}")
        ranked = sorted(methods.items(), key=lambda pair: mean(row["kl"] for row in pair[1]))
        print(line("teacher", [of_part], of_part, None))
        for name, rows in ranked:
            print(line(name, rows, of_part, methods.get(AGAINST[part])))
        for name, rows in methods.items():
            if rows[0]["along"]:
                print(f"\n`{name}`, student / teacher after every block:\n")
                along(rows)


def along(rows: list[dict[str, Any]]) -> None:
    """Share of the teacher's score that a run keeps, by the number of edits."""
    tasks = [key for key in rows[0]["along"][0] if key not in ("edited", "params")]
    print(f"| edits | params M | {' | '.join(f'{task} %' for task in tasks)} |\n|---|---|{'---|' * len(tasks)}")
    for stages in zip(*(row["along"] for row in rows), strict=True):
        kept = [mean(100 * stage[task][0] / stage[task][1] for stage in stages) for task in tasks]
        cells = [str(stages[0]["edited"]), f"{stages[0]['params'] / 1e6:.1f}", *(f"{value:.1f}" for value in kept)]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    """`score RUN...` or `table`."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    asking = commands.add_parser("score")
    asking.add_argument("runs", nargs="+", type=Path)
    asking.add_argument("--data", type=Path, required=True)
    asking.add_argument("--items", type=int, default=300)
    asking.add_argument("--tokens", type=int, default=8192)
    asking.add_argument("--tasks", nargs="+", help=f"among {', '.join(METRICS)}; what its part asks where not given")
    commands.add_parser("table")
    asked = parser.parse_args()
    if asked.command == "table":
        table()
        return
    scorers: dict[tuple[str, ...], scoring.Scorer] = {}
    for run in asked.runs:
        tasks = tuple(asked.tasks or TASKS.get(run.name.partition("-")[0], USUAL))
        if tasks not in scorers:
            metrics = {name: METRICS[name] for name in tasks}
            scorers[tasks] = scoring.Scorer(asked.data, asked.items, asked.tokens, metrics=metrics)
        score(run, scorers[tasks])


if __name__ == "__main__":
    main()
