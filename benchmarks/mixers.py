"""The mixers' recurrences on a CPU: chunks against single tokens, and against causal attention of the same size.

    python -m benchmarks.mixers

Two tables of ratios, float32, equal heads for queries and keys: the shared core with every kind of decay and rule, and
the two mixers with a way of their own, `mamba` (its scan) and `sliding` (softmax in a window, linear attention behind
it), between their projections. A ratio is taken within a repeat, of CPU seconds of the process, so that other programs
on the machine count little. Attention is torch's own scaled_dot_product_attention(is_causal=True), which gets its
tensors in the layout it likes, [B, H, T, K].
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.common import in_turns, setting, spread, timed
from iskd.mixers import Context, RecurrentMixer, Streams
from iskd.mixers.mamba import Mamba
from iskd.mixers.ops import Recurrence, recurrence
from iskd.mixers.sliding import Sliding
from iskd.models import Stack

CPU = torch.device("cpu")
CORES = {
    "no decay": (),
    "scalar decay": ("scalar",),
    "vector decay": ("vector",),
    "vector decay, bonus": ("vector", "bonus"),
    "no decay, delta rule": ("delta",),
    "scalar decay, delta rule": ("scalar", "delta"),
    "vector decay, delta rule": ("vector", "delta"),
}
MIXERS: dict[str, type[RecurrentMixer]] = {"mamba": Mamba, "sliding": Sliding}
KINDS = (*CORES, *MIXERS)
GOALS = ("at least 5", "at most 2")
Inputs = dict[str, Tensor]
Way = Callable[..., Tensor]


def inputs(kind: str, tokens: int, heads: int, width: int) -> Inputs:
    """One sequence; keys of length 1 and decays as a fresh GLA, Gated DeltaNet or Mamba has them."""
    shape, needs = (1, tokens, heads, width), CORES.get(kind, ())
    if kind == "mamba":
        found = {name: torch.randn(1, tokens, 1, 16) for name in "qk"}
        step = F.softplus(torch.randn(1, tokens, heads * width) - 4)
        return {**found, "v": torch.randn(1, tokens, heads * width, 1), "beta": step}
    found = {"q": torch.randn(shape), "k": F.normalize(torch.randn(shape), dim=-1), "v": torch.randn(shape)}
    if "scalar" in needs or "vector" in needs:
        found["g"] = F.logsigmoid(torch.randn(shape if "vector" in needs else shape[:3])) / 16
    if "delta" in needs:
        found["beta"] = torch.rand(shape[:3])
    if "bonus" in needs:
        found["bonus"] = torch.randn(shape[2:])
    return found


def ways(kind: str, heads: int, width: int, size: int) -> tuple[Way, Way]:
    """The recurrence in chunks, and token after token."""
    if kind in MIXERS:
        mixer = mixer_of(MIXERS[kind], heads, width, size)
        return partial(mixed, mixer, tokens=None), partial(mixed, mixer, tokens=1)

    def run(function: Callable[[Recurrence], tuple[Tensor, Tensor]], **given: Tensor) -> Tensor:
        return function(Recurrence(**given))[0]  # type: ignore[arg-type]

    return partial(run, partial(recurrence.chunk, size=size)), partial(run, recurrence.step)


def mixer_of(kind: type[RecurrentMixer], heads: int, width: int, size: int) -> RecurrentMixer:
    """A fresh mixer for as many key-value heads as query heads."""
    sizes = {"hidden_size": heads * width, "num_attention_heads": heads, "num_key_value_heads": heads}
    config = LlamaConfig(**sizes, head_dim=width, intermediate_size=64, num_hidden_layers=1, vocab_size=32)
    stack = Stack(AutoModelForCausalLM.from_config(config))
    return kind.from_attention(stack.layers[0].get_submodule(stack.family.attn), stack, chunk=size).requires_grad_(
        False
    )


def mixed(mixer: RecurrentMixer, *, tokens: int | None, **given: Tensor) -> Tensor:
    """What the mixer makes of queries, keys and values, so many tokens at a time (None = all), as in decoding."""
    extra = () if isinstance(mixer, Mamba) else (given["k"].new_ones(given["k"].shape[:2]),)
    total, outputs, state, past = given["k"].shape[1], [], None, []
    for start in range(0, total, tokens or total):
        piece = slice(start, start + (tokens or total))
        streams = Streams(**{name: x[:, piece] for name, x in given.items()}, extra=tuple(x[:, piece] for x in extra))
        context = Context(None, torch.arange(total)[None, piece], past=past)
        o, state = mixer.mix(streams, context, state)
        outputs.append(o)
        past = context.last
    return torch.cat(outputs, dim=1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def seconds(way: Way, given: Inputs, _: int) -> tuple[float, float]:
    """CPU seconds of the forward pass without gradients, and of forward and backward."""

    def forward() -> None:
        with torch.no_grad():
            way(**given)

    def both() -> None:
        leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
        o = way(**leaves)
        torch.autograd.grad(o, [*leaves.values()], torch.ones_like(o))

    return timed(CPU, forward)[0].cpu, timed(CPU, both)[0].cpu


def table(title: str, goal: str, rows: Mapping[str, tuple[Sequence[Any], Sequence[Any]]]) -> None:
    """Of every kind the ratios of the first to the second."""
    print(f"\n| {title} | forward | forward + backward | goal |\n|---|---|---|---|")
    for name, (above, below) in rows.items():
        cells = [spread([one[way] for one in above], [one[way] for one in below]) for way in (0, 1)]
        print(f"| {name} | {' | '.join(cells)} | {goal} |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64, help="of a head's keys and values")
    parser.add_argument("--size", type=int, default=64, help="tokens per chunk")
    parser.add_argument("--tokens", type=int, nargs=2, default=[1024, 2048], help="of the two tables")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = {"heads": options.heads, "width": options.width}
    found = {kind: ways(kind, **sizes, size=options.size) for kind in options.kinds}
    print(
        f"{setting(CPU)}; float32, batch 1, {options.heads} heads, K = V = {options.width}, chunks of {options.size}, "
        f"median of {options.repeats} (least-greatest)"
    )
    short, long = options.tokens
    given = {kind: inputs(kind, short, **sizes) for kind in found}
    turns = {
        f"{kind} {name}": partial(seconds, way, given[kind])
        for kind, pair in found.items()
        for name, way in zip(("chunk", "step"), pair, strict=True)
    }
    taken = in_turns(turns, options.repeats)
    rows = {kind: (taken[f"{kind} step"], taken[f"{kind} chunk"]) for kind in found}
    table(f"{short} tokens: times faster than step", GOALS[0], rows)

    plain = {name: torch.randn(1, options.heads, long, options.width) for name in "qkv"}
    turns = {kind: partial(seconds, chunk, inputs(kind, long, **sizes)) for kind, (chunk, _) in found.items()}
    taken = in_turns({"attention": partial(seconds, attention, plain), **turns}, options.repeats)
    table(
        f"{long} tokens: time / time of causal attention",
        GOALS[1],
        {kind: (taken[kind], taken["attention"]) for kind in found},
    )


if __name__ == "__main__":
    main()
