"""Efficiency, measured and not computed: latency of prefill and decode, memory, and the bytes of the KV cache.

One sequence, greedy decoding, the cache that the model itself makes. The two models of a comparison take turns within
every repeat, so that a machine that slows down slows both; a first pass of each, which warms up and during which memory
is watched, is not timed. Times are medians. On a CPU they hold for this machine only, and ratios for machines like it.

What a token costs after a long context is the point of a converted student, and reading such a context takes a CPU
minutes. Where there is no time for that, a short prompt is read and its cache lengthened
(`iskd.models.cache.lengthen`).
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from iskd.evaluation.results import AtContext, Efficiency, Measured
from iskd.models import Stack, sharding, surgery
from iskd.models.cache import cache_bytes, cache_held_bytes, lengthen
from iskd.models.weights import served
from iskd.plan.run_files import EFFICIENCY_FILE
from iskd.system import machine, write_whole
from iskd.system.faults import is_out_of_memory
from iskd.system.machine import clock

CONTEXTS = (128, 1024, 4096, 8192)
_NO_MEMORY = "not enough memory"
_SHORT = 64  # tokens of the prompt whose cache is lengthened
Progress = Callable[[str, int, int], None]
"""Told what is under way, how many passes are done, and of how many."""


def measure(
    models: Mapping[str, PreTrainedModel],
    *,
    contexts: Sequence[int] = CONTEXTS,
    decode_tokens: int = 32,
    repeats: int = 5,
    seconds: float | None = None,
    dtype: torch.dtype | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Efficiency:
    """Size, latency and memory of models side by side, where they lie.

    Args:
        models: `teacher` and `student`, or one of them: whole models, not in shards, on one device. Modes, weights and
            random numbers stay as they are.
        contexts: lengths of the prompt in tokens.
        decode_tokens: tokens decoded after the prompt, over which the time per token is the mean.
        repeats: of which the median is taken; at least one, the others as far as `seconds` go.
        seconds: time for all of it, roughly; what does not fit is left out, in this order: further repeats, the
            reading of long prompts, long contexts. The shortest context is always measured. None = no limit.
        dtype: measure copies in this dtype, e.g. bfloat16 as they would be served; None = as they are.
        batch: sequences at a time; times are of all of them, and a token is one of each.
        progress: told how far it is.

    Returns:
        The machine (`iskd.system.machine.describe`), and of each model its size and what it costs by context. A
        context's `prefill_seconds` is nan where the cache was filled and no such prompt read; `left_out` says why
        others are missing: too long for the model (`Stack.limit`), for the time or for the memory.

    Raises:
        ValueError: a context, `decode_tokens`, `repeats` or `batch` below 1, a model in shards, models on different
            devices, or of another name.
    """
    places = {name: _device(model) for name, model in models.items()}
    if len(set(places.values())) > 1:
        where = ", ".join(f"the {name} lies on {place}" for name, place in places.items())
        raise ValueError(f"{where}: put both on one device to compare them")
    if other := models.keys() - {"teacher", "student"}:
        raise ValueError(f"efficiency is that of a teacher and a student, got one named {min(other)!r}")
    facts = machine.describe(next(iter(places.values())))
    passes = _Passes(decode_tokens, repeats, batch, progress)
    copies = {name: served(model, dtype) for name, model in models.items()}
    # as they would be served: a caller's autocast would cast frozen weights anew in every pass
    with torch.autocast(next(iter(places.values())).type, enabled=False):
        return Efficiency(facts, **_side_by_side(copies, contexts, passes, seconds))


def write(run_dir: Path, found: Efficiency) -> Path:
    """Put what `measure` found into `run_dir` as efficiency.json."""
    return write_whole(run_dir / EFFICIENCY_FILE, json.dumps(found.to_json(), indent=1))


# ---- the measurement -------------------------------------------------------------------------------------------------


@dataclass
class _Timed:
    """One model at one context; `prefill` stays empty where the cache is filled and no prompt of that length read."""

    rise: int = 0
    cache: tuple[int, int] = (0, 0)
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def summary(self, context: int, weights: int) -> AtContext:
        return AtContext(
            context,
            prefill_seconds=statistics.median(self.prefill) if self.prefill else math.nan,
            decode_seconds_per_token=statistics.median(self.decode),
            cache_bytes=self.cache[0],
            cache_held_bytes=self.cache[1],
            peak_memory_bytes=weights + self.rise,
            repeats=len(self.decode),
        )


@dataclass(frozen=True)
class _Passes:
    """What is asked of a model at every context."""

    decode_tokens: int
    repeats: int
    batch: int
    progress: Progress | None


@dataclass
class _Clock:
    """The time that is left, and what passes will take, judged by those before.

    A context takes at least two passes of every model. The time for decoding after all longer contexts is kept back
    from the reading of prompts, which takes ever longer and says less.
    """

    deadline: float
    context: int = 0  # the longest prompt that was read
    reading: float = 0.0  # seconds for it, all models
    decoding: float = 0.0  # seconds of all else in a pass at the latest context, all models

    def allows(self, context: int, *, reading: bool, longer: int = 0) -> bool:
        """Whether there is time for a context, its prompt read or not, and then for `longer` more, theirs not read."""
        if not self.context:
            return True
        ahead = 2 * (1 + longer) * self.decoding
        if reading:
            # at least as many times as long as the context is longer
            ahead += 2 * self.reading * context / self.context
        return time.perf_counter() + ahead <= self.deadline

    def share(self, contexts: int) -> float:
        """When the first of so many contexts, which share what is left alike, should make no further repeat."""
        now = time.perf_counter()
        return now + (self.deadline - now) / contexts

    def learn(self, context: int, reading: float | None, decoding: float) -> None:
        """Take note of a pass of all models."""
        self.decoding = decoding
        if reading is not None:
            self.context, self.reading = context, reading


@torch.no_grad()
def _side_by_side(
    models: Mapping[str, PreTrainedModel],
    contexts: Sequence[int],
    passes: _Passes,
    seconds: float | None,
) -> dict[str, Measured]:
    asked = {"contexts": min(contexts, default=0), "decode_tokens": passes.decode_tokens, "repeats": passes.repeats}
    asked["batch"] = passes.batch
    for key, least in asked.items():
        if least < 1:
            raise ValueError(f"efficiency needs {key} of at least 1, got {least}")
    left = _Clock(time.perf_counter() + (math.inf if seconds is None else seconds))
    facts = {name: _facts(model) for name, model in models.items()}
    found: dict[str, list[AtContext]] = {name: [] for name in models}
    left_out: dict[str, dict[int, str]] = {name: {} for name in models}
    lengths, full = sorted(set(contexts)), False
    with _evaluating(models.values()):
        for index, context in enumerate(lengths):
            longer = len(lengths) - index - 1
            late = "" if left.allows(context, reading=False) else f"no time left of {seconds:g} s"
            reasons = {
                name: _NO_MEMORY if full else _too_long(model, context, passes.decode_tokens) or late
                for name, model in models.items()
            }
            taking = {name: model for name, model in models.items() if not reasons[name]}
            rows = None
            if taking:
                reads, until = left.allows(context, reading=True, longer=longer), left.share(longer + 1)
                try:
                    rows, reading, decoding = _rounds(taking, context, passes, reads, until)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    full = True
                else:
                    left.learn(context, reading, decoding)
            for name in models:
                if rows and name in rows:
                    found[name].append(rows[name])
                else:
                    left_out[name][context] = reasons[name] or _NO_MEMORY
    return {
        name: replace(
            known,
            peak_memory_bytes=max((at.peak_memory_bytes for at in found[name]), default=known.bytes),
            contexts=tuple(found[name]),
            left_out=left_out[name],
        )
        for name, known in facts.items()
    }


def _rounds(
    models: Mapping[str, PreTrainedModel], context: int, passes: _Passes, reads: bool, until: float
) -> tuple[dict[str, AtContext], float | None, float]:
    """A row per model, the seconds of reading the prompt, and those of all else in a pass of all of them."""
    at = {name: _Timed() for name in models}
    total, done = len(models) * (1 + passes.repeats), count()

    def tell() -> None:
        if passes.progress is not None:
            passes.progress(f"measuring efficiency at {context:,} tokens, passes", next(done), total)

    start = time.perf_counter()
    for name, model in models.items():
        tell()
        with machine.PeakMemory(_device(model)) as memory:
            *_, cache = _use(model, context, passes, reads)
        at[name].rise, at[name].cache = memory.rise, cache
    one_round, order = time.perf_counter() - start, list(models)
    for repeat in range(passes.repeats):
        if repeat and time.perf_counter() + one_round > until:
            break
        start = time.perf_counter()
        for name in order if repeat % 2 else reversed(order):
            tell()
            prefill, decode, _ = _use(models[name], context, passes, reads)
            at[name].prefill += [prefill] if reads else []
            at[name].decode.append(decode)
        one_round = time.perf_counter() - start
    reading = sum(entry.prefill[-1] for entry in at.values()) if reads else None
    return (
        {name: at[name].summary(context, _weight_bytes(model)) for name, model in models.items()},
        reading,
        one_round - (reading or 0.0),
    )


def _use(model: PreTrainedModel, context: int, passes: _Passes, reads: bool) -> tuple[float, float, tuple[int, int]]:
    """Seconds of a prompt, seconds per token decoded after it, and the bytes of the cache between the two.

    Unless it `reads` the prompt, that is a short one, and the cache is lengthened to the context.
    """
    stack, device = Stack(model), _device(model)
    generator = torch.Generator().manual_seed(0)
    length = context if reads else min(context, _SHORT)
    ids = torch.randint(int(model.config.vocab_size), (passes.batch, length), generator=generator).to(device)
    start = clock(device)
    output = stack.base(input_ids=ids, use_cache=True)
    token = _next(stack, output.last_hidden_state)
    prefill = clock(device) - start
    cache = output.past_key_values
    lengthen(cache, context - length)
    held = cache_bytes(cache), cache_held_bytes(cache)
    start = clock(device)
    for _ in range(passes.decode_tokens):
        output = stack.base(input_ids=token, past_key_values=cache, use_cache=True)
        token = _next(stack, output.last_hidden_state)
    return prefill, (clock(device) - start) / passes.decode_tokens, held


def _next(stack: Stack, last_BTD: Tensor) -> Tensor:
    """The likeliest next token [B, 1]; of a prompt only the last state passes the head, as in generation."""
    weight_VD, bias_V = stack.head
    return F.linear(last_BTD[:, -1:].to(weight_VD.dtype), weight_VD, bias_V).argmax(-1)


def _too_long(model: PreTrainedModel, context: int, decode_tokens: int) -> str:
    """Why a model cannot take a context, or ""; a table of learned positions ends for decoded tokens too."""
    stack = Stack(model)
    needed, limit = context + (decode_tokens if stack.family.positions else 0), stack.limit
    return "" if limit is None or needed <= limit else f"{needed} tokens are more than {stack.bound}"


def _facts(model: PreTrainedModel) -> Measured:
    if sharding.is_sharded(model):
        raise ValueError("efficiency is that of a whole model, and this one is in shards; gather it first")
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return Measured(surgery.parameters(model), _weight_bytes(model), dtype)


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _device(model: PreTrainedModel) -> torch.device:
    return next(model.parameters()).device


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
