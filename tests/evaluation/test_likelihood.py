"""Laws of the tasks: files become items, batches equal one text at a time, blocks are scored by what they give."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iskd.data import Framing
from iskd.evaluation import EvalSpec, likelihood
from iskd.evaluation.batches import Text, stems
from iskd.evaluation.judging import TaskResult, evaluate, judge, paired, pairs_of
from iskd.evaluation.likelihood import Likelihoods, log_likelihoods
from iskd.evaluation.questions import questions
from iskd.evaluation.tasks.task_items import COPY, TASKS, Item, copy_items, read_task, split_items, subset
from iskd.importance.task_accuracy import TaskAccuracy
from iskd.models import Stack, surgery
from iskd.models import project as original
from iskd.models.packing import Separator
from iskd.models.tokenizers import byte_tokenizer
from iskd.plan import Convert, Record, Remove, Replace, Spec
from tests.factories import digest, hooks, mixer_specs, modes, silence, tiny

MIXERS = mixer_specs()
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
ROWS: dict[str, dict[str, Any]] = {
    "hellaswag": {
        "activity_label": "Tea",
        "ctx": "A man [step] sits. he",
        "endings": ["pours [x]it.", "eats"],
        "label": 1,
    },
    "piqa": {"goal": "dry a dish", "sol1": "towel", "sol2": "lake", "label": 0},
    "arc_easy": {"query": "Question: Hot?", "choices": ["sun", "ice", "sea"], "gold": 0},
    "arc_challenge": {"query": "Question: Cold?", "choices": ["sun", "ice", "sea"], "gold": 1},
    "openbookqa": {"query": "A cat is", "choices": ["an animal", "a tool"], "gold": 0},
    "copa": {"query": "It rained, therefore", "choices": ["he got wet.", "he sang."], "gold": 0},
    "boolq": {"query": "Passage: Tea is hot.\nQuestion: is tea hot?", "choices": ["no", "yes"], "gold": 1},
    "mmlu": {"question": " 1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1},
    "winogrande": {"context_options": ["Ann met Bo; Ann", "Ann met Bo; Bo"], "continuation": "left.", "gold": 1},
    "winograd_wsc": {"context_options": ["the cup", "the box"], "continuation": "is small.", "gold": 0},
    "lambada": {"text": "He said it\n\nand then she"},
    "blimp": {"sentence_good": "Cats sleep.", "sentence_bad": "Cats sleeps."},
    "cbt": {
        "sentences": ["It rained .", "Ann ran ."],
        "question": "Then XXXXX fell .",
        "options": ["Ann", "rain", "cat"],
        "answer": "rain",
    },
}
MADE: dict[str, tuple[tuple[str, ...], tuple[str, ...], int]] = {
    "hellaswag": (("Tea: A man sits. he",), (" pours it.", " eats"), 1),
    "piqa": (("Question: dry a dish\nAnswer:",), (" towel", " lake"), 0),
    "arc_easy": (("Question: Hot?\nAnswer:",), (" sun", " ice", " sea"), 0),
    "arc_challenge": (("Question: Cold?\nAnswer:",), (" sun", " ice", " sea"), 1),
    "openbookqa": (("A cat is",), (" an animal", " a tool"), 0),
    "copa": (("It rained, therefore",), (" he got wet.", " he sang."), 0),
    "boolq": (("Tea is hot.\nQuestion: is tea hot?\nAnswer:",), (" no", " yes"), 1),
    "mmlu": (("1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",), (" A", " B", " C", " D"), 1),
    "winogrande": (("Ann met Bo; Ann", "Ann met Bo; Bo"), (" left.",), 1),
    "winograd_wsc": (("the cup", "the box"), (" is small.",), 0),
    "lambada": (("He said it\n\nand then",), (" she",), 0),
    "blimp": (("",), (" Cats sleep.", " Cats sleeps."), 0),
    "cbt": (("It rained . Ann ran . Then",), (" Ann fell .", " rain fell .", " cat fell ."), 1),
}
PAIRS = [
    *[("Question: hot?\nAnswer:", f" {letter}") for letter in "ABCD"],  # told apart by their last byte only
    *[("The cat", text) for text in (" sat", " sat on the mat.", " ran")],  # one begins another
    *[("", " Cats sleep."), ("", "x"), ("ends in spaces  ", " a"), ("\n", "b"), ("x" * 200, " too long")],
    ("caf\u00e9", " \u00fcber"),
    # go on from one context, of which all but the last token is read once
    *[("A man walks into", text) for text in (" a bar", " a barn full of hay", " it")],
    *[("Nobody was ever", text) for text in (" there.", " so")],
]


def write(folder: Path, name: str, *rows: dict[str, Any]) -> Path:
    """Write a task's file, with ids; returns it."""
    file = folder / name / "eval.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"id": f"{name}-{i}", **row}) + "\n" for i, row in enumerate(rows)))
    return file


