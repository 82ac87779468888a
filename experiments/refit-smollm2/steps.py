"""Tokens a step against the rate, at equal tokens, after one refit: SmolLM2-135M at 23 of 30 layers.

    python experiments/refit-smollm2/steps.py DATA WORK adamw,512,1e-4,512 muon,512,3e-4,512 ...

A recipe is OPTIMIZER,TOKENS_A_STEP,RATE,WINDOW. The student is refitted once (kept in WORK), and each recipe trains a
copy of it by a plain loop: KL per token, cosine, clip 1, no weight decay. Text is half WikiText-2 and half TinyStories,
training splits; no window that is trained on was calibrated on. A recipe adds its line to steps.csv: KL on WikiText-2
test and on stories, LAMBADA (100 items). One seed.
"""

from __future__ import annotations

import copy
import csv
import gzip
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from evaluate import Scorer, ild
from torch import Tensor
from transformers import PreTrainedModel

from iskd.data.files.readers import detokenize_wikitext
from iskd.evaluation.likelihood import evaluate
from iskd.models import surgery
from iskd.plan import Record, Remove
from iskd.refits.carrying_out import refit_survivors
from iskd.refits.output import Output
from iskd.training.step.muon import MuonSpec, matrices
from iskd.training.step.optimizer import OptimSpec

RESULTS = Path(__file__).parent / "steps.csv"
LAYERS = (3, 12, 13, 14, 17, 25, 26)
TOKENS, LENGTH = 29_696, 512
REFIT = Output(tokens=32_768, held_tokens=4_096)
SKIPPED = 147_456  # tokens at the head of the text, of which calibration text is
_CHARACTERS = 4_000_000


class Text:
    """Windows [n, 512] of the two texts, in an order drawn once."""

    def __init__(self, data: Path, tokenizer: Any) -> None:
        with gzip.open(data / "wikitext2" / "train.txt.gz", "rt", encoding="utf-8") as file:
            wikitext = detokenize_wikitext(file.read())
        with gzip.open(data / "tinystories" / "train.txt.gz", "rt", encoding="utf-8") as file:
            stories = file.read()
        self.parts = [self._windows(tokenizer, text) for text in (wikitext, stories)]

    @staticmethod
    def _windows(tokenizer: Any, text: str) -> Tensor:
        ids = torch.tensor(tokenizer(text[:_CHARACTERS]).input_ids)
        count = len(ids) // LENGTH
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        return ids[: count * LENGTH].view(count, LENGTH)[order]

    def mixed(self, tokens: int, skip: int = 0) -> Tensor:
        """Windows of so many tokens, half of each text, behind the first `skip` tokens."""
        count, first = tokens // LENGTH, skip // LENGTH // 2
        numbers = (count - count // 2, count // 2)
        drawn = torch.cat([part[first : first + number] for part, number in zip(self.parts, numbers, strict=True)])
        return drawn[torch.randperm(len(drawn), generator=torch.Generator().manual_seed(1 + skip))]


def train(
    student: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor, optimizer: str, step: int, rate: float
) -> int:
    """Train by KL on windows [n, T], `step` tokens a step; the number of steps."""
    student.requires_grad_(True).train()
    orthogonal = matrices(student) if optimizer == "muon" else set()
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in student.parameters() if (id(p) in orthogonal) == chosen],
            "lr": rate, "weight_decay": 0.0, "orthogonal": chosen,
        }
        for chosen in (True, False)
    ]  # fmt: skip
    spec = MuonSpec() if optimizer == "muon" else OptimSpec()
    stepper = spec.make([group for group in groups if group["params"]])
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    batches = windows[order].split(step // windows.shape[1])
    for number, batch in enumerate(batches):
        warm = min(1.0, (number + 1) / max(1, round(0.05 * len(batches))))
        for group in stepper.param_groups:
            group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * number / len(batches)))
        with ild.autocast():
            with torch.no_grad():
                goal = teacher(input_ids=batch).logits
            logits = student(input_ids=batch).logits
        goal, logits = goal.float().log_softmax(-1), logits.float().log_softmax(-1)
        (goal.exp() * (goal - logits)).sum(-1).mean().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        stepper.step()
        stepper.zero_grad(set_to_none=True)
    student.requires_grad_(False)
    return len(batches)


def score(student: PreTrainedModel, scorer: Scorer) -> dict[str, float]:
    """KL on WikiText-2 test and on stories, LAMBADA."""
    student.eval()
    with ild.autocast():
        kl = {name: scorer._on_text(student, name)["kl"] for name in ("wikitext", "stories")}
        lambada = evaluate(student, scorer.teacher.tokenizer, scorer.tasks["lambada"])
    return {
        "kl_wikitext": round(kl["wikitext"], 4),
        "kl_stories": round(kl["stories"], 4),
        "lambada_nll": round(-lambada.mean("log_p"), 3),
        "lambada": round(100 * float(lambada.of("acc").mean()), 1),
    }


def add(row: dict[str, Any], results: Path = RESULTS) -> None:
    """One line more in a table."""
    print(row, flush=True)
    fresh = not results.exists()
    with results.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(row), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def main(data: Path, work: Path, recipes: Sequence[str]) -> None:
    """Refit once, then train and score every recipe that has no line yet."""
    done = set()
    if RESULTS.exists():
        with RESULTS.open(newline="") as stream:
            done = {f"{r['optimizer']},{r['step']},{r['rate']},{r['window']}" for r in csv.DictReader(stream)}
    scorer = Scorer(data, 100, 8192, ["lambada"])
    scorer.tasks.pop("copy", None)
    teacher = scorer.teacher.model
    text = Text(data, scorer.teacher.tokenizer)
    student = copy.deepcopy(teacher)
    edits = [Remove(layer) for layer in LAYERS]
    record = surgery.apply(student, Record(30), edits)
    kept = work / "refitted.pt"
    if not kept.exists():
        start, windows = time.monotonic(), text.mixed(REFIT.tokens + REFIT.held_tokens)
        with ild.autocast():
            told = refit_survivors([REFIT], student, teacher, record, edits, lambda _tokens: [windows])
        print("\n".join(told), flush=True)
        facts = {"optimizer": "none", "step": 0, "rate": 0, "window": 0, "steps": 0}
        add({**facts, "seconds": round(time.monotonic() - start), **score(student, scorer)})
        work.mkdir(parents=True, exist_ok=True)
        torch.save(student.state_dict(), kept)
    refitted = torch.load(kept)
    for recipe in recipes:
        if recipe in done:
            continue
        optimizer, step, rate, window = recipe.split(",")
        student.load_state_dict(refitted)
        windows, start = text.mixed(TOKENS, SKIPPED).view(-1, int(window)), time.monotonic()
        steps = train(student, teacher, windows, optimizer, int(step), float(rate))
        facts = {"optimizer": optimizer, "step": step, "rate": rate, "window": window, "steps": steps}
        add({**facts, "seconds": round(time.monotonic() - start), **score(student, scorer)})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
