"""Zero-shot accuracy of a causal language model on tasks, from log-likelihoods of continuations.

Continuations are scored as in lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.12608602): context and continuation
are encoded as one text and cut at the length of the encoded context; `acc` picks the continuation of the highest sum of
log p, `acc_norm` that of the highest sum per character. A context too long for the model (`Stack.limit`) loses its
beginning.

Whether greedy decoding would give a continuation is read off the same pass: up to its first mistake, decoding sees the
very tokens that scoring feeds. So scores of the generation type, which lose most when layers go, cost no generation.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iskd.data import Framing, framing_of
from iskd.evaluation.batches import Batch, Stems, Text, stems
from iskd.evaluation.bootstrap import interval, resampled_means, resampled_together
from iskd.evaluation.tasks import Item
from iskd.evaluation.tasks.aggregates import Aggregate
from iskd.models import Stack, autocast_head, cap_logits, project, scoring
from iskd.models.cache import forked

log = logging.getLogger(__name__)

BATCH_TOKENS = 4096
METRICS = ("acc", "acc_norm", "acc_token", "log_p", "led", "hits")
"""What `judge` finds; `TaskResult` says what they are."""
HEAD_CHUNK = 256  # positions whose logits exist at a time
_RESAMPLES = 100  # behind the standard error of what is no mean

Pairs = Sequence[tuple[str, str]]
Step = Callable[[int, int], None]
"""Told how much is done, and of how much."""


@dataclass(frozen=True, eq=False)
class Likelihoods:
    """What a model says about N continuations, on the CPU.

    Attributes:
        log_p: sum over the continuation's tokens of log p, in nats [N], float64.
        led: how many tokens of the continuation greedy decoding gives before its first mistake [N].
        tokens: length of the continuation in tokens [N].
        characters: its length in characters without the space in front [N].
        hits: how many of its tokens are the likeliest after the right ones before them [N].
    """

    log_p: Tensor
    led: Tensor
    tokens: Tensor
    characters: Tensor
    hits: Tensor

    @property
    def greedy(self) -> Tensor:
        """Whether greedy decoding gives the whole continuation [N]."""
        return self.led == self.tokens


@dataclass(frozen=True, eq=False)
class TaskResult:
    """Scores of a model by item.

    Attributes:
        ids: the items' ids.
        values: by metric, one number per item [N] in float32: `acc`, `acc_norm` and `acc_token` (by the mean over all
            characters, over all tokens), 1 = right; `log_p` of the right
            continuation in nats; `led`, the share of its tokens that greedy decoding gives before its first mistake;
            `hits`, the share that are the likeliest after the right ones before them.
        wholes: metrics that are a number of all items and no mean over them.
    """

    ids: tuple[str, ...]
    values: dict[str, Tensor]
    wholes: Mapping[str, Aggregate] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics."""
        return (*self.values, *self.wholes)

    def of(self, metric: str) -> Tensor:
        """Values [N] of a metric. Raises ValueError for an unknown one, and for one that items do not have."""
        if metric not in self.values:
            raise ValueError(f"unknown metric {metric!r}: choose one of {', '.join(self.values)}")
        return self.values[metric]

    def mean(self, metric: str = "acc") -> float:
        """The metric of all items, which is the mean over them unless it is one of `wholes`."""
        return self.wholes[metric].whole() if metric in self.wholes else self.of(metric).double().mean().item()

    def stderr(self, metric: str = "acc") -> float:
        """Standard error of the mean; nan for a single item. Of `wholes` the deviation over resamples of the items."""
        if metric in self.wholes:
            drawn = resampled_together([self.wholes[metric]], _RESAMPLES, 0)[1:, 0]
            known = drawn[drawn.isfinite()]
            return known.std().item() if len(known) > 1 and len(self.ids) > 1 else float("nan")
        values = self.of(metric).double()
        return float("nan") if len(values) < 2 else (values.std() / len(values) ** 0.5).item()


@dataclass(frozen=True)
class Paired:
    """Mean difference of two models on the same items, with a bootstrap confidence interval."""

    difference: float
    low: float
    high: float


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    batch_tokens: int = BATCH_TOKENS,
    step: Step | None = None,
    frame: Framing | None = None,
    first_given: bool = False,
) -> TaskResult:
    """Scores of a model on items; for `first_given` see `by_branch`.

    Raises ValueError as `log_likelihoods` does, and when there is no item.
    """
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "step": step, "frame": frame}
    return judge(items, log_likelihoods(model, tokenizer, pairs_of(items), first_given=first_given, **options))


