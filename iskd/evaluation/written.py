"""Translation and summary: a model writes, and its text is compared with a reference.

It continues the prompt of a passage by its likeliest tokens up to the end of the line. Scores are torchmetrics' own:
BLEU of a sentence (Papineni et al. 2002, smoothed), chrF (Popovic 2015, with pairs of words), ROUGE (Lin 2004), all in
[0, 1], item by item. Words are those of any script (`words`).
"""

from __future__ import annotations

import logging
import re
import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iskd.data import Framing
from iskd.evaluation.likelihood import Step, TaskResult
from iskd.evaluation.scores import GENERATION, Scored
from iskd.evaluation.tasks.passages import WRITTEN, Passage
from iskd.models import Stack, scoring

log = logging.getLogger(__name__)

_ROUGE = ("rouge1", "rouge2", "rougeL")
METRICS = ("bleu", "chrf", *_ROUGE)
# a character, with the marks that belong to it, of Thai, Lao, Tibetan, Burmese, Khmer, kana and Han
_UNSPACED = re.compile(
    "[\u0e00-\u0e30\u0e32-\u0e33\u0e40-\u0e46\u0e80-\u0eb0\u0eb2-\u0eb3\u0ec0-\u0ec6\u0f40-\u0f6c\u1000-\u102a"
    "\u1780-\u17b3\u3005-\u3007\u3041-\u3096\u30a1-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    "[\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u0f71-\u0f84\u102b-\u103e\u17b4-\u17d3]*"
)
_ROOM = 1.5  # times the tokens of the reference may be written


@torch.no_grad()
def write_and_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    passages: Sequence[Passage],
    *,
    metric: str | None,
    step: Step,
    frame: Framing,
) -> Scored:
    """Have a model write every passage greedily, and compare with the references.

    A prompt too long for the model (`Stack.limit`) loses its beginning, which is told.
    """
    rows, cut, limit = [], 0, Stack(model).limit
    with scoring(model):
        for done, passage in enumerate(passages, 1):
            ids, new = _prompt(tokenizer, passage, frame, limit)
            cut += limit is not None and len(ids) + new > limit
            text = _written(model, tokenizer, ids if limit is None else ids[-(limit - new) :], new)
            rows.append(compared(text, passage.reference))
            step(done, len(passages))
    if cut:
        log.warning("%s: %d texts lost their beginning: the context is %d tokens", name, cut, limit)
    main = metric or WRITTEN[name]
    names = [main, *(each for each in METRICS if each != main)]
    values = {each: torch.tensor([row[each] for row in rows]) for each in names}
    return Scored(GENERATION, main, 0.0, TaskResult(tuple(passage.id for passage in passages), values))


def _prompt(
    tokenizer: PreTrainedTokenizerBase, passage: Passage, frame: Framing, limit: int | None
) -> tuple[list[int], int]:
    """The whole prompt's tokens, and how many a model may write after it: at most half of what it reads at once."""
    reference = len(tokenizer(passage.reference, add_special_tokens=False).input_ids)
    new = max(8, int(_ROOM * reference))
    ids = [*frame.front, *tokenizer(passage.prompt, add_special_tokens=False).input_ids]
    return ids, new if limit is None else min(new, max(1, limit // 2))


def _written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], new: int) -> str:
    """The line that a model writes after a prompt."""
    ids_1T = torch.tensor([ids], device=model.device)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    call: dict[str, Any] = {"do_sample": False, "max_new_tokens": new, "pad_token_id": padding}
    sequence: Tensor = cast(Any, model).generate(ids_1T, attention_mask=torch.ones_like(ids_1T), **call)
    text = str(tokenizer.decode(sequence[0, len(ids) :].tolist(), skip_special_tokens=True))
    return text.strip().split("\n", 1)[0].strip()


def compared(text: str, reference: str) -> dict[str, float]:
    """Scores of a text beside its reference, each in [0, 1]."""
    from torchmetrics.functional.text import chrf_score, rouge_score, sacre_bleu_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rouge = rouge_score(text, reference, normalizer=str.lower, tokenizer=words, rouge_keys=_ROUGE)
        bleu: dict[str, Any] = {"smooth": True, "tokenize": _bleu_tokens(reference)}
        found: dict[str, Any] = {
            "bleu": sacre_bleu_score([text], [[reference]], **bleu) if text else 0.0,
            "chrf": chrf_score([text], [[reference]]) if text else 0.0,
            **{key: rouge[f"{key}_fmeasure"] for key in _ROUGE},
        }
    return {name: float(value) for name, value in found.items()}


def words(text: str) -> list[str]:
    """Runs of letters, marks and digits of any script; of scripts that are written without spaces each character.

    torchmetrics' own words are of a-z and 0-9 alone, so that nothing is left of most languages. In English both agree.
    """
    kept = (character if unicodedata.category(character)[0] in "LMN" else " " for character in text)
    return _UNSPACED.sub(r" \g<0> ", "".join(kept)).split()


def _bleu_tokens(reference: str) -> str:
    """Which of sacrebleu's tokenizers is for a text's script."""
    found = "".join(_UNSPACED.findall(reference))
    if not found:
        return "13a"
    return "zh" if all(unicodedata.name(character, "").startswith("CJK") for character in found) else "char"
