"""The vocabulary loss: chunks with gradients formed on the way, against whole logits and autograd.

    python -m benchmarks.vocabulary_loss --tokens 2048 --vocabulary 49152 --width 576

One student and one teacher head of the given size, CE + KL by default. Time: wall seconds of forward and backward, the
ways in turns, medians of the ratios within a repeat. Memory: every way alone in a fresh process, the rise of its memory
(`iskd.system.machine.PeakMemory`) over what the inputs took; the gradients that every way has to return are part of it,
and left out of the last column. Liger's fused linear JSD at beta 0 (forward KL alone) is added where `liger-kernel` is
installed and the loss is `kl`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.common import Taken, fast_bf16, in_turns, low, setting, spread, timed
from iskd.losses import Terms, chunked_vocabulary_loss, naive_vocabulary_loss
from iskd.losses.ce import CrossEntropy
from iskd.losses.kl import KL
from iskd.system.machine import PeakMemory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMPILED = DEVICE.type == "cuda"
LIGER = "Liger, compiled" if COMPILED else "Liger, not compiled"
LOSSES: dict[str, Terms] = {
    "ce+kl": {"ce": (CrossEntropy(), 1.0), "kl": (KL(), 1.0)},
    "kl": {"kl": (KL(), 1.0)},
    "reverse_kl": {"kl": (KL("reverse"), 1.0)},
    "jsd": {"kl": (KL("jsd"), 1.0)},
}


class Inputs:
    """Hidden states [1, T, D] and heads [V, D] of student and teacher; the student's want gradients."""

    def __init__(self, tokens: int, vocabulary: int, width: int) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(1, tokens, width, device=DEVICE, requires_grad=True)
        self.weight = nn.Parameter(torch.randn(vocabulary, width, device=DEVICE) * width**-0.5)
        self.teacher_hidden = torch.randn(1, tokens, width, device=DEVICE)
        self.teacher_weight = torch.randn(vocabulary, width, device=DEVICE) * width**-0.5
        self.labels = torch.randint(vocabulary, (1, tokens), device=DEVICE)

    @property
    def gradient_bytes(self) -> int:
        return self.hidden.nbytes + self.weight.nbytes

    def ours(self, terms: Terms, chunk: int) -> Tensor:
        return chunked_vocabulary_loss(
            terms, self.hidden, (self.weight, None), self.teacher_hidden, (self.teacher_weight, None), self.labels,
            chunk=chunk,
        )[0]  # fmt: skip

    def naive(self, terms: Terms) -> Tensor:
        return naive_vocabulary_loss(
            terms, self.hidden, (self.weight, None), self.teacher_hidden, (self.teacher_weight, None), self.labels
        )[0]

    def liger(self) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=COMPILED)
        return loss(self.hidden[0], self.weight, self.teacher_hidden[0], self.teacher_weight, self.labels[0])


def ways(given: Inputs, loss: str, chunks: list[int]) -> dict[str, Callable[[], Tensor]]:
    terms = LOSSES[loss]
    found: dict[str, Callable[[], Tensor]] = {"naive": partial(given.naive, terms)}
    found |= {f"chunks of {chunk}": partial(given.ours, terms, chunk) for chunk in chunks}
    if loss == "kl" and importlib.util.find_spec("liger_kernel") is not None:
        found[LIGER] = given.liger
    return found


def once(given: Inputs, way: Callable[[], Tensor], *, mixed: bool) -> tuple[Taken, float]:
    """Seconds of forward and backward, and the loss."""
    given.hidden.grad = given.weight.grad = None

    def work() -> Tensor:
        with low(DEVICE, mixed):
            loss = way()
        loss.backward()
        return loss.detach()

    taken, loss = timed(DEVICE, work)
    return taken, float(loss)


def memory_rise(given: Inputs, options: argparse.Namespace, *, mixed: bool) -> int:
    """Bytes that the one way takes on top of the inputs."""
    small = Inputs(8, 64, options.width)  # what libraries set up at their first use is not the way's
    once(small, ways(small, options.loss, options.chunks)[options.only], mixed=mixed)
    with PeakMemory(DEVICE, interval=0.002) as memory:
        once(given, ways(given, options.loss, options.chunks)[options.only], mixed=mixed)
    return memory.rise


def in_a_process(name: str) -> int:
    """The memory of a way, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.vocabulary_loss", *sys.argv[1:], "--only", name]
    return int(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--loss", choices=LOSSES, default="ce+kl")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--only", help="measure one way's memory and print it, in bytes")
    options = parser.parse_args()
    mixed = fast_bf16(DEVICE) if options.precision == "auto" else options.precision == "bf16"
    given = Inputs(options.tokens, options.vocabulary, options.width)
    if options.only:
        print(json.dumps(memory_rise(given, options, mixed=mixed)))
        return
    found = ways(given, options.loss, options.chunks)
    memory = {name: in_a_process(name) for name in found}
    rounds = in_turns({name: lambda _, way=way: once(given, way, mixed=mixed) for name, way in found.items()},
                      options.repeats)  # fmt: skip
    returned = given.gradient_bytes
    print(
        f"{setting(DEVICE)}\n\n{options.loss}, {options.tokens} tokens x vocabulary {options.vocabulary}, width "
        f"{options.width}, {'bf16 autocast' if mixed else 'float32'}, median of {options.repeats} (least-greatest), "
        f"gradients that every way returns: {returned / 2**20:.0f} MiB\n"
    )
    absolute = " ms |" if DEVICE.type == "cuda" else ""
    print(f"| way |{absolute} faster than naive by | peak MiB | naive's / this | without the gradients | loss |")
    print("|---|---|---|---|---|---|" + ("---|" if absolute else ""))
    base = [taken.wall for taken, _ in rounds["naive"]]
    for name, taken in rounds.items():
        own, rise = [one.wall for one, _ in taken], memory[name]
        shown = f" {1e3 * statistics.median(own):.2f} |" if absolute else ""
        beyond = (memory["naive"] - returned) / max(rise - returned, 1)
        print(
            f"| {name} |{shown} {spread(base, own)} | {rise / 2**20:.0f} | {memory['naive'] / max(rise, 1):.1f} "
            f"| {beyond:.1f} | {taken[-1][1]:.5f} |"
        )


if __name__ == "__main__":
    main()
