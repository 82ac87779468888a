r"""Items of tasks, read from local files into one form: which continuation follows which context.

A task is the file DATA_DIR/NAME/eval.jsonl, one JSON object a line with a field `id`. Prompts are those of
lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.12608602), zero shot; every continuation starts with a space:

    hellaswag       "{activity_label}: {ctx}" + each of `endings`, both cleaned of WikiHow's marks
    piqa            "Question: {goal}\nAnswer:" + sol1, sol2
    arc_easy, arc_challenge    "{query}\nAnswer:" + each of `choices`; the query starts with "Question: "
    openbookqa, copa           "{query}" + each of `choices`
    boolq           "{query}\nAnswer:" + no, yes; the harness has no "Passage: " before the passage, so it is dropped
    mmlu            "{question}\nA. ...\nB. ...\nC. ...\nD. ...\nAnswer:" + A, B, C, D; no line names the subject
    winogrande, winograd_wsc   each of `context_options` + the `continuation`: which context makes it likelier
    lambada         `text` up to its last space + the last word, which greedy decoding must give
    blimp           nothing + sentence_good, sentence_bad: the likelier sentence
    cbt             the `sentences`, then the `question` up to its XXXXX + each of `options` with what follows XXXXX
    copy            made here, no file: random words, shown once; given the first, greedy decoding must repeat the rest

The harness has no cbt, the Children's Book Test (Hill et al. 2016, arXiv 1511.02301), so that it is read from a local
file alone. A line has the fields of the data set on the hub: `sentences` (20 texts), `question` (the 21st sentence with
XXXXX in the place of a word), `options` (ten words) and `answer` (one of them). How likely a word and the rest of the
sentence are, given all that stands before, is how Radford et al. (GPT-2, 2019, section 3.2) score it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from iskd.system.faults import UnavailableError
from iskd.system.files import expanded, read_plain

COPY = "copy"
CBT_SENTENCE = "cbt_sentence"
COPY_POOL = 1000
_LONGEST = 1 << 30  # bytes of a file of items
_GAP = "XXXXX"  # where the word stood
_WORDS = (
    "apple arrow basket bell bird boat bottle bread bridge brush bucket button cake candle carpet chair cheese church "
    "clock cloud coat corn cow crown desk dog door dress drum duck egg engine farm feather fence field fish flag "
    "flower forest fork garden glass glove grass hammer hat honey horse house island jacket kettle key kitchen knife "
    "ladder lake lamp leaf letter lion map market milk mirror moon mountain mouse nail nest ocean onion orange paper "
    "pencil piano pillow plate pocket potato queen rabbit ring river road roof rope rose salt school shirt shoe snow "
    "soap spoon star stone sugar table tent tiger tower train tree wagon wall watch water wheel window wolf wood"
)
WORDS = tuple(_WORDS.split())
_T = TypeVar("_T")


@dataclass(frozen=True)
class Item:
    """One question: n continuations of one context, or n contexts of one continuation.

    A single context with a single continuation is right when greedy decoding gives the continuation.

    Attributes:
        id: the item's name within its task.
        contexts, continuations: texts; one of the two holds a single one.
        gold: index of the right one among the several.
        group: items of one group (the questions on one passage) stay on one side of a split; "" = those that share
            their contexts.
        twin: `sha256` of the same question in the form of another task (`cbt`, `cbt_sentence`); "" = there is none.

    Raises:
        ValueError: the texts do not fit together, a continuation is blank, or `gold` is not one of them.
    """

    id: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int
    group: str = ""
    twin: str = ""

    def __post_init__(self) -> None:
        if min(len(self.contexts), len(self.continuations)) != 1:
            raise ValueError(
                f"an item has one context or one continuation, not {len(self.contexts)} and {len(self.continuations)}"
            )
        if not all(text.strip() for text in self.continuations):
            raise ValueError(f"a continuation is blank: {self.continuations}")
        if not 0 <= self.gold < len(self.pairs):
            raise ValueError(f"the right answer is number {self.gold}, but there are {len(self.pairs)}, counted from 0")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(context, continuation) of every choice."""
        return [(context, continuation) for context in self.contexts for continuation in self.continuations]

    @property
    def sha256(self) -> str:
        """Hash of the texts in hex, whatever the item's name and the order of its choices."""
        return hashlib.sha256(json.dumps([sorted(self.contexts), sorted(self.continuations)]).encode()).hexdigest()

    def among(self, hashes: Collection[str]) -> bool:
        """Whether the question, in whatever form, is one of those with these `sha256`."""
        return self.sha256 in hashes or self.twin in hashes


