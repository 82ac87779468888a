"""The vocabulary loss: chunks with gradients formed on the way, against whole logits and autograd.

One student and one teacher head of the given size, CE + KL by default. Time: the ways one after the other within each
repeat, wall seconds of forward and backward, medians of the ratios within a repeat. Memory: every way alone in a fresh
process, the rise of its peak resident memory (CPU) or of the peak allocation (CUDA) over what it held before. Liger's
fused linear JSD at beta 0 (forward KL alone) is added where `liger-kernel` is installed and the loss is `kl`.

    python -m benchmarks.vocabulary_loss --tokens 2048 --vocabulary 49152 --width 576
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from iskd.allocator import tune

tune()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from iskd.build import fast_bf16  # noqa: E402
from iskd.losses.base import Terms  # noqa: E402
from iskd.losses.ce import CrossEntropy  # noqa: E402
from iskd.losses.chunked import chunked_vocabulary_loss, naive_vocabulary_loss  # noqa: E402
from iskd.losses.kl import KL  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Way = Callable[[], Tensor]
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
        self.weight = torch.nn.Parameter(torch.randn(vocabulary, width, device=DEVICE) * width**-0.5)
        self.teacher_hidden = torch.randn(1, tokens, width, device=DEVICE)
        self.teacher_weight = torch.randn(vocabulary, width, device=DEVICE) * width**-0.5
        self.labels = torch.randint(vocabulary, (1, tokens), device=DEVICE)

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

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
        return loss(self.hidden[0], self.weight, self.teacher_hidden[0], self.teacher_weight, self.labels[0])


def ways(given: Inputs, terms: Terms, chunks: list[int], *, liger: bool) -> dict[str, Way]:
    found: dict[str, Way] = {"naive": lambda: given.naive(terms)}
    for chunk in chunks:
        found[f"chunks of {chunk}"] = lambda chunk=chunk: given.ours(terms, chunk)
    if liger:
        found["Liger, not compiled"] = given.liger
    return found


def once(given: Inputs, way: Way, *, low: bool) -> tuple[float, float]:
    """Wall seconds of forward and backward, and the loss."""
    given.hidden.grad = given.weight.grad = None
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=low):
        loss = way()
    loss.backward()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, loss.item()


def peak_mib() -> float:
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def memory(arguments: argparse.Namespace, name: str) -> float:
    """Rise of the peak in MiB, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.vocabulary_loss", *sys.argv[1:], "--only", name]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--loss", choices=LOSSES, default="ce+kl")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--only", help="measure one way's memory and print it")
    arguments = parser.parse_args()
    auto = DEVICE.type == "cuda" or fast_bf16()
    low = auto if arguments.precision == "auto" else arguments.precision == "bf16"
    given = Inputs(arguments.tokens, arguments.vocabulary, arguments.width)
    try:
        import liger_kernel  # noqa: F401

        liger = arguments.loss == "kl"
    except ImportError:
        liger = False
    found = ways(given, LOSSES[arguments.loss], arguments.chunks, liger=liger)
    if arguments.only:
        given.hidden.grad, given.weight.grad = torch.zeros_like(given.hidden), torch.zeros_like(given.weight)
        before = peak_mib()
        once(given, found[arguments.only], low=low)
        print(json.dumps(peak_mib() - before))
        return
    seconds: dict[str, list[float]] = {name: [] for name in found}
    values = {}
    for repeat in range(arguments.repeats + 1):  # the first one warms up
        for name, way in found.items():
            taken, values[name] = once(given, way, low=low)
            if repeat:
                seconds[name].append(taken)
    print(
        f"{arguments.tokens} tokens, vocabulary {arguments.vocabulary}, width {arguments.width}, {arguments.loss}, "
        f"{'bf16 autocast' if low else 'float32'}, {DEVICE.type}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {arguments.repeats} repeats\n"
    )
    absolute = " ms |" if DEVICE.type == "cuda" else ""
    print(f"| way |{absolute} times faster than naive | peak memory MiB | naive's memory / this | loss |")
    print("|---|---|---|---|---|" + ("---|" if absolute else ""))
    base = memory(arguments, "naive")
    for name, taken in seconds.items():
        ratios = [naive / own for naive, own in zip(seconds["naive"], taken, strict=True)]
        mib = base if name == "naive" else memory(arguments, name)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        shown = f" {1e3 * statistics.median(taken):.2f} |" if absolute else ""
        print(f"| {name} |{shown} {spread} | {mib:.0f} | {base / max(mib, 1e-9):.1f} | {values[name]:.5f} |")


if __name__ == "__main__":
    main()
