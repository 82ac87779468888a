"""Score converted students on data that neither training nor selection saw, and make the table of a README.

`score RUN` writes scores/NAME.json: what `experiments/scoring.py` asks (KL, retention of next-token
accuracy and perplexity on WikiText-2 test, perplexity on docstrings, copying), the six zero-shot tasks of arXiv
2504.14366, recall in texts of 64, 256 and 1,024 tokens, and what a token costs after 8,192 tokens, in time and in bytes
of cache or state, measured beside the teacher. The teacher's scores are written once, of all items; `--every 3` asks a
student every third, and the table holds it against the teacher on those. `look RUN` asks the texts and recall in 64 and
256 tokens alone, and `best RUN...` the rest of the one nearest to its teacher. `table` prints what all runs gave, of
this and of earlier days, and writes results.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
CONTEXT = 8192
LENGTHS = (64, 256, 1024)
SIX = {
    "lambada": "acc",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "piqa": "acc",
    "hellaswag": "acc_norm",
}
TEXTS = ("kl", "ppl_wikitext", "ppl_docstrings", "lambada_nll")
sys.path.insert(0, str(HERE.parent))

import scoring  # noqa: E402
from torch import nn  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

import iskd  # noqa: E402
from iskd.evaluation import efficiency  # noqa: E402
from iskd.evaluation.judging import evaluate  # noqa: E402
from iskd.evaluation.tasks.made_items import recall_items  # noqa: E402
from iskd.models import Stack, surgery  # noqa: E402
from iskd.models.hosting import HostedMixer  # noqa: E402
from iskd.teacher.origin import find_teacher  # noqa: E402


class Scorer(scoring.Scorer):
    """Texts, tasks and items to recall from, for the students of one teacher."""

    def __init__(self, data: Path, items: int, tokens: int, run: Path) -> None:
        super().__init__(data, items, tokens, find_teacher(run / "model"), {**SIX, "copy": "led"})
        self.recall = {at: recall_items(self.teacher.tokenizer, at, min(items, 100)) for at in LENGTHS}

    def score(self, model: PreTrainedModel, every: int = 1) -> dict[str, Any]:
        """All scores of one model, of every n-th item."""
        tasks = self.on_tasks(model, list(self.tasks), every)
        return {**self.on_texts(model), **tasks, **self.on_recall(model, LENGTHS, every)}

    def look(self, model: PreTrainedModel) -> dict[str, Any]:
        """Texts, and half the items of the short lengths of recall."""
        return {**self.on_texts(model), **self.on_recall(model, LENGTHS[:2], 2)}

    def on_recall(self, model: PreTrainedModel, lengths: Sequence[int], every: int) -> dict[str, list[float]]:
        """A number per item; a text that the model cannot read whole is not asked."""
        found, limit = dict[str, list[float]](), Stack(model).limit
        with scoring.autocast():
            for length in lengths:
                if limit is None or length <= limit:
                    items = self.recall[length][::every]
                    found[f"recall_{length}"] = evaluate(model, self.teacher.tokenizer, items).of("acc").tolist()
        return found

    def cost(self, student: PreTrainedModel, seconds: float) -> dict[str, float]:
        """Bytes held and time of a token after `CONTEXT` tokens, of student and teacher in turns; {} = not measured."""
        models = {"teacher": self.teacher.model, "student": student}
        for model in models.values():
            nn.Module.to(model, scoring.DEVICE)
        with scoring.autocast():
            found = efficiency.measure(models, contexts=(128, CONTEXT), seconds=seconds, repeats=3)
        values = dict[str, float]()
        for who, measured in found.models.items():
            if at := measured.at(CONTEXT):
                values |= {f"{who}_bytes": at.cache_bytes, f"{who}_seconds": at.decode_seconds_per_token}
        return values


def score(run: Path, scorer: Scorer, kept: Path, every: int, seconds: float) -> None:
    """Write NAME.json of a run's exported student into the folder `kept`, and the teacher's once.

    Args:
        run: folder of the run.
        scorer: of its teacher.
        kept: folder of scores.
        every: of each task every n-th item; 0 = a look alone.
        seconds: for measuring what a token costs.
    """
    kept.mkdir(parents=True, exist_ok=True)
    if not (kept / "teacher.json").exists():
        (kept / "teacher.json").write_text(json.dumps(scorer.score(scorer.teacher.model)))
    rows = json.loads((run / "stages.json").read_text())
    last = [row for row in rows if row["status"] == "kept"][-1]
    model = iskd.load(run / "model")
    layers = Stack(model).layers
    facts = {
        "layers": len(layers),
        "attention": sum(not any(isinstance(part, HostedMixer) for part in layer.modules()) for layer in layers),
        "params": surgery.parameters(model),
        "tokens": last["tokens"],
        "seconds": round(sum(row["seconds"] for row in rows)),
    }
    if every:
        found = {**facts, **scorer.score(model, every), "cost": scorer.cost(model, seconds)}
    else:
        found = {**facts, **scorer.look(model)}
    (kept / f"{run.name}.json").write_text(json.dumps(found))
    print(run.name, summary(run.name, found, json.loads((kept / "teacher.json").read_text())), flush=True)


def nearest(runs: Sequence[Path], kept: Path) -> Path | None:
    """The run with the lowest KL, unless it was asked everything already or its student is not there."""
    scored = {run: json.loads((kept / f"{run.name}.json").read_text()) for run in runs}
    best = min(scored, key=lambda run: float(scored[run]["kl"]))
    asked = all(task in scored[best] for task in SIX)
    return None if asked or not (best / "model" / "config.json").is_file() else best


def summary(name: str, row: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    """A row of results.csv; None = not measured.

    Raises SystemExit where student and teacher were asked other numbers of items.
    """
    teacher = dict(teacher)
    for task in (*SIX, "copy"):
        if task in row:
            every = len(teacher[task]) // max(1, len(row[task]))
            teacher[task] = teacher[task][:: max(1, every)]
            if len(row[task]) != len(teacher[task]):
                sys.exit(
                    f"{name}.json was asked {len(row[task])} items of {task}, teacher.json {len(teacher[task])}: "
                    "remove one"
                )
    mixer, _, technique = name.rpartition("-")
    facts = {key: row[key] for key in ("attention", "params", "tokens", "seconds")}
    whole = all(task in row for task in SIX)
    six = [mean(mean(model[task]) for task in SIX) for model in (row, teacher)] if whole else [0.0, 0.0]
    texts = {key: round(row[key], 4) if key in row else None for key in TEXTS}
    tasks = {task: _mean(row.get(task)) for task in (*SIX, "copy")}
    recall = {name: _mean(row.get(name)) for name in map("recall_{}".format, LENGTHS)}
    cost = row.get("cost", {})
    return {
        **{"mixer": mixer, "technique": technique, **facts, "retention": round(100 * row["retention"], 1), **texts},
        **tasks,
        "six": round(100 * six[0], 1) if whole else None,
        "six_kept": round(100 * six[0] / six[1], 1) if six[1] else None,
        **recall,
        "mb_at_8192": round(cost["student_bytes"] / 2**20, 1) if cost else None,
        "memory_of_teacher": _percent(cost, "bytes"),
        "time_of_teacher": _percent(cost, "seconds"),
    }


def _mean(items: list[float] | None) -> float | None:
    """In percent; None = not asked."""
    return None if items is None else round(100 * mean(items), 1)


def _percent(cost: dict[str, float], what: str) -> float | None:
    both = cost.get(f"student_{what}"), cost.get(f"teacher_{what}")
    return round(100 * both[0] / both[1], 1) if both[0] is not None and both[1] else None


COLUMNS = {
    "mixer": "mixer",
    "technique": "technique",
    "attention": "layers with attention",
    "tokens": "tokens",
    "retention": "next-token retention %",
    "kl": "KL",
    "ppl_wikitext": "ppl WikiText-2",
    "lambada_nll": "LAMBADA nll",
    "lambada": "LAMBADA",
    "copy": "copied",
    "six": "six tasks",
    "six_kept": "kept %",
    "recall_64": "recall 64",
    "recall_256": "256",
    "recall_1024": "1,024",
    "mb_at_8192": "MiB at 8,192",
    "memory_of_teacher": "% of teacher's",
    "time_of_teacher": "time of a token, % of teacher's",
}


def table(kept: Path) -> None:
    """Print the table, best retention first, and write results.csv beside the folder of scores."""
    if not (kept / "teacher.json").is_file():
        sys.exit(f"{kept} holds no teacher.json: run.sh writes it with the first row")
    teacher = json.loads((kept / "teacher.json").read_text())
    files = sorted(path for path in kept.glob("*.json") if path.name != "teacher.json")
    rows = [summary(path.stem, json.loads(path.read_text()), teacher) for path in files]
    size = {"attention": None, "params": None, "tokens": 0, "seconds": 0}
    first = {**summary("teacher-", {**size, **teacher}, teacher), "technique": ""}
    with (kept.parent / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(first), lineterminator="\n")
        writer.writeheader()
        writer.writerows([first, *rows])
    print(f"| {' | '.join(COLUMNS.values())} |\n|{'---|' * len(COLUMNS)}")
    for row in [first, *sorted(rows, key=lambda row: -row["retention"])]:
        print(f"| {' | '.join('' if row[key] is None else str(row[key]) for key in COLUMNS)} |")


def main() -> None:
    """`evaluate.py score RUN... --data DIR`, `look RUN...`, `best RUN...`, `table`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("score", "look", "best", "table"))
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--scores", type=Path, default=HERE / "scores")
    given = parser.parse_args()
    if given.what == "table":
        table(given.scores)
        return
    runs = given.runs
    if given.what == "best":
        runs = [best] if (best := nearest(runs, given.scores)) else []
    for run in runs:
        scorer = Scorer(given.data, given.items, given.tokens, run)
        score(run, scorer, given.scores, 0 if given.what == "look" else given.every, given.seconds)


if __name__ == "__main__":
    main()