def model_of(family: str = "llama", **sizes: Any) -> PreTrainedModel:
    """A random model over bytes, peaked enough for its choices to differ."""
    model = tiny(family, vocab=257, context=128, **sizes)
    with torch.no_grad():
        Stack(model).head[0].mul_(20)
    return model


def items_of(words: int = 12) -> list[Item]:
    """Items of all kinds."""
    names = [chr(97 + i) * (1 + i % 5) for i in range(words)]
    several = [Item(f"m{i}", (f"Is it {x}?",), (" yes", f" no {x}", " or so"), i % 3) for i, x in enumerate(names)]
    contexts = [Item(f"w{i}", (f"{x} and b, b", f"{x} and b, {x}"), (" left.",), i % 2) for i, x in enumerate(names)]
    return [*several, *contexts, *[Item(f"l{i}", (f"say {x}",), (f" {x}",), 0) for i, x in enumerate(names)]]


@torch.no_grad()
def one_by_one(model: PreTrainedModel, pairs: list[tuple[str, str]], *, bos: bool = False) -> Likelihoods:
    """The obvious way: bytes, whole logits, one text at a time, token by token."""
    rows = []
    for context, continuation in pairs:
        whole, short = list((context + continuation).encode()), len(context.rstrip().encode())
        if bos or not short:
            whole, short = [256, *whole], short + 1
        targets, ids = whole[short:], whole[:-1][-128:]
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)[-len(targets) :]
        led = 0
        while led < len(targets) and int(log_p[led].argmax()) == targets[led]:
            led += 1
        total = sum(float(log_p[i, target]) for i, target in enumerate(targets))
        hits = sum(int(log_p[i].argmax()) == target for i, target in enumerate(targets))
        rows.append((total, led, len(targets), len(continuation) - continuation.startswith(" "), hits))
    log_p, *counts = zip(*rows, strict=True)
    return Likelihoods(torch.tensor(log_p, dtype=torch.float64), *map(torch.tensor, counts))


def assert_same(found: Likelihoods, reference: Likelihoods) -> None:
    torch.testing.assert_close(found.log_p, reference.log_p, atol=1e-5, rtol=1e-5)
    for name in ("led", "tokens", "characters", "hits"):
        assert torch.equal(getattr(found, name), getattr(reference, name)), name


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_lines_become_items(name: str, tmp_path: Path) -> None:
    write(tmp_path, name, ROWS[name])
    (item,) = read_task(name, tmp_path)
    assert (item.contexts, item.continuations, item.gold) == MADE[name]
    assert item.id == f"{name}-0"


def test_an_unknown_task_gets_a_hint() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'helaswag': did you mean 'hellaswag'\? known tasks are hella"):
        read_task("helaswag", ".")


def test_a_missing_file_says_what_to_put_where(tmp_path: Path) -> None:
    message = r"task 'piqa' has no local file .*piqa/eval\.jsonl: put .* id, goal, sol1, sol2, label \(.*ybisk/piqa"
    with pytest.raises(ValueError, match=message):
        read_task("piqa", tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 is no item of piqa: "),
        ('["x"]', r"line 2 is no item of piqa: no field 'id'"),
        ('{"id": "a", "goal": "x", "sol1": "y", "sol2": "z"}', r"line 2 .* no field 'label'"),
        ('{"id": "a", "goal": 3, "sol1": "y", "sol2": "z", "label": 0}', r"'goal' must be a text, not 3"),
        ('{"id": "a", "goal": "x", "sol1": "y", "sol2": "z", "label": "1"}', r"'label' must be the index .* not '1'"),
        (
            '{"id": "a", "goal": "x", "sol1": "y", "sol2": "z", "label": 2}',
            r"right answer is number 2, but there are 2",
        ),
        ('{"id": "piqa-0", "goal": "x", "sol1": "y", "sol2": "z", "label": 0}', r"id 'piqa-0' was there before"),
    ],
)
def test_a_malformed_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    file = write(tmp_path, "piqa", ROWS["piqa"])
    file.write_text(file.read_text() + line)
    with pytest.raises(ValueError, match=message):
        read_task("piqa", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": "It fell ."}, "line 1 is no item of cbt: field 'question' has no XXXXX"),
        ({"answer": "dog"}, "'answer' must be one of the options, not 'dog'"),
        ({"options": ["rain"]}, "'options' must be a list of at least 2 texts"),
    ],
)
def test_a_cloze_needs_a_gap_and_its_answer(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, "cbt", {**ROWS["cbt"], **changes})
    with pytest.raises(ValueError, match=message):
        read_task("cbt", tmp_path)


