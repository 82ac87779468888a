"""Perplexity and bits per byte of a text, in windows without overlap.

    perplexity    = exp(nats / tokens)
    bits per byte = nats / (ln 2 * bytes)
    by position   = nats of the tokens that have so many others before them in their window, over their number

over the tokens of the text that have one before them in their window; what frames a document (`iskd.data.framing`) is
read and never scored, as it is no text. Bytes are the UTF-8 bytes of exactly these tokens, so that
bits per byte compare between tokenizers; perplexities do not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iskd.data import Framing
from iskd.data.files import find_files, read_file
from iskd.evaluation.judging import TaskResult, paired
from iskd.evaluation.likelihood import HEAD_CHUNK, Step
from iskd.evaluation.metrics import Perplexity
from iskd.evaluation.results import AtPosition, TextScore
from iskd.models import IGNORE, Stack, autocast_head, cap_logits, project, scoring
from iskd.system.files import hash_files

_FIRST_SPAN = 16  # positions of the first span of them; every further one is as wide as all before it
_CHARACTERS_PER_TOKEN = 64  # as much text is read for a token; none but runs of spaces are longer


@dataclass(frozen=True, eq=False)
class TextWindows:
    """Consecutive windows of a text.

    Attributes:
        ids: their tokens [W, T].
        labels: what is scored [W, T - 1]: the next token, ignored where that frames a document.
        bytes: UTF-8 bytes of the tokens that are scored.
    """

    ids: Tensor
    labels: Tensor
    bytes: int

    @property
    def counts(self) -> Tensor:
        """Tokens that are scored, by window [W]."""
        return (self.labels != IGNORE).sum(1)

    def counts_at(self, spans: Sequence[tuple[int, int]]) -> Tensor:
        """Tokens that are scored, by span of positions [S]."""
        at_each = (self.labels != IGNORE).sum(0)
        return torch.stack([at_each[first - 1 : last].sum() for first, last in spans])


@dataclass(frozen=True, eq=False)
class TextLoss:
    """A model's perplexity, bits per byte, and nats per token of every window [W] in float64.

    `nats_S` are those of every span of positions (`spans_of`), nan where the model cannot read that far at once.
    """

    perplexity: float
    bits_per_byte: float
    nats_W: Tensor
    nats_S: Tensor


def read_text(path: str | Path, tokens: int) -> list[str]:
    """The documents at the beginning of a file, folder or glob of text, enough for `tokens`.

    Raises:
        ValueError: there is no such file, or it is not text.
    """
    documents: list[str] = []
    wanted = tokens * _CHARACTERS_PER_TOKEN
    for file in find_files(str(path), "eval.text"):
        for document in read_file(file, "auto", "text", "eval.text"):
            documents.append(document)
            wanted -= len(document)
            if wanted <= 0:
                return documents
    return documents


def refuse_training_text(text: str | Path, contents: Iterable[str]) -> None:
    """Raise ValueError where the files to report on, together or one of them, are all that a run trained on.

    Args:
        text: file, folder or glob.
        contents: what identifies the data of a run, and of those that its student comes from (`data.json`): of local
            files their hash, before those of validation.
    """
    files = find_files(str(text), "eval.text")
    asked = {hash_files(files), *(hash_files([file]) for file in files)}
    if asked & {content.partition("-")[0] for content in contents}:
        raise ValueError(f"eval.text={text} is what the student trains on; report on text that it never sees")


def text_windows(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, tokens: int, window: int, frame: Framing
) -> TextWindows:
    """The first `tokens` of documents in whole windows, or all of them as one window if they are shorter than that.

    Raises:
        ValueError: there are fewer than 2 tokens, or the tokenizer does not tell where its tokens are.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell which bytes its tokens stand for: use a tokenizer with a "
            "tokenizer.json, or leave the text out (eval.text=null)"
        )
    ids, sizes = list[int](), list[int]()  # of what frames a document there are -1 bytes: no text
    for text in documents:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        own, offsets = list(found["input_ids"]), cast(Any, found["offset_mapping"])
        own, offsets = own[:tokens], offsets[:tokens]
        framed, at = frame.framed(own, first=not ids)
        spans = _spans(text, [end for _, end in offsets]).tolist() if own else []
        ids += framed
        sizes += [-1] * at + spans + [-1] * (len(framed) - at - len(own))
        if len(ids) >= tokens:
            break
    length = min(window, tokens, len(ids) + len(frame.window))
    if length < 2:
        raise ValueError(f"a text of {len(ids)} tokens, scored in windows of {length}, has nothing to score")
    ids, sizes = frame.headed(ids, length, 0)[:tokens], frame.headed(sizes, length, 0, filler=-1)[:tokens]
    count = len(ids) // length * length
    ids_WT, sizes_WT = (torch.tensor(values[:count]).view(-1, length) for values in (ids, sizes))
    scored = sizes_WT[:, 1:] >= 0
    if not scored.any():
        raise ValueError(f"a text of {len(ids)} tokens, scored in windows of {length}, has nothing to score")
    labels = ids_WT[:, 1:].masked_fill(~scored, IGNORE)
    return TextWindows(ids_WT, labels, int(sizes_WT[:, 1:][scored].sum()))


