"""Laws of chat data: rows of any shape are one conversation, and what is learned is exactly the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from iskd.data import TextData, TextFiles
from iskd.data.chat_template import ChatTemplate
from iskd.data.coding import Coding
from iskd.data.files.chat import conversation, messages_of
from iskd.evaluation import measure_quality
from iskd.losses.ce import CrossEntropy
from iskd.losses.hidden import HiddenMatch
from iskd.losses.kl import KL
from iskd.models import IGNORE
from iskd.models.packing import with_successor
from iskd.models.signals import next_tokens
from iskd.models.tokenizers import byte_tokenizer
from iskd.plan import Record
from iskd.training.step import DistillModule, OptimSpec
from tests.factories import louder, tiny

PROMPT = "{% if add_generation_prompt %}[assistant]{% endif %}"
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}.\n{% endfor %}" + PROMPT
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}."
    "{% endgeneration %}{% else %}{{ m.content }}.{% endif %}{{ '\n' }}{% endfor %}" + PROMPT
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
# reasoning is kept in the last answer alone, and a prompt for an answer opens it
THINKING = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}.\n{% endfor %}{% if add_generation_prompt %}[assistant]<think>{% endif %}"
)
HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
LONG = [*HI, {"role": "user", "content": "so"}, {"role": "assistant", "content": "no"}]


def tokenizer_of(template: str | None, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    for name, token in special.items():
        setattr(tokenizer, name, token)
    tokenizer.chat_template = template
    return tokenizer


def document(messages: list[dict[str, Any]]) -> str:
    return conversation({"messages": messages}, "row 1")


def learned(template: str, messages: list[dict[str, Any]]) -> tuple[str, str]:
    """The text of a conversation, and what of it is learned, one character in the place of each token."""
    ids, targets = ChatTemplate(tokenizer_of(template), "assistant").encode(document(messages))
    assert targets is not None
    return bytes(ids).decode(), "".join(chr(i) if on else "_" for i, on in zip(ids, targets, strict=True))


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "marks"])
def test_the_answers_are_learned_and_nothing_else(template: str) -> None:
    text, marked = learned(template, LONG)
    assert text == "[user]hi.\n[assistant]yes.\n[user]so.\n[assistant]no.\n"
    assert marked == "_" * len("[user]hi.\n[assistant]") + "yes." + "_" * len("\n[user]so.\n[assistant]") + "no." + "_"


def test_a_template_that_rewrites_the_past_loses_only_that() -> None:
    text, marked = learned(THINKING, LONG)
    assert text.endswith("[assistant]<think></think>no.\n")
    assert marked.strip("_") == "</think>no."
    chat = ChatTemplate(tokenizer_of(THINKING), "assistant")
    chat.encode(document(LONG))
    assert chat.left_out == 1, "and that is told"


def test_a_system_message_that_a_template_refuses_goes_to_the_user() -> None:
    messages = [{"role": "system", "content": "be kind"}, *HI]
    assert learned(NO_SYSTEM, messages)[0] == "[user]be kind\n\nhi.\n[assistant]yes.\n"
    assert learned(PLAIN, messages)[0].startswith("[system]be kind.")
    with pytest.raises(ValueError, match=r"refuses a conversation \(System role not supported\): its roles are system"):
        learned(NO_SYSTEM, [{"role": "system", "content": "be kind"}, HI[1]])


LOOK = {"type": "function", "function": {"name": "look_up", "arguments": {"q": "x"}}}
USERS = "{% for m in messages %}{% if m.role == 'user' %}[user]{{ m.content }}.\n{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "messages", "roles"),
    [
        (PLAIN, LONG, []),
        (USERS, [HI[0], {"role": "assistant", "content": "yes indeed"}], ["assistant"]),
        (USERS, [{"role": "system", "content": "be kind"}, HI[0]], ["system"]),
        (PLAIN, [HI[0], {"role": "assistant", "content": "", "tool_calls": [LOOK]}], ["assistant"]),
        (PLAIN.replace(".\n", "{{ m.tool_calls }}.\n"), [HI[0], {**HI[1], "tool_calls": [LOOK]}], []),
        (THINKING, LONG, []),
    ],
)
def test_what_a_template_does_not_write_is_told(
    template: str, messages: list[dict[str, Any]], roles: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    coding = Coding.of(tokenizer_of(template), chat_loss="assistant", seq_len=8)
    assert coding.chat is not None
    ((_, targets),) = coding.encode([document(messages)], tokenizer_of(template))
    coding.tell()
    assert list(coding.chat.dropped) == roles
    assert [
        role for role in ("system", "assistant") if f"does not write what the role {role!r}" in caplog.text
    ] == roles
    assert any(targets or ()) is (not roles), "no empty answer is learned in the place of a call"
    assert ("nothing is learned of 1 conversations" in caplog.text) is bool(roles)


def test_text_in_other_keys_that_a_template_does_not_write_is_told(caplog: pytest.LogCaptureFixture) -> None:
    thought = [HI[0], {**HI[1], "reasoning_content": "yes,\n  I think", "name": "Ann", "thinking": ""}]
    for template, told in {PLAIN: True, PLAIN.replace(".\n", "{{ m.reasoning_content }}.\n"): False}.items():
        caplog.clear()
        coding = Coding.of(tokenizer_of(template), chat_loss="all", seq_len=8)
        coding.encode([document(thought), document(thought)], tokenizer_of(template))
        coding.tell()
        assert ("does not write what messages hold under 'reasoning_content', in 2" in caplog.text) is told
        assert len(caplog.records) == told


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "marks"])
def test_answers_of_no_weight_are_not_learned(template: str) -> None:
    text, whole = learned(template, LONG)
    for key, value in {"weight": 0, "train": False}.items():
        for number, answer in {1: "yes.", 3: "no."}.items():
            messages = [{**message, "weight": 1} for message in LONG]
            messages[number][key] = value
            assert learned(template, messages) == (text, whole.replace(answer, "_" * len(answer)))
    assert document([{**message, "weight": 1, "train": True} for message in LONG]) == document(LONG)


def test_a_template_that_cannot_be_computed_is_one_sentence() -> None:
    for template in ("{% if %}", "{{ 1 // 0 }}", "{{ range(99999999) | list }}", "{{ messages[0].content.x() }}"):
        with pytest.raises(ValueError, match="the chat template refuses a conversation"):
            ChatTemplate(tokenizer_of(template), "assistant")


def test_a_date_in_a_template_is_the_same_every_day() -> None:
    dated = "{{ date_string }}; {{ strftime_now('%d %B %Y') }}" + PLAIN
    assert learned(dated, HI)[0].startswith("26 Jul 2024; 26 July 2024[user]hi.")


def test_a_model_without_a_template_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"data\.chat\.loss=all needs a chat template.*chat_template\.jinja"):
        ChatTemplate(tokenizer_of(None), "all")
    with pytest.raises(ValueError, match=r"data\.chat\.loss='answers' is unknown; use all, assistant"):
        ChatTemplate(tokenizer_of(PLAIN), "answers")


def test_rows_of_every_shape_are_one_document() -> None:
    rows: list[dict[str, Any]] = [
        {"messages": HI},
        {"messages": [{**message, "name": None} for message in HI], "prompt": None},
        {"messages": json.dumps(HI)},
        {"messages": {"role": ["user", "assistant"], "content": ["hi", "yes"]}},
        {"messages": [HI[0], {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}], "tools": "[]"},
        {"messages": [{"role": "user", "content": ["h", {"type": "input_text", "text": "i"}]}, HI[1]]},
        {"prompt": "hi", "completion": "yes"},
        {"prompt": HI[:1], "completion": HI[1:]},
        {"prompt": "hi", "completion": HI[1:], "other": 3},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes", "weight": None}]},
        {"messages": HI, "system": ""},
    ]
    assert len({conversation(row, "row") for row in rows}) == 1
    assert messages_of(conversation(rows[0], "row")) == (HI, None)
    kind = {"role": "system", "content": "be kind"}
    rows = [{**row, "system": "be kind"} for row in rows] + [{"messages": [kind, *HI], "system": "be kind"}]
    assert {conversation(row, "row") for row in rows} == {document([kind, *HI])}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "hi"}, r"f, line 3 is no chat: it has the fields \['text'\]; give rows with `messages`, or"),
        ({"prompt": "hi"}, "is no chat"),
        ({"messages": []}, "field 'messages' is empty, not a list of messages"),
        ({"messages": "hi"}, "is a text and no list of messages"),
        ({"messages": [{"content": "hi"}]}, r"message 1 has no role, only \['content'\]"),
        (
            {"messages": [HI[0], {"role": "assistant", "content": 3}]},
            "message 2 has no `content` that is text, but int",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1 holds image: only text"),
        ({"messages": HI, "tools": "look"}, "field 'tools' is a text and no JSON"),
        ([1], "is list, not a row of fields"),
        *(
            (
                {"messages": [HI[0], {"role": role, "content": "yes"}]},
                rf"message 2 has the role '{role}', .*jq -c .*{role}",
            )
            for role in ("gpt", "model", "Assistant", "bot")
        ),
        ({"conversations": [{"from": "bing", "value": "yes"}]}, "message 1 has the role 'bing'"),
        ({"prompt": "hi", "completion": HI[:1]}, "'completion' holds no message of role assistant"),
        ({"messages": [{**HI[0], "weight": 0.5}]}, r"has weight 0\.5: write 0"),
        ({"messages": [{"role": "system", "content": "a"}], "system": "b"}, "two system messages"),
        ({"messages": HI, "system": 3}, "`system` as int"),
    ],
)
def test_rows_that_are_no_chat_are_named(row: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        conversation(row, "f, line 3")


def test_the_begin_token_of_a_template_is_the_framings() -> None:
    with_bos = tokenizer_of("{{ bos_token }}" + PLAIN, eos_token="a")
    assert ChatTemplate(with_bos, "all").framing.head == (256,)
    ids, _ = ChatTemplate(with_bos, "all").encode(document(HI))
    assert 256 not in ids, "it is set once, by the framing"
    ChatTemplate(with_bos, "all").check_apart()
    with pytest.raises(ValueError, match=r"data\.boundaries=true needs a token that stands at the beginning of a conv"):
        ChatTemplate(tokenizer_of(PLAIN), "all").check_apart()
    assert ChatTemplate(tokenizer_of(PLAIN), "all", "document").framing.head == (256,)
    twice = tokenizer_of("{{ bos_token }}{{ bos_token }}" + PLAIN, eos_token="a")
    for bos, count in {None: 2, "document": 1, "none": 0}.items():
        chat = ChatTemplate(twice, "all", bos)
        assert chat.framing.head == (256,) * count
        assert 256 not in chat.encode(document(HI))[0]


def test_labels_are_the_next_tokens_that_are_targets() -> None:
    """By hand: a position learns the token behind it, so the end of the question learns how the answer begins."""
    ids, targets = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[False, False, True, True, False]])
    assert next_tokens(ids, targets).tolist() == [[IGNORE, 7, 8, IGNORE, IGNORE]]
    assert with_successor(ids, None, targets).tolist() == [1, 2]
    assert next_tokens(ids, torch.ones_like(targets)).tolist() == next_tokens(ids).tolist()


def chats(path: Path, loss: str | None, **options: Any) -> TextData:
    rows = [{"messages": [{"role": "user", "content": f"question {n} " * (1 + n % 9)}, HI[1]]} for n in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys: dict[str, Any] = {"seq_len": 32, "batch_size": 2, "val_tokens": 320, **options}
    source = TextFiles(str(path), chat=loss is not None)
    return TextData(source, tokenizer_of(PLAIN), cache_dir=path.parent / "cache", chat_loss=loss, **keys)


def answers(ids: Tensor, targets: Tensor) -> str:
    return "".join(chr(i) for i, on in zip(ids.flatten().tolist(), targets.flatten().tolist(), strict=True) if on)


def test_targets_go_with_their_windows(tmp_path: Path) -> None:
    """Through shards, batches and both held-out splits; a window that holds no answer is in none of them."""
    module = chats(tmp_path / "chats.jsonl", "assistant")
    batches = [*module.train_dataloader(), *module.validation(), *module.calibration_batches(320)]
    for batch in batches:
        assert batch["targets"].dtype == torch.bool
        assert batch["targets"][:, 1:].any(dim=1).all()
        assert set(answers(batch["input_ids"], batch["targets"])) <= set("yes.")
    assert module.manifest()["train_windows"] < len(module.windows("train"))
    moved = module.on_before_batch_transfer(batches[0], 0)
    labels = next_tokens(batches[0]["input_ids"], batches[0]["targets"])
    assert torch.equal(moved["kept"], (labels != IGNORE).flatten().nonzero().squeeze(1))
    whole = chats(tmp_path / "chats.jsonl", "all")
    assert "targets" not in next(iter(whole.train_dataloader()))
    assert module.manifest()["cache"] != whole.manifest()["cache"], "shards are keyed by what is learned"
    shard = tmp_path / "cache" / module.manifest()["cache"] / "train.targets.bin"
    shard.write_bytes(b"\1" * shard.stat().st_size)
    with pytest.raises(ValueError, match=r"train\.targets\.bin does not have the SHA-256"):
        chats(tmp_path / "chats.jsonl", "assistant").prepare()


def test_chats_are_not_read_as_text_nor_texts_as_chats(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no field 'text', only \['messages'\].*for chats data\.chat\.loss=assistant"):
        chats(tmp_path / "chats.jsonl", None).prepare()
    path = tmp_path / "prose.txt"
    path.write_text("once upon a time")
    with pytest.raises(ValueError, match="is read as plain text, and chats are rows"):
        list(TextFiles(str(path), chat=True).documents())


def test_every_term_and_measure_sees_targets_alone() -> None:
    """What stands at other positions changes nothing, and the slow way, by the answers' own numbers, agrees."""
    teacher, student = louder(tiny("llama")), louder(tiny("llama", seed=1))
    terms = {"ce": (CrossEntropy(), 1.0), "kl": (KL(), 1.0), "hidden": (HiddenMatch(), 1.0)}
    module = DistillModule(student, teacher, terms, OptimSpec(), Record(4))
    ids = torch.randint(3, 101, (2, 12), generator=torch.Generator().manual_seed(0))
    targets = torch.zeros_like(ids, dtype=torch.bool)
    targets[0, 3:6] = targets[1, 11] = True
    result = module.step(ids, targets=targets)
    with torch.no_grad():
        log_q, log_p = (model(ids).logits.log_softmax(-1) for model in (student, teacher))
    at = [(0, 2), (0, 3), (0, 4), (1, 10)]  # the positions in front of the targets
    nll = [-log_q[b, t, ids[b, t + 1]] for b, t in at]
    kl = [(log_p[b, t].exp() * (log_p[b, t] - log_q[b, t])).sum() for b, t in at]
    assert float(result.terms["ce"]) == pytest.approx(float(torch.stack(nll).mean()), rel=1e-4)
    assert float(result.terms["kl"]) == pytest.approx(float(torch.stack(kl).mean()), rel=1e-4)
    assert float(result.terms["hidden"]) != pytest.approx(float(module.step(ids).terms["hidden"]), rel=1e-3)
    batch = {"input_ids": ids, "targets": targets}
    empty = {"input_ids": ids, "targets": torch.zeros_like(targets)}
    found = measure_quality(student, teacher, [batch, empty])
    assert found["nll"] == pytest.approx(float(torch.stack(nll).mean()), rel=1e-4)
    assert found["kl"] == pytest.approx(float(torch.stack(kl).mean()), rel=1e-4)
