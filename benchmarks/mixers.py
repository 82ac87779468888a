"""The mixers' recurrence on a CPU: chunks against single tokens, and against causal attention of the same size.

Two tables of ratios, every kind of decay and rule, float32, equal heads for queries and keys. The ways of a table run
one after the other within each repeat; a ratio is the median over the repeats of the ratio within one. Times are CPU
seconds of the process, so that other programs on the machine count little. Attention is torch's own
scaled_dot_product_attention(is_causal=True), which gets its tensors in the layout it likes, [B, H, T, K].
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from iskd.allocator import tune

tune()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from iskd.mixers import core  # noqa: E402

KINDS = {
    "no decay": (),
    "scalar decay": ("scalar",),
    "vector decay": ("vector",),
    "vector decay, bonus": ("vector", "bonus"),
    "no decay, delta rule": ("delta",),
    "scalar decay, delta rule": ("scalar", "delta"),
    "vector decay, delta rule": ("vector", "delta"),
}
Inputs = dict[str, Tensor]
Seconds = dict[str, list[tuple[float, float]]]


def inputs(parts: tuple[str, ...], tokens: int, heads: int, width: int) -> Inputs:
    """One sequence; keys of length 1 and decays as a fresh GLA or Gated DeltaNet has them."""
    shape = (1, tokens, heads, width)
    found = {name: torch.randn(shape) for name in ("q_BTHK", "v_BTGV")}
    found["k_BTGK"] = F.normalize(torch.randn(shape), dim=-1)
    if "scalar" in parts or "vector" in parts:
        found["g"] = F.logsigmoid(torch.randn(shape if "vector" in parts else shape[:3])) / 16
    if "delta" in parts:
        found["beta_BTG"] = torch.rand(shape[:3])
    if "bonus" in parts:
        found["bonus_GK"] = torch.randn(shape[2:])
    return found


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    return (F.scaled_dot_product_attention(q, k, v, is_causal=True),)


def timed(function: Callable[..., tuple[Tensor, ...]], given: Inputs) -> tuple[float, float]:
    """CPU seconds of the forward pass without gradients, and of forward and backward."""
    with torch.no_grad():
        start = time.process_time()
        function(**given)
        forward = time.process_time() - start
    given = {name: x.detach().requires_grad_() for name, x in given.items()}
    start = time.process_time()
    o = function(**given)[0]
    torch.autograd.grad(o, [*given.values()], torch.ones_like(o))
    return forward, time.process_time() - start


def interleaved(ways: dict[str, Callable[[], tuple[float, float]]], repeats: int) -> Seconds:
    """Every way once per repeat; the first repeat warms up and is not kept."""
    seconds: Seconds = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            pair = way()
            if repeat:
                seconds[name].append(pair)
    return seconds


def ratio(seconds: Seconds, above: str, below: str, part: int) -> float:
    pairs = zip(seconds[above], seconds[below], strict=True)
    return statistics.median(one[part] / other[part] for one, other in pairs)


def table(title: str, rows: dict[str, tuple[float, float]]) -> None:
    print(f"\n| {title} | forward | forward + backward |\n|---|---|---|")
    for name, (forward, both) in rows.items():
        print(f"| {name} | {forward:.2f} | {both:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64, help="of a head's keys and values")
    parser.add_argument("--size", type=int, default=64, help="tokens per chunk")
    parser.add_argument("--tokens", type=int, nargs=2, default=[1024, 2048], help="of the two tables")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sized: dict[str, Any] = {"heads": options.heads, "width": options.width}
    by_chunks = partial(core.chunk, size=options.size)
    print(
        f"torch {torch.__version__}, {options.threads} thread(s), float32, batch 1, {options.heads} heads, "
        f"K = V = {options.width}, chunks of {options.size}, median of {options.repeats}"
    )

    short, long = options.tokens
    given = {name: inputs(parts, short, **sized) for name, parts in KINDS.items()}
    ways = {name: partial(timed, by_chunks, x) for name, x in given.items()}
    ways |= {f"{name}, step": partial(timed, core.step, x) for name, x in given.items()}
    seconds = interleaved(ways, options.repeats)
    rows = {
        name: (ratio(seconds, f"{name}, step", name, 0), ratio(seconds, f"{name}, step", name, 1)) for name in KINDS
    }
    table(f"{short} tokens: times faster than step", rows)

    qkv = {name: torch.randn(1, options.heads, long, options.width) for name in "qkv"}
    ways = {name: partial(timed, by_chunks, inputs(parts, long, **sized)) for name, parts in KINDS.items()}
    seconds = interleaved({"attention": partial(timed, attention, qkv), **ways}, options.repeats)
    rows = {name: (ratio(seconds, name, "attention", 0), ratio(seconds, name, "attention", 1)) for name in KINDS}
    table(f"{long} tokens: time / time of causal attention", rows)


if __name__ == "__main__":
    main()
