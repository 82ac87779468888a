"""Score refitted students on data that neither calibration, training nor selection saw, and make a README's tables.

`score RUN...` scores by `experiments/scoring.py`, a text of stories beside it, and adds a line for each run to
results.csv: what it gave, what it cost. `table` prints results.csv, one table for each depth and budget.

FLOPs are counted, not measured: a refit's passes over its text through the teacher's blocks, and for each training
token a forward pass of the teacher and three of the student, head included, 2 for every weight that is multiplied.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"
sys.path.insert(0, str(HERE.parent))

import scoring  # noqa: E402
import torch  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from iskd.commands.values.config import object_of  # noqa: E402
from iskd.models import Stack, surgery  # noqa: E402

TEXTS = (*scoring.TEXTS, "ppl_stories")
COLUMNS = (
    "method",
    "seeds",
    "refit s",
    "refit TFLOP",
    "all s",
    "all TFLOP",
    *scoring.COLUMNS[:3],
    "ppl stories",
    *scoring.COLUMNS[3:],
)


class Scorer(scoring.Scorer):
    """With stories, which are of the kind of half of the calibration text and not in it."""

    def __init__(self, data: Path, items: int, tokens: int, tasks: list[str] | None = None) -> None:
        super().__init__(data, items, tokens)
        if tasks is not None:
            self.tasks = {name: found for name, found in self.tasks.items() if name in tasks}
        with gzip.open(data / "tinystories" / "valid.txt.gz", "rt", encoding="utf-8") as file:
            self.texts["stories"] = scoring.windows(self.teacher.tokenizer, file.read(), tokens)
        with scoring.autocast():
            self.goals["stories"] = [scoring.last_hidden(self.teacher.model, ids) for ids in self.texts["stories"]]

    def score(self, model: PreTrainedModel) -> dict[str, Any]:
        texts = self.texts
        self.texts = {name: text for name, text in texts.items() if name != "stories"}
        found: dict[str, Any] = super().score(model)
        self.texts = texts
        with scoring.autocast():
            return {**found, "ppl_stories": self._on_text(model, "stories")["ppl"]}


def score(run: Path, scorer: Scorer) -> None:
    """Score the student at the end of a run, and add its line."""
    [row] = scoring.score(run, None, scorer, kept=run.parent)
    if not RESULTS.exists():
        teacher = json.loads((run.parent / "teacher.json").read_text())
        add(summary("teacher", {"depth": teacher["layers"], "budget": 0, "seed": 0}, teacher))
    depth, _, rest = run.name.partition("-")
    method, budget, seed = rest.rsplit("-", 2)
    facts = {"depth": int(depth), "budget": int(budget), "seed": int(seed), **costs(run, scorer, row)}
    add(summary(method, facts, row))


def costs(run: Path, scorer: Scorer, row: dict[str, Any]) -> dict[str, float]:
    """Seconds and TFLOP of the refits and of all of a run."""
    config = OmegaConf.load(run / "config.yaml")
    refits = [object_of(config.refit[name]) for name in config.get("refit") or ()]
    teacher = scorer.teacher.model
    blocks = sum(p.numel() for p in Stack(teacher).layers.parameters())
    refit = 2 * blocks * sum(refit.passes * (refit.tokens + refit.held_tokens) for refit in refits)
    # the embedding is the head: tied
    train = row["tokens"] * 2 * (surgery.parameters(teacher) + 3 * row["params"])
    with (run / "metrics.csv").open() as file:
        seconds = sum(float(line.get("train/refit_seconds") or 0) for line in csv.DictReader(file))
    return {
        "refit_seconds": round(seconds, 1),
        "refit_tflop": round(refit / 1e12, 2),
        "tflop": round((refit + train) / 1e12, 2),
    }


def summary(method: str, facts: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """A row of results.csv."""
    fixed = {"depth": 0, "budget": 0, "seed": 0, "refit_seconds": 0, "refit_tflop": 0, "tflop": 0} | facts
    taken = {key: row[key] for key in ("layers", "params", "tokens", "seconds")}
    texts = {key: round(row[key], 4) for key in TEXTS}
    tasks = {key: round(100 * mean(row[key]), 1) if key in row else math.nan for key in scoring.METRICS}
    average = round(100 * scoring.average(row), 2) if all(key in row for key in scoring.AVERAGED) else math.nan
    return {"method": method, **fixed, **taken, **texts, **tasks, "average": average}


def add(row: dict[str, Any]) -> None:
    """One line more in results.csv; a run that is done again takes the place of its line."""
    rows = read()
    key = ("method", "depth", "budget", "seed")
    rows = [kept for kept in rows if any(str(kept[name]) != str(row[name]) for name in key)] + [row]
    draft = RESULTS.with_suffix(".new")
    with draft.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draft.replace(RESULTS)


def read() -> list[dict[str, Any]]:
    """What results.csv holds."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as stream:
        return list(csv.DictReader(stream))


def table() -> None:
    """Print a table for every depth and budget, the lowest KL first; ± half the range of the seeds."""
    rows, groups = read(), defaultdict[tuple[int, int], dict[str, list[dict[str, Any]]]](lambda: defaultdict(list))
    teachers = [row for row in rows if row["method"] == "teacher"]
    for row in rows:
        if row["method"] != "teacher":
            groups[int(row["depth"]), int(row["budget"])][row["method"]].append(row)
    for (depth, budget), methods in sorted(groups.items(), key=lambda pair: (-pair[0][0], pair[0][1])):
        print(f"\n**{depth} layers, {budget:,} training tokens**\n")
        print(f"| {' | '.join(COLUMNS)} | average lost % |\n|{'---|' * (len(COLUMNS) + 1)}")
        print("\n".join([line("teacher", teachers, teachers)] if teachers else []))
        for name, found in sorted(methods.items(), key=lambda pair: mean(float(row["kl"]) for row in pair[1])):
            print(line(name, found, teachers))


def line(name: str, rows: list[dict[str, Any]], teachers: list[dict[str, Any]]) -> str:
    """A row of a table: means over seeds."""
    spent = [
        f"{mean(float(row[key]) for row in rows):.1f}" for key in ("refit_seconds", "refit_tflop", "seconds", "tflop")
    ]
    texts = [
        scoring.spread([float(row[key]) for row in rows])
        for key in ("kl", "ppl_wikitext", "ppl_docstrings", "ppl_stories")
    ]
    texts.append(scoring.spread([float(row["lambada_nll"]) for row in rows]))
    tasks = [scoring.spread([float(row[key]) for row in rows], 1) for key in scoring.METRICS]
    whole = float(teachers[0]["average"]) if teachers else float("nan")
    lost = scoring.spread([100 * (1 - float(row["average"]) / whole) for row in rows], 1)
    return f"| {' | '.join([name, str(len(rows)), *spent, *texts, *tasks, lost])} |"


def main() -> None:
    """`score RUN...` or `table`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    scoring = commands.add_parser("score")
    scoring.add_argument("runs", nargs="+", type=Path)
    scoring.add_argument("--data", type=Path, required=True)
    scoring.add_argument("--items", type=int, default=300)
    scoring.add_argument("--tasks", nargs="+", help="only these, lambada among them; the others of the table are nan")
    scoring.add_argument("--tokens", type=int, default=8192)
    commands.add_parser("table")
    arguments = parser.parse_args()
    if arguments.command == "table":
        table()
        return
    torch.manual_seed(0)
    scorer = Scorer(arguments.data, arguments.items, arguments.tokens, arguments.tasks)
    for run in arguments.runs:
        score(run, scorer)


if __name__ == "__main__":
    main()