def _spans(text: str, ends: list[int]) -> Tensor:
    """UTF-8 bytes [N] from the end of one token to that of the next, for their ends in characters.

    A character of several tokens counts for the first of them; spaces that a tokenizer leaves out count for the token
    behind them.
    """
    at_byte = [0, *accumulate(len(character.encode("utf-8", "surrogatepass")) for character in text[: max(ends)])]
    reached = torch.tensor([0, *(at_byte[end] for end in accumulate(ends, max))])
    return reached.diff()


def spans_of(length: int) -> list[tuple[int, int]]:
    """Spans of positions in windows of so many tokens, as first and last; the token at p has p others before it."""
    last, end, ends = length - 1, _FIRST_SPAN, list[int]()
    while 3 * end <= 2 * last:  # the last span is no narrower than half of the one before it
        ends.append(end)
        end *= 2
    ends.append(last)
    return list(zip([1, *(end + 1 for end in ends)], ends, strict=False))


def text_loss(model: PreTrainedModel, windows: TextWindows, *, batch_tokens: int, step: Step) -> TextLoss:
    """Score a text under the caller's autocast; logits exist for a few positions at a time.

    A model whose limit is shorter than a window reads it in pieces of that length, each from its own beginning, so that
    models of different limits are scored on the same tokens.

    Raises:
        ValueError: the model gives nan.
    """
    stack = Stack(model)
    perplexity = Perplexity().to(model.device)
    nats: list[Tensor] = []
    spans = spans_of(windows.ids.shape[1])
    sizes = [last - first + 1 for first, last in spans]
    nats_S = torch.zeros(len(spans), dtype=torch.float64, device=model.device)
    with scoring(model):
        head = autocast_head(stack.head)
        size = max(1, batch_tokens // windows.ids.shape[1])
        piece = stack.limit or windows.ids.shape[1]
        chunks = (whole.to(model.device).split(size) for whole in (windows.ids, windows.labels))
        for ids_BT, labels_BT in zip(*chunks, strict=True):
            for h_TD, label_T in zip(_read(stack, ids_BT[:, :-1], piece), labels_BT, strict=True):
                before = perplexity.total.clone()
                for span, (h_sD, label_s) in enumerate(zip(h_TD.split(sizes), label_T.split(sizes), strict=True)):
                    so_far = perplexity.total.clone()
                    for h_tD, label_t in zip(h_sD.split(HEAD_CHUNK), label_s.split(HEAD_CHUNK), strict=True):
                        logits_tV = cap_logits(project(h_tD, head), scale=1.0, softcap=stack.softcap)
                        perplexity.update(logits_tV, None, label_t)
                    nats_S[span] += perplexity.total - so_far
                nats.append((perplexity.total - before).cpu())
            step(len(nats), len(windows.ids))
    bits_per_byte = MeanMetric(nan_strategy="disable").set_dtype(torch.float64)
    bits_per_byte.update(perplexity.total.cpu() / (math.log(2) * windows.bytes), windows.bytes)
    nats_W = torch.stack(nats) / windows.counts.clamp(min=1)
    if nats_W.isnan().any():
        raise ValueError("the model gives nan on the text: its weights are broken")
    nats_S = nats_S.cpu() / windows.counts_at(spans)  # nan where nothing is scored
    nats_S[torch.tensor([last > piece for _, last in spans])] = torch.nan
    return TextLoss(perplexity.compute().item(), bits_per_byte.compute().item(), nats_W, nats_S)


def _read(stack: Stack, ids_BT: Tensor, piece: int) -> Tensor:
    """Last states [B, T, D] of windows read in pieces of so many tokens."""
    states = [stack.last_hidden(ids) for ids in ids_BT.split(piece, 1)]
    return states[0] if len(states) == 1 else torch.cat(states, 1)


def text_score(
    windows: TextWindows, student: TextLoss, teacher: TextLoss | None, *, resamples: int, seed: int
) -> TextScore:
    """Put a student's loss on a text beside its teacher's."""
    count, tokens = len(windows.ids), int(windows.counts.sum())
    digest = hashlib.sha256(windows.ids.numpy().astype("<i8").tobytes()).hexdigest()
    own = (student.perplexity, student.bits_per_byte)
    score = TextScore(tokens, windows.bytes, count, digest, *own)
    if teacher is None:
        return score
    names = tuple(map(str, range(count)))
    mine, theirs = (TaskResult(names, {"nats": one.nats_W}) for one in (student, teacher))
    gap = paired(mine, theirs, "nats", resamples=resamples, seed=seed)
    return replace(
        score,
        teacher_perplexity=teacher.perplexity,
        teacher_bits_per_byte=teacher.bits_per_byte,
        difference=gap.difference,
        low=gap.low,
        high=gap.high,
    )


def by_position(windows: TextWindows, student: TextLoss, teacher: TextLoss | None) -> tuple[AtPosition, ...]:
    """Losses by span of positions; a model that starts anew inside a window has none from there on."""
    spans = spans_of(windows.ids.shape[1])
    counts, mine = windows.counts_at(spans).tolist(), student.nats_S.tolist()
    theirs = [None] * len(spans) if teacher is None else teacher.nats_S.tolist()
    rows = zip(spans, counts, mine, theirs, strict=True)
    return tuple(AtPosition(*span, count, own, other) for span, count, own, other in rows if count)
