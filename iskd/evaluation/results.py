"""What was measured about a finished student: evaluation.json and efficiency.json of a run, written and read.

A number that is not known is NaN, and null in the file. So is one that a file lacks, or that is no number: a page about
ten measurements must not fail because of the eleventh. What else an evaluation.json says is kept in `Evaluation.rest`.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, OnErrorOmit, PlainValidator

from iskd.evaluation.tasks.made_items import length_of
from iskd.plan.run_files import EFFICIENCY_FILE, EVALUATION_FILE
from iskd.system import Json
from iskd.system.reading import between, is_number, read_as


def _only(kind: type[Any], otherwise: Any) -> BeforeValidator:
    """What is no `kind` counts as `otherwise`."""
    return BeforeValidator(lambda value: value if isinstance(value, kind) else otherwise)


def _items(value: Any) -> tuple[Any, ...]:
    """What is no list counts as none."""
    return tuple(value) if isinstance(value, list) else ()


def _plain(value: Any, digits: int | None = None) -> Any:
    """Strict JSON: null for numbers that are not finite, the others rounded to so many decimals."""
    if isinstance(value, dict):
        return {str(key): _plain(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, digits) for item in value]
    if isinstance(value, float):
        return None if not math.isfinite(value) else value if digits is None else round(value, digits)
    return value


Known = Annotated[float, PlainValidator(lambda value: value if is_number(value) else math.nan)]
Word = Annotated[str, _only(str, "")]
Facts = Annotated[Json, _only(dict, {})]

_LISTS = ("quantized", "positions")
"""Keys of evaluation.json that are there where something was measured."""
_HELD = ("text", "models", "settings")
"""Keys of evaluation.json that are fields, where their values are of the right kind."""


def _bounds(value: Any) -> Any:
    return value if value is None or isinstance(value, dict) else {"value": value}


def _by_length(found: tuple[AtContext, ...]) -> tuple[AtContext, ...]:
    return tuple(at for _, at in sorted({at.context: at for at in found}.items()))


def _reasons(told: Any) -> dict[int, str]:
    rows = told.items() if isinstance(told, dict) else ()
    known = {int(at): why for at, why in rows if at.isdecimal() and len(at) < 18 and isinstance(why, str)}
    return dict(sorted(known.items()))


# ---- efficiency.json -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AtContext:
    """One model at one context length.

    Attributes:
        context: Tokens of the context.
        prefill_seconds: Time to read the whole context; NaN where it was not read and the cache filled instead.
        decode_seconds_per_token: Time of one more token after it.
        cache_bytes: Keys and values, or the mixers' states, held between two tokens.
        cache_held_bytes: The memory behind these, more where they are views.
        peak_memory_bytes: Of the weights and what the context takes on top; of decoding alone where it was not read.
        repeats: How often it was timed.
    """

    context: Annotated[int, between(1)]
    prefill_seconds: Known = math.nan
    decode_seconds_per_token: Known = math.nan
    cache_bytes: Known = math.nan
    cache_held_bytes: Known = math.nan
    peak_memory_bytes: Known = math.nan
    repeats: Known = math.nan


@dataclass(frozen=True)
class Measured:
    """Size and speed of one model; contexts ascending, each length once; why others were left out, by length."""

    params: Known = math.nan
    bytes: Known = math.nan
    dtype: Word = ""
    peak_memory_bytes: Known = math.nan
    contexts: Annotated[tuple[OnErrorOmit[AtContext], ...], BeforeValidator(_items), AfterValidator(_by_length)] = ()
    left_out: Annotated[dict[int, str], PlainValidator(_reasons)] = field(default_factory=dict)

    def at(self, context: int) -> AtContext | None:
        """The measurement at a context length, None where there is none."""
        return next((found for found in self.contexts if found.context == context), None)


@dataclass(frozen=True)
class Efficiency:
    """efficiency.json: the machine, and what both models, or one of them, cost on it."""

    machine: Any = None
    teacher: Annotated[Measured | None, _only(dict, None)] = None
    student: Annotated[Measured | None, _only(dict, None)] = None

    @property
    def models(self) -> dict[str, Measured]:
        """What was measured, by name, the teacher first."""
        both = {"teacher": self.teacher, "student": self.student}
        return {name: model for name, model in both.items() if model is not None}

    def to_json(self) -> Json:
        """Plain JSON values."""
        return {"machine": self.machine} | {name: _plain(asdict(model)) for name, model in self.models.items()}


def efficiency_of(value: Any) -> Efficiency:
    """What efficiency.json holds.

    Raises:
        ValueError: It is no JSON object, or holds neither model.
    """
    found = read_as(Efficiency, _whole(value, EFFICIENCY_FILE), EFFICIENCY_FILE, others=True)
    if found.teacher is None and found.student is None:
        raise ValueError(f"{EFFICIENCY_FILE} holds neither 'teacher' nor 'student': measure the run again")
    return found


# ---- evaluation.json -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A number and the bounds of its interval."""

    value: Known
    low: Known = math.nan
    high: Known = math.nan


