"""Perplexity and bits per byte of a text, in windows without overlap.

    perplexity    = exp(nats / tokens)
    bits per byte = nats / (ln 2 * bytes)

over the tokens that have one before them in their window. Bytes are the UTF-8 bytes of exactly these tokens, so that
bits per byte compare between tokenizers; perplexities do not.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iskd.data.readers import find_files, read_file
from iskd.evaluation.likelihood import HEAD_CHUNK, Step, TaskResult, paired
from iskd.evaluation.metrics import Perplexity
from iskd.models import Stack, autocast_head, cap_logits, project, scoring
from iskd.system.files import hash_files

_CHARACTERS_PER_TOKEN = 64  # as much text is read for a token; none but runs of spaces are longer


@dataclass(frozen=True)
class TextScore:
    """How well a text is predicted; lower = better.

    Attributes:
        tokens, bytes: scored; the first token of each window is not.
        windows: how many.
        sha256: of the windows' token ids, in hex.
        perplexity, bits_per_byte: the student's.
        teacher_perplexity, teacher_bits_per_byte: None without a teacher.
        difference, low, high: student - teacher in nats per token, with a 95 % bootstrap interval over windows.
    """

    tokens: int
    bytes: int
    windows: int
    sha256: str
    perplexity: float
    bits_per_byte: float
    teacher_perplexity: float | None = None
    teacher_bits_per_byte: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, eq=False)
class TextWindows:
    """Token ids [W, T] of consecutive windows, and the UTF-8 bytes of all tokens but the first of each window."""

    ids: Tensor
    bytes: int


@dataclass(frozen=True, eq=False)
class TextLoss:
    """A model's perplexity, bits per byte, and nats per token of every window [W] in float64."""

    perplexity: float
    bits_per_byte: float
    nats_W: Tensor


def read_text(path: str | Path, tokens: int) -> str:
    """The beginning of a file, folder or glob of text, enough for `tokens`; documents are joined by a blank line.

    Raises:
        ValueError: there is no such file, or it is not text.
    """
    documents: list[str] = []
    wanted = tokens * _CHARACTERS_PER_TOKEN
    for file in find_files(str(path), "eval.text"):
        for document in read_file(file, "auto", "text"):
            documents.append(document)
            wanted -= len(document)
            if wanted <= 0:
                return "\n\n".join(documents)
    return "\n\n".join(documents)


def refuse_training_text(text: str | Path, content: str) -> None:
    """Raise ValueError where the files to report on, together or one of them, are all that a run trained on.

    Args:
        text: file, folder or glob.
        content: what identifies the run's data (`data.json`): of local files their hash, before those of validation.
    """
    trained, files = content.partition("-")[0], find_files(str(text), "eval.text")
    if trained in {hash_files(files), *(hash_files([file]) for file in files)}:
        raise ValueError(f"eval.text={text} is what the run trains on; report on text that it never sees")


def text_windows(text: str, tokenizer: PreTrainedTokenizerBase, *, tokens: int, window: int) -> TextWindows:
    """The first `tokens` of a text in whole windows, or all of it as one window if it is shorter than that.

    Raises:
        ValueError: the text has fewer than 2 tokens, or the tokenizer does not tell where its tokens are.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell which bytes its tokens stand for: use a tokenizer with a "
            "tokenizer.json, or leave the text out (eval.text=null)"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    length = min(window, tokens, len(encoded.input_ids))
    if length < 2:
        raise ValueError(
            f"a text of {len(encoded.input_ids)} tokens, scored in windows of {length}, has nothing to score"
        )
    count = min(tokens, len(encoded.input_ids)) // length * length
    ids = torch.tensor(encoded.input_ids[:count]).view(-1, length)
    offsets: Any = encoded["offset_mapping"]
    spans = _spans(text, [end for _, end in offsets[:count]])
    return TextWindows(ids, int(spans.view(-1, length)[:, 1:].sum()))


def _spans(text: str, ends: list[int]) -> Tensor:
    """UTF-8 bytes [N] from the end of one token to that of the next, for their ends in characters.

    A character of several tokens counts for the first of them; spaces that a tokenizer leaves out count for the token
    behind them.
    """
    at_byte = [0, *accumulate(len(character.encode("utf-8", "surrogatepass")) for character in text[: max(ends)])]
    reached = torch.tensor([0, *(at_byte[end] for end in accumulate(ends, max))])
    return reached.diff()


def text_loss(model: PreTrainedModel, windows: TextWindows, *, batch_tokens: int, step: Step) -> TextLoss:
    """Score a text under the caller's autocast; logits exist for a few positions at a time.

    Raises:
        ValueError: the model gives nan.
    """
    stack = Stack(model)
    perplexity = Perplexity().to(model.device)
    nats: list[Tensor] = []
    with scoring(model):
        head = autocast_head(stack.head)
        for ids_BT in windows.ids.to(model.device).split(max(1, batch_tokens // windows.ids.shape[1])):
            for h_TD, label_T in zip(stack.last_hidden(ids_BT[:, :-1]), ids_BT[:, 1:], strict=True):
                before = perplexity.total.clone()
                for h_tD, label_t in zip(h_TD.split(HEAD_CHUNK), label_T.split(HEAD_CHUNK), strict=True):
                    logits_tV = cap_logits(project(h_tD, head), scale=1.0, softcap=stack.softcap)
                    perplexity.update(logits_tV, None, label_t)
                nats.append((perplexity.total - before).cpu())
            step(len(nats), len(windows.ids))
    bits_per_byte = MeanMetric(nan_strategy="disable").set_dtype(torch.float64)
    bits_per_byte.update(perplexity.total.cpu() / (math.log(2) * windows.bytes), windows.bytes)
    nats_W = torch.stack(nats) / (windows.ids.shape[1] - 1)
    if nats_W.isnan().any():
        raise ValueError("the model gives nan on the text: its weights are broken")
    return TextLoss(perplexity.compute().item(), bits_per_byte.compute().item(), nats_W)


def text_score(
    windows: TextWindows, student: TextLoss, teacher: TextLoss | None, *, resamples: int, seed: int
) -> TextScore:
    """Put a student's loss on a text beside its teacher's."""
    count, length = windows.ids.shape
    digest = hashlib.sha256(windows.ids.numpy().astype("<i8").tobytes()).hexdigest()
    own = (student.perplexity, student.bits_per_byte)
    score = TextScore(count * (length - 1), windows.bytes, count, digest, *own)
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
