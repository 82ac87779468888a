"""What a model costs when it is used: latency of prefill and decode, memory, and the cache, measured and not computed.

One sequence, greedy decoding, the cache that the model itself makes. The two models of a comparison take turns within
every repeat, so that a machine that slows down slows both; a first pass of each, which warms up and during which memory
is watched, is not timed. Times are medians. On a CPU they hold for this machine only, and ratios for machines like it.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from iskd import machine, sharding, surgery
from iskd.arch import Stack
from iskd.module import clock

CONTEXTS = (128, 1024, 4096, 8192)
FILE = "efficiency.json"
Progress = Callable[[str, int, int], None]
"""Told what is under way, how many passes are done, and of how many."""


def measure(
    model: PreTrainedModel,
    *,
    contexts: Sequence[int] = CONTEXTS,
    decode_tokens: int = 32,
    repeats: int = 5,
    seconds: float | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Size, latency and memory of one model, where it lies.

    Args:
        model: a whole model, not in shards; mode, weights and random numbers stay as they are.
        contexts: lengths of the prompt in tokens.
        decode_tokens: tokens decoded after the prompt, over which the time per token is the mean.
        repeats: of which the median is taken; at least one, the others as far as `seconds` go.
        seconds: time for all of it, roughly; longer contexts and further repeats are left out. The shortest context is
            always measured. None = no limit.
        dtype: measure a copy in this dtype, e.g. bfloat16 as it would be served; None = as it is.
        progress: told how far it is.

    Returns:
        `params`, `bytes` (of the weights, tied ones once), `dtype`, `peak_memory_bytes` (the weights and what the
        costliest context takes on top), `contexts` and `left_out`. A context has `context`, `prefill_seconds`,
        `decode_seconds_per_token`, `cache_bytes` after the prompt, `cache_held_bytes` (the memory behind these, more
        where they are views), `peak_memory_bytes` and `repeats`; `left_out` says why, by length.

    Raises:
        ValueError: a context, `decode_tokens` or `repeats` below 1, or a model in shards.
    """
    return _side_by_side({"model": _as(model, dtype)}, contexts, decode_tokens, repeats, seconds, progress)["model"]


