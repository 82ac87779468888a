"""Score exported students on text that neither training nor selection saw; writes results.csv and prints the table.

WikiText-2 test (in domain), docstrings of the standard library (out of domain), LAMBADA (last word of novels' passages:
accuracy under greedy choice and the mean negative log-likelihood of the word). All against the teacher on the same
items.
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

from iskd.system.allocator import tune

tune()

import torch  # noqa: E402

import iskd  # noqa: E402
from iskd.data.files.readers import detokenize_wikitext  # noqa: E402
from iskd.data.sources import Docstrings  # noqa: E402
from iskd.system.precision import fast_bf16  # noqa: E402
from iskd.teacher import TeacherSpec, load_teacher  # noqa: E402

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from scoring import windows  # noqa: E402

FACTS = ("method", "seed", "params", "tokens", "seconds")
FIELDS = ("kl_wikitext", "ppl_wikitext", "ppl_docstrings", "lambada_acc", "lambada_nll")


@torch.no_grad()
def token_nll(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every next token [B, T-1] in nats."""
    with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16()):
        logits = model(ids).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


@torch.no_grad()
def lambada(model: Any, tokenizer: Any, items: list[str], batch: int = 16) -> tuple[float, float]:
    """Accuracy and mean negative log-likelihood of the last word; batches of like length, padded on the right."""
    pairs = []
    for text in items:
        context, _, word = text.rpartition(" ")
        pairs.append((tokenizer(context).input_ids, tokenizer(" " + word).input_ids))
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    right, nll = 0, 0.0
    for start in range(0, len(pairs), batch):
        group = pairs[start : start + batch]
        rows = [torch.tensor(prompt + target) for prompt, target in group]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16()):
            logits = model(ids).logits
        for row, (prompt, target) in zip(logits, group, strict=True):
            goal, guess = torch.tensor(target), row[len(prompt) - 1 : len(prompt) + len(target) - 1].float()
            right += int((guess.argmax(-1) == goal).all())
            nll += torch.nn.functional.cross_entropy(guess, goal, reduction="sum").item()
    return right / len(items), nll / len(items)


@torch.no_grad()
def log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [N, V] of every 4th window at every 4th position."""
    with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16()):
        return torch.cat(
            [model(window).logits[:, ::4].float().log_softmax(-1).flatten(0, 1) for window in ids[::4].split(2)]
        )


def score(
    model: Any, tokenizer: Any, texts: dict[str, torch.Tensor], items: list[str], goal: torch.Tensor
) -> dict[str, float]:
    """All scores of one model; `goal` are the teacher's log-probabilities."""
    model.eval()
    found = log_probabilities(model, texts["wikitext"])
    values = {"kl_wikitext": (goal.exp() * (goal - found)).sum(-1).mean().item()}
    for name, ids in texts.items():
        values[f"ppl_{name}"] = math.exp(mean(token_nll(model, window).mean().item() for window in ids.split(2)))
    values["lambada_acc"], values["lambada_nll"] = lambada(model, tokenizer, items)
    return values


def main() -> None:
    """Score the teacher and every run given; the lines of other runs in results.csv stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--items", type=int, default=300)
    arguments = parser.parse_args()
    teacher = load_teacher(TeacherSpec("HuggingFaceTB/SmolLM2-135M-Instruct", bundled="smollm2"))
    with gzip.open(arguments.data / "wikitext2" / "test.txt.gz", "rt", encoding="utf-8") as file:
        wikitext = detokenize_wikitext(file.read())
    docstrings = "\n\n".join(text for text, _ in Docstrings().documents())
    texts = {
        "wikitext": windows(teacher.tokenizer, wikitext, arguments.tokens),
        "docstrings": windows(teacher.tokenizer, docstrings, arguments.tokens),
    }
    lines = (arguments.data / "lambada" / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line)["text"] for line in lines[: arguments.items]]
    goal = log_probabilities(teacher.model, texts["wikitext"])
    size = sum(p.numel() for p in teacher.model.parameters())
    scores = score(teacher.model, teacher.tokenizer, texts, items, goal)
    rows = [row for row in read() if row["method"] != "teacher"]
    rows.insert(0, {"method": "teacher", "seed": 0, "params": size, "tokens": 0, **scores})
    for run in arguments.runs:
        method, _, seed = run.name.rpartition("-")
        last = [row for row in json.loads((run / "stages.json").read_text()) if row["status"] == "kept"][-1]
        model = iskd.load(run / "model")
        facts = {"method": method, "seed": int(seed), "params": last["params"], "tokens": last["tokens"]}
        scores = score(model, teacher.tokenizer, texts, items, goal)
        rows = [row for row in rows if (row["method"], row["seed"]) != (method, int(seed))]
        rows.append({**facts, "seconds": round(sum_seconds(run)), **scores})
        print(rows[-1], flush=True)
    fields = (*FACTS, *FIELDS)
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    print_table(rows)


def read() -> list[dict[str, Any]]:
    """What results.csv holds."""
    if not (HERE / "results.csv").is_file():
        return []
    with (HERE / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {
            **{key: row[key] if key == "method" else int(row[key] or 0) for key in FACTS},
            **{key: float(row[key]) for key in FIELDS},
        }
        for row in rows
    ]


def sum_seconds(run: Path) -> float:
    """Wall time of all stages of a run."""
    return sum(row["seconds"] for row in json.loads((run / "stages.json").read_text()))


def print_table(rows: list[dict[str, Any]]) -> None:
    """Markdown table: mean over seeds, and half the spread between them."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["method"]].append(row)
    print("| method | params M | tokens k | seeds | KL | ppl WikiText-2 | ppl docs | LAMBADA acc % | LAMBADA nll |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, group in groups.items():
        cells = [f"{group[0]['params'] / 1e6:.1f}", f"{group[0]['tokens'] / 1e3:.0f}", str(len(group))]
        cells += [spread([row[key] for row in group]) for key in FIELDS[:3]]
        cells += [spread([100 * row["lambada_acc"] for row in group], 1), spread([row["lambada_nll"] for row in group])]
        print(f"| {name} | " + " | ".join(cells) + " |")


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and half the range of some values."""
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {(max(values) - min(values)) / 2:.{digits}f}"


if __name__ == "__main__":
    main()
