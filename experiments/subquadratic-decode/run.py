"""Decoding with a cache that grows and with states that do not: time per token and bytes against the context.

SmolLM2-135M with its attention, and with every layer converted to each mixer, untrained: neither time nor bytes depend
on the weights. Caches are filled up to a context with random keys and values, states by a prompt of 64 tokens, and then
the time of one more token is measured, models interleaved. Times are ratios to attention's at the shortest context;
bytes are those of the tensors in the cache. Writes results.csv and decode.png.

Attention is measured with three caches. `attention` has transformers' default, DynamicCache, which copies all keys and
values for every token; `attention, in place` the same with room ahead, so that a token writes its own keys and values
and copies nothing; `attention, StaticCache` transformers' own cache with room ahead, which comes with a mask, for which
grouped keys and values are repeated for all query heads at every token.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import time
from pathlib import Path
from typing import Any

from iskd.system.allocator import tune

tune()

import torch  # noqa: E402
import yaml  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache  # noqa: E402
from transformers.cache_utils import DynamicLayer  # noqa: E402

from iskd.models import (  # noqa: E402
    Stack,
    surgery,
)
from iskd.plan import Convert, Record, Spec  # noqa: E402
from iskd.report.figures import figure_of  # noqa: E402
from iskd.report.figures.style import PALETTE, set_heading  # noqa: E402
from iskd.teacher import TeacherSpec, load_teacher  # noqa: E402

HERE = Path(__file__).parent
MIXERS = HERE.parents[1] / "conf" / "mixer"
ATTENTION, IN_PLACE, STATIC = "attention", "attention, in place", "attention, StaticCache"
STYLES = {ATTENTION: "-", IN_PLACE: "--", STATIC: ":"}
COLOURS = [PALETTE[name] for name in ("blue", "vermillion", "green", "orange", "purple", "sky")]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def converted(teacher: PreTrainedModel, name: str) -> PreTrainedModel:
    """A copy with every layer's attention exchanged for the mixer of conf/mixer/NAME.yaml."""
    values: dict[str, Any] = yaml.safe_load((MIXERS / f"{name}.yaml").read_text())
    spec = Spec(values.pop("_target_"), values)
    model = copy.deepcopy(teacher)
    layers = len(Stack(model).layers)
    surgery.apply(model, Record(layers), [Convert(layer, spec) for layer in range(layers)])
    return model.eval().to(DEVICE, DTYPE)


class RoomAhead(DynamicLayer):
    """Keys and values of one layer in memory that is there from the start; what is handed out are views of it."""

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens [B, H, T, K] behind the others; all of them."""
        old = self.get_seq_length()
        if not old:
            shape = (*key_states.shape[:2], self.room, key_states.shape[3])
            self.rows = key_states.new_empty(shape), value_states.new_empty(shape)
            self.is_initialized = True
        end = old + key_states.shape[2]
        for row, states in zip(self.rows, (key_states, value_states), strict=True):
            row[:, :, old:end] = states
        self.keys, self.values = (row[:, :, :end] for row in self.rows)
        return self.keys, self.values


def empty(model: PreTrainedModel, kind: str, room: int) -> Cache:
    """A cache for attention with room for so many tokens, where the kind has to know."""
    if kind == STATIC:
        return StaticCache(config=model.config, max_cache_len=room)
    if kind == IN_PLACE:
        return Cache(layers=[RoomAhead(room) for _ in range(model.config.num_hidden_layers)])
    return DynamicCache()


def filled(model: PreTrainedModel, tokens: int, kind: str = ATTENTION, more: int = 0) -> Cache:
    """The cache of a prompt of so many tokens, `more` to come; attention's keys and values are drawn, not computed."""
    config, cache = model.config, empty(model, kind, tokens + more)
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(
            torch.randn(shape, device=DEVICE, dtype=DTYPE), torch.randn(shape, device=DEVICE, dtype=DTYPE), layer
        )
    return cache


def prompted(model: PreTrainedModel) -> DynamicCache:
    """The cache of a prompt of 64 tokens."""
    cache = DynamicCache()
    model(torch.arange(64, device=DEVICE)[None], past_key_values=cache, use_cache=True)
    return cache


