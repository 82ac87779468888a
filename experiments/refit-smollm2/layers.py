"""Which seven of thirty layers: SmolLM2-135M at 23 after one refit, and after 29,696 training tokens.

    python experiments/refit-smollm2/layers.py DATA 4096 12,13,14,15,16,17,18 12,13,14,15,17,25,26 3,4,5,7,12,14,17

The number is of calibration tokens; a quarter as many, at least 1,024 and at most 4,096, are held out. Text, refit and
training (512 tokens a step at 1e-4) are those of `steps.py`. Every student adds two lines to layers.csv: KL on
WikiText-2 test, docstrings and stories, LAMBADA (300 items). One seed.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from evaluate import Scorer, ild
from steps import SKIPPED, TOKENS, Text, add, train
from transformers import PreTrainedModel

from iskd.evaluation.likelihood import evaluate
from iskd.models import surgery
from iskd.plan import Record, Remove
from iskd.refits.carrying_out import refit_survivors
from iskd.refits.output import Output

RESULTS = Path(__file__).parent / "layers.csv"


def score(student: PreTrainedModel, scorer: Scorer) -> dict[str, float]:
    """KL on three texts, LAMBADA."""
    student.eval()
    with ild.autocast():
        kl = {f"kl_{name}": round(scorer._on_text(student, name)["kl"], 4) for name in scorer.texts}
        lambada = evaluate(student, scorer.teacher.tokenizer, scorer.tasks["lambada"])
    right = round(100 * float(lambada.of("acc").mean()), 1)
    return {**kl, "lambada_nll": round(-lambada.mean("log_p"), 3), "lambada": right}


def main(data: Path, tokens: int, choices: Sequence[str]) -> None:
    """Remove, refit, score, train and score."""
    scorer = Scorer(data, 300, 8192, ["lambada"])
    teacher, text = scorer.teacher.model, Text(data, scorer.teacher.tokenizer)
    refit = Output(tokens=tokens, held_tokens=min(4096, max(1024, tokens // 4)))
    for choice in choices:
        edits = [Remove(int(layer)) for layer in choice.split(",")]
        student = copy.deepcopy(teacher)
        record = surgery.apply(student, Record(30), edits)
        start, windows = time.monotonic(), text.mixed(refit.tokens + refit.held_tokens)
        with ild.autocast():
            refit_survivors([refit], student, teacher, record, edits, lambda _tokens, windows=windows: [windows])
        facts = {"layers": choice.replace(",", " "), "refit_tokens": tokens}
        add({**facts, "trained": 0, "seconds": round(time.monotonic() - start), **score(student, scorer)}, RESULTS)
        start = time.monotonic()
        train(student, teacher, text.mixed(TOKENS, SKIPPED), "adamw", 512, 1e-4)
        add({**facts, "trained": TOKENS, "seconds": round(time.monotonic() - start), **score(student, scorer)}, RESULTS)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
