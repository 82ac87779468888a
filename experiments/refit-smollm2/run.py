"""Refit, score, train and score again: SmolLM2-135M with four, seven or ten of its layers gone.

    python experiments/refit-smollm2/run.py --data DATA
    python experiments/refit-smollm2/run.py --data DATA --only '23-output*' --tokens 0
    python experiments/refit-smollm2/run.py table

DATA holds wikitext2/{train,test}.txt.gz, tinystories/{train,valid}.txt.gz and the tasks' NAME/eval.jsonl. A row is
DEPTH-METHOD (`methods.py`), its training tokens and the seed of their order, and has a line in results.csv as soon as
it is done; what has one is skipped, so the table may be filled over days, by several processes too. A student is
refitted once and trained from there for every seed.

Scores are of WikiText-2 test, docstrings of the standard library, the validation split of TinyStories and the tasks,
none of which calibration or training saw; and no window that is trained on was calibrated on. FLOPs are counted, not
measured: passes of fits and refits over their text through the teacher's blocks, and for each training token a forward
pass of the teacher and three of the student, head included, 2 for every weight that is multiplied.
"""

from __future__ import annotations

import argparse
import copy
import csv
import fcntl
import gzip
import math
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import scoring  # noqa: E402
import torch  # noqa: E402
from methods import LAYERS, STEPS, Method, Recipe, methods  # noqa: E402
from tables import spread  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from iskd.blocks import warm_start  # noqa: E402
from iskd.data.files.readers import detokenize_wikitext  # noqa: E402
from iskd.evaluation import measure_quality  # noqa: E402
from iskd.evaluation.judging import evaluate  # noqa: E402
from iskd.models import Stack, surgery  # noqa: E402
from iskd.plan import Record, Remove  # noqa: E402
from iskd.refits import divided, refit_survivors  # noqa: E402
from iskd.system.precision import fast_bf16  # noqa: E402
from iskd.training.step.muon import MuonSpec, matrices  # noqa: E402
from iskd.training.step.optimizer import OptimSpec  # noqa: E402

RESULTS = HERE / "results.csv"
LENGTH, TOKENS, FIT = 512, 29_696, 8_192
TEXTS = ("wikitext", "docstrings", "stories")
SKIPPED = 147_456  # tokens at the head of the text, of which calibration text is
COLUMNS = (
    "depth", "method", "layers", "tokens", "seed", "precision", "refit_seconds", "train_seconds", "refit_tflop",
    "tflop", "params", *(f"{kind}_{name}" for kind in ("kl", "ppl") for name in TEXTS), "lambada_nll", *scoring.METRICS,
)  # fmt: skip