def read_task(name: str, data_dir: str | Path, limit: int | None = None, seed: int = 0) -> list[Item]:
    """The items of a task, in the order of its file.

    Args:
        name: a key of `TASKS`, or `copy`.
        data_dir: folder that holds NAME/eval.jsonl; not read for the task `copy`.
        limit: at most so many items, drawn as in `subset`; None = all.
        seed: of the draw.

    Raises:
        ValueError: an unknown task, no such file, or a line that is not an item of the task.
    """
    check_task(name)
    items = copy_items(COPY_POOL) if name == COPY else list(_read(name, Path(expanded(data_dir))))
    return items if limit is None else subset(items, limit, seed)


def check_task(name: str) -> None:
    """Raise ValueError, with the nearest name, unless `name` is a task."""
    known = (*TASKS, COPY)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown task {name!r}: {hint}known tasks are {', '.join(known)}")


def subset(items: Sequence[Item], limit: int, seed: int = 0) -> list[Item]:
    """At most `limit` items, drawn by a hash of seed and text, in the given order; a larger draw contains a smaller.

    Raises:
        ValueError: `limit` is below 1.
    """
    if limit < 1:
        raise ValueError(f"the limit must be at least 1 item, got {limit}")
    drawn = sorted(range(len(items)), key=lambda i: _hash(seed, items[i].sha256))[:limit]
    return [items[i] for i in sorted(drawn)]


def subset_of(values: Sequence[_T], keys: Sequence[str], limit: int, seed: int) -> list[_T]:
    """At most `limit` values, drawn by a hash of seed and key, in the given order."""
    drawn = sorted(range(len(values)), key=lambda i: _hash(seed, keys[i]))[:limit]
    return [values[i] for i in sorted(drawn)]


def read_sentences(data_dir: str | Path | None) -> list[Item]:
    """The items of `cbt_sentence`: of DATA_DIR/cbt_sentence or DATA_DIR/cbt, without such a file those of the hub.

    Source: the evaluation of ISKD (COLING 2025): the sentence with each of ten words in its gap and nothing before it;
    the one of the least mean loss over its tokens counts.

    Raises:
        ValueError: they cannot be had.
    """
    folder = None if data_dir is None else Path(expanded(data_dir))
    for name in (CBT_SENTENCE, "cbt"):
        if folder is not None and (folder / name / "eval.jsonl").is_file():
            return list(_read(name, folder, Task(_sentence, TASKS["cbt"].fields, TASKS["cbt"].hub)))
    try:
        from datasets import load_dataset

        rows = load_dataset("cam-cst/cbt", "CN", split="test", trust_remote_code=False)
        return [_sentence(dict(row), f"{CBT_SENTENCE}-{number}") for number, row in enumerate(rows)]
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UnavailableError(
            f"the data of task {CBT_SENTENCE!r} is neither on this machine nor did the hub give it ({first:.300}). "
            "Offline: put its items (cam-cst/cbt, CN, on the hub) into DIR/cbt/eval.jsonl, one JSON object a line with "
            f"the fields id, {TASKS['cbt'].fields}, and set eval.data_dir=DIR"
        ) from error


