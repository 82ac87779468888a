r"""Translation and summary from local files: a model writes, and its text is compared with a reference.

    translation  DATA_DIR/translation/eval.jsonl: id, source, target; optional source_language, target_language
    summary      DATA_DIR/summary/eval.jsonl: id, text, summary

The model continues "{language}: {source}\n{language}:" or "{text}\nSummary:" by its likeliest tokens up to the end of
the line. Scores are torchmetrics' own: BLEU of a sentence (Papineni et al. 2002, smoothed), chrF (Popovic 2015), ROUGE
(Lin 2004), all in [0, 1], item by item.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iskd.data import Framing
from iskd.evaluation.likelihood import Step, TaskResult
from iskd.evaluation.scores import GENERATION, Scored
from iskd.evaluation.tasks.task_items import lines_of, subset_of
from iskd.models import Stack, scoring
from iskd.system.faults import UnavailableError
from iskd.system.files import expanded

WRITTEN = {"translation": "bleu", "summary": "rougeL"}
"""Tasks, and the metric that each is compared by where nobody says another."""
METRICS = ("bleu", "chrf", "rouge1", "rouge2", "rougeL")
_FIELDS = {"translation": ("source", "target"), "summary": ("text", "summary")}
_ROOM = 1.5  # times the tokens of the reference may be written


@dataclass(frozen=True)
class Passage:
    """A text to be written: what the model is shown, and the reference."""

    id: str
    prompt: str
    reference: str


def read_passages(
    name: str, data_dir: str | None, *, limit: int | None, seed: int, fewshot: int | None
) -> list[Passage]:
    """The passages of a task, each behind so many examples, drawn as items are.

    Raises:
        ValueError: there is no file, a line is no passage, or there are too few examples.
    """
    folder = None if data_dir is None else Path(expanded(data_dir)) / name
    file = None if folder is None else folder / "eval.jsonl"
    if folder is None or file is None or not file.is_file():
        where = "eval.data_dir=DIR" if file is None else str(file)
        raise UnavailableError(
            f"task {name!r} is read from a local file, which is not there ({where}): put its texts into "
            f"DIR/{name}/eval.jsonl, one JSON object a line with the fields id, {', '.join(_FIELDS[name])}"
        )
    found = _read(name, file)
    shown = _read(name, folder / "fewshot.jsonl") if (folder / "fewshot.jsonl").is_file() else found
    chosen = found if limit is None else subset_of(found, [passage.prompt for passage in found], limit, seed)
    return [_with_examples(passage, shown, fewshot or 0, name) for passage in chosen]


def _read(name: str, file: Path) -> list[Passage]:
    passages = []
    for number, line in enumerate(lines_of(file), 1):
        if not line.strip():
            continue
        try:
            passages.append(_passage(name, json.loads(line)))
        except (ValueError, RecursionError, TypeError) as error:
            raise ValueError(f"{file}, line {number} is no item of {name}: {error}") from error
    if not passages:
        raise ValueError(f"{file} holds no items")
    return passages


def _passage(name: str, row: Any) -> Passage:
    fields = ("id", *_FIELDS[name])
    values = [row.get(key) if isinstance(row, dict) else None for key in fields]
    for key, value in zip(fields, values, strict=True):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"field {key!r} must be a text, not {value!r:.200}")
    id_, text, reference = (" ".join(str(value).split()) for value in values)
    if name == "summary":
        return Passage(id_, f"{text}\nSummary:", reference)
    ours, theirs = (str(row.get(f"{word.lower()}_language", word)) for word in ("Source", "Target"))
    return Passage(id_, f"{ours}: {text}\n{theirs}:", reference)


def _with_examples(passage: Passage, shown: Sequence[Passage], count: int, name: str) -> Passage:
    others = [other for other in shown if other.prompt != passage.prompt][:count]
    if len(others) < count:
        raise ValueError(
            f"eval.fewshot={count}: task {name!r} has {len(others)} examples to show beside the question; put more "
            "into fewshot.jsonl beside its eval.jsonl, or ask for fewer"
        )
    before = "".join(f"{other.prompt} {other.reference}\n\n" for other in others)
    return Passage(passage.id, before + passage.prompt, passage.reference)


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

    A prompt too long for the model (`Stack.limit`) loses its beginning.

    Raises:
        ValueError: an unknown metric.
    """
    if metric is not None and metric not in METRICS:
        raise ValueError(
            f"task {name!r} reports no metric {metric!r}: set eval.metrics.{name} to {' or '.join(METRICS)}"
        )
    rows = []
    with scoring(model):
        for done, passage in enumerate(passages, 1):
            rows.append(compared(_written(model, tokenizer, passage, frame), passage.reference))
            step(done, len(passages))
    main = metric or WRITTEN[name]
    names = [main, *(each for each in METRICS if each != main)]
    values = {each: torch.tensor([row[each] for row in rows]) for each in names}
    return Scored(GENERATION, main, 0.0, TaskResult(tuple(passage.id for passage in passages), values))


def _written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, passage: Passage, frame: Framing) -> str:
    """The line that a model writes after a prompt."""
    limit = Stack(model).limit
    reference = len(tokenizer(passage.reference, add_special_tokens=False).input_ids)
    new = max(8, int(_ROOM * reference))
    ids = [*frame.front, *tokenizer(passage.prompt, add_special_tokens=False).input_ids]
    if limit is not None:
        new = min(new, max(1, limit // 2))
        ids = ids[-(limit - new) :]
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
        rouge = rouge_score(text, reference, rouge_keys=("rouge1", "rouge2", "rougeL"))
        found: dict[str, Any] = {
            "bleu": sacre_bleu_score([text], [[reference]], smooth=True) if text else 0.0,
            "chrf": chrf_score([text], [[reference]]) if text else 0.0,
            **{key: rouge[f"{key}_fmeasure"] for key in ("rouge1", "rouge2", "rougeL")},
        }
    return {name: float(value) for name, value in found.items()}