def compare(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    *,
    contexts: Sequence[int] = CONTEXTS,
    decode_tokens: int = 32,
    repeats: int = 5,
    seconds: float | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Both models side by side; arguments as in `measure`, `seconds` for the two together.

    Returns:
        `machine` (`iskd.machine.describe`), `teacher` and `student`, each as from `measure`.

    Raises:
        ValueError: as in `measure`, or the models lie on different devices.
    """
    places = _device(teacher), _device(student)
    if places[0] != places[1]:
        raise ValueError(
            f"the teacher lies on {places[0]} and the student on {places[1]}: put both on one device to compare them"
        )
    models = {"teacher": _as(teacher, dtype), "student": _as(student, dtype)}
    facts = machine.describe(places[0])
    return {"machine": facts, **_side_by_side(models, contexts, decode_tokens, repeats, seconds, progress)}


def write(run_dir: Path, result: Mapping[str, Any]) -> Path:
    """Put a comparison into `run_dir` as efficiency.json."""
    path = run_dir / FILE
    path.write_text(json.dumps(result, indent=1))
    return path


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors of a cache: keys and values of attention, states of mixers."""
    return sum(tensor.nbytes for tensor in _tensors(cache))


def cache_held_bytes(cache: Any) -> int:
    """Bytes of the memory behind a cache's tensors: a view keeps all of what it was cut from."""
    storages = (tensor.untyped_storage() for tensor in _tensors(cache))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(cache: Any) -> Iterator[Tensor]:
    def inside(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from inside(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from inside(item)

    return inside([vars(layer) for layer in cache.layers])


# ---- the measurement -------------------------------------------------------------------------------------------------


@dataclass
class _AtContext:
    """One model at one context."""

    context: int
    weights: int
    rise: int = 0
    cache: tuple[int, int] = (0, 0)
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        return {
            "context": self.context,
            "prefill_seconds": statistics.median(self.prefill),
            "decode_seconds_per_token": statistics.median(self.decode),
            "cache_bytes": self.cache[0],
            "cache_held_bytes": self.cache[1],
            "peak_memory_bytes": self.weights + self.rise,
            "repeats": len(self.prefill),
        }


@torch.no_grad()
def _side_by_side(
    models: Mapping[str, PreTrainedModel],
    contexts: Sequence[int],
    decode_tokens: int,
    repeats: int,
    seconds: float | None,
    progress: Progress | None,
) -> dict[str, Any]:
    for key, least in {
        "contexts": min(contexts, default=0),
        "decode_tokens": decode_tokens,
        "repeats": repeats,
    }.items():
        if least < 1:
            raise ValueError(f"efficiency needs {key} of at least 1, got {least}")
    deadline = time.perf_counter() + (math.inf if seconds is None else seconds)
    found = {name: _facts(model) for name, model in models.items()}
    one_round, before, lengths = 0.0, 0, sorted(set(contexts))
    with _evaluating(models.values()):
        for index, context in enumerate(lengths):
            if progress is not None:
                progress("measuring efficiency", index, len(lengths))
            taking = dict(models)
            for name, model in models.items():
                reason = _too_long(model, context, decode_tokens)
                # at least as many times as long as the context is longer; a warm-up and one repeat
                if not reason and before and time.perf_counter() + 2 * one_round * context / before > deadline:
                    reason = f"no time left of {seconds:g} s"
                if reason:
                    found[name]["left_out"][str(context)] = reason
                    del taking[name]
            if taking:
                rows, one_round = _rounds(taking, context, decode_tokens, repeats, deadline)
                before = context
                for name, row in rows.items():
                    found[name]["contexts"].append(row)
    for facts in found.values():
        peaks = [row["peak_memory_bytes"] for row in facts["contexts"]]
        facts["peak_memory_bytes"] = max(peaks, default=facts["bytes"])
    return found


def _rounds(
    models: Mapping[str, PreTrainedModel], context: int, decode_tokens: int, repeats: int, deadline: float
) -> tuple[dict[str, dict[str, Any]], float]:
    """A row per model, and the seconds of one pass of all of them."""
    at = {name: _AtContext(context, _weight_bytes(model)) for name, model in models.items()}
    start = time.perf_counter()
    for name, model in models.items():
        with machine.PeakMemory(_device(model)) as memory:
            *_, cache = _use(model, context, decode_tokens)
        at[name].rise, at[name].cache = memory.rise, cache
    one_round, order = time.perf_counter() - start, list(models)
    for repeat in range(repeats):
        if repeat and time.perf_counter() + one_round > deadline:
            break
        start = time.perf_counter()
        for name in order if repeat % 2 else reversed(order):
            prefill, decode, _ = _use(models[name], context, decode_tokens)
            at[name].prefill.append(prefill)
            at[name].decode.append(decode)
        one_round = time.perf_counter() - start
    return {name: entry.row() for name, entry in at.items()}, one_round


def _use(model: PreTrainedModel, context: int, decode_tokens: int) -> tuple[float, float, tuple[int, int]]:
    """Seconds of a prompt, seconds per token decoded after it, and the bytes of the cache between the two."""
    stack, device = Stack(model), _device(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(int(model.config.vocab_size), (1, context), generator=generator).to(device)
    start = clock(device)
    output = stack.base(input_ids=ids, use_cache=True)
    token = _next(stack, output.last_hidden_state)
    prefill = clock(device) - start
    cache = output.past_key_values
    held = cache_bytes(cache), cache_held_bytes(cache)
    start = clock(device)
    for _ in range(decode_tokens):
        output = stack.base(input_ids=token, past_key_values=cache, use_cache=True)
        token = _next(stack, output.last_hidden_state)
    return prefill, (clock(device) - start) / decode_tokens, held


def _next(stack: Stack, last_BTD: Tensor) -> Tensor:
    """The likeliest next token [B, 1]; of a prompt only the last state passes the head, as in generation."""
    weight_VD, bias_V = stack.head
    return F.linear(last_BTD[:, -1:].to(weight_VD.dtype), weight_VD, bias_V).argmax(-1)


def _too_long(model: PreTrainedModel, context: int, decode_tokens: int) -> str:
    """Why a model cannot take a context, or ""; a table of learned positions ends for decoded tokens too."""
    stack = Stack(model)
    needed = context + (decode_tokens if stack.family.positions else 0)
    if stack.context is None or needed <= stack.context:
        return ""
    return f"needs {needed:,} positions, the model has {stack.context:,}"


def _facts(model: PreTrainedModel) -> dict[str, Any]:
    if sharding.is_sharded(model):
        raise ValueError("efficiency is that of a whole model, and this one is in shards; gather it first")
    weights = {"params": surgery.parameters(model), "bytes": _weight_bytes(model)}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {**weights, "dtype": dtype, "peak_memory_bytes": 0, "contexts": [], "left_out": {}}


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _device(model: PreTrainedModel) -> torch.device:
    return next(model.parameters()).device


def _as(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model itself, or a copy in another dtype."""
    if dtype is None or all(parameter.dtype == dtype for parameter in model.parameters()):
        return model
    other = copy.deepcopy(model)
    nn.Module.to(other, dtype)
    return other


@contextmanager
def _evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode, and every module's own mode again afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# ---- the table -------------------------------------------------------------------------------------------------------


def efficiency_table(result: Mapping[str, Any]) -> Table:
    """Teacher, student and their ratio, for the terminal; `result` is from `compare`."""
    facts, models = result["machine"], (result["teacher"], result["student"])
    table = Table(title="efficiency, measured")
    for head in ("", "teacher", "student", "student / teacher"):
        table.add_column(head, justify="right" if head else "left")

    def add(name: str, values: Sequence[float | None], scale: float, digits: int) -> None:
        cells = ["-" if value is None else f"{value * scale:,.{digits}f}" for value in values]
        teacher, student = values
        table.add_row(name, *cells, f"{student / teacher:.2f}" if teacher and student is not None else "-")

    for key, name, scale in (
        ("params", "parameters (M)", 1e-6),
        ("bytes", "weights (MiB)", 2**-20),
        ("peak_memory_bytes", "peak memory (MiB)", 2**-20),
    ):
        add(name, [model[key] for model in models], scale, 1)
    rows = [{row["context"]: row for row in model["contexts"]} for model in models]
    for context in sorted({*rows[0], *rows[1]}):
        for key, name, scale in (
            ("prefill_seconds", "prefill of {:,} tokens (ms)", 1e3),
            ("decode_seconds_per_token", "a token after {:,} (ms)", 1e3),
            ("cache_bytes", "cache after {:,} (MiB)", 2**-20),
        ):
            values = [row[context][key] if context in row else None for row in rows]
            add(name.format(context), values, scale, 2)
    left = {f"{context}: {why}" for model in models for context, why in model["left_out"].items()}
    where = (
        f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {models[1]['dtype']}; {facts['note']}"
    )
    table.caption = "; ".join([where, *sorted(left)])
    return table