def split_items(items: Sequence[Item], share: float, seed: int = 0) -> tuple[list[Item], list[Item]]:
    """Split into items to select by (about `share` of them) and items to report on.

    The side of an item follows from its group's hash alone, so that it is the same whatever else is read, and twins
    (questions on one passage, continuations of one sentence) are never apart.

    Raises:
        ValueError: `share` is not between 0 and 1, or one side is empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of items to select by must be between 0 and 1, got {share}")
    below = [_hash(seed, _group(item)) < share * 16**64 for item in items]
    sides = [[item for item, here in zip(items, below, strict=True) if here is side] for side in (True, False)]
    if not all(sides):
        raise ValueError(f"splitting {len(items)} items at {share} leaves one side empty: use more items")
    return sides[0], sides[1]


def copy_items(count: int, words: int = 10, seed: int = 0) -> list[Item]:
    """Lists of different random words to be repeated from the second word on; the n-th is the same whatever `count`.

    The first word is given: without it a model may write something else there, and nothing would be measured.

    Raises:
        ValueError: `count` is below 1, or there are not so many words.
    """
    if count < 1 or not 2 <= words <= len(WORDS):
        raise ValueError(f"need at least 1 list of 2 to {len(WORDS)} words, got {count} lists of {words} words")
    draw = random.Random(seed)
    lists = [draw.sample(WORDS, words) for _ in range(count)]
    return [
        _choice(f"copy-{seed}-{number}", f"Words: {', '.join(drawn)}\nWords: {drawn[0]},", [", ".join(drawn[1:])], 0)
        for number, drawn in enumerate(lists)
    ]


def _hash(seed: int, text: str) -> int:
    return int(hashlib.sha256(f"{seed}\n{text}".encode()).hexdigest(), 16)


def _group(item: Item) -> str:
    return item.group or "\n".join(sorted(item.contexts)) or "\n".join(sorted(item.continuations))


def _read(name: str, data_dir: Path, reading: Task | None = None) -> Iterator[Item]:
    task, file = reading or TASKS[name], data_dir / name / "eval.jsonl"
    if not file.is_file():
        raise UnavailableError(
            f"task {name!r} has no local file {file}: put its items there, one JSON object a line with the fields "
            f"id, {task.fields} (the hub has them as {task.hub}), or set data_dir to the folder of {name}/eval.jsonl"
        )
    ids: set[str] = set()
    for number, line in enumerate(lines_of(file), 1):
        if line.strip():
            try:
                row = json.loads(line)
                item = task.make(row, _text(row, "id"))
                if item.id in ids:
                    raise ValueError(f"id {item.id!r} was there before")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}, line {number} is no item of {name}: {error}") from error
            ids.add(item.id)
            yield item
    if not ids:
        raise ValueError(f"{file} holds no items")


def lines_of(file: Path) -> list[str]:
    """The lines of a file of items. Raises ValueError where it is no UTF-8 text, or no plain file."""
    try:
        return read_plain(file, max_bytes=_LONGEST, links=True).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}); convert it, or fetch it again") from error


def _field(row: Any, name: str) -> Any:
    if not isinstance(row, dict) or name not in row:
        raise ValueError(f"no field {name!r} in {row!s:.200}")
    return row[name]


def _text(row: Any, name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {name!r} must be a text, not {value!r:.200}")
    return value


def _texts(row: Any, name: str) -> list[str]:
    values = _field(row, name)
    if not isinstance(values, list) or len(values) < 2 or not all(isinstance(value, str) for value in values):
        raise ValueError(f"field {name!r} must be a list of at least 2 texts, not {values!r:.200}")
    return values


def _gold(row: Any, name: str) -> int:
    value = _field(row, name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"field {name!r} must be the index of the right answer, not {value!r:.200}")
    return value


def _choice(id_: str, context: str, choices: Sequence[str], gold: int, group: str = "") -> Item:
    return Item(id_, (context,), tuple(f" {choice}" for choice in choices), gold, group)


def _clean(text: str) -> str:
    """Without the marks that WikiHow articles left in HellaSwag."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _hellaswag(row: Any, id_: str) -> Item:
    context = _clean(f"{_text(row, 'activity_label')}: {_text(row, 'ctx')}")
    return _choice(id_, context, [_clean(ending) for ending in _texts(row, "endings")], _gold(row, "label"))


def _piqa(row: Any, id_: str) -> Item:
    choices = [_text(row, "sol1"), _text(row, "sol2")]
    return _choice(id_, f"Question: {_text(row, 'goal')}\nAnswer:", choices, _gold(row, "label"))


def _query(row: Any, id_: str) -> Item:
    return _choice(id_, _text(row, "query"), _texts(row, "choices"), _gold(row, "gold"))


def _query_answer(row: Any, id_: str) -> Item:
    return _choice(id_, f"{_text(row, 'query')}\nAnswer:", _texts(row, "choices"), _gold(row, "gold"))


