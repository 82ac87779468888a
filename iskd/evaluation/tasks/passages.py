r"""Passages of translation and summary, read from local files.

    translation  DATA_DIR/translation/eval.jsonl: id, source, target; optional source_language, target_language
    summary      DATA_DIR/summary/eval.jsonl: id, text, summary

A prompt is "{language}: {source}\n{language}:" or "{text}\nSummary:".
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iskd.evaluation.tasks.task_items import Item, lines_of, subset_of
from iskd.system.faults import UnavailableError
from iskd.system.files import expanded

WRITTEN = {"translation": "bleu", "summary": "rougeL"}
"""Tasks, and the metric that each is compared by where nobody says another."""
FIELDS = {"translation": ("source", "target"), "summary": ("text", "summary")}


@dataclass(frozen=True)
class Passage:
    """A text to be written: what the model is shown, and the reference."""

    id: str
    prompt: str
    reference: str

    @property
    def item(self) -> Item:
        """The reference as the continuation of the prompt."""
        return Item(self.id, (self.prompt,), (f" {self.reference}",), 0)


def read_passages(
    name: str,
    data_dir: str | Path | None,
    *,
    limit: int | None,
    seed: int,
    fewshot: int | None,
    exclude: Collection[str] = (),
) -> list[Passage]:
    """The passages of a task, each behind so many examples, drawn as items are; without those of excluded hashes.

    Raises:
        ValueError: there is no file, a line is no passage, or there are too few examples.
    """
    folder = None if data_dir is None else Path(expanded(data_dir)) / name
    file = None if folder is None else folder / "eval.jsonl"
    if folder is None or file is None or not file.is_file():
        where = "eval.data_dir=DIR" if file is None else str(file)
        raise UnavailableError(
            f"task {name!r} is read from a local file, which is not there ({where}): put its texts into "
            f"DIR/{name}/eval.jsonl, one JSON object a line with the fields id, {', '.join(FIELDS[name])}"
        )
    found = _read(name, file)
    free = [passage for passage in found if passage.item.sha256 not in exclude]
    if not free:
        raise ValueError(f"task {name!r}: layers were selected by all {len(found)} items; there is none to report on")
    shown = _read(name, folder / "fewshot.jsonl") if (folder / "fewshot.jsonl").is_file() else found
    chosen = free if limit is None else subset_of(free, [passage.prompt for passage in free], limit, seed)
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
    fields = ("id", *FIELDS[name])
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