def paired(
    a: TaskResult, b: TaskResult, metric: str = "acc", *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Paired:
    """Difference `a` minus `b` on the same items, with the percentile interval of a bootstrap over items.

    Raises:
        ValueError: the two do not have the same items in the same order, or an unknown metric.
    """
    if a.ids != b.ids:
        raise ValueError(
            f"a paired difference needs the same items in the same order, got {len(a.ids)} and {len(b.ids)}"
        )
    if metric in a.wholes:
        both = resampled_together([a.wholes[metric], b.wholes[metric]], resamples, seed)
        gaps = both[:, 0] - both[:, 1]
        known = gaps[1:][gaps[1:].isfinite()]
        return Paired(gaps[0].item(), *(interval(known, level).tolist() if len(known) else (math.nan, math.nan)))
    differences = (a.of(metric) - b.of(metric)).double()
    low, high = interval(resampled_means(differences, resamples, seed), level).tolist()
    return Paired(differences.mean().item(), low, high)


def pairs_of(items: Sequence[Item]) -> list[tuple[str, str]]:
    """(context, continuation) of all choices of all items, in order."""
    return [pair for item in items for pair in item.pairs]


def judge(items: Sequence[Item], found: Likelihoods) -> TaskResult:
    """Scores that follow from the likelihoods of `pairs_of(items)`; of equal choices the first counts.

    Raises:
        ValueError: an item has a choice whose likelihood is nan, or none that is possible at all.
    """
    log_p = found.log_p.tolist()
    norm = (found.log_p / found.characters).tolist()
    by_token = (found.log_p / found.tokens).tolist()
    greedy, led, hits = found.greedy.tolist(), *((one / found.tokens).tolist() for one in (found.led, found.hits))
    rows, start = [], 0
    for item in items:  # its choices are start..end-1
        end, gold = start + len(item.pairs), start + item.gold
        if any(map(math.isnan, log_p[start:end])) or not math.isfinite(max(log_p[start:end])):
            raise ValueError(
                f"item {item.id}: the model gives {', '.join(f'{value:g}' for value in log_p[start:end])} for its "
                "choices, among which none is best: its weights are broken"
            )
        if end - start == 1:  # nothing to choose from: right is what greedy decoding gives
            right = [greedy[start]] * 3
        else:
            right = [max(range(start, end), key=values.__getitem__) == gold for values in (log_p, norm, by_token)]
        rows.append([*map(float, right), log_p[gold], led[gold], hits[gold]])
        start = end
    columns = torch.tensor(rows).unbind(1)
    return TaskResult(
        tuple(item.id for item in items),
        dict(zip(METRICS, columns, strict=True)),
    )


def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    *,
    batch_tokens: int = BATCH_TOKENS,
    step: Step | None = None,
    frame: Framing | None = None,
    first_given: bool = False,
) -> Likelihoods:
    """Log-likelihood of each continuation given its context; see `by_branch`, of which this is the plain case.

    A context is read once for all its continuations, which go on from its KV cache: up to rounding the same.
    """
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "step": step, "frame": frame}
    (found,) = by_branch(model, tokenizer, pairs, None, first_given=first_given, **options)
    return found


def by_branch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    states: Callable[[Tensor], Iterable[Tensor]] | None,
    *,
    batch_tokens: int = BATCH_TOKENS,
    step: Step | None = None,
    frame: Framing | None = None,
    first_given: bool = False,
) -> list[Likelihoods]:
    """Log-likelihoods of each (context, continuation) under variants of a model that share its head.

    Texts are padded on the right, in batches of like length; an input that begins another one, such as that of choices
    of a single token, is not run again. Logits exist for a few positions of the continuations at a time. The model is
    left as it was found.

    Args:
        model: gives the head and the context length; run under the caller's autocast.
        tokenizer: the model's own.
        pairs: N texts and their continuations; the context may be empty.
        states: for token ids [B, T], the state after the final norm [B, T, D] under each variant in turn; None = the
            model as it is, which can go on from a cache.
        batch_tokens: most tokens in a batch, padding included, but for a single longer text.
        step: told how many of the pairs are done.
        frame: how the model's texts are framed, of which the front goes before a context; None = as the tokenizer does.
        first_given: of a text without a context and a front the first token is given and not scored, as in the loss
            that transformers computes of a text.

    Raises:
        ValueError: no pairs, batch_tokens < 1, ids without an embedding row, a continuation without a token of its own
            or longer than the model's context, or a model that gives nan.
    """
    stack = Stack(model)
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    with scoring(model):
        texts = _encode(tokenizer, pairs, stack, framing_of(tokenizer) if frame is None else frame, first_given)
        log_p: list[Tensor] = []
        led: list[Tensor] = []
        hits: list[Tensor] = []
        done = 0
        # windows of several documents have places of their own, which a cache does not know
        share = states is None and stack.separator is None
        for batch, found in _read(stack, stems(texts, batch_tokens, share=share), states):
            for branch, h_BTD in enumerate(found):
                # how many branches there are is known when the first batch has gone through
                if branch == len(log_p):
                    log_p.append(torch.zeros(len(texts), dtype=torch.float64))
                    led.append(torch.zeros(len(texts), dtype=torch.int64))
                    hits.append(torch.zeros(len(texts), dtype=torch.int64))
                _score(stack, batch, h_BTD, log_p[branch], led[branch], hits[branch])
            done += len(batch.pairs)
            if step is not None:
                step(done, len(texts))
    if bad := [i for sums in log_p for i in sums.isnan().nonzero()]:
        context, continuation = pairs[int(bad[0])]
        raise ValueError(
            f"the model gives nan for {continuation!r:.100} after {context[-100:]!r}: its weights are broken"
        )
    tokens = torch.tensor([len(text.targets) for text in texts])
    characters = torch.tensor([len(continuation.removeprefix(" ")) for _, continuation in pairs])
    each = zip(log_p, led, hits, strict=True)
    return [Likelihoods(total, greedy, tokens, characters, right) for total, greedy, right in each]