_Bounds = Annotated[Interval | None, BeforeValidator(_bounds)]
_NO_SHARES = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "log_p")
"""Metrics of nats, bits and their powers, which may be below 1 all the same."""


@dataclass(frozen=True)
class TaskScore:
    """A task's scores, in [0, 1] but for a few metrics (perplexities).

    Attributes:
        task: its name.
        kind, metric, chance: as in `iskd.evaluation.scores.Scored`.
        items: how many both models were asked.
        student, teacher: means over the items, or the number of all of them where a metric is no mean (MCC, a
            perplexity); the teacher's is None when there is none.
        student_error, teacher_error: standard errors of the two; nan for one item.
        difference: student - teacher, None without a teacher.
        retention: student / teacher, None without a teacher, nan when the teacher gets nothing right.
        metrics: means of all metrics of the task, by `student` and `teacher`.
    """

    task: Annotated[str, BeforeValidator(str)]
    kind: Word = ""
    metric: Word = ""
    items: Known = math.nan
    chance: Known = math.nan
    student: Known = math.nan
    student_error: Known = math.nan
    teacher: Known | None = None
    teacher_error: Known | None = None
    difference: _Bounds = None
    retention: _Bounds = None
    metrics: Facts = field(default_factory=dict)

    @property
    def per_cent(self) -> bool:
        """Whether the scores are shares, told in per cent, and no perplexities or the like."""
        large = any(value is not None and abs(value) > 1 for value in (self.student, self.teacher))
        return not large and self.metric.partition(",")[0] not in _NO_SHARES


@dataclass(frozen=True)
class TextScore:
    """How well a text is predicted; lower = better.

    Attributes:
        tokens, bytes: scored; the first token of each window is not, nor what frames documents.
        windows: how many.
        sha256: of the windows' token ids, in hex.
        perplexity, bits_per_byte: the student's.
        teacher_perplexity, teacher_bits_per_byte: None without a teacher.
        difference, low, high: student - teacher in nats per token, with a 95 % bootstrap interval over windows.
    """

    tokens: Known = math.nan
    bytes: Known = math.nan
    windows: Known = math.nan
    sha256: Word = ""
    perplexity: Known = math.nan
    bits_per_byte: Known = math.nan
    teacher_perplexity: Known | None = None
    teacher_bits_per_byte: Known | None = None
    difference: Known | None = None
    low: Known | None = None
    high: Known | None = None


@dataclass(frozen=True)
class AtPosition:
    """Loss on a text at some positions of its windows; lower = better.

    Attributes:
        first, last: how many tokens stand before the scored ones in their windows.
        tokens: scored.
        student, teacher: nats per token; nan for a model that cannot read so many at once, None without a teacher.
    """

    first: Annotated[int, between(1)]
    last: Annotated[int, between(1)]
    tokens: Known = math.nan
    student: Known = math.nan
    teacher: Known | None = None


