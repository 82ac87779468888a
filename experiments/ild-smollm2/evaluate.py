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

import torch  # noqa: E402
from scoring import AVERAGED, COLUMNS, METRICS, TEXTS, Scorer, average, score, spread  # noqa: E402
from torch import Tensor  # noqa: E402

SCORES = HERE / "scores"
HEADS = ("method", "params M", "seeds", "tokens k", "s", *COLUMNS, "average lost %", "more than ILD")
"""Of a table whose rows are `line`."""


def lost(
    rows: list[dict[str, Any]],
    teacher: dict[str, Any],
    than: list[dict[str, Any]] | None = None,
    resamples: int = 1000,
) -> tuple[float, float, float]:
    """Share of the teacher's average accuracy that is lost, mean over seeds, with its 95 % bootstrap interval.

    With `than`: how much more is lost than by these; every resample draws the same items for all.
    """
    generator = torch.Generator().manual_seed(0)

    def once(drawn: dict[str, Tensor] | None) -> float:
        kept = mean(average(row, drawn) for row in rows) / average(teacher, drawn)
        others = 1.0 if than is None else mean(average(row, drawn) for row in than) / average(teacher, drawn)
        return others - kept

    sizes = {name: len(teacher[name]) for name in AVERAGED}
    draws = [
        once({name: torch.randint(size, (size,), generator=generator) for name, size in sizes.items()})
        for _ in range(resamples)
    ]
    low, high = torch.tensor(draws, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return once(None), low, high


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
        print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
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


def line(name: str, rows: list[dict[str, Any]], teacher: dict[str, Any], ild: list[dict[str, Any]] | None) -> str:
    """A row of the table: means over seeds, half the range after the sign."""
    cells = [
        f"{rows[0]['params'] / 1e6:.1f}",
        str(len(rows)),
        f"{rows[0]['tokens'] / 1e3:.0f}",
        f"{mean(row['seconds'] for row in rows):.0f}",
    ]
    cells += [spread([row[key] for row in rows]) for key in TEXTS]
    cells += [spread([100 * mean(row[key]) for row in rows], 1) for key in METRICS]
    cells.append(interval(*lost(rows, teacher)))
    cells.append("" if ild is None or name == "ild" else interval(*lost(rows, teacher, ild)))
    return f"| {name} | " + " | ".join(cells) + " |"


def interval(share: float, low: float, high: float) -> str:
    """In percent."""
    return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def main() -> None:
    """`score RUN...` or `table`."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    scoring = commands.add_parser("score")
    scoring.add_argument("runs", nargs="+", type=Path)
    scoring.add_argument("--data", type=Path, required=True)
    scoring.add_argument("--depths", nargs="+", type=int, required=True)
    scoring.add_argument("--items", type=int, default=300)
    scoring.add_argument("--tokens", type=int, default=8192)
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
