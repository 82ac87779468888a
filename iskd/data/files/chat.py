"""Rows of chat data to conversations, in one form: JSON text of the messages, which is what a source calls a document.

A row holds `messages`, `conversations` (ShareGPT's name for them), or `prompt` and `completion`, each of these a text
or a list of messages, and perhaps `system`; rows of one file may mix. So the same conversation is the same document,
and in the same split, however it was written down.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

ROWS = "\0chat"
"""In the place of a field's name: the row itself is read, as a conversation."""
_FIX = "give rows with `messages`, or with `prompt` and `completion` (docs/data.md)"
# what templates know: an answer under another name would be learned as if it were a question
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_SHAREGPT = {"human": "user", "gpt": "assistant", "function_call": "assistant", "function_response": "tool"}


def conversation(row: Any, where: str) -> str:
    """The document of a row.

    Args:
        row: a mapping of field names to values.
        where: names the row in errors.

    Raises:
        ValueError: the row is no conversation.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {type(row).__name__}, not a row of fields; {_FIX}")
    name = next((name for name in ("messages", "conversations") if row.get(name) is not None), None)
    if name:
        messages = _messages(row[name], f"{where}: field {name!r}")
    elif row.get("prompt") is not None and row.get("completion") is not None:
        answer = _turns(row["completion"], "assistant", f"{where}: field 'completion'")
        if all(message["role"] != "assistant" for message in answer):
            raise ValueError(
                f"{where}: field 'completion' holds no message of role assistant, so there is no answer; {_FIX}"
            )
        messages = [*_turns(row["prompt"], "user", f"{where}: field 'prompt'"), *answer]
    else:
        known = [key for key, value in row.items() if value is not None]
        raise ValueError(f"{where} is no chat: it has the fields {known}; {_FIX}")
    messages = [*_system(row.get("system"), messages, where), *messages]
    tools = _tools(row.get("tools"), where)
    found = {"messages": messages, **({"tools": tools} if tools else {})}
    return json.dumps(found, ensure_ascii=False, sort_keys=True, default=str)


def is_chat(names: Iterable[str]) -> bool:
    """Whether a row of such fields may be a conversation."""
    return bool({"messages", "conversations"} & {*names}) or {"prompt", "completion"} <= {*names}


def _system(value: Any, messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The system message that a row holds beside the others, unless it is one of them."""
    if value is None or value == "":
        return []
    own = [message["content"] for message in messages if message["role"] in ("system", "developer")]
    if not isinstance(value, str) or (own and value not in own):
        what = "two system messages, in `system` and among the others" if own else f"`system` as {type(value).__name__}"
        raise ValueError(f"{where} has {what}; write one, as the first of `messages`")
    return [] if own else [{"role": "system", "content": value}]


def _tools(value: Any, where: str) -> Any:
    if not isinstance(value, str) or not value.strip():  # columns of csv and parquet files may hold JSON
        return value or None
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{where}: field 'tools' is a text and no JSON ({error}); write a list of schemas") from None


def messages_of(document: str) -> tuple[list[dict[str, Any]], Any]:
    """Messages and tools (or None) of a document that `conversation` made."""
    found = json.loads(document)
    return found["messages"], found.get("tools")


def _turns(value: Any, role: str, where: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else _messages(value, where)


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(value, str):  # columns of csv and parquet files may hold JSON
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"{where} is a text and no list of messages; {_FIX}") from None
    if isinstance(value, dict):  # a list of structs that was stored by column
        columns = {key: column for key, column in value.items() if isinstance(column, list)}
        if not columns or len({len(column) for column in columns.values()}) != 1:
            raise ValueError(f"{where} is one mapping and no list of messages; {_FIX}")
        value = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} is {'empty' if value == [] else type(value).__name__}, not a list of messages")
    return [_message(message, f"{where}, message {number}") for number, message in enumerate(value, start=1)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"{where} is {type(message).__name__}, not a mapping with role and content")
    found = {key: value for key, value in message.items() if value is not None}  # what a table fills up with nulls
    if "role" not in found and "from" in found:
        sender = found.pop("from")
        found["role"] = _SHAREGPT.get(sender, sender) if isinstance(sender, str) else sender
        found["content"] = found.pop("value", None)
    role = found.get("role")
    if not isinstance(role, str) or not role.strip():
        raise ValueError(f"{where} has no role, only {sorted(found)}: a message has `role` and `content`")
    if role not in ROLES:
        jq = f"jq -c '(.. | objects | select(.role == {json.dumps(role)})).role = \"assistant\"' FILE > FILE.jsonl"
        fix = f"name it so (where it is the assistant, {jq})"
        raise ValueError(f"{where} has the role {role!r}, and roles are {', '.join(ROLES)}: {fix}")
    content = found.get("content")
    if isinstance(content, list):
        parts = [{"text": part} if isinstance(part, str) else part for part in content]
        kinds = {str(part.get("type", "text")) if isinstance(part, dict) else type(part).__name__ for part in parts}
        if other := sorted(kinds - {"text", "input_text", "output_text"}):
            raise ValueError(f"{where} holds {', '.join(other)}: only text can be learned from; drop the row")
        content = "".join(str(part.get("text") or "") for part in parts)
    if content is None and (found.get("tool_calls") or role == "tool"):
        content = ""
    if not isinstance(content, str):
        raise ValueError(
            f"{where} has no `content` that is text, but {type(content).__name__}; write it as text, or drop the row"
        )
    found = {key: value for key, value in found.items() if key not in ("weight", "train")}
    kept = {} if _is_learned(message, where) else {"train": False}
    return {**found, "role": role, "content": content, **kept}


def _is_learned(message: dict[str, Any], where: str) -> bool:
    """Whether an answer is to be learned, by the two keys that say so."""
    for key in ("weight", "train"):
        value = message.get(key)
        if value not in (None, 0, 1):  # False and True are 0 and 1
            raise ValueError(f"{where} has {key} {value!r}: write 0 (or false) for what is not learned, else 1")
        if value is not None and not value:
            return False
    return True