def _read(
    stack: Stack, each: Iterable[Stems], states: Callable[[Tensor], Iterable[Tensor]] | None
) -> Iterator[tuple[Batch, Iterable[Tensor]]]:
    """Every batch with the states [B, T, D] of its rows, under each variant."""
    device = stack.model.device
    for stem in each:
        cache = stack.new_cache() if stem.ids.numel() else None
        if cache is not None:
            stack.last_hidden(stem.ids.to(device), cache=cache)
        for batch in stem.batches:
            ids = batch.ids.to(device)
            if states is not None:
                yield batch, states(ids)
            else:
                yield batch, [stack.last_hidden(ids, cache=None if cache is None else forked(cache, batch.stem_B))]


def _encode(
    tokenizer: PreTrainedTokenizerBase, pairs: Pairs, stack: Stack, frame: Framing, first_given: bool = False
) -> list[Text]:
    """Input and targets of every pair; space at a context's end belongs to the continuation's first token."""
    if not pairs:
        raise ValueError("there is nothing to score: no items")
    front, start = frame.front, _start(tokenizer)
    # the whole text is encoded at once, as a model meets it, and cut by the length of the context alone; a space at
    # the cut is part of the next token in most vocabularies, hence `rstrip`
    wholes = tokenizer([context + continuation for context, continuation in pairs], add_special_tokens=False).input_ids
    stripped = list(dict.fromkeys(context.rstrip() for context, _ in pairs))
    encoded = tokenizer(stripped, add_special_tokens=False).input_ids
    lengths = {text: len(ids) for text, ids in zip(stripped, encoded, strict=True)}
    rows, context_tokens, texts, cut = stack.head[0].shape[0], stack.limit, [], 0
    numbers = {context: number for number, context in enumerate(dict.fromkeys(context for context, _ in pairs))}
    for (context, continuation), whole in zip(pairs, wholes, strict=True):
        length = lengths[context.rstrip()]
        if first_given and not (length or front):
            length = 1
        if not (length or front) and start is None:
            raise ValueError("a text without a context needs a token to start from: set the tokenizer's bos_token")
        targets = tuple(whole[length:])
        # the last token is predicted and never read
        ids = ((*front, *whole) if front or length else (start, *whole))[:-1]
        limit = context_tokens or len(ids)
        if not targets or len(targets) > limit:
            raise ValueError(
                f"the continuation {continuation!r:.100} has {len(targets)} tokens of its own; "
                f"between 1 and {limit} (the model's context) can be scored"
            )
        if max(whole) >= rows:
            raise ValueError(
                f"the tokenizer gives id {max(whole)}, the model has {rows} rows: they do not belong together"
            )
        cut += len(ids) > limit
        texts.append(Text(ids[-limit:], targets, numbers[context]))
    if cut:
        log.warning("%d of %d texts lost their beginning: the context is %d tokens", cut, len(texts), context_tokens)
    return texts


def _start(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id before a text that has no context, where nothing else stands there."""
    bos = tokenizer.bos_token_id
    return tokenizer.eos_token_id if bos is None else bos


def _score(stack: Stack, batch: Batch, h_BTD: Tensor, log_p_N: Tensor, led_N: Tensor, hits_N: Tensor) -> None:
    """Write the sums of a batch's pairs into [N] tensors."""
    head = autocast_head(stack.head)
    # gathered before the head: logits of the context are never made
    h_MD = h_BTD[batch.row_M.to(h_BTD.device), batch.at_M.to(h_BTD.device)]
    values, right = [], []
    for h_mD, target_m in zip(h_MD.split(HEAD_CHUNK), batch.targets_M.to(h_BTD.device).split(HEAD_CHUNK), strict=True):
        logits_mV = cap_logits(project(h_mD, head), scale=1.0, softcap=stack.softcap)
        values.append(-torch.nn.functional.cross_entropy(logits_mV, target_m, reduction="none").double().cpu())
        right.append((logits_mV.argmax(-1) == target_m).long().cpu())
    found = zip(batch.pairs, torch.cat(values).split(batch.lengths), torch.cat(right).split(batch.lengths), strict=True)
    for pair, log_p_m, hit_m in found:
        log_p_N[pair] = log_p_m.sum()
        led_N[pair] = hit_m.cumprod(0).sum()  # ones up to the first miss
        hits_N[pair] = hit_m.sum()
