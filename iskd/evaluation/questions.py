"""What a spec asks, task by task: of the harness, or made and scored here; and what a model answers."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iskd.data import Framing
from iskd.data.overlap import PASSAGE
from iskd.evaluation import harness
from iskd.evaluation.harness import Drawn
from iskd.evaluation.judging import METRICS
from iskd.evaluation.judging import evaluate as ask
from iskd.evaluation.scores import CHOICE, GENERATION, Scored
from iskd.evaluation.tasks.made_items import (
    COPY_DOC,
    COPY_PARA,
    LENGTHS,
    POOL,
    RECALL,
    copying_items,
    length_of,
    recall_items,
    recall_name,
)
from iskd.evaluation.tasks.passages import WRITTEN, Passage, read_passages
from iskd.evaluation.tasks.task_items import (
    CBT_SENTENCE,
    COPY,
    COPY_POOL,
    Item,
    copy_items,
    read_sentences,
    subset,
)
from iskd.evaluation.written import METRICS as WRITTEN_METRICS
from iskd.evaluation.written import write_and_score
from iskd.system import Busy

log = logging.getLogger(__name__)

Question = Drawn | Sequence[Item] | Sequence[Passage]
Tell = Callable[[str, int, int], None]
"""Told what is done, how much of it, and of how much."""
STAGE = "stage"
_LONGEST = 131072  # tokens, of RULER's
_MADE = (COPY, COPY_DOC, COPY_PARA, RECALL)
OURS = (*_MADE, CBT_SENTENCE, *WRITTEN)
"""Tasks that are scored here and not by the harness."""


def is_ours(name: str) -> bool:
    """Whether a task is scored here. Raises ValueError for a `recall_N` of a length that there is not."""
    return name in OURS or length_of(name) is not None


def _takes_no_examples(name: str) -> bool:
    return is_ours(name) and name not in WRITTEN


def _check_own_metric(name: str, metric: str) -> None:
    """Raise ValueError where a task that is scored here has no such metric."""
    known = WRITTEN_METRICS if name in WRITTEN else METRICS
    if is_ours(name) and metric not in known:
        close = difflib.get_close_matches(metric, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"task {name!r} reports no metric {metric!r}: {hint}set eval.metrics.{name} to {' or '.join(known)}"
        )


@dataclass(frozen=True)
class EvalSpec:
    """What to evaluate; one conf/eval/*.yaml.

    Attributes:
        tasks: keys of `iskd.evaluation.TASKS`, tasks that are scored here (`OURS`, e.g. `copy`: random words to be
            repeated), and any other name that lm-evaluation-harness knows.
        limit: at most so many items of each task; None = all.
        data_dir: folder of NAME/eval.jsonl; tasks that have no folder there are the harness's own, from the hub.
        task_dir: folder of tasks in the harness's own format (a yaml each), for names that are none of ours.
        fewshot: examples before every question of the harness; None = as many as each task says, 0 of ours. Of local
            files they are the lines of DATA_DIR/NAME/fewshot.jsonl, or the other items.
        metrics: by task the metric that is compared, one that the harness reports of it, as `metric,filter` where it
            reads answers off texts in several ways; others go by their usual one.
        lengths: tokens of the items of `recall` and of tasks of the harness that are made to a length (RULER's); None =
            `LENGTHS`, and 4,096 and 8,192 of the harness's.
        seed: of the items drawn and of the bootstrap.
        batch_size: texts at a time in the harness.
        batch_tokens: tokens at a time in `copy` and in the text.
        text: file, folder or glob for perplexity and bits per byte; None = none, or what the caller passes.
        tokens: at most so many tokens of the text.
        window: tokens per window of the text; at most what the model with the longest limit takes, beside which the
            other one reads a window in pieces of its own.
        resamples: of the bootstrap.
        every: along a run, for its figures. `stage`: tasks and text are asked at the start and after every stage; a
            number: that too, and inside a stage the student is validated every so many training tokens, on the windows
            of `data.val_tokens`. None = at the end alone.
        quantize: also measure the student with its weights in fewer bits: `int8`, `int4` (`iskd.evaluation.quantize`);
            of a run the last one alone.
        efficiency_seconds: how long `iskd evaluate` may measure latency, memory and cache as well; 0 = not at all.
            At the end of a run it is `run.efficiency_seconds` that says so.

    Raises:
        ValueError: a value that cannot work.
    """

    tasks: Sequence[str] = ()
    limit: int | None = 100
    data_dir: str | None = None
    task_dir: str | None = None
    fewshot: NonNegativeInt | None = None
    metrics: Mapping[str, str] = field(default_factory=dict)
    lengths: Sequence[int] | None = None
    seed: NonNegativeInt = 0
    batch_size: int = 8
    batch_tokens: int = 4096
    text: str | None = None
    tokens: int = 16384
    window: int = 512
    resamples: int = 1000
    every: PositiveInt | Literal["stage"] | None = None
    quantize: Sequence[str] = ()
    efficiency_seconds: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "lengths", None if self.lengths is None else tuple(self.lengths))
        object.__setattr__(self, "quantize", tuple(self.quantize))
        if stray := [name for name in self.metrics if name not in self.tasks and not self._recalls(name)]:
            raise ValueError(f"eval.metrics.{stray[0]} is of a task that is not asked: add it to eval.tasks")
        for name, metric in self.metrics.items():
            _check_own_metric(name, metric)
        if (self.fewshot or 0) > 0 and self.tasks and all(_takes_no_examples(name) for name in self.tasks):
            raise ValueError(
                f"eval.fewshot={self.fewshot}: none of {', '.join(self.tasks)} takes examples: leave it out"
            )
        most = LENGTHS[-1] if RECALL in self.tasks else _LONGEST
        if self.lengths is not None and not (self.lengths and all(LENGTHS[0] <= each <= most for each in self.lengths)):
            raise ValueError(
                f"eval.lengths={list(self.lengths)}: give one or more lengths from {LENGTHS[0]} to {most} tokens"
            )
        if twice := sorted({name for name in self.tasks if self.tasks.count(name) > 1}):
            raise ValueError(f"eval.tasks lists {twice[0]!r} twice")
        for name in self.tasks:
            is_ours(name)
        least = {"limit": 1, "batch_size": 1, "batch_tokens": 1, "tokens": 2, "window": 2, "resamples": 1}
        for key, lowest in (least | {"efficiency_seconds": 0, "fewshot": 0}).items():
            value = getattr(self, key)
            if value is not None and value < lowest:
                raise ValueError(f"eval.{key}={value} must be at least {lowest}")
        if not isinstance(self.every, int | str | None) or isinstance(self.every, bool):
            raise ValueError(f"eval.every={self.every!r}: choose stage, a number of training tokens, or null")
        if self.every != STAGE and (isinstance(self.every, str) or (self.every is not None and self.every < 1)):
            raise ValueError(f"eval.every={self.every}: choose stage, a number of training tokens, or null")

    def _recalls(self, name: str) -> bool:
        """Whether a name is of one of the lengths that `recall` stands for."""
        return RECALL in self.tasks and length_of(name) in (LENGTHS if self.lengths is None else self.lengths)

    @property
    def asks(self) -> bool:
        """Whether there is anything to ask."""
        return bool(self.tasks or self.text)

    @property
    def along(self) -> bool:
        """Whether tasks or text are asked after every stage."""
        return self.every is not None and self.asks

    @property
    def inside(self) -> int | None:
        """Training tokens after which a student is validated inside a stage; None = it is not."""
        return None if isinstance(self.every, str) else self.every


def questions(spec: EvalSpec, tokenizer: PreTrainedTokenizerBase, exclude: Collection[str]) -> dict[str, Question]:
    """What to ask, by task in the order of the spec; `recall` stands for one task per length.

    Raises:
        ValueError: an unknown task, or items that cannot be had.
    """
    names = [name for name in spec.tasks if not is_ours(name)]
    if spec.fewshot and (none := [name for name in spec.tasks if _takes_no_examples(name)]):
        log.warning("eval.fewshot=%d: no examples stand before the questions of %s", spec.fewshot, ", ".join(none))
    found: dict[str, Question] = {}
    options: dict[str, Any] = {"limit": spec.limit, "seed": spec.seed}
    if names:
        ways: dict[str, Any] = {
            "exclude": exclude,
            "task_dir": spec.task_dir,
            "fewshot": spec.fewshot,
            "metrics": spec.metrics,
        }
        made_for: dict[str, Any] = {"tokenizer": tokenizer, "lengths": spec.lengths or ()}
        with Busy("reading the tasks"):
            drawn = harness.draw(names, data_dir=spec.data_dir, **options, **ways, **made_for)
            found |= {each.name: each for each in drawn}
    for name in spec.tasks:
        if name in WRITTEN:
            found[name] = read_passages(name, spec.data_dir, fewshot=spec.fewshot, exclude=exclude, **options)
        elif is_ours(name):
            for each, items in _items(name, spec, tokenizer).items():
                free = [item for item in items if not item.among(exclude)]
                if not free:
                    raise ValueError(f"task {each!r}: layers were selected by all of its {len(items)} items")
                found[each] = free if spec.limit is None else subset(free, spec.limit, spec.seed)
    asked = [each for name in spec.tasks for each in found if each == name or (name == RECALL and length_of(each))]
    return {name: found[name] for name in dict.fromkeys(asked)}


def _items(name: str, spec: EvalSpec, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Item]]:
    """Items of a task that is scored here; several where the name stands for several."""
    if name == COPY:
        return {name: copy_items(COPY_POOL)}
    if name in (COPY_DOC, COPY_PARA):
        return {name: copying_items(name, POOL)}
    if name == CBT_SENTENCE:
        return {name: read_sentences(spec.data_dir)}
    length = length_of(name)
    count = POOL if spec.limit is None else spec.limit
    with Busy("making texts to recall from"):
        lengths = (spec.lengths or LENGTHS) if length is None else (length,)
        return {recall_name(each): recall_items(tokenizer, each, count, spec.seed) for each in lengths}


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Mapping[str, Question],
    spec: EvalSpec,
    who: str,
    tell: Tell,
    frame: Framing,
) -> dict[str, Scored]:
    """Scores of a model by task. Raises ValueError for a metric that a task does not have, and as scorers do."""
    scores = {}
    for number, (name, question) in enumerate(asked.items(), 1):
        step = partial(tell, f"{who}, task {number} of {len(asked)}, texts of {name}")
        metric = spec.metrics.get(name, spec.metrics.get(RECALL) if length_of(name) else None)
        if isinstance(question, Drawn):
            scores[name] = harness.score(model, tokenizer, question, batch_size=spec.batch_size, step=step, frame=frame)
        elif name in WRITTEN:
            passages = [each for each in question if isinstance(each, Passage)]
            options: dict[str, Any] = {"metric": metric, "step": step, "frame": frame}
            scores[name] = write_and_score(model, tokenizer, name, passages, **options)
        else:
            items = [each for each in question if isinstance(each, Item)]
            scores[name] = _scored(model, tokenizer, name, items, metric, spec.batch_tokens, step, frame)
    return scores


def passages_of(
    question: Sequence[Item] | Sequence[Passage], tokenizer: PreTrainedTokenizerBase, length: int = PASSAGE
) -> Tensor | None:
    """All passages [N, length] of the texts of a task of ours; None where its texts are shorter than one."""
    items = [one.item if isinstance(one, Passage) else one for one in question]
    texts = dict.fromkeys("".join(item.pairs[item.gold]) for item in items)
    found = [torch.tensor(ids) for ids in tokenizer(list(texts), add_special_tokens=False).input_ids]
    rows = [ids.unfold(0, length, 1) for ids in found if len(ids) >= length]
    return torch.cat(rows) if rows else None


def digest_of(question: Question) -> str:
    """Hex SHA-256 of the texts of a task of ours, in order; "" for one of the harness, whose `source` says as much."""
    if isinstance(question, Drawn):
        return ""
    items = [one.item if isinstance(one, Passage) else one for one in question]
    return hashlib.sha256(json.dumps([[one.contexts, one.continuations] for one in items]).encode()).hexdigest()


def _scored(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    items: Sequence[Item],
    metric: str | None,
    batch_tokens: int,
    step: Callable[[int, int], None],
    frame: Framing,
) -> Scored:
    alone = name == CBT_SENTENCE
    usual = "acc_token" if alone else "acc" if length_of(name) else "led"
    frame = Framing() if alone else frame
    result = ask(model, tokenizer, items, batch_tokens=batch_tokens, step=step, frame=frame, first_given=alone)
    chance = sum(1 / len(item.pairs) for item in items) / len(items) if alone else 0.0
    return Scored(CHOICE if alone else GENERATION, metric or usual, chance, result)