def test_bad_files_and_items_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no items"):
        read_task("piqa", write(tmp_path, "piqa").parents[1])
    write(tmp_path, "blimp").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_task("blimp", tmp_path)
    with pytest.raises(ValueError, match="one context or one continuation, not 2 and 2"):
        Item("a", ("x", "y"), ("x", "y"), 0)
    with pytest.raises(ValueError, match="a continuation is blank"):
        Item("a", ("x",), (" ", "y"), 0)
    with pytest.raises(ValueError, match="at least 1 item, got 0"):
        subset(items_of(), 0)
    with pytest.raises(ValueError, match="lists of 1 words"):
        copy_items(3, words=1)


def test_a_draw_is_seeded_keeps_the_order_and_grows(tmp_path: Path) -> None:
    items = items_of()
    small, large, other = subset(items, 5), subset(items, 9), subset(items, 5, seed=1)
    assert len(small) == 5
    assert [item for item in large if item in small] == small
    assert sorted(large, key=items.index) == large
    assert small != other
    assert small != items[:5]
    assert subset(items, 500) == items
    write(tmp_path, "piqa", *[{**ROWS["piqa"], "goal": f"goal {i}"} for i in range(30)])
    assert read_task("piqa", tmp_path, 7, seed=3) == subset(read_task("piqa", tmp_path), 7, 3)


def apart(selection: Sequence[Item], report: Sequence[Item]) -> bool:
    """Whether no item of the report is one that was selected by."""
    return {item.sha256 for item in selection}.isdisjoint(item.sha256 for item in report)


def test_the_sides_of_a_split_depend_on_nothing_but_the_item() -> None:
    items = copy_items(400)
    selection, report = split_items(items, 0.3, seed=5)
    assert sorted([*selection, *report], key=items.index) == items
    assert len(selection) == pytest.approx(120, abs=30)
    assert split_items(items[::3], 0.3, seed=5)[0] == [item for item in items[::3] if item in selection]
    assert split_items(items, 0.3, seed=6)[0] != selection
    assert apart(selection, report)
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        split_items(items, 1)
    with pytest.raises(ValueError, match="leaves one side empty"):
        split_items(items[:1], 0.5)


