"""Tasks that layers can be chosen by: those that are scored off likelihoods, by one pass of the model.

Written texts are too: not by what a model writes, which is a pass for every token and every layer, but by the share of
the reference's tokens that are the likeliest after those before them.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from iskd.evaluation.tasks.made_items import COPY_DOC, COPY_PARA, POOL, copying_items
from iskd.evaluation.tasks.passages import FIELDS, WRITTEN, read_passages
from iskd.evaluation.tasks.task_items import CBT_SENTENCE, COPY, TASKS, Item, read_sentences, read_task

_MADE = (COPY, COPY_DOC, COPY_PARA)
CHOOSABLE = (*TASKS, *_MADE, CBT_SENTENCE, *WRITTEN)


def check_choosable(name: str) -> None:
    """Raise ValueError, with the nearest name, unless layers can be chosen by a task."""
    if name not in CHOOSABLE:
        close = difflib.get_close_matches(name, CHOOSABLE, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown task {name!r}: {hint}layers can be chosen by {', '.join(CHOOSABLE)}")


def file_of(name: str) -> str | None:
    """What a task is read from, for messages: its data set on the hub or its fields; None where nothing is read."""
    if name in _MADE:
        return None
    return ", ".join(("id", *FIELDS[name])) if name in WRITTEN else TASKS["cbt" if name == CBT_SENTENCE else name].hub


def items_of(name: str, data_dir: str | Path | None) -> list[Item]:
    """All items of a task. Raises ValueError as the readers of its files do."""
    if name in (COPY_DOC, COPY_PARA):
        return copying_items(name, POOL)
    if name == CBT_SENTENCE:
        return read_sentences(data_dir)
    if name in WRITTEN:
        return [each.item for each in read_passages(name, data_dir, limit=None, seed=0, fewshot=None)]
    return read_task(name, data_dir or ".")


def metric_of(name: str, usual: str) -> str:
    """The metric by which a task chooses: of one that is right or wrong the usual one, of others a share."""
    if name in WRITTEN:
        return "hits"
    return "led" if name in _MADE else "acc_token" if name == CBT_SENTENCE else usual
