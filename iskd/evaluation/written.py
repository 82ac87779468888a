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
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from iskd.data import Framing
from iskd.evaluation.judging import TaskResult
from iskd.evaluation.likelihood import Step
from iskd.evaluation.scores import GENERATION, Scored
from iskd.evaluation.tasks.passages import WRITTEN, Passage
from iskd.models import Stack, scoring
from iskd.models.cache import forked

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

    What several prompts begin with, such as the same examples, is read once, and each goes on from its KV cache: up to
    rounding the same. A prompt too long for the model (`Stack.limit`) loses its beginning, which is told.
    """
    stack = Stack(model)
    limit, rows = stack.limit, dict[int, dict[str, float]]()
    with scoring(model):
        wholes = [_prompt(tokenizer, passage, frame, limit) for passage in passages]
        prompts = [ids if limit is None else ids[-(limit - new) :] for ids, new in wholes]
        cut = sum(len(whole) > len(ids) for (whole, _), ids in zip(wholes, prompts, strict=True))
        for group in _groups(prompts):
            begun = _begun(stack, [prompts[number] for number in group])
            for number in group:
                text = _written(model, tokenizer, prompts[number], wholes[number][1], begun)
                rows[number] = compared(text, passages[number].reference)
                step(len(rows), len(passages))
    if cut:
        log.warning("%s: %d texts lost their beginning: the context is %d tokens", name, cut, limit)
    main = metric or WRITTEN[name]
    names = [main, *(each for each in METRICS if each != main)]
    values = {each: torch.tensor([rows[number][each] for number in range(len(passages))]) for each in names}
    return Scored(GENERATION, main, 0.0, TaskResult(tuple(passage.id for passage in passages), values, cut=cut))


def _prompt(
    tokenizer: PreTrainedTokenizerBase, passage: Passage, frame: Framing, limit: int | None
) -> tuple[list[int], int]:
    """The whole prompt's tokens, and how many a model may write after it: at most half of what it reads at once."""
    reference = len(tokenizer(passage.reference, add_special_tokens=False).input_ids)
    new = max(8, int(_ROOM * reference))
    ids = [*frame.front, *tokenizer(passage.prompt, add_special_tokens=False).input_ids]
    return ids, new if limit is None else min(new, max(1, limit // 2))


def _groups(prompts: Sequence[list[int]]) -> list[list[int]]:
    """Numbers of the prompts, those together of which each has half of its tokens or more in common with the first.

    A passage that is itself among the examples has others before it.
    """
    groups: list[list[int]] = []
    for number in sorted(range(len(prompts)), key=prompts.__getitem__):
        if groups and 2 * _alike(prompts[groups[-1][0]], prompts[number]) >= len(prompts[number]):
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two prompts begin with."""
    return next((at for at, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


def _begun(stack: Stack, group: Sequence[Sequence[int]]) -> Cache | None:
    """The KV cache of what the prompts of a group begin with; None for a single one, or where documents are told apart.

    The last token of a prompt is read with the prompt itself: it says what comes next.
    """
    # they are in order: what the first and the last have in common, all have
    length = min(_alike(group[0], group[-1]), min(map(len, group)) - 1)
    if len(group) < 2 or length < 1 or stack.separator is not None:
        return None
    cache = stack.new_cache()
    stack.last_hidden(torch.tensor([group[0][:length]], device=stack.model.device), cache=cache)
    return cache


def _written(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], new: int, begun: Cache | None
) -> str:
    """The line that a model writes after a prompt, of which `begun` holds the beginning."""
    ids_1T = torch.tensor([ids], device=model.device)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    call: dict[str, Any] = {"do_sample": False, "max_new_tokens": new, "pad_token_id": padding}
    if begun is not None:
        call |= {"past_key_values": forked(begun, torch.zeros(1, dtype=torch.int64)), "use_cache": True}
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
