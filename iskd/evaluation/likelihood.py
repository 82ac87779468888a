"""Log-likelihoods of continuations under a causal language model, and what greedy decoding would give of them.

Continuations are scored as in lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.12608602): context and continuation
are encoded as one text and cut at the length of the encoded context. A context too long for the model (`Stack.limit`)
loses its beginning.

Whether greedy decoding would give a continuation is read off the same pass: up to its first mistake, decoding sees the
very tokens that scoring feeds. So scores of the generation type, which lose most when layers go, cost no generation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iskd.data import Framing, framing_of
from iskd.evaluation.batches import Batch, Stems, Text, stems
from iskd.models import Stack, autocast_head, cap_logits, project, scoring
from iskd.models.cache import forked

log = logging.getLogger(__name__)

BATCH_TOKENS = 4096
HEAD_CHUNK = 256  # positions whose logits exist at a time

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
        cut: how many of the texts lost their beginning to the model's context.
    """

    log_p: Tensor
    led: Tensor
    tokens: Tensor
    characters: Tensor
    hits: Tensor
    cut: int = 0

    @property
    def greedy(self) -> Tensor:
        """Whether greedy decoding gives the whole continuation [N]."""
        return self.led == self.tokens


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
        texts, cut = _encode(tokenizer, pairs, stack, framing_of(tokenizer) if frame is None else frame, first_given)
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
    return [Likelihoods(total, greedy, tokens, characters, right, cut) for total, greedy, right in each]


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
) -> tuple[list[Text], int]:
    """Input and targets of every pair, and how many lost their beginning.

    A space at a context's end belongs to the continuation's first token.
    """
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
    return texts, cut


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
