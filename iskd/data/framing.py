"""What stands in front of a document, behind it and between two: the one rule for all text that a model is shown.

A model that was trained with a begin token in front of every text is another model without it. So a document is
framed as the tokenizer frames a text by itself, `tokenizer(text)`; how, is read off what it does. `data.bos` decides
otherwise:

    null       the tokenizer's own template; where that adds nothing, an end token between documents
    document   a begin token in front of every document
    window     a begin token at the head of every window, an end token between documents
    none       an end token between documents and nothing else, as iskd 0.1 had it
    bare       nothing at all: a document follows the other, as ISKD's authors have it

Which of them is right is a fact about the model and no rule: docs/data.md has figures.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from iskd.models.packing import Separator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

BOS = ("document", "window", "none", "bare")
_PROBES = ("The cat sat on the mat.", "12 a b c", "x")


@dataclass(frozen=True)
class Framing:
    """Token ids around documents.

    Attributes:
        head: in front of every document.
        tail: behind every document.
        between: between two documents.
        window: at the head of every window.
    """

    head: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    window: tuple[int, ...] = ()

    @property
    def front(self) -> tuple[int, ...]:
        """What stands before a text that is shown alone: a task's context, a prompt."""
        return self.head or self.window

    @property
    def plain(self) -> bool:
        """Whether documents are joined by something between them and that is all, as iskd 0.1 did."""
        return not (self.head or self.tail or self.window)

    @property
    def separator(self) -> Separator | None:
        """The token that tells documents apart, and whether it begins or ends one; None = nothing does."""
        ends = self.tail[-1:] or self.between[-1:]
        if self.head:
            return Separator(self.head[0], begins=True)
        if self.window and self.window[:1] == ends:
            return Separator(ends[0], begins=True)  # the same token heads the window and goes with what follows
        return Separator(ends[0]) if ends else None

    def framed(self, ids: Sequence[int], *, first: bool) -> tuple[list[int], int]:
        """A document as it goes into a stream, and where its own tokens begin in that.

        Args:
            ids: the document's tokens.
            first: of its stream: nothing stands before it.
        """
        before = [*(() if first else self.between), *self.head]
        return [*before, *ids, *self.tail], len(before)

    def headed(self, values: Sequence[int], seq_len: int, at: int, filler: int | None = None) -> list[int]:
        """Values that go into a stream from place `at` on, with the head of a window wherever one begins.

        Args:
            values: framed tokens, or one value for each of them.
            seq_len: tokens per window, its head among them.
            at: how many the stream holds so far.
            filler: what stands for a token of the head among values that are no tokens.
        """
        if not self.window:
            return list(values)
        heads = list(self.window) if filler is None else [filler] * len(self.window)
        out: list[int] = []
        for value in values:
            if (at + len(out)) % seq_len == 0:
                out += heads
            out.append(value)
        return out

    def told(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The framing in words, for a console."""

        def names(ids: tuple[int, ...]) -> str:
            return " ".join(map(str, tokenizer.convert_ids_to_tokens(list(ids))))

        said = " ".join(part for part in (names(self.head), "TEXT", names(self.tail)) if part)
        between = f", {names(self.between)} between" if self.between else ""
        window = f", {names(self.window)} at the head of every window" if self.window else ""
        return f"a document is framed as {said}{between}{window}"

    def to_json(self) -> dict[str, list[int]]:
        """Plain JSON values."""
        return {key: list(ids) for key, ids in asdict(self).items()}


def framing_of(tokenizer: PreTrainedTokenizerBase, bos: str | None = None) -> Framing:
    """How documents are framed for the models of a tokenizer.

    Args:
        tokenizer: fast or slow.
        bos: `data.bos`: one of `BOS`; None = the tokenizer's own template.

    Raises:
        ValueError: an unknown `bos`, or a begin token is asked for and there is none.
    """
    if bos not in (None, *BOS):
        raise ValueError(
            f"data.bos={bos!r} is unknown; use {', '.join(BOS)}, or null for what the tokenizer itself does"
        )
    _, end = separator(tokenizer)
    between = () if end is None else (end,)
    if bos == "none":
        return Framing(between=between)
    if bos == "bare":
        return Framing()
    head, tail = template(tokenizer)
    if bos is None:
        return Framing(head, tail) if head or tail else Framing(between=between)
    begin = head or begin_token(tokenizer, bos)
    if bos == "window":
        return Framing(tail=tail, between=() if tail else between, window=begin)
    return Framing(begin, tail)


def begin_token(tokenizer: PreTrainedTokenizerBase, bos: str) -> tuple[int]:
    """The tokenizer's bos token. Raises ValueError where it has none."""
    token = tokenizer.bos_token_id
    if not isinstance(token, int):
        raise ValueError(
            f"data.bos={bos} puts the tokenizer's bos token in front, and {type(tokenizer).__name__} has none: set "
            "data.bos=none, or give the tokenizer a bos_token that the model was trained with"
        )
    return (token,)


def template(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What `tokenizer(text)` puts in front of a text and behind it, found by looking at what it does.

    Flags and files that should say so (`add_bos_token`, post-processors) are not asked: what counts is what comes out.

    Raises:
        ValueError: it does more to a text than put tokens around it.
    """
    found: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for text in _PROBES:
        bare, whole = encoded(tokenizer, text), list(tokenizer(text, verbose=False)["input_ids"])
        if not bare:  # a vocabulary without these letters
            continue
        places = [at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare]
        # several where a template adds a token that is the text's too, as the unknown one: of these the other probes
        options = {(tuple(whole[:at]), tuple(whole[at + len(bare) :])) for at in places}
        found = found & options if found else options
        if not found:
            break
    if not found:
        whole = list(tokenizer("", verbose=False)["input_ids"])
        if any(encoded(tokenizer, text) for text in _PROBES):
            raise ValueError(
                f"{type(tokenizer).__name__} does more to a text than put tokens around it, so that documents cannot "
                "be framed as it does: set data.bos=none, document or window"
            )
        return tuple(whole), ()
    return min(found)


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text without anything around them."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def separator(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int | None]:
    """Return the name and id of the token between documents: eos, else bos, else ("none", None)."""
    for name, token in (("eos", tokenizer.eos_token_id), ("bos", tokenizer.bos_token_id)):
        if isinstance(token, int):
            return name, token
    return "none", None