def held(cache: Cache) -> int:
    """Bytes of all tensors of a cache."""

    def tensors(layer: Any) -> list[Tensor]:
        state = getattr(layer, "state", None)
        return [layer.keys, layer.values] if state is None else list(state)

    return sum(tensor.nbytes for layer in cache.layers for tensor in tensors(layer))


def seconds(model: PreTrainedModel, cache: Cache, position: int, steps: int) -> float:
    """Of one token more, mean over `steps` tokens."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter() if DEVICE.type == "cuda" else time.process_time()
    for step in range(steps):
        at = torch.tensor([[position + step]], device=DEVICE)
        model(ids, past_key_values=cache, use_cache=True, position_ids=at)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return ((time.perf_counter() if DEVICE.type == "cuda" else time.process_time()) - start) / steps


@torch.no_grad()
def measure(names: list[str], contexts: list[int], repeats: int, steps: int) -> list[dict[str, Any]]:
    """A row per model and context: time in units of attention's at the first context, and bytes."""
    teacher = load_teacher(TeacherSpec("HuggingFaceTB/SmolLM2-135M-Instruct", bundled="smollm2")).model
    plain = torch.nn.Module.to(teacher, DEVICE, DTYPE)
    rows = []
    for name in names:
        attends = name.startswith(ATTENTION)
        model = plain if attends else converted(teacher, name)
        for context in contexts:
            cache = filled(plain, context, name, repeats * steps) if attends else prompted(model)
            size, times = held(cache), []
            for _ in range(repeats):
                unit = seconds(plain, filled(plain, contexts[0]), contexts[0], steps)  # beside every measurement
                times.append(seconds(model, cache, context, steps) / unit)
            rows.append({"mixer": name, "context": context, "time": statistics.median(times), "bytes": size})
            print(f"{name}, {context}: {rows[-1]['time']:.2f}, {size / 2**20:.1f} MiB", flush=True)
    return rows


def draw(rows: list[dict[str, Any]]) -> None:
    """Two panels against the context: time and bytes, attention with its caches in black."""
    names = list(dict.fromkeys(row["mixer"] for row in rows))
    with figure_of(5.4, width=10.5) as figure:
        panels = figure.subplots(1, 2)
        titles = ("Time of a token / attention's at the shortest context", "Cache or state (MiB)")
        for axes, key, title in zip(panels, ("time", "bytes"), titles, strict=True):
            for index, name in enumerate(names):
                points = [(r["context"], r[key] / (2**20 if key == "bytes" else 1)) for r in rows if r["mixer"] == name]
                color, style = COLOURS[index % len(COLOURS)], ("-", "--", ":")[index // len(COLOURS) % 3]
                look: dict[str, Any] = {"color": color, "linestyle": style}
                if name.startswith(ATTENTION):
                    look = {"color": "black", "linewidth": 2.5, "linestyle": STYLES[name]}
                axes.plot(*zip(*points, strict=True), marker=".", label=name, **look)
            contexts = sorted({row["context"] for row in rows})
            axes.set_xscale("log", base=2)
            axes.set_xticks(contexts, [f"{context:,}" for context in contexts], minor=False)
            axes.set_xlabel("context (tokens)")
            if key == "bytes":
                axes.set_yscale("log", base=10)
                ticks = [1, 10, 100, 1000]
                axes.set_yticks(ticks, [str(tick) for tick in ticks])
            else:
                axes.set_ylim(bottom=0)
            set_heading(axes, title)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=8, fontsize=7)
        figure.savefig(HERE / "decode.png", dpi=120, facecolor="white", metadata={"Software": None})


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mixers", nargs="*", default=sorted(file.stem for file in MIXERS.glob("*.yaml")))
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 512, 2048, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = measure([*STYLES, *arguments.mixers], arguments.contexts, arguments.repeats, arguments.steps)
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "time": round(row["time"], 3)} for row in rows)
    draw(rows)


if __name__ == "__main__":
    main()
