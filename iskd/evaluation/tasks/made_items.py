"""Tasks that need no files of items: recall over a distance, and copying of documents; their items are made here.

    recall_N    "{key} is {value}." somewhere in the first half of N tokens of other words, then "{key} is": greedy
                decoding must give the value. N counts the tokens of the whole text with whatever tokenizer asks
    copy_doc    a document, then its first words: greedy decoding must repeat the rest
    copy_para   a document of numbered paragraphs, then the number and the first word of one: it must repeat the rest

Source: recall: S-NIAH of RULER (arXiv 2404.06654), with words instead of numbers; copying: tasks cp_doc and cp_para of
LLMTF, by which ILD (arXiv 2511.05085) scores layers. Documents are Python's own docstrings, which are on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice

from transformers import PreTrainedTokenizerBase

from iskd.data.sources import Docstrings
from iskd.evaluation.tasks.task_items import WORDS, Item

RECALL, COPY_DOC, COPY_PARA = "recall", "copy_doc", "copy_para"
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
POOL = 1000
_WORDS_OF_DOC = (25, 90)
_WORDS_OF_PARA = (6, 40)
_PARAGRAPHS = 4
_DOCUMENTS = 1500


def recall_name(length: int) -> str:
    """The name of the task at a length."""
    return f"{RECALL}_{length}"


def length_of(name: str) -> int | None:
    """The length that a task's name asks for; None where it is no name of one.

    Raises:
        ValueError: a length that there is not.
    """
    head, _, tail = name.partition(f"{RECALL}_")
    if head or not tail.isdecimal():
        return None
    length = int(tail)
    if not LENGTHS[0] <= length <= LENGTHS[-1]:
        raise ValueError(f"task {name!r}: the length must be between {LENGTHS[0]} and {LENGTHS[-1]} tokens")
    return length


def recall_items(tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int = 0) -> list[Item]:
    """Items of at most `length` tokens, fewer than a word short of it; the n-th is the same whatever `count`.

    Raises:
        ValueError: the tokenizer needs more tokens than that for the fact and the question alone.
    """
    return [_recall(tokenizer, length, random.Random(f"{seed}/{length}/{n}"), n) for n in range(count)]


def _recall(tokenizer: PreTrainedTokenizerBase, length: int, draw: random.Random, number: int) -> Item:
    key, value = draw.sample(WORDS, 2)
    others = [word for word in WORDS if word not in (key, value)]
    depth = draw.random() / 2
    fact, query, answer = f"{key} is {value}.", f"{key} is", f" {value}"

    def text(filler: int) -> str:
        words = random.Random(number).choices(others, k=filler)
        sentences = [" ".join(words[i : i + 8]) + "." for i in range(0, filler, 8)]
        place = round(depth * len(sentences))
        return " ".join([*sentences[:place], fact, *sentences[place:], query])

    def tokens(filler: int) -> int:
        return len(tokenizer(text(filler) + answer, add_special_tokens=False).input_ids)

    least = tokens(0)
    if least > length:
        raise ValueError(
            f"{recall_name(length)}: this tokenizer needs {least} tokens for a fact and its question alone; ask for a "
            "greater length"
        )
    low, high = 0, length  # words: tokens(low) fits, and a word is a token at least
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= length else (low, middle)
    return Item(f"{recall_name(length)}-{number}", (text(low),), (answer,), 0)


def copying_items(name: str, count: int, seed: int = 0) -> list[Item]:
    """Items of `copy_doc` or `copy_para`, drawn from the documents by the seed."""
    make = _document if name == COPY_DOC else _paragraph
    items = list(islice(make(), 20 * POOL))
    random.Random(seed).shuffle(items)
    return items[:count]


def _texts(bounds: tuple[int, int]) -> Iterator[str]:
    """Paragraphs of the documents as single lines of so many words, each once."""
    seen = set[str]()
    for document, _ in Docstrings(max_documents=_DOCUMENTS).documents():
        for paragraph in document.split("\n\n"):
            words = paragraph.split()
            text = " ".join(words)
            plain = text.isascii() and sum(character.isalpha() or character == " " for character in text) > 0.9 * len(
                text
            )
            if bounds[0] <= len(words) <= bounds[1] and plain and text not in seen:
                seen.add(text)
                yield text


def _document() -> Iterator[Item]:
    for number, text in enumerate(_texts(_WORDS_OF_DOC)):
        first, rest = _cut(text, 3)
        yield Item(f"{COPY_DOC}-{number}", (f"Text: {text}\n\nText: {first}",), (rest,), 0)


def _paragraph() -> Iterator[Item]:
    texts = _texts(_WORDS_OF_PARA)
    for number, group in enumerate(iter(lambda: list(islice(texts, _PARAGRAPHS)), [])):
        if len(group) == _PARAGRAPHS:
            asked = number % _PARAGRAPHS
            listed = "\n".join(f"Paragraph {n}: {text}" for n, text in enumerate(group, 1))
            first, rest = _cut(group[asked], 1)
            context = f"{listed}\n\nParagraph {asked + 1}: {first}"
            yield Item(f"{COPY_PARA}-{number}", (context,), (rest,), 0)


def _cut(text: str, words: int) -> tuple[str, str]:
    """The first words of a text, and the rest with the space before it."""
    cut = len(" ".join(text.split(" ")[:words]))
    return text[:cut], text[cut:]
