"""How documents become the tokens of a stream: what they are, how they are framed, which tokens are to be learned."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from iskd.data.chat_template import ChatTemplate
from iskd.data.framing import Framing, framing_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from iskd.models.packing import Separator

_log = logging.getLogger(__name__)

Coded = tuple[list[int], list[bool] | None]
"""Tokens of a document, and which of them are targets; None = all."""


@dataclass(frozen=True)
class Coding:
    """What is made of a document.

    Attributes:
        framing: what stands around documents.
        seq_len: tokens per window, for what stands at the head of each.
        chat: documents are conversations (`iskd.data.files.chat`); None = they are text.
    """

    framing: Framing
    seq_len: int = 0
    chat: ChatTemplate | None = None

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, *, bos: str | None = None, chat_loss: str | None = None, seq_len: int
    ) -> Coding:
        """The coding that `data.bos` and `data.chat.loss` ask for. Raises ValueError where it cannot be had."""
        if chat_loss is None:
            return cls(framing_of(tokenizer, bos), seq_len)
        chat = ChatTemplate(tokenizer, chat_loss, bos)
        return cls(chat.framing, seq_len, chat)

    def recipe(self) -> dict[str, Any]:
        """What decides the tokens beside the tokenizer: nothing for text as iskd 0.1 had it."""
        found: dict[str, Any] = {}
        if not self.framing.plain or self.chat is not None:
            found["framing"] = self.framing.to_json()
        if self.framing.window:
            found["seq_len"] = self.seq_len
        if self.chat is not None:
            found["chat"] = self.chat.recipe()
        return found

    @cached_property
    def separator(self) -> Separator | None:
        """What tells documents apart; None = nothing does. Raises ValueError where a chat template gets in the way."""
        if self.chat is not None:
            self.chat.check_apart()
        return self.framing.separator

    @property
    def marks_targets(self) -> bool:
        """Whether streams of targets go beside the streams of tokens."""
        return self.chat is not None and self.chat.marks_targets

    def encode(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Coded]:
        """Tokens of documents, without their framing. Raises ValueError where a chat template refuses one."""
        if self.chat is not None:
            return [self.chat.encode(text) for text in texts]
        # verbose=False: a document longer than the model's context is fine here, it is cut into windows
        encoded: Any = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [(list(ids), None) for ids in encoded["input_ids"]]

    def announce(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Log how documents are framed."""
        what = "text" if self.chat is None else f"chats, {self.chat.loss} tokens are learned"
        _log.info("data are %s; %s", what, self.framing.told(tokenizer))

    def tell(self) -> None:
        """Log what was done to documents that nobody asked for in so many words."""
        if self.chat is None:
            return
        if self.chat.merged:
            _log.warning(
                "the chat template takes no system message: in %d conversations it was put at the head of the first "
                "user's message",
                self.chat.merged,
            )
        for role, count in self.chat.dropped.items():
            _log.warning(
                "the chat template does not write what the role %r says, or the tools that it calls, in %d "
                "conversations: these are learned without; name roles as the template does, or give another template",
                role,
                count,
            )
        for key, count in self.chat.unwritten.items():
            _log.warning(
                "the chat template does not write what messages hold under %r, in %d conversations: these are learned "
                "without; put it into `content`, or give another template",
                key,
                count,
            )
        if self.chat.untaught:
            _log.warning(
                "nothing is learned of %d conversations: they have no answer of role assistant that is to be learned "
                "and has a place in the text",
                self.chat.untaught,
            )
        if self.chat.left_out:
            _log.warning(
                "%d answers are not learned: they open a conversation, or the chat template writes them otherwise once "
                "something follows, so that they have no place in the text; a template with {%% generation %%} "
                "marks would tell",
                self.chat.left_out,
            )
