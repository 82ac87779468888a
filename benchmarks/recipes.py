"""What a recipe for a GPU takes: memory and hours as expected, and beside them as measured where there is a GPU.

    python -m benchmarks.recipes                              # the table of docs/quickstart/one_gpu.md, on any machine
    python -m benchmarks.recipes --measure gpu_24gb           # one optimizer step of it, here (make measure-recipe)

Expected memory: float32 weights of the teacher; of the student (as deep as it is in the end) float32 weights, gradients
and two moments, and the bf16 copies that autocast keeps; what autograd keeps of a micro-batch, counted on one block of
the model's sizes (`kept_by_a_block`); and logits, for which `chunk: auto` takes a quarter of what is free, up to 4 GiB.
Expected hours: FLOPs of the forward passes of both models and the student's backward pass, over `SHARE` of the card's
peak for dense bf16 products, which is the maker's figure. Scores, refits and measurements between edits come on top.
Nothing of this was measured on a GPU; on a CPU the same sum is compared with what `benchmarks.step` measured
(tests/project/test_recipes.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from iskd.commands.compose import compose_config
from iskd.models import Stack
from iskd.system.machine import called

CARDS = {  # bytes, FLOP/s of dense bf16 products with float32 sums, by their makers' data sheets
    "RTX 3090": (24 << 30, 71e12),
    "L4": (24 << 30, 121e12),
    "RTX 4090": (24 << 30, 165e12),
    "A100 80 GB": (80 << 30, 312e12),
    "H100 SXM": (80 << 30, 989e12),
}
RECIPES = {"gpu_24gb": ("RTX 3090", "L4", "RTX 4090"), "gpu_80gb": ("A100 80 GB", "H100 SXM")}
SHARE = 0.35  # of that peak; assumed
MOST_LOGITS = 4 << 30  # see iskd.losses.chunk_size


@dataclass(frozen=True)
class Recipe:
    """What memory and time depend on.

    Attributes:
        config: of the teacher, as transformers has it. kept: layers of the student in the end.
        batch: windows of a micro-batch. window, tokens: in tokens. accumulate: micro-batches of an optimizer step.
    """

    config: dict[str, Any]
    kept: int
    batch: int
    window: int
    tokens: int
    accumulate: int
    model: str = ""
    data: str = ""
    precision: str = ""

    @staticmethod
    def of(name: str) -> Recipe:
        """That of `experiment=NAME`."""
        config = compose_config([f"experiment={name}", "hydra.run.dir=."], Path())[0]
        plain: Any = OmegaConf.to_container(config, resolve=True)
        data, trainer = plain["data"], plain["trainer"]
        return Recipe(
            plain["model"]["config"],
            plain["schedule"]["target_layers"],
            data["batch_size"],
            data["seq_len"],
            plain["schedule"]["tokens"],
            trainer["accumulate_grad_batches"],
            plain["model"]["name"],
            data["source"]["name"],
            trainer["precision"],
        )

    def parameters(self, layers: int | None = None) -> int:
        """Of the model with so many layers; None = all."""
        with torch.device("meta"):
            return sum(p.numel() for p in _model(self.config, num_hidden_layers=layers).parameters())

    def memory(self, logits: int = MOST_LOGITS) -> int:
        """Bytes that training is expected to take, those of `logits` among them."""
        student = self.parameters(self.kept)
        fixed = 4 * self.parameters() + (4 * 4 + 2) * student
        return fixed + self.batch * self.window * self.kept * kept_by_a_block(self.config) + logits

    @property
    def flops(self) -> float:
        """Of the whole training: 2 for a parameter and token forward, 4 backward, and causal attention."""
        attention = 2 * self.window * self.config["hidden_size"]  # a token of a layer, scores and values, half masked
        layers = self.config["num_hidden_layers"]
        forward = 2 * self.parameters() + layers * attention
        student = 2 * self.parameters(self.kept) + self.kept * attention
        return float(self.tokens) * (forward + 3 * student)


def _model(config: dict[str, Any], **changes: Any) -> Any:
    asked = {**config, **{key: value for key, value in changes.items() if value is not None}}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**asked))


def kept_by_a_block(config: dict[str, Any], tokens: int = 128) -> int:
    """Bytes of activations per token that autograd keeps of one block under bf16 autocast, counted on real tensors.

    Two models of one and of two blocks, few tokens and a small vocabulary: the difference is one block. Weights and
    their bf16 copies are left out. Fused attention keeps no scores, so that bytes grow with tokens alone.
    """

    def kept(layers: int) -> int:
        model = _model(config, num_hidden_layers=layers, vocab_size=64)
        weights = {tuple(p.shape) for p in model.parameters() if p.dim() > 1}
        weights |= {shape[::-1] for shape in weights}
        seen: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tuple(tensor.shape) not in weights and not isinstance(tensor, torch.nn.Parameter):
                seen[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
            return tensor

        ids = torch.zeros(1, tokens, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
            Stack(model).trunk(ids)
        return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())

    return (kept(2) - kept(1)) // tokens


def table() -> str:
    """All recipes, as markdown."""
    heads: tuple[str, ...] = (
        "recipe",
        "model",
        "text",
        "precision",
        "windows x tokens, accumulated",
        "M tokens",
        "expected GiB",
    )
    heads += ("card", "expected hours")
    rows = [heads, ("---",) * len(heads)]
    for name, cards in RECIPES.items():
        recipe = Recipe.of(name)
        layers = f"{recipe.config['num_hidden_layers']} -> {recipe.kept} layers"
        size = f"{recipe.batch} x {recipe.window}, {recipe.accumulate}"
        first = (f"`{name}`", f"{recipe.model}, {layers}", recipe.data, recipe.precision, size)
        amounts = (f"{recipe.tokens / 1e6:.0f}", f"{recipe.memory() / 2**30:.0f}")
        for card in cards:
            hours = recipe.flops / (SHARE * CARDS[card][1]) / 3600
            rows.append((*first, *amounts, card, f"{hours:.1f}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def measure(name: str, overrides: Sequence[str]) -> str:
    """One line: an optimizer step of `experiment=NAME` on this machine, in a process of its own.

    Layers go in another order than in the run, which would score them first: a step is as fast with either.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "iskd", "profile", f"experiment={name}", f"hydra.run.dir={folder}/run"]
        subprocess.run([*command, "schedule.order=middle_out", *overrides], check=True)
        [file] = Path(folder).rglob("profile.json")
        found = json.loads(file.read_text(encoding="utf-8"))
    tokens = compose_config([f"experiment={name}", *overrides], Path())[0].schedule.tokens
    hours = tokens / found["tokens_per_second"] / 3600
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return (
        f"{name} on {called(device)}: {found['memory_bytes'] / 2**30:.1f} GiB, {found['tokens_per_second']:,.0f} "
        f"tokens/s, {100 * found['mfu']:.0f} % of the matrix peak; {tokens:,} tokens take {hours:.1f} h"
    )


def main() -> None:
    """Print the table, or measure a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", metavar="RECIPE", help="an experiment of conf/: one optimizer step of it, here")
    parser.add_argument("overrides", nargs="*", help="keys of that run, as on the command line of iskd train")
    options = parser.parse_args()
    print(table() if options.measure is None else measure(options.measure, options.overrides))


if __name__ == "__main__":
    main()