def _boolq(row: Any, id_: str) -> Item:
    query = _text(row, "query").removeprefix("Passage: ")
    passage = query.rpartition("\nQuestion:")[0]
    return _choice(id_, f"{query}\nAnswer:", _texts(row, "choices"), _gold(row, "gold"), passage)


def _mmlu(row: Any, id_: str) -> Item:
    choices, letters = _texts(row, "choices"), "ABCDEFGHIJ"
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=False)]
    context = "\n".join([_text(row, "question").strip(), *lines, "Answer:"])
    return _choice(id_, context, letters[: len(choices)], _gold(row, "answer"))


def _two_contexts(row: Any, id_: str) -> Item:
    continuation = f" {_text(row, 'continuation')}"
    return Item(id_, tuple(_texts(row, "context_options")), (continuation,), _gold(row, "gold"))


def _lambada(row: Any, id_: str) -> Item:
    context, _, word = _text(row, "text").rpartition(" ")
    return _choice(id_, context, [word], 0)


def _blimp(row: Any, id_: str) -> Item:
    return _choice(id_, "", [_text(row, "sentence_good"), _text(row, "sentence_bad")], 0)


def _cbt(row: Any, id_: str) -> Item:
    return replace(_cbt_alone(row, id_), twin=_sentence_alone(row, id_).sha256)


def _cbt_alone(row: Any, id_: str) -> Item:
    before, gap, after = _text(row, "question").partition(_GAP)
    options, answer = _texts(row, "options"), _text(row, "answer")
    if not gap:
        raise ValueError(f"field 'question' has no {_GAP}, the place of the word: {row['question']!r:.200}")
    if answer not in options:
        raise ValueError(f"field 'answer' must be one of the options, not {answer!r:.200}")
    context = " ".join([*_texts(row, "sentences"), before]).strip()
    return _choice(id_, context, [option + after for option in options], options.index(answer))


def _sentence(row: Any, id_: str) -> Item:
    told = isinstance(row, dict) and "sentences" in row  # what the sentence alone is asked without
    return replace(_sentence_alone(row, id_), twin=_cbt_alone(row, id_).sha256 if told else "")


def _sentence_alone(row: Any, id_: str) -> Item:
    before, gap, after = _text(row, "question").partition(_GAP)
    options, answer = _texts(row, "options"), _text(row, "answer")
    if not gap or answer not in options:
        raise ValueError(f"field 'question' needs {_GAP}, and 'answer' one of the options: {row!s:.200}")
    return Item(id_, ("",), tuple(before + option + after for option in options), options.index(answer))


@dataclass(frozen=True)
class Task:
    """How a task's lines become items: the function, the fields that a line must have, the data set on the hub."""

    make: Callable[[Any, str], Item]
    fields: str
    hub: str


_CHOICES = "query, choices, gold"
_CONTEXTS = "context_options, continuation, gold"
TASKS: dict[str, Task] = {
    "hellaswag": Task(_hellaswag, "activity_label, ctx, endings, label", "Rowan/hellaswag"),
    "piqa": Task(_piqa, "goal, sol1, sol2, label", "ybisk/piqa"),
    "arc_easy": Task(_query_answer, _CHOICES, "allenai/ai2_arc, ARC-Easy"),
    "arc_challenge": Task(_query_answer, _CHOICES, "allenai/ai2_arc, ARC-Challenge"),
    "openbookqa": Task(_query, _CHOICES, "allenai/openbookqa"),
    "copa": Task(_query, _CHOICES, "aps/super_glue, copa"),
    "boolq": Task(_boolq, _CHOICES, "google/boolq"),
    "mmlu": Task(_mmlu, "question, choices, answer", "cais/mmlu"),
    "winogrande": Task(_two_contexts, _CONTEXTS, "allenai/winogrande, winogrande_xl"),
    "winograd_wsc": Task(_two_contexts, _CONTEXTS, "ErnestSDavis/winograd_wsc, wsc273"),
    "lambada": Task(_lambada, "text", "EleutherAI/lambada_openai"),
    "blimp": Task(_blimp, "sentence_good, sentence_bad", "nyu-mll/blimp"),
    "cbt": Task(_cbt, "sentences, question, options, answer", "cam-cst/cbt, CN or NE"),
}
