"""Examples that tasks of lm-evaluation-harness show before a question, of which the question itself is never one.

The harness leaves a question out of its own examples only where both come from `test_split` under one name: with the
same file under two names, a validation split that is asked and shown from, or a question that stands twice in the data,
the answer would be in the prompt. Here two rows are one question where their prompts are, whatever else they hold; of
multiple choice also the choices, in any order, since a prompt may be empty or the same for all rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from iskd.system.patches import before_examples

_LOOKED_AT = 1000
"""Rows to show of which all are looked at; in more there is always another example."""


def question_of(task: Any, row: Mapping[str, Any]) -> Any:
    """What a row asks; equal for rows that ask the same."""
    try:
        prompt = task.doc_to_text(row)
        if task.config.doc_to_choice is None:
            return " ".join(str(prompt).split()) or str(task.doc_to_target(row))
        # of several contexts the prompt is the number of the right one
        shown = prompt if isinstance(prompt, str) else ""
        return " ".join(shown.split()), tuple(sorted(map(str, task.doc_to_choice(row))))
    except Exception:  # written by hand, with other fields than the rows that are asked
        return repr(sorted(row.items(), key=str)) if isinstance(row, Mapping) else repr(row)


def keep_apart(task: Any) -> None:
    """Have a task show no question among its own examples, from now on; others are drawn as the harness draws them."""
    if getattr(task, "sampler", None) is None:
        return

    def choose(asked: Any, drawn: list[Any], count: int) -> list[Any]:
        own = question_of(task, asked)
        if all(question_of(task, row) != own for row in drawn):
            return drawn
        others = [row for row in task.sampler.fewshot_docs() if question_of(task, row) != own]
        again = copy.copy(task.sampler)  # draws from the same stream of random numbers
        again.fewshot_indices = None
        return list(type(again).sample(again.replace_df(others), count))

    before_examples(task, choose)


def fewest_examples(task: Any, asked: Iterable[Mapping[str, Any]]) -> int:
    """How many examples there are beside a question, where they are fewest."""
    shown = list(task.sampler.fewshot_docs()) if getattr(task, "sampler", None) is not None else []
    if len(shown) > _LOOKED_AT:
        return len(shown)
    pool: dict[Any, int] = {}
    for row in shown:
        key = question_of(task, row)
        pool[key] = pool.get(key, 0) + 1
    return len(shown) - max((pool.get(question_of(task, row), 0) for row in asked), default=0)
