"""How far from the teacher a student is right after its edit, before any training, with and without fitting.

Eight of SmolLM2's thirty blocks are replaced at once. KL to the teacher in nats per token on WikiText-2 valid (8
windows of 512, every 4th position); blocks are fitted on text of its train split, and all blocks of those that
`--refit` names then refitted (`refit=[output]`) on 32,768 tokens.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import sys
import time
from pathlib import Path

from iskd.system.allocator import tune

tune()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from iskd.blocks import warm_start  # noqa: E402
from iskd.data.files.readers import detokenize_wikitext  # noqa: E402
from iskd.models import (  # noqa: E402
    Stack,
    surgery,
)
from iskd.plan import Record, Replace, Spec  # noqa: E402
from iskd.refits import divided, refit_survivors  # noqa: E402
from iskd.refits.output import Output  # noqa: E402
from iskd.system.precision import fast_bf16  # noqa: E402
from iskd.teacher import TeacherSpec, load_teacher  # noqa: E402

LAYERS = (3, 12, 13, 14, 16, 17, 25, 26)
BLOCKS = {
    "nothing (identity)": (Spec("iskd.blocks.identity.Identity"), False),
    "linear": (Spec("iskd.blocks.linear.Linear"), True),
    "bottleneck, zero up-projection": (Spec("iskd.blocks.bottleneck.Bottleneck"), False),
    "bottleneck, fitted": (Spec("iskd.blocks.bottleneck.Bottleneck"), True),
    "bottleneck, as published": (Spec("iskd.blocks.bottleneck.Bottleneck", {"norm": False, "zero_up": False}), False),
    "slim 18.5 %, inherited by L1": (Spec("iskd.blocks.slim.Slim", {"ratio": 0.185}), False),
    "slim 18.5 %, fitted": (Spec("iskd.blocks.slim.Slim", {"ratio": 0.185}), True),
    "slim 41.7 %, inherited by L1": (Spec("iskd.blocks.slim.Slim", {"ratio": 0.417}), False),
    "slim 41.7 %, fitted": (Spec("iskd.blocks.slim.Slim", {"ratio": 0.417}), True),
}
REFIT = Output(tokens=32_768, held_tokens=4_096)


def windows(tokenizer: object, file: Path, count: int) -> Tensor:
    """Evenly spaced windows [count, 512] of a text file, or of its start where it is long."""
    with gzip.open(file, "rt", encoding="utf-8") as handle:
        text = detokenize_wikitext(handle.read(6_000_000))
    ids = torch.tensor(tokenizer(text).input_ids)  # type: ignore[operator]
    starts = torch.linspace(0, len(ids) - 513, count).long()
    return torch.stack([ids[start : start + 512] for start in starts.tolist()])


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, batches: tuple[Tensor, ...]) -> Tensor:
    """Log-probabilities [N, V] at every 4th position."""
    with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16()):
        return torch.cat([model(b).logits[:, ::4].float().log_softmax(-1).flatten(0, 1) for b in batches])


def main() -> None:
    """Print a table row per block, and one more where all blocks are refitted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2/{train,valid}.txt.gz")
    parser.add_argument("--only", default="", help="run the blocks whose name contains this")
    parser.add_argument("--tokens", type=int, default=8192, help="that blocks are fitted to; a quarter as many choose")
    parser.add_argument("--refit", default="slim", help="refit the fitted students whose block's name contains this")
    parser.add_argument("--windows", type=int, default=8, help="windows of WikiText-2 valid that are scored")
    arguments = parser.parse_args()
    folder = arguments.data / "wikitext2"
    loaded = load_teacher(TeacherSpec("HuggingFaceTB/SmolLM2-135M-Instruct", bundled="smollm2"))

    def train(tokens: int) -> list[Tensor]:
        return [windows(loaded.tokenizer, folder / "train.txt.gz", tokens // 512)]

    held = arguments.tokens // 4
    text = divided(train, max(REFIT.tokens, arguments.tokens), max(REFIT.held_tokens, held))
    own = text.few(arguments.tokens, held)
    valid = windows(loaded.tokenizer, folder / "valid.txt.gz", arguments.windows).split(2)
    goal = log_probabilities(loaded.model, valid)

    def row(name: str, student: PreTrainedModel, whole: int, seconds: float) -> None:
        share = sum(p.numel() for p in Stack(student).layers[LAYERS[0]].parameters()) / whole
        kl = (goal.exp() * (goal - log_probabilities(student, valid))).sum(-1).view(arguments.windows, -1).mean(1)
        error = kl.std().item() / len(kl) ** 0.5
        print(f"| {name} | {100 * share:.1f} % | {kl.mean().item():.3f} ± {error:.3f} | {seconds:.0f} |", flush=True)

    print("| block | share | KL before training | fit, s |\n|---|---|---|---|")
    for name, (spec, fitted) in BLOCKS.items():
        if arguments.only not in name:
            continue
        student = copy.deepcopy(loaded.model)
        edits = [Replace(layer, spec, seed=layer) for layer in LAYERS]
        old = dict(enumerate(Stack(student).layers))
        whole = sum(p.numel() for p in old[LAYERS[0]].parameters())
        record = surgery.apply(student, Record(len(old)), edits)
        if not fitted:
            row(name, student, whole, 0)
            continue
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16()):
            warm_start(student, loaded.model, old, record, edits, own.fit.split(4), own.held.split(4))
        row(name, student, whole, time.perf_counter() - start)
        if arguments.refit in name:
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16()):
                told = refit_survivors([REFIT], student, loaded.model, record, edits, text)
            row(f"{name}, all refitted", student, whole, time.perf_counter() - start)
            print(*told, sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