@dataclass(frozen=True)
class Quantized:
    """The student with its weights in fewer bits, by torchao; the first of several rows is the student as it is.

    Attributes:
        kind: `int8`, `int4`, or the dtype of the student as it is.
        bytes: of its weights.
        perplexity: on the text of `TextScore`.
        tokens_per_s: written after a short context, one at a time, in turns with the student as it is.
        why: what kept it from being measured; empty where nothing did.
    """

    kind: Word
    bytes: Known = math.nan
    perplexity: Known = math.nan
    tokens_per_s: Known = math.nan
    why: Word = ""


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json; equal for equal models, data, settings and machine, but for the speeds of `quantized`.

    Attributes:
        tasks: in the order asked for.
        retention: mean over the tasks of a kind, by kind; empty without a teacher. Tasks of which the teacher gets
            nothing right are left out.
        mean_retention: mean over the tasks of all kinds; None without a teacher, or when none is left.
        text: perplexity and bits per byte; None when no text was given.
        models: what identifies the `student` and the `teacher`: hash, sizes, dtype of the weights.
        settings: what was asked for, hashes of the data, device, precision, versions; no paths and no times.
        rest: what a file says that no field does, as it stands there: keys of others, and values of another kind.
        quantized: the student in fewer bits, where that was asked for.
        positions: losses on the text by position.
    """

    tasks: tuple[TaskScore, ...]
    retention: dict[str, Interval]
    mean_retention: _Bounds
    text: Annotated[TextScore | None, _only(dict, None)]
    models: Facts
    settings: Facts
    rest: Json = field(default_factory=dict)
    quantized: Annotated[tuple[OnErrorOmit[Quantized], ...], BeforeValidator(_items)] = ()
    positions: Annotated[tuple[OnErrorOmit[AtPosition], ...], BeforeValidator(_items)] = ()

    @property
    def mean(self) -> Interval:
        """Mean retention over all tasks: as told, or that of the one kind there is, or computed; nan without any."""
        if self.mean_retention is not None and not math.isnan(self.mean_retention.value):
            return self.mean_retention
        if len(self.retention) == 1:
            return next(iter(self.retention.values()))
        values = [task.retention.value for task in self.tasks if task.retention is not None]
        known = [value for value in values if math.isfinite(value)]
        return Interval(sum(known) / len(known) if known else math.nan)

    def limit(self, who: str) -> float:
        """Most tokens that the `student` or the `teacher` reads at once; inf = any number, or not told."""
        told = self.models.get(who)
        limit: Any = told.get("limit") if isinstance(told, dict) else None
        return float(limit) if is_number(limit) else math.inf

    def recall(self, who: str) -> list[tuple[int, float, float]]:
        """Tokens, score and standard error (nan = not known) of every `recall_N` that `who` can read."""
        found = []
        for task in self.tasks:
            with suppress(ValueError):  # a length that there is not: a task of somebody else's
                length, score = length_of(task.task), getattr(task, who)
                if length and length <= self.limit(who) and score is not None and math.isfinite(score):
                    error = getattr(task, f"{who}_error")
                    found.append((length, float(score), math.nan if error is None else float(error)))
        return sorted(found)

    def loss_by_position(self, who: str) -> list[tuple[int, float]]:
        """Last position and nats per token of every span that the student or teacher can read."""
        found = ((at.last, getattr(at, who)) for at in self.positions)
        return sorted((last, float(nats)) for last, nats in found if nats is not None and math.isfinite(nats))

    @property
    def about(self) -> Json:
        """All but scores and retention, as plain JSON, keys in order."""
        told = {key: value for key, value in asdict(self).items() if key in _HELD}
        return json.loads(json.dumps(_plain({**told, **self.rest}), sort_keys=True))

    def to_json(self) -> str:
        """JSON text; numbers rounded to 6 decimals, null for those that are not finite."""
        values = asdict(self)
        rest = values.pop("rest")
        for key in _LISTS:
            if not values[key]:
                del values[key]
        return json.dumps(_plain({**values, **rest}, 6), indent=1, sort_keys=True) + "\n"


def evaluation_of(value: Any) -> Evaluation:
    """What evaluation.json holds; tasks that are no list of objects and no object of them are in `rest`.

    Raises:
        ValueError: It is no JSON object.
    """
    rest = dict(_whole(value, EVALUATION_FILE))
    tasks, by_kind = _named(rest.get("tasks")), rest.get("retention")
    told: Json = {"tasks": tasks or [], "retention": {}, "mean_retention": rest.pop("mean_retention", None)}
    if tasks is not None:
        del rest["tasks"]
    if isinstance(by_kind, dict) and all(isinstance(each, dict) for each in by_kind.values()):
        told["retention"] = {kind: {"value": None, **each} for kind, each in rest.pop("retention").items()}
    told |= {key: rest.get(key) for key in _HELD} | {key: rest.pop(key, None) for key in _LISTS}
    found = read_as(Evaluation, told, EVALUATION_FILE, others=True)
    held = {key: value for key, value in asdict(found).items() if key in _HELD}
    rest = {key: value for key, value in rest.items() if key not in held or not _same(value, held[key])}
    return replace(found, rest=rest)


def _same(value: Any, held: Any) -> bool:
    """Whether a field says all that stood in the file."""
    return json.dumps(_plain(value, 6), sort_keys=True) == json.dumps(_plain(held, 6), sort_keys=True)


def _named(value: Any) -> list[Json] | None:
    """Tasks that say their name under `task`: listed like that, or an object by name."""
    if isinstance(value, dict) and all(isinstance(scores, dict) for scores in value.values()):
        return [_task({**scores, "task": name}) for name, scores in value.items()]
    if isinstance(value, list) and all(isinstance(scores, dict) and "task" in scores for scores in value):
        return [_task(scores) for scores in value]
    return None


def _task(scores: Json) -> Json:
    """With the bounds of its retention in one object, which may stand beside it."""
    retention = scores.get("retention")
    if retention is None or isinstance(retention, dict):
        return scores
    return {**scores, "retention": {"value": retention, "low": scores.get("low"), "high": scores.get("high")}}


def _whole(value: Any, name: str) -> Json:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must hold a JSON object, got {type(value).__name__}: write it again")
    return value