class Text:
    """Windows [n, 512] of the two texts, in an order drawn once."""

    def __init__(self, data: Path, tokenizer: Any) -> None:
        with gzip.open(data / "wikitext2" / "train.txt.gz", "rt", encoding="utf-8") as file:
            self.wikitext = self._windows(tokenizer, detokenize_wikitext(file.read()))
        with gzip.open(data / "tinystories" / "train.txt.gz", "rt", encoding="utf-8") as file:
            self.stories = self._windows(tokenizer, file.read())

    @staticmethod
    def _windows(tokenizer: Any, text: str) -> Tensor:
        ids = torch.tensor(tokenizer(text[:4_000_000]).input_ids)
        count = len(ids) // LENGTH
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        return ids[: count * LENGTH].view(count, LENGTH)[order]

    def windows(self, tokens: int, skip: int = 0, *, wikitext: bool = False) -> Tensor:
        """Windows of so many tokens, half of each text or all of WikiText-2, behind the first `skip` tokens."""
        parts = [self.wikitext] if wikitext else [self.wikitext, self.stories]
        count, first = tokens // LENGTH, skip // LENGTH // len(parts)
        numbers = [(count + place) // len(parts) for place in range(len(parts))]
        drawn = [part[first : first + number] for part, number in zip(parts, numbers, strict=True)]
        if sum(map(len, drawn)) < count:
            raise SystemExit(f"the texts have too few windows for {skip:,} + {tokens:,} tokens")
        return torch.cat(drawn)[torch.randperm(count, generator=torch.Generator().manual_seed(1 + skip))]


class Scorer(scoring.Scorer):
    """With stories, which are of the kind of half of the calibration text and not in it."""

    def __init__(self, data: Path, items: int, tokens: int, tasks: Sequence[str]) -> None:
        super().__init__(data, items, tokens)
        self.tasks = {name: found for name, found in self.tasks.items() if name in tasks}
        with gzip.open(data / "tinystories" / "valid.txt.gz", "rt", encoding="utf-8") as file:
            self.texts["stories"] = scoring.windows(self.teacher.tokenizer, file.read(), tokens)
        with scoring.autocast():
            self.goals["stories"] = [scoring.last_hidden(self.teacher.model, ids) for ids in self.texts["stories"]]

    def score(self, model: PreTrainedModel) -> dict[str, Any]:
        """A line's scores; tasks in percent."""
        found: dict[str, Any] = {}
        model.eval().to(scoring.DEVICE)
        with scoring.autocast():
            for name in TEXTS:
                quality = self._on_text(model, name)
                found |= {f"kl_{name}": round(quality["kl"], 4), f"ppl_{name}": round(quality["ppl"], 3)}
            for name, items in self.tasks.items():
                result = evaluate(model, self.teacher.tokenizer, items)
                found[name] = round(100 * float(result.of(self.metrics[name]).mean()), 1)
                if name == "lambada":
                    found["lambada_nll"] = round(-result.mean("log_p"), 3)
        return found


class Rows:
    """Makes and scores students; each adds its lines."""

    def __init__(self, scorer: Scorer, text: Text) -> None:
        self.scorer, self.text, self.teacher = scorer, text, scorer.teacher.model
        self._states: dict[int, list[Tensor]] = {}

    def made(self, method: Method, layers: Sequence[int]) -> tuple[PreTrainedModel, float]:
        """The student before it is trained, and the seconds of its fits and refits."""
        student, start = copy.deepcopy(self.teacher), time.monotonic()
        old = dict(enumerate(Stack(student).layers))
        edits = method.edits(layers)
        record = surgery.apply(student, Record(len(old)), edits)
        tokens, held_tokens = (
            max([least, *(getattr(refit, key) for refit in method.refits)])
            for key, least in (("tokens", FIT), ("held_tokens", FIT // 4))
        )
        text = divided(lambda count: [self.text.windows(count, wikitext=method.wikitext)], tokens, held_tokens)
        few = text.few(FIT, FIT // 4)
        with scoring.autocast():
            warm_start(
                student, self.teacher, old, record, edits, few.fit.split(4), few.held.split(4),
                lambda held: self._kl(student, held),
            )  # fmt: skip
            told = refit_survivors(method.refits, student, self.teacher, record, edits, text)
        print("\n".join(told[-3:]), flush=True)
        return student, time.monotonic() - start

    def _kl(self, student: PreTrainedModel, windows: Sequence[Tensor]) -> float:
        return measure_quality(student, self.teacher, [{"input_ids": batch} for batch in windows])["kl"]

    def train(self, student: PreTrainedModel, recipe: Recipe, tokens: int, seed: int) -> None:
        """KL per token, cosine after a warmup of 5 %, clip 1, no weight decay; the seed orders the windows."""
        windows = self.text.windows(tokens, SKIPPED).view(-1, recipe.window)
        goals, head = self._goals(windows), self.teacher.get_output_embeddings()
        student.requires_grad_(True).train()
        orthogonal = matrices(student) if recipe.optimizer == "muon" else set()
        groups: list[dict[str, Any]] = [
            {
                "params": [p for p in student.parameters() if (id(p) in orthogonal) == chosen],
                "lr": recipe.rate, "weight_decay": 0.0, "orthogonal": chosen,
            }
            for chosen in (True, False)
        ]  # fmt: skip
        spec = MuonSpec() if recipe.optimizer == "muon" else OptimSpec()
        stepper = spec.make([group for group in groups if group["params"]])
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        batches = order.split(recipe.step // recipe.window)
        for number, chosen in enumerate(batches):
            warm = min(1.0, (number + 1) / max(1, round(0.05 * len(batches))))
            for group in stepper.param_groups:
                group["lr"] = recipe.rate * warm * 0.5 * (1 + math.cos(math.pi * number / len(batches)))
            for row in chosen.tolist():  # one window at a time: the same gradient, and a fraction of the memory
                with scoring.autocast():
                    with torch.no_grad():
                        goal = head(goals[row]).float().log_softmax(-1)
                    logits = student(input_ids=windows[row : row + 1]).logits.float().log_softmax(-1)
                ((goal.exp() * (goal - logits)).sum(-1).mean() / len(chosen)).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        student.requires_grad_(False)

    def _goals(self, windows: Tensor) -> list[Tensor]:
        """What the teacher's head reads on the training text [1, T, C], which is the same for all rows of a window."""
        length = windows.shape[1]
        if length not in self._states:
            with scoring.autocast():
                self._states = {length: [scoring.last_hidden(self.teacher, ids) for ids in windows]}
        return self._states[length]

    def add(self, depth: int, name: str, method: Method, budgets: Sequence[int], seeds: Sequence[int]) -> None:
        """All lines of one student that are not there yet."""
        wanted = [(0, 0)] if 0 in budgets and name not in STEPS else []  # nothing is drawn at random before training
        wanted += [(tokens, seed) for tokens in budgets if tokens for seed in seeds]
        done = {
            (int(row["tokens"]), int(row["seed"]))
            for row in read()
            if (row["depth"], row["method"]) == (str(depth), name)
        }
        wanted = [row for row in wanted if row not in done]
        if not wanted:
            return
        layers = method.layers or LAYERS[depth]
        student, seconds = self.made(method, layers)
        blocks = sum(p.numel() for p in Stack(self.teacher).layers.parameters())
        fits = 0 if all(isinstance(edit, Remove) for edit in method.edits(layers)) else 2 * FIT
        refit = 2 * blocks * (fits + sum(r.passes * (r.tokens + r.held_tokens) for r in method.refits)) / 1e12
        facts = {
            "depth": depth, "method": name, "layers": " ".join(map(str, layers)), "precision": precision(),
            "refit_seconds": round(seconds), "refit_tflop": round(refit, 1), "params": surgery.parameters(student),
        }  # fmt: skip
        for tokens, seed in wanted:
            trained, start = (copy.deepcopy(student) if tokens else student), time.monotonic()
            if tokens:
                self.train(trained, method.recipe, tokens, seed)
            cost = 2 * tokens * (surgery.parameters(self.teacher) + 3 * surgery.parameters(trained)) / 1e12
            spent = {"train_seconds": round(time.monotonic() - start) if tokens else 0, "tflop": round(refit + cost, 1)}
            write({**facts, "tokens": tokens, "seed": seed, **spent, **self.scorer.score(trained)})


def precision() -> str:
    """Of products: float32 where the machine emulates bf16."""
    return "bf16" if scoring.DEVICE.type == "cuda" or fast_bf16() else "float32"


def write(row: dict[str, Any]) -> None:
    """A line more in results.csv, whoever else adds lines."""
    print(row, flush=True)
    with RESULTS.open("a", newline="") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        if stream.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def read() -> list[dict[str, str]]:
    """What results.csv holds."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as stream:
        return list(csv.DictReader(stream))


def table() -> None:
    """Print a table for every depth and budget, the lowest KL first; ± half the range of the seeds."""
    rows, groups = read(), defaultdict[tuple[int, int], dict[str, list[dict[str, str]]]](lambda: defaultdict(list))
    for row in rows:
        groups[int(row["depth"]), int(row["tokens"])][row["method"]].append(row)
    shown = [name for name in COLUMNS[6:] if any(row[name] for row in rows)]
    for (depth, tokens), found in sorted(groups.items(), key=lambda pair: (-pair[0][0], pair[0][1])):
        print(f"\n**{depth} layers, {tokens:,} training tokens**\n")
        print(f"| method | seeds | {' | '.join(name.replace('_', ' ') for name in shown)} |")
        print(f"|{'---|' * (len(shown) + 2)}")
        for name, lines in sorted(found.items(), key=lambda pair: mean(float(row["kl_wikitext"]) for row in pair[1])):
            cells = [_cell([float(row[key]) for row in lines if row[key]], key) for key in shown]
            print(f"| {name} | {len(lines)} | {' | '.join(cells)} |")


def _cell(values: list[float], column: str) -> str:
    if not values:
        return ""
    if column == "params":
        return f"{values[0] / 1e6:.1f} M"
    return spread(values, 3 if column.startswith("kl") else 2 if column.startswith(("ppl", "lambada_nll")) else 1)


def main() -> None:
    """Fill results.csv, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["table"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names (DEPTH-METHOD), done in this order")
    parser.add_argument("--tokens", nargs="+", type=int, default=[0, TOKENS], help="training tokens, 0 = as refitted")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--tasks", nargs="+", default=["lambada", "copy"], help=f"among {', '.join(scoring.METRICS)}")
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--text", type=int, default=4_096, help="tokens of each text that is scored")
    given = parser.parse_args()
    if given.command == "table":
        table()
        return
    if given.data is None:
        parser.error("--data: the folder of texts and tasks")
    torch.manual_seed(0)
    scorer = Scorer(given.data, given.items, given.text, given.tasks)
    rows = Rows(scorer, Text(given.data, scorer.teacher.tokenizer))
    if not any(row["method"] == "teacher" for row in read()):
        blank = {"depth": 30, "method": "teacher", "tokens": 0, "seed": 0, "precision": precision()}
        write({**blank, "params": surgery.parameters(rows.teacher), **scorer.score(rows.teacher)})
    every = {f"{depth}-{name}": (depth, name) for depth in LAYERS for name in methods(depth)}
    order = [key for pattern in given.only for key in every if fnmatch(key, pattern)]
    for key in dict.fromkeys(order):
        depth, name = every[key]
        rows.add(depth, name, methods(depth)[name], given.tokens, given.seeds)


if __name__ == "__main__":
    main()
