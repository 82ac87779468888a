"""Conversations to tokens by the tokenizer's chat template, and which of the tokens are the assistant's.

Where the template marks answers (`{% generation %}`), the marks are taken. Where it does not, an answer is found by
rendering: it reaches from where the conversation before it, with the prompt for an answer, ends in the whole text, to
where the conversation up to it ends. The token that ends a turn belongs to the answer, space behind it does not. A turn
that a template writes otherwise once something follows it (such as one whose reasoning is dropped) has no such place
in the whole text: it is left out, counted and told.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from iskd.data.files.chat import messages_of
from iskd.data.framing import BOS, Framing, begin_token, encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOSSES = ("all", "assistant")
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# what Llama's templates say where no date is given; today's would make other tokens every day
_DATE = "26 Jul 2024"
_DAY = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri"}
_SAME_DAY = (  # in the place of the function of that name, as a template takes none from outside
    "{% macro strftime_now(form) %}{{ form"
    + "".join(f" | replace('{code}', '{value}')" for code, value in _DAY.items())
    + " }}{% endmacro %}"
)
_TURNS = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
_KNOWN = {"role", "content", "name", "id", "tool_call_id"}  # `content` is looked for by words: templates may cut it

Message = dict[str, Any]


class ChatTemplate:
    """The chat template of a tokenizer, and what is learned of a conversation.

    Args:
        tokenizer: the teacher's.
        loss: `all` tokens or the `assistant`'s (`data.chat.loss`).
        bos: `data.bos`; None = as the template has it.

    Attributes:
        framing: what the template puts in front of a conversation, as the framing of documents has it.
        left_out: answers without a place in the text so far.
        merged: conversations whose system message went to the user so far.
        dropped: roles of messages that the template does not write, with how many conversations hold one so far.
        unwritten: keys of messages whose text the template does not write (`reasoning_content`), counted alike.
        untaught: conversations of which nothing is learned so far.

    Raises:
        ValueError: there is no template, an unknown `loss` or `bos`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss: str, bos: str | None = None) -> None:
        if loss not in LOSSES:
            raise ValueError(f"data.chat.loss={loss!r} is unknown; use all, assistant, or null for rows of text")
        if bos not in (None, *BOS):
            raise ValueError(f"data.bos={bos!r} is unknown; use {', '.join(BOS)}, or null for what the template does")
        try:
            self.template = str(tokenizer.get_chat_template())
        except ValueError as error:
            raise ValueError(
                f"data.chat.loss={loss} needs a chat template, and {type(tokenizer).__name__} has none that could be "
                "taken: use an instruct model as the teacher, or put its chat_template.jinja beside tokenizer.json; "
                "for rows of plain text set data.chat.loss=null"
            ) from error
        if "strftime_now" in self.template:
            self.template = _SAME_DAY + self.template
        self.loss, self._tokenizer = loss, tokenizer
        self._marked = bool(_MARK.search(self.template))
        self.left_out = self.merged = self.untaught = 0
        self.dropped: Counter[str] = Counter()
        self.unwritten: Counter[str] = Counter()
        if loss == "assistant" and self._marked and not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} cannot tell where answers are: use a fast tokenizer")
        self.framing = self._framing(bos)

    @property
    def marks_targets(self) -> bool:
        """Whether some tokens are not to be learned."""
        return self.loss == "assistant"

    def recipe(self) -> dict[str, str]:
        """What decides tokens and targets, beside the tokenizer."""
        return {"loss": self.loss, "template": hashlib.sha256(self.template.encode()).hexdigest()}

    def check_apart(self) -> None:
        """Raise ValueError unless a token of its own begins every conversation (`data.boundaries`)."""
        head = self.framing.head
        inside = encoded(self._tokenizer, self._render(_TURNS, None)) if head else []
        if not head or inside.count(head[0]) > 1:
            raise ValueError(
                "data.boundaries=true needs a token that stands at the beginning of a conversation and nowhere in it, "
                "and this chat template has none: set data.boundaries=false"
            )

    def encode(self, document: str) -> tuple[list[int], list[bool] | None]:
        """Tokens of a conversation without its framing, and which are targets; None = all.

        Raises:
            ValueError: the template refuses the conversation.
        """
        messages, tools = messages_of(document)
        messages, text = self._rendered(messages, tools)
        self.dropped.update({str(message["role"]) for message in messages if not _is_written(message, text)})
        self.unwritten.update({key for message in messages for key in _unwritten(message, text)})
        if self.loss == "all":
            return self._headless(encoded(self._tokenizer, text), None)
        ids, targets = self._answers(messages, tools, text)
        self.untaught += not any(targets)
        return self._headless(ids, targets)

    def _answers(self, messages: list[Message], tools: Any, text: str) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation, and which are of answers that are to be learned."""
        if self._marked:
            options: dict[str, Any] = {"return_dict": True, "return_assistant_tokens_mask": True, "verbose": False}
            found: Any = self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=True, chat_template=self.template, date_string=_DATE, **options
            )
            ids, marked = list(found["input_ids"]), [bool(one) for one in found["assistant_masks"]]
            if all(map(_is_learned, messages)):
                return ids, marked
            # marks do not say whose they are
            _, within = self._by_place(text, self._spans(messages, tools, text))
            return ids, [one and other for one, other in zip(marked, within, strict=True)]
        return self._by_place(text, self._spans(messages, tools, text))

    # ---- text -------------------------------------------------------------------------------------------------------

    def _render(self, messages: Sequence[Message], tools: Any, *, prompt: bool = False) -> str:
        options: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt, "date_string": _DATE}
        return str(
            self._tokenizer.apply_chat_template(list(messages), tokenize=False, chat_template=self.template, **options)
        )

    def _rendered(self, messages: list[Message], tools: Any) -> tuple[list[Message], str]:
        """The conversation as the template takes it, and its text."""
        try:
            return messages, self._render(messages, tools)
        except Exception as error:  # a template computes, and fails in any way it likes
            refused = error
        if joined := _system_in_user(messages):
            try:
                text = self._render(joined, tools)
            except Exception as error:
                refused = error
            else:
                self.merged += 1
                return joined, text
        roles = ", ".join(str(message["role"]) for message in messages)
        raise ValueError(
            f"the chat template refuses a conversation ({refused!s:.200}): its roles are {roles}, its first message "
            f"begins {messages[0]['content'][:80]!r}; mend or drop the row, or give the tokenizer another chat template"
        ) from refused

    def _spans(self, messages: Sequence[Message], tools: Any, text: str) -> list[tuple[int, int]]:
        """First and last-plus-one character of every answer in the text of the whole conversation."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or not _is_learned(message):
                continue
            span = self._span(messages, number, tools, text) if number else None
            if span is None:
                self.left_out += 1
            else:
                spans.append(span)
        return spans

    def _span(self, messages: Sequence[Message], number: int, tools: Any, text: str) -> tuple[int, int] | None:
        try:
            before, prompted = (self._render(messages[:number], tools, prompt=prompt) for prompt in (False, True))
            after = text if number == len(messages) - 1 else self._render(messages[: number + 1], tools)
        except Exception:  # a template that wants to see the end of a conversation
            return None
        # a prompt may say more than the text has there, as the mark that begins reasoning
        start, end = _shared(prompted, text), len(text[: _shared(after, text)].rstrip())
        said = str(messages[number]["content"]).strip()
        found = start >= len(before.rstrip()) and end > start and said[-40:] in text[start:end]
        found = found and _is_written({**messages[number], "content": ""}, text[start:end])  # its tool calls
        return (start, end) if found else None

    # ---- tokens -----------------------------------------------------------------------------------------------------

    def _by_place(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Tokens of a text, and which of them lie within the spans of characters."""
        if not self._tokenizer.is_fast:
            return self._by_prefix(text, spans)
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets: Any = found["offset_mapping"]
        within = [any(start <= a < b <= end for start, end in spans) for a, b in offsets]
        return list(found["input_ids"]), within

    def _by_prefix(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """The same for a tokenizer that does not tell places: by the number of tokens of what stands before."""
        ids = encoded(self._tokenizer, text)
        within = [False] * len(ids)
        for span in spans:
            places = []
            for place in span:
                before = encoded(self._tokenizer, text[:place])
                if ids[: len(before)] != before:
                    raise ValueError(
                        f"{type(self._tokenizer).__name__} joins an answer to what stands around it, and does not tell "
                        "where: use a fast tokenizer, or data.chat.loss=all"
                    )
                places.append(len(before))
            within[places[0] : places[1]] = [True] * (places[1] - places[0])
        return ids, within

    def _framing(self, bos: str | None) -> Framing:
        token = self._tokenizer.bos_token_id
        ids = encoded(self._tokenizer, self._rendered(_TURNS[:2], None)[1])
        own = (token,) * _opening(ids, token) if isinstance(token, int) else ()
        if bos is None:
            return Framing(head=own)
        if bos == "none":
            return Framing()
        begin = begin_token(self._tokenizer, bos)
        return Framing(window=begin) if bos == "window" else Framing(head=begin)

    def _headless(self, ids: list[int], targets: list[bool] | None) -> tuple[list[int], list[bool] | None]:
        """Without the begin tokens that the template wrote, which are the framing's to set."""
        head = self.framing.head
        at = len(head) if head and tuple(ids[: len(head)]) == head else 0
        at = max(at, _opening(ids, self._tokenizer.bos_token_id))
        return ids[at:], None if targets is None else targets[at:]


def _opening(ids: Sequence[int], token: Any) -> int:
    """How many begin tokens open a conversation: none where the token stands elsewhere too, as one of every turn."""
    count = next((at for at, each in enumerate(ids) if each != token), len(ids))
    return count if list(ids).count(token) == count else 0


def _is_written(message: Message, text: str) -> bool:
    """Whether a message is in the text: the longest word of its end, and the names of the tools that it calls."""
    words = re.findall(r"[A-Za-z0-9]+", str(message["content"])[-200:])
    calls = [call.get("function") for call in message.get("tool_calls") or () if isinstance(call, dict)]
    names = [str(call.get("name", "")) for call in calls if isinstance(call, dict)]
    return all(word in text for word in (max(words, key=len, default=""), *names))


def _is_learned(message: Message) -> bool:
    return message.get("train") is not False


def _unwritten(message: Message, text: str) -> list[str]:
    """Keys of a message whose text is not in the text, by its end; space may differ."""
    values = {key: " ".join(value.split())[-40:] for key, value in message.items() if isinstance(value, str)}
    others = {key: end for key, end in values.items() if key not in _KNOWN and re.search(r"\w", end)}
    flat = " ".join(text.split()) if others else ""
    return [key for key, end in others.items() if end not in flat]


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _system_in_user(messages: Sequence[Message]) -> list[Message]:
    """The conversation with its system message at the head of the first user's; empty where there is none to move."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return []
    joined = f"{messages[0]['content']}\n\n{messages[1]['content']}".strip()
    return [{**messages[1], "content": joined}, *messages[2:]]
