"""Score students of several depths on data that neither training nor selection saw, and make the tables of a README.

`score RUN` reads the checkpoints at the ends of a run's stages and writes scores/NAME.json (`experiments/scoring.py`),
the teacher's scores once. `table` prints what all runs gave, of this and of earlier days, with intervals of a bootstrap
over the items.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from iskd.system.allocator import tune

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
tune()

from scoring import METRICS, TEXTS, Scorer, score  # noqa: E402
from tables import head, line  # noqa: E402

SCORES = HERE / "scores"


def table() -> None:
    """Print one table per depth and write results.csv (one row per student)."""
    groups: dict[int, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    flat = []
    teacher = json.loads((SCORES / "teacher.json").read_text())
    flat.append(summary("teacher", "0", teacher))
    for file in sorted(path for path in SCORES.glob("*.json") if path.name != "teacher.json"):
        name, _, seed = file.stem.rpartition("-")
        for row in json.loads(file.read_text()):
            groups[row["layers"]][name.partition("-to-")[0]].append(row)
            flat.append(summary(name, seed, row))
    with (HERE / "results.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    for layers, methods in sorted(groups.items(), reverse=True):
        print(f"\n**{layers} layers**\n")
        print(head(teacher, "ILD"))
        print(line("teacher", [teacher], teacher, None))
        for name, rows in sorted(methods.items(), key=lambda pair: mean(row["kl"] for row in pair[1])):
            print(line(name, rows, teacher, methods.get("ild")))


def summary(name: str, seed: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row of results.csv."""
    scores = {key: round(100 * mean(row[key]), 1) for key in METRICS}
    texts = {key: round(row[key], 4) for key in TEXTS}
    facts = {key: row[key] for key in ("layers", "params", "tokens", "seconds")}
    left = " ".join(map(str, row.get("left", [])))
    return {"method": name, "seed": seed, **facts, **texts, **scores, "left": left}


def main() -> None:
    """`score RUN...` or `table`."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    asking = commands.add_parser("score")
    asking.add_argument("runs", nargs="+", type=Path)
    asking.add_argument("--data", type=Path, required=True)
    asking.add_argument("--depths", nargs="+", type=int, required=True)
    asking.add_argument("--items", type=int, default=300)
    asking.add_argument("--tokens", type=int, default=8192)
    commands.add_parser("table")
    arguments = parser.parse_args()
    if arguments.command == "table":
        table()
        return
    scorer = Scorer(arguments.data, arguments.items, arguments.tokens)
    for run in arguments.runs:
        score(run, arguments.depths, scorer, SCORES)


if __name__ == "__main__":
    main()