def test_twins_stay_together(tmp_path: Path) -> None:
    passages = [f"Passage: text {i}.\nQuestion: is it {word}?" for i in range(20) for word in ("so", "not")]
    write(tmp_path, "boolq", *[{**ROWS["boolq"], "query": query} for query in passages])
    options = [
        ([f"{i} a", f"{i} b"][::step], word) for i in range(20) for step, word in ((1, "left."), (-1, "stayed."))
    ]
    rows = [{"context_options": contexts, "continuation": word, "gold": 0} for contexts, word in options]
    write(tmp_path, "winogrande", *rows)
    for name in ("boolq", "winogrande"):
        items = read_task(name, tmp_path)
        selection, report = split_items(items, 0.5)
        assert {items.index(item) // 2 for item in selection}.isdisjoint(items.index(item) // 2 for item in report)


def test_an_item_is_known_by_its_content() -> None:
    items = items_of()
    same = Item("other name", items[3].contexts, items[3].continuations[::-1], 0)
    assert apart(items[:9], items[9:])
    assert not apart(items[:9], [*items[9:], same])


def test_copy_items_are_lists_to_repeat() -> None:
    items = copy_items(20, words=5, seed=2)
    assert items == copy_items(30, words=5, seed=2)[:20]
    assert len({item.contexts for item in items}) == 20
    for item in items:
        first, again = item.contexts[0].split("\n")
        assert f"{again}{item.continuations[0]}" == first
    assert read_task(COPY, "nowhere", 4) == read_task(COPY, "", 4)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real task files are not beside this checkout")
def test_all_real_files_are_read() -> None:
    for name in TASKS.keys() - {"cbt"}:  # whose file is not among them
        items = read_task(name, DATA)
        lines = (DATA / name / "eval.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(items) == len([line for line in lines if line.strip()])
        assert not any(text.endswith(" ") for item in items for text in item.contexts)
        selection, report = split_items(items, 0.5)
        assert apart(selection, report)


# ---- likelihoods ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma", "gemma3_text"])
def test_batches_equal_one_text_at_a_time(family: str) -> None:
    model = model_of(family)
    reference = one_by_one(model, PAIRS)
    for batch_tokens in (1, 60, 4096):
        assert_same(log_likelihoods(model, byte_tokenizer(), PAIRS, batch_tokens=batch_tokens), reference)
    turned = log_likelihoods(model, byte_tokenizer(), PAIRS[::-1], batch_tokens=100)
    torch.testing.assert_close(turned.log_p.flip(0), reference.log_p, atol=1e-5, rtol=1e-5)
    assert torch.equal(turned.greedy.flip(0), reference.led == reference.tokens)


def test_a_student_with_foreign_blocks_is_scored_alike() -> None:
    model = model_of(layers=5)
    bottleneck = Spec("iskd.blocks.bottleneck.Bottleneck", {"reduction": 3, "zero_up": False})
    surgery.apply(model, Record(5), [Replace(0, bottleneck), Remove(1)])
    assert_same(log_likelihoods(model, byte_tokenizer(), PAIRS), one_by_one(model, PAIRS))


def test_a_tokenizer_that_puts_a_token_in_front_does_so_here() -> None:
    tokenizer = byte_tokenizer()
    front = TemplateProcessing(single="<|eos|> $A", special_tokens=[("<|eos|>", 256)])
    tokenizer.backend_tokenizer.post_processor = front
    model = model_of()
    assert_same(log_likelihoods(model, tokenizer, PAIRS), one_by_one(model, PAIRS, bos=True))


def test_no_input_is_run_twice_and_logits_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran, projected = model_of(), [], []
    stack = Stack(model)

    def states(ids: Tensor) -> list[Tensor]:
        ran.append(ids)
        return [stack.last_hidden(ids)]

    def project(hidden: Tensor, head: Any) -> Tensor:
        projected.append(len(hidden))
        return original(hidden, head)

    monkeypatch.setattr(likelihood, "project", project)
    monkeypatch.setattr(likelihood, "HEAD_CHUNK", 4)
    pairs = [PAIRS[i] for i in (0, 1, 2, 3, 4, 5, 4)]
    (found,) = likelihood.by_branch(model, byte_tokenizer(), pairs, states, batch_tokens=1)
    assert [batch.shape for batch in ran] == [(1, 23), (1, 22)]
    assert max(projected) == 4
    # four choices of " " and a letter, " sat" twice
    assert sum(projected) == int(found.tokens.sum()) == 4 * 2 + 4 * 2 + 16


def test_a_context_is_read_once_for_all_that_goes_on_from_it() -> None:
    contexts = {"A man walks into": ("a bar", "a barn full of hay", "it"), "Nobody was": ("there", "so")}
    pairs = [(context, f" {text}") for context, texts in contexts.items() for text in texts]
    model, read = model_of(), []

    def note(module: Any, positional: Any, given: dict[str, Any]) -> None:
        read.append(given["input_ids"].numel())

    Stack(model).base.register_forward_pre_hook(note, with_kwargs=True)
    log_likelihoods(model, byte_tokenizer(), pairs, batch_tokens=1)
    # what begins another is no input of its own; the last token of a context predicts, and is read with what follows
    stems = [len(context) - 1 for context in contexts]
    behind = [1 + len(text) for text in (" a barn full of ha", " i", " ther", " s")]
    assert sum(read) == sum(stems) + sum(behind)
    assert_same(log_likelihoods(model, byte_tokenizer(), pairs), one_by_one(model, pairs))


@pytest.mark.parametrize("mixer", MIXERS)
def test_choices_go_on_from_the_state_of_a_mixer(mixer: str) -> None:
    model = model_of()
    surgery.apply(model, Record(4), [Convert(layer, MIXERS[mixer], seed=layer) for layer in range(0, 4, 2)])
    assert_same(log_likelihoods(model.eval(), byte_tokenizer(), PAIRS), one_by_one(model, PAIRS))


def test_documents_that_are_told_apart_are_read_whole() -> None:
    model = model_of()
    Stack(model).keep_apart(Separator(ord(" "), begins=False))
    whole = evaluate(model, byte_tokenizer(), items_of())
    apart = likelihood.by_branch(
        model, byte_tokenizer(), pairs_of(items_of()), lambda ids: [Stack(model).last_hidden(ids)]
    )
    assert torch.equal(whole.of("log_p"), judge(items_of(), apart[0]).of("log_p"))


def test_padding_is_at_most_a_quarter() -> None:
    texts = [Text(tuple(range(i, 2 * i)), (1,), i) for i in range(4, 120)]
    for stem in stems(texts, 500, share=True):
        for batch in stem.batches:
            longest = batch.ids.shape[1]
            assert batch.ids.numel() <= 500
            assert min(int(at) + 1 for at in batch.at_M) >= 0.75 * longest


@torch.no_grad()
def letters_only() -> PreTrainedModel:
    """A model whose greedy decoding writes small letters, so that what it writes is text."""
    model = model_of("phi")
    bias = Stack(model).head[1]
    assert bias is not None
    bias.fill_(-1e4)
    bias[97:123] = 0
    return model


def written(model: Any, prompt: str, count: int) -> str:
    """What a model writes after a prompt, by transformers' own greedy decoding."""
    ids = torch.tensor([list(prompt.encode())])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return bytes(out[0, len(prompt) :].tolist()).decode()


def test_greedy_decoding_is_read_off_one_pass() -> None:
    model = letters_only()
    items = []
    for number, prompt in enumerate(("once upon", "a list:", "say")):
        text = written(model, prompt, 8)
        wrong = text[:5] + ("a" if text[5] != "a" else "b") + text[6:]
        items += [Item(f"r{number}", (prompt,), (text,), 0), Item(f"w{number}", (prompt,), (wrong,), 0)]
    result = evaluate(model, byte_tokenizer(), items)
    assert result.of("acc").tolist() == [1.0, 0.0] * 3
    torch.testing.assert_close(result.of("led"), torch.tensor([1.0, 5 / 8] * 3))


def test_copying_is_scored_by_the_tokens_before_the_first_mistake() -> None:
    model = letters_only()
    items = copy_items(4, words=2)
    result = evaluate(model, byte_tokenizer(), items)
    for item, led in zip(items, result.of("led").tolist(), strict=True):
        goal = item.continuations[0]
        text = written(model, item.contexts[0], len(goal))
        assert led == next(i for i in range(len(goal) + 1) if text[: i + 1] != goal[: i + 1]) / len(goal)


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_planted_answers_are_found() -> None:
    model = model_of()
    items = items_of()
    several = [item for item in items if len(item.pairs) > 1]
    start, planted = 0, []
    reference = one_by_one(model, pairs_of(several))
    for item in several:
        best = int(reference.log_p[start : start + len(item.pairs)].argmax())
        planted.append(Item(item.id, item.contexts, item.continuations, best))
        start += len(item.pairs)
    assert evaluate(model, byte_tokenizer(), planted).mean() == 1
    wrong = [Item(x.id, x.contexts, x.continuations, (x.gold + 1) % len(x.pairs)) for x in planted]
    assert evaluate(model, byte_tokenizer(), wrong, batch_tokens=50).mean() == 0


def test_accuracy_by_sum_by_character_and_by_greedy_decoding() -> None:
    items = [
        Item("a", ("x",), (" aa", " bbbbbb"), 1),
        Item("b", ("x",), (" aa", " bb"), 0),
        Item("c", ("x",), (" word",), 0),
    ]
    found = Likelihoods(
        torch.tensor([-2.0, -3.0, -1.0, -1.0, -4.0], dtype=torch.float64),
        torch.tensor([0, 0, 1, 0, 3]),
        torch.tensor([2, 2, 2, 2, 4]),
        torch.tensor([2, 6, 2, 2, 4]),
        torch.tensor([1, 0, 2, 1, 3]),
    )
    result = judge(items, found)
    assert result.ids == ("a", "b", "c")
    assert result.of("acc").tolist() == [0, 1, 0]  # of equal choices the first
    assert result.of("acc_norm").tolist() == [1, 1, 0]
    assert result.of("log_p").tolist() == [-3, -1, -4]
    assert result.of("led").tolist() == [0, 0.5, 0.75]
    assert result.of("hits").tolist() == [0, 1, 0.75]
    assert result.mean() == pytest.approx(1 / 3)
    assert result.stderr() == pytest.approx((1 / 3 * 2 / 3 / 2) ** 0.5)
    for bad in ([math.nan, -3.0], [-3.0, math.nan], [-math.inf] * 2):
        broken = dataclasses.replace(found, log_p=torch.tensor([-1.0, -2.0, *bad, -4.0], dtype=torch.float64))
        with pytest.raises(ValueError, match=r"item b: the model gives .* for its choices, among which none is best"):
            judge(items, broken)
    with pytest.raises(ValueError, match=r"unknown metric 'f1': choose one of acc, acc_norm, acc_token, log_p, led"):
        result.mean("f1")


def test_paired_differences_have_a_seeded_interval() -> None:
    ids = tuple(str(i) for i in range(400))
    drawn = torch.rand(400, generator=torch.Generator().manual_seed(0))
    a, b = (TaskResult(ids, {"acc": (drawn < share).float()}) for share in (0.6, 0.5))
    first = paired(a, b)
    assert first == paired(a, b)
    assert first != paired(a, b, seed=1)
    assert first.difference == pytest.approx(a.mean() - b.mean())
    assert first.low < first.difference < first.high
    spread = (a.of("acc") - b.of("acc")).std().item() / 20
    assert first.high - first.low == pytest.approx(2 * 1.96 * spread, rel=0.15)
    same = paired(a, a)
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="same items in the same order"):
        paired(a, TaskResult(ids[::-1], b.values))


def test_bad_input_is_refused_and_the_model_left_as_it_was() -> None:
    tokenizer = byte_tokenizer()
    model = model_of().train()
    for pairs, message in (
        ([], "there is nothing to score"),
        ([("a", "b" * 200)], "has 200 tokens of its own; between 1 and 128"),
        ([("a", "")], "has 0 tokens of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            log_likelihoods(model, tokenizer, pairs)
    with pytest.raises(ValueError, match="batch_tokens must be at least 1, got 0"):
        log_likelihoods(model, tokenizer, PAIRS, batch_tokens=0)
    with pytest.raises(ValueError, match=r"the tokenizer gives id 1\d\d, the model has 101 rows"):
        log_likelihoods(tiny("llama"), tokenizer, [("word", " word")])
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="needs a token to start from"):
        log_likelihoods(model, tokenizer, [("", "word")])
    with torch.no_grad():
        Stack(model).head[0].fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the model gives nan for ' word' after 'a'"):
        log_likelihoods(model, tokenizer, [("a", " word")])
    assert all(modes(model))


def test_a_context_cut_at_its_beginning_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    log_likelihoods(model_of(), byte_tokenizer(), [("a" * 300, " b"), ("a", " b")])
    assert "1 of 2 texts lost their beginning: the context is 128 tokens" in caplog.text


@pytest.mark.parametrize(("family", "cut"), [("llama", False), ("gpt2", True)])
def test_a_model_without_attention_reads_all_of_a_context(
    family: str, cut: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Unless it has learned positions, which end."""
    model, linear = model_of(family), Spec("iskd.mixers.linear_attention.LinearAttention", {})
    surgery.apply(model, Record(4), [Convert(layer, linear) for layer in range(4)])
    found = log_likelihoods(model, byte_tokenizer(), [("b" * 100 + "a" * 200, " c")])
    assert ("lost their beginning" in caplog.text) == cut
    ids = list(("b" * 100 + "a" * 200 + " c").encode())
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1][-128:] if cut else ids[:-1]])).logits[0].double().log_softmax(-1)
    assert found.log_p.item() == pytest.approx(float(logits[-2, ids[-2]] + logits[-1, ids[-1]]), abs=1e-4)


# ---- importance -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tasks of different size."""
    words = [chr(97 + i) * (1 + i % 3) for i in range(26)]
    write(tmp_path, "openbookqa", *[{"query": f"{x} is", "choices": [x, "a", "no"], "gold": 0} for x in words])
    write(tmp_path, "lambada", *[{"text": f"say {x} and {x}"} for x in words[:9]])
    return tmp_path


def student_of(teacher: PreTrainedModel) -> PreTrainedModel:
    """A student with a gap and two foreign blocks."""
    student = copy.deepcopy(teacher)
    bottleneck = Spec("iskd.blocks.bottleneck.Bottleneck", {"reduction": 3, "zero_up": False})
    slim = Spec("iskd.blocks.slim.Slim", {"ratio": 0.6})
    surgery.apply(student, Record(5), [Replace(0, bottleneck), Remove(1), Replace(3, slim)])
    return student


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_importance_is_the_accuracy_lost_without_the_block(family: str, folder: Path) -> None:
    student = student_of(model_of(family, layers=5))
    part = TaskAccuracy(folder, ["openbookqa", "lambada", "copy"], items=8, metric="acc_norm")
    metrics = {"openbookqa": "acc_norm", "lambada": "acc_norm", "copy": "led"}
    reference = []
    for position in range(4):
        short = copy.deepcopy(student)
        surgery.apply(short, Record(4), [Remove(position)])
        lost = []
        for task, items in part.selection.items():
            values = []
            for item in items:
                pair = (evaluate(model, byte_tokenizer(), [item]).mean(metrics[task]) for model in (student, short))
                values.append(next(pair) - next(pair))
            lost.append(sum(values) / len(values))
        reference.append(sum(lost) / len(lost))
    scores = part(student, student, [])
    assert scores.dtype == torch.float32
    assert scores.abs().max() > 0
    torch.testing.assert_close(scores, torch.tensor(reference), atol=1e-5, rtol=1e-4)
    rows = part.rows(student.train(), student, [])
    assert rows.shape == (4, sum(len(items) for items in part.selection.values()))
    torch.testing.assert_close(rows.mean(1), scores)


def test_importance_takes_what_ild_chooses_layers_by(folder: Path) -> None:
    """Copying of documents, translation, summaries, and sentences of CBT; reports leave out what was chosen by."""
    words = ["ab", "bat", "stab", "tab", "sat", "bats", "tabs", "at", "as", "sab"]
    rows: dict[str, list[dict[str, Any]]] = {
        "translation": [{"source": f"{word} da", "target": f"{word} at bats"} for word in words],
        "summary": [{"text": f"a {word} sat there", "summary": f"{word} sat at"} for word in words],
        "cbt": [
            {"sentences": ["x"] * 2, "question": f"{word} met XXXXX.", "options": words, "answer": word}
            for word in words
        ],
    }
    for name, held in rows.items():
        (folder / name).mkdir(exist_ok=True)
        lines = (json.dumps({"id": f"{name}-{n}", **row}) for n, row in enumerate(held))
        (folder / name / "eval.jsonl").write_text("\n".join(lines))
    student = tiny("llama", vocab=257, context=1024, layers=3)
    with torch.no_grad():  # whatever it is shown, it writes these letters, some of which are right
        others = [byte for byte in range(257) if byte not in set(b" abst")]
        Stack(student).head[0].mul_(20)[others] = 0
    names = ["translation", "cbt_sentence", "copy_doc", "summary"]
    part = TaskAccuracy(folder, names, items=3)
    assert list(part.selection) == names
    lost = torch.zeros(3, len(names))
    for position in range(3):
        short = copy.deepcopy(student)
        surgery.apply(short, Record(3), [Remove(position)])
        for place, (name, items) in enumerate(part.selection.items()):
            alone = name == "cbt_sentence"
            metric = "acc_token" if alone else "led" if name.startswith("copy") else "hits"
            ways: dict[str, Any] = {"frame": Framing() if alone else None, "first_given": alone}
            whole, without = (
                evaluate(model, byte_tokenizer(), items, **ways).mean(metric) for model in (student, short)
            )
            lost[position, place] = whole - without
    torch.testing.assert_close(part(student, student, []), lost.mean(1), atol=1e-5, rtol=1e-4)
    assert (lost.abs().amax(0)[[0, 3]] > 0).all()
    used = {item.sha256 for items in part.selection.values() for item in items}
    asked = questions(EvalSpec([names[n] for n in (0, 1, 3)], None, str(folder)), byte_tokenizer(), used)
    left = {name: [getattr(each, "item", each) for each in found] for name, found in asked.items()}
    assert not {item.sha256 for items in left.values() for item in items} & used
    assert [len(left[name]) for name in ("translation", "summary")] == [7, 7]


def test_importance_selects_on_one_side_of_the_split(folder: Path) -> None:
    part = TaskAccuracy(folder, ["openbookqa"], items=4, share=0.4, seed=2)
    mine, rest = split_items(read_task("openbookqa", folder), 0.4, 2)
    assert part.selection["openbookqa"] == subset(mine, 4, 2)
    assert apart(part.selection["openbookqa"], rest)


def test_a_block_that_does_nothing_loses_nothing(folder: Path) -> None:
    model = model_of(layers=5)
    silence(model, 3)
    rows = TaskAccuracy(folder, ["openbookqa", "lambada"]).rows(model, model, [])
    assert torch.equal(rows[3], torch.zeros(rows.shape[1]))


def test_importance_leaves_everything_as_found(folder: Path) -> None:
    student = student_of(model_of("gpt2", layers=5, dropout=0.3)).train()
    Stack(student).layers[1].eval()
    part = TaskAccuracy(folder, ["openbookqa", "copy"], items=4)
    before = (digest(student), modes(student), hooks(student), student.config.to_dict(), torch.get_rng_state().tolist())
    blocks = list(Stack(student).layers)
    assert torch.equal(part(student, student, []), part(student, student, []))
    with pytest.raises(ValueError, match="do not belong together"):
        part(tiny("gpt2"), student, [])
    after = (digest(student), modes(student), hooks(student), student.config.to_dict(), torch.get_rng_state().tolist())
    assert before == after
    assert all(one is other for one, other in zip(blocks, Stack(student).layers, strict=True))
    assert torch.is_grad_enabled()


def test_the_tokenizer_is_given_or_that_of_the_teacher(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = model_of(), byte_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    seen: list[PreTrainedTokenizerBase] = []
    known = likelihood.by_branch

    def watched(model: Any, tokenizer: PreTrainedTokenizerBase, *args: Any, **kwargs: Any) -> Any:
        seen.append(tokenizer)
        return known(model, tokenizer, *args, **kwargs)

    monkeypatch.setattr("iskd.importance.task_accuracy.by_branch", watched)
    options: dict[str, Any] = {"data_dir": folder, "tasks": ["lambada"], "items": 3}
    scores = [TaskAccuracy(**options, tokenizer=given)(model, model, []) for given in (None, tokenizer)]
    scores.append(TaskAccuracy(**options, tokenizer=str(folder / "tokenizer"))(model, model, []))
    model.config._name_or_path = model.name_or_path = str(folder / "tokenizer")
    scores.append(TaskAccuracy(**options)(model, model, []))
    assert seen[1] is tokenizer
    assert [found.name_or_path for found in seen[2:]] == [str(folder / "tokenizer")] * 2
    assert all(torch.equal(scores[0], other) for other in scores[1:])
    model.name_or_path = str(folder / "lambada")
    with pytest.raises(ValueError, match=r"no tokenizer in .*lambada .*set importance\.tokenizer"):
        TaskAccuracy(**options)(model, model, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["lambda"]}, "did you mean 'lambada'"),
        ({"tasks": []}, "importance.tasks must name at least one"),
        ({"tasks": ["copy", "copy"]}, "none twice"),
        ({"data_dir": None}, r"importance\.data_dir is not set"),
        ({"data_dir": None, "tasks": ["summary"]}, r"importance\.data_dir is not set.* summary: id, text, summary"),
        ({"tasks": ["recall"]}, "unknown task 'recall': .* copy_doc, copy_para, cbt_sentence, translation, summary"),
        ({"tasks": ["piqa"]}, "task 'piqa' has no local file"),
        ({"items": 0}, r"importance\.items and .* got 0 and 4096"),
        ({"metric": "f1"}, r"importance\.metric='f1': choose acc or acc_norm"),
        ({"share": 1.0}, "must be between 0 and 1, got 1.0"),
    ],
)
def test_bad_values_are_refused_before_training(options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        TaskAccuracy(**{"data_dir": folder, "tasks": ["lambada"], **options})
