"""Laws of the evaluation: the harness and our scorer agree, draws are seeded, two models get the same items."""

from __future__ import annotations

import copy
import io
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from iskd.data import Framing, framing_of
from iskd.evaluation import Evaluation, harness
from iskd.evaluation.evaluator import EvalSpec, check, evaluate
from iskd.evaluation.harness import TASK_FILES, draw
from iskd.evaluation.judging import TaskResult, pairs_of
from iskd.evaluation.judging import evaluate as ask
from iskd.evaluation.results import evaluation_of
from iskd.evaluation.scores import CHOICE, GENERATION, Scored, compare
from iskd.evaluation.tasks.task_items import TASKS, copy_items, read_task
from iskd.evaluation.text import by_position, spans_of, text_loss, text_windows
from iskd.models import Stack, surgery
from iskd.models.tokenizers import byte_tokenizer, check_same_tokenizer
from iskd.plan import Convert, Record, Remove, Spec
from iskd.report import evaluation_table
from iskd.report.contexts import length_rows, reads_less
from iskd.system import ProgressLine, progress
from iskd.teacher import Loaded
from tests.factories import conf_group, digest, hooks, modes, tiny

pytest.importorskip("lm_eval")
TEXT = "The caf\u00e9 costs 12.50.\n\n\u4f60\u597d, said the cat; and the dog \U0001f436 sat. " * 4


def row(name: str, number: int) -> dict[str, Any]:
    """An item of a task: quotes, letters beyond ASCII and all that a prompt strips, in words that differ by number."""
    word = f"t{number}\u00e9a" * (1 + number % 3)
    several = [word, f"the {word} isn't", f'a "{word}" (b)'][:: 1 if number % 2 else -1]
    two = {"context_options": [f"Ann met {word}; Ann", f"Ann met {word}; {word}"], "continuation": f"left {word}."}
    rows: dict[str, dict[str, Any]] = {
        "hellaswag": {
            "activity_label": "Tea",
            "ctx": f"A man [step] sits [title] {word}  and he",
            "endings": [f" {part} [x]it. [title] now" for part in several],
            "label": number % 3,
        },
        "piqa": {"goal": f"dry {word}'s dish", "sol1": f"towel {word}", "sol2": "it's a lake", "label": number % 2},
        "boolq": {
            "query": f"{'Passage: ' if number % 2 else ''}{word} is hot.\nQuestion: is {word}?",
            "choices": ["no", "yes"],
            "gold": number % 2,
        },
        "mmlu": {"question": f" {word} + 1? ", "choices": [*several, "4"], "answer": number % 4},
        "winogrande": {**two, "gold": number % 2},
        "winograd_wsc": {**two, "gold": number % 2},
        "lambada": {"text": f"He said {word}\n\nand then  she said {word}"},
        "blimp": {"sentence_good": f"Cats {word} sleep.", "sentence_bad": f"Cats {word} sleeps."},
        "cbt": {
            "sentences": [f"`` {word} ! ''", f"He is n't {word} ."],
            "question": ("XXXXX said so ." if number % 2 else "Then `` the XXXXX ''"),
            "options": [f"{part}{digit}" for digit in range(5) for part in ('a"', "b'")],
            "answer": f"b'{number % 5}",
        },
    }
    return rows.get(name, {"query": f"Question: {word}?", "choices": several, "gold": number % 3})


def write(folder: Path, *names: str, count: int = 6) -> Path:
    """Write the files of tasks; returns their folder."""
    for name in names:
        file = folder / name / "eval.jsonl"
        file.parent.mkdir(parents=True)
        lines = [json.dumps({"id": f"{name}-{i}", **row(name, i)}) + "\n" for i in range(count)]
        file.write_text("\n".join(lines), encoding="utf-8")
    return folder


def model_of(context: int = 256, **sizes: Any) -> PreTrainedModel:
    """A random model over bytes, peaked enough for its choices to differ."""
    model = tiny("llama", vocab=257, context=context, **sizes)
    with torch.no_grad():
        Stack(model).head[0].mul_(20)
    return model


def ignore(done: int, total: int) -> None:
    """Nobody watches."""


def drawn_of(name: str, folder: Path, limit: int | None = None, **options: Any) -> harness.Drawn:
    (drawn,) = draw([name], data_dir=folder, limit=limit, **{"seed": 0, **options})
    return drawn


def scores_of(name: str, folder: Path, model: PreTrainedModel, limit: int | None = None) -> Scored:
    return harness.score(model, byte_tokenizer(), drawn_of(name, folder, limit), batch_size=3, step=ignore)


# ---- the harness ----------------------------------------------------------------------------------------------------


def test_every_task_has_its_file() -> None:
    assert sorted(file.stem for file in TASK_FILES.glob("*.yaml")) == sorted(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_the_harness_and_our_scorer_agree(name: str, tmp_path: Path) -> None:
    """The same prompts, letter by letter, and the same scores: layers are chosen by ours."""
    model, items = model_of(), read_task(name, write(tmp_path, name))
    drawn = drawn_of(name, tmp_path, limit=4)
    steps: list[tuple[int, int]] = []
    theirs = harness.score(
        model, byte_tokenizer(), drawn, batch_size=3, step=lambda done, total: steps.append((done, total))
    )
    asked = [item for item in items if item.id in drawn.ids]
    assert drawn.ids == tuple(item.id for item in asked) == tuple(item.id for item in read_task(name, tmp_path, 4))
    (task,) = drawn.leaves.values()
    assert [instance.args for instance in task.instances] == pairs_of(asked)
    ours = ask(model, byte_tokenizer(), asked)
    assert theirs.result.ids == ours.ids
    for metric, values in theirs.result.values.items():
        torch.testing.assert_close(values, ours.of(metric), msg=metric)
    choices = len(asked[0].pairs)
    assert (theirs.kind, theirs.chance) == ((CHOICE, 1 / choices) if choices > 1 else (GENERATION, 0))
    assert steps[-1] == (len(task.instances), len(task.instances))


def test_a_task_is_reported_by_the_usual_metric(tmp_path: Path) -> None:
    model = model_of()
    write(tmp_path, "hellaswag", "piqa", "winogrande")
    found = {name: scores_of(name, tmp_path, model, limit=1).metric for name in ("hellaswag", "piqa", "winogrande")}
    assert found == {"hellaswag": "acc_norm", "piqa": "acc", "winogrande": "acc"}


def test_draws_are_seeded_and_leave_out_what_chose_layers(tmp_path: Path) -> None:
    items = read_task("piqa", write(tmp_path, "piqa", count=20))
    small, large, other = (drawn_of("piqa", tmp_path, n, seed=seed).ids for n, seed in ((4, 0), (9, 0), (4, 1)))
    assert [id_ for id_ in large if id_ in small] == list(small)
    assert small not in (other, tuple(item.id for item in items[:4]))
    exclude = {item.sha256 for item in items if item.id in small}
    assert set(drawn_of("piqa", tmp_path, 16, exclude=exclude).ids).isdisjoint(small)
    with pytest.raises(ValueError, match="layers were selected by all 20 items"):
        drawn_of("piqa", tmp_path, exclude={item.sha256 for item in items})
    with pytest.raises(ValueError, match=r"cannot be told among those of piqa on the hub: set eval\.data_dir"):
        next(draw(["piqa"], data_dir=None, limit=4, seed=0, exclude=exclude))


def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A harness that knows a group of two tasks, and one task whose data are not there."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "tasks"
    folder.mkdir()
    text = (TASK_FILES / "blimp.yaml").read_text()
    for leaf, name in (("blimp_a", "a/blimp"), ("blimp_b", "b/blimp"), ("piqa", "nowhere")):
        file = tmp_path / name / "eval.jsonl"
        content = text.replace("iskd_blimp", leaf).replace("blimp/eval.jsonl", str(file))
        (folder / f"{leaf}.yaml").write_text(content)
    (folder / "group.yaml").write_text("group: blimp\ntask: [blimp_a, blimp_b]\n")
    write(tmp_path / "a", "blimp", count=6)
    write(tmp_path / "b", "blimp", count=9)
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda **_: TaskManager(include_path=str(folder), include_defaults=False)
    )


def test_a_group_is_drawn_over_all_its_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    hub(tmp_path, monkeypatch)
    (everything,) = draw(["blimp"], data_dir=None, limit=None, seed=0)
    assert len(everything.ids) == 15
    assert {leaf: len(rows) for leaf, rows in everything.rows.items()} == {"blimp_a": 6, "blimp_b": 9}
    (single,) = draw(["blimp"], data_dir=None, limit=1, seed=0)
    assert len(single.leaves) == 1
    (drawn,) = draw(["blimp"], data_dir=None, limit=8, seed=0)
    assert len(drawn.ids) == 8
    assert set(single.ids) < set(drawn.ids) < set(everything.ids)
    model = model_of()
    all_scores, some = (
        harness.score(model, byte_tokenizer(), one, batch_size=4, step=ignore).result for one in (everything, drawn)
    )
    by_id = dict(zip(all_scores.ids, all_scores.of("acc").tolist(), strict=True))
    assert [by_id[id_] for id_ in some.ids] == some.of("acc").tolist()
    with pytest.raises(ValueError, match=r"unknown task 'blim': did you mean 'blimp'\?"):
        next(draw(["blim"], data_dir=None, limit=1, seed=0))
    message = (
        r"'piqa' is neither .* \(ybisk/piqa on the hub\) into DIR/piqa/eval\.jsonl, .* id, goal, .* label, and set"
    )
    with pytest.raises(ValueError, match=message):
        next(draw(["piqa"], data_dir=None, limit=1, seed=0))
    with pytest.raises(ValueError, match=r"'cbt' is neither .* Put its items \(cam-cst/cbt.* into DIR/cbt/eval"):
        next(draw(["cbt"], data_dir=None, limit=1, seed=0))


def test_local_and_hub_tasks_are_asked_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    hub(tmp_path, monkeypatch)
    folder = write(tmp_path / "here", "piqa", count=6)
    options: dict[str, Any] = {"data_dir": folder, "limit": 4, "seed": 0}
    with caplog.at_level("WARNING"):
        piqa, blimp, leaf = draw(["piqa", "blimp", "blimp_a"], **options)
    assert (list(piqa.leaves), piqa.source[:7]) == (["iskd_piqa"], "sha256 ")
    assert (set(blimp.leaves) <= {"blimp_a", "blimp_b"}, list(leaf.leaves)) == (True, ["blimp_a"])
    assert [record.message for record in caplog.records] == [
        f"blimp: not in eval.data_dir={folder}, so the hub's items are asked"
    ]
    exclude = {read_task("piqa", folder)[0].sha256}
    assert next(draw(["piqa"], **options, exclude=exclude)).ids == next(draw(["piqa"], **options, exclude=exclude)).ids
    with pytest.raises(
        ValueError, match=r"cannot be told among those of blimp, blimp_a on the hub: set eval\.data_dir"
    ):
        next(draw(["piqa", "blimp", "blimp_a"], **options, exclude=exclude))


def test_models_and_tokenizers_are_left_as_they_were(tmp_path: Path) -> None:
    model, tokenizer = model_of(tie_word_embeddings=True).train(), byte_tokenizer()
    tokenizer.pad_token = None
    before = (digest(model), modes(model), hooks(model), logging.getLogger("lm_eval").level)
    harness.score(model, tokenizer, drawn_of("copa", write(tmp_path, "copa"), 2), batch_size=2, step=ignore)
    assert (digest(model), modes(model), hooks(model), logging.getLogger("lm_eval").level) == before
    assert tokenizer.pad_token is None


def test_what_the_harness_would_get_wrong_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "arc_easy", "lambada")
    with pytest.raises(
        ValueError, match=r"lambada: the continuation .* tokens of its own; between 1 and 4 \(the model's"
    ):
        scores_of("lambada", tmp_path, model_of(context=4))
    with caplog.at_level("WARNING"):
        scores_of("lambada", tmp_path, model_of(context=24))
        scores_of("arc_easy", tmp_path, model_of())
    assert [record.message for record in caplog.records] == [
        "lambada: 6 texts lost their beginning: the context is 24 tokens"
    ]
    broken = model_of()
    with torch.no_grad():
        Stack(broken).head[0].fill_(math.nan)
    with pytest.raises(ValueError, match="arc_easy: the model gives nan for"):
        scores_of("arc_easy", tmp_path, broken)


def test_a_missing_harness_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(ValueError, match=r"not installed .*: pip install 'iskd\[eval\]'"):
        drawn_of("piqa", write(tmp_path, "piqa"))


# ---- comparisons ----------------------------------------------------------------------------------------------------


def scored(values: list[float], kind: str = CHOICE, chance: float = 0.5) -> Scored:
    ids = tuple(map(str, range(len(values))))
    return Scored(kind, "acc", chance, TaskResult(ids, {"acc": torch.tensor(values)}))


def test_retention_is_the_ratio_of_means_with_a_paired_interval() -> None:
    drawn = torch.rand(2, 300, generator=torch.Generator().manual_seed(0))
    teacher = (drawn[0] < 0.8).float()
    student = teacher * (drawn[1] < 0.9)
    mine = {"a": scored(student.tolist()), "b": scored([1.0, 0.0, 1.0, 1.0]), "c": scored([0.0, 1.0], GENERATION, 0)}
    theirs = {"a": scored(teacher.tolist()), "b": scored([1.0, 1.0, 1.0, 1.0]), "c": scored([0.0, 0.0], GENERATION, 0)}
    (a, b, c), means, mean = compare(mine, theirs, resamples=400, seed=3)
    assert a.retention is not None
    assert a.difference is not None
    assert b.retention is not None
    assert c.retention is not None
    assert a.retention.value == pytest.approx(float(student.mean() / teacher.mean()))
    # the student is right on a subset of what the teacher is right on, so that their ratio is a plain share
    share = a.retention.value
    width = 2 * 1.96 * (share * (1 - share) / float(teacher.sum())) ** 0.5
    assert a.retention.high - a.retention.low == pytest.approx(width, rel=0.2)
    assert a.difference.value == pytest.approx(float(student.mean() - teacher.mean()))
    assert a.difference.low < a.difference.value < a.difference.high
    assert b.retention.value == 0.75
    assert math.isnan(c.retention.value), "nothing to retain"
    assert set(means) == {CHOICE}
    assert means[CHOICE].value == pytest.approx((share + 0.75) / 2)
    assert means[CHOICE].low < means[CHOICE].value < means[CHOICE].high
    assert mean == means[CHOICE], "a task of which nothing can be retained counts nowhere"
    assert (a.chance, a.items, c.student, c.teacher) == (0.5, 300, 0.5, 0)
    assert compare(mine, theirs, resamples=400, seed=3)[1] == means
    assert compare(mine, theirs, resamples=400, seed=4)[1] != means
    with pytest.raises(ValueError, match="the same items in the same order"):
        compare({"a": mine["b"]}, {"a": mine["c"]}, resamples=4, seed=0)


def test_the_mean_over_tasks_of_several_kinds_has_the_interval_of_independent_tasks() -> None:
    """The widths of two tasks of like spread add in squares, and tasks count alike whatever their number of items."""
    drawn = torch.rand(2, 2, 400, generator=torch.Generator().manual_seed(0))
    teacher, kept = (drawn[0] < 0.8).float(), (drawn[1] < 0.9).float()
    names = {"a": CHOICE, "b": GENERATION}
    mine = {name: scored((teacher * kept)[i].tolist(), kind) for i, (name, kind) in enumerate(names.items())}
    theirs = {name: scored(teacher[i].tolist(), kind) for i, (name, kind) in enumerate(names.items())}
    tasks, means, mean = compare(mine, theirs, resamples=2000, seed=0)
    assert mean is not None
    values = [task.retention for task in tasks if task.retention is not None]
    assert set(means) == {CHOICE, GENERATION}
    assert mean.value == pytest.approx(sum(found.value for found in values) / 2)
    assert mean.low < mean.value < mean.high
    widths = [found.high - found.low for found in values]
    assert mean.high - mean.low == pytest.approx(math.hypot(*widths) / 2, rel=0.15)
    found = Evaluation(tasks, means, mean, None, {}, {})
    assert "mean, all" in printed(found)
    read = evaluation_of(json.loads(found.to_json())).mean
    assert (read.value, read.low, read.high) == pytest.approx((mean.value, mean.low, mean.high), abs=1e-6)


# ---- text -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def naive(model: PreTrainedModel, text: bytes, window: int) -> tuple[float, float]:
    """Perplexity and bits per byte of bytes, window by window, from whole logits."""
    nats, count = 0.0, 0
    for start in range(0, len(text) // window * window, window):
        ids = torch.tensor([list(text[start : start + window])])
        nats += float(cross_entropy(model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="sum"))
        count += window - 1
    return math.exp(nats / count), nats / count / math.log(2)


@pytest.mark.parametrize("batch_tokens", [1, 90])
def test_perplexity_and_bits_per_byte_equal_the_slow_way(batch_tokens: int) -> None:
    """Over ASCII a byte is a token, so that both are functions of the same mean."""
    model, text = tiny("gpt2", vocab=257, context=64), "Of cats and dogs, and what they said. " * 6
    windows = text_windows([text], byte_tokenizer(), tokens=200, window=40, frame=Framing())
    assert windows.ids.shape == (5, 40)
    assert windows.bytes == 5 * 39
    loss = text_loss(model, windows, batch_tokens=batch_tokens, step=ignore)
    perplexity, bits = naive(model, text.encode()[:200], 40)
    assert (loss.perplexity, loss.bits_per_byte) == (pytest.approx(perplexity, rel=1e-5), pytest.approx(bits, rel=1e-5))
    assert loss.nats_W.mean().exp() == pytest.approx(loss.perplexity)


def test_losses_by_position_equal_the_slow_way() -> None:
    """The spans hold every position once; a model that starts anew inside a window has no loss from there on."""
    model, text = tiny("gpt2", vocab=257, context=48), "Of cats and dogs, and what they said. " * 6
    for window in (2, 17, 25, 40, 64, 100, 257):
        spans = spans_of(window)
        assert [at for first, last in spans for at in range(first, last + 1)] == list(range(1, window))
    windows = text_windows([text], byte_tokenizer(), tokens=200, window=100, frame=Framing())
    loss = text_loss(model, windows, batch_tokens=1, step=ignore)
    with torch.no_grad():
        logits = model(windows.ids[:, :48]).logits.double()
    nats = cross_entropy(logits[:, :-1].mT, windows.ids[:, 1:48], reduction="none").mean(0)
    rows = by_position(windows, loss, loss)
    assert [(row.last, row.tokens) for row in rows] == [(16, 32), (32, 32), (64, 64), (99, 70)]
    assert [row.student for row in rows[:2]] == pytest.approx([float(nats[:16].mean()), float(nats[16:32].mean())])
    assert all(math.isnan(row.student) and row.teacher is not None and math.isnan(row.teacher) for row in rows[2:])
    whole = text_loss(tiny("gpt2", vocab=257, context=128), windows, batch_tokens=400, step=ignore)
    weighed = (whole.nats_S * windows.counts_at(spans_of(100))).sum() / windows.counts.sum()
    assert float(weighed.exp()) == pytest.approx(whole.perplexity)


def test_what_a_teacher_cannot_read_is_in_no_mean() -> None:
    """A student without attention is asked beyond its teacher's context, where no ratio says anything."""
    teacher, tokenizer = model_of(context=80), byte_tokenizer()
    student = copy.deepcopy(teacher)
    surgery.apply(student, Record(4), [Convert(layer, Spec("iskd.mixers.gla.GLA", {})) for layer in range(4)])
    spec = EvalSpec(["recall"], limit=2, lengths=[64, 128], resamples=20)
    found = evaluate(student, tokenizer, spec, Loaded(teacher, tokenizer, {"name": "t"}), text=TEXT * 4)
    near, far = found.tasks
    assert (found.limit("teacher"), found.limit("student")) == (80, math.inf)
    assert near.teacher is not None
    assert math.isnan(far.retention.value)  # type: ignore[union-attr]
    assert [math.isnan(row.teacher or 0) for row in found.positions] == [row.last > 80 for row in found.positions]
    assert any(row.last > 80 and math.isfinite(row.student) for row in found.positions)
    assert evaluation_of(json.loads(found.to_json())).to_json() == found.to_json()
    rows = length_rows({"run": found})[1:]
    recalled = [(row[2], row[3]) for row in rows if row[1] == "recall"]
    assert recalled == [(64, "teacher"), (64, "student"), (128, "student")]
    assert max(int(str(row[2])) for row in rows if row[1:4:2] == ["loss", "teacher"]) <= 80
    assert "The teacher reads at most 80 tokens at once" in reads_less([found])


@pytest.mark.parametrize("window", [7, 50, 1000])
def test_bytes_are_those_of_the_scored_tokens(window: int) -> None:
    """Telescoping over characters of several tokens: together the spans are the text."""
    windows = text_windows([TEXT], byte_tokenizer(), tokens=10_000, window=window, frame=Framing())
    tokens = windows.ids.numel()
    text = TEXT.encode()[:tokens]
    heads = len(windows.ids)
    assert windows.ids.flatten().tolist() == list(text)
    # the first token of a window may hold a whole character, or be the rest of one that was counted before
    assert len(text) - 4 * heads <= windows.bytes <= len(text) + 3
    if window == 1000:
        assert windows.bytes == len(text) - 1


def test_texts_that_cannot_be_scored_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a text of 1 tokens, scored in windows of 1, has nothing to score"):
        text_windows(["a"], byte_tokenizer(), tokens=100, window=10, frame=Framing())
    with pytest.raises(ValueError, match=r"eval\.text=.*nowhere\.txt does not exist"):
        evaluate(model_of(), byte_tokenizer(), EvalSpec(text=str(tmp_path / "nowhere.txt")))
    broken = model_of()
    with torch.no_grad():
        Stack(broken).head[0].fill_(math.nan)
    with pytest.raises(ValueError, match="nan on the text"):
        evaluate(broken, byte_tokenizer(), EvalSpec(), text=TEXT)


# ---- the whole ------------------------------------------------------------------------------------------------------


def printed(evaluation: Evaluation) -> str:
    console = Console(width=140, file=io.StringIO())
    console.print(evaluation_table(evaluation))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_an_evaluation_compares_on_the_same_items_and_repeats_itself(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    folder, tokenizer, model = write(tmp_path / "data", "lambada", "arc_easy"), byte_tokenizer(), model_of()
    spec = EvalSpec(["arc_easy", "copy", "lambada"], 4, str(folder), text=str(tmp_path / "text.txt"), resamples=50)
    student = copy.deepcopy(model)
    surgery.apply(student, Record(4), [Remove(1)])
    place = str(tmp_path / "teacher")
    teacher = Loaded(model, byte_tokenizer(), {"name": place, "kind": "local", "path": place, "sha256": "ab"})
    check(spec, teacher)
    found = evaluate(student, tokenizer, spec, teacher)
    assert found.to_json() == evaluate(student, tokenizer, spec, teacher).to_json()
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate(student, tokenizer, EvalSpec(["copy"], 1)).settings["precision"] == "bfloat16 autocast"
    assert str(tmp_path) not in found.to_json()
    data = json.loads(found.to_json())
    assert [task["task"] for task in data["tasks"]] == ["arc_easy", "copy", "lambada"]
    assert data["settings"]["data"]["arc_easy"].startswith("sha256 ")
    assert (data["settings"]["device"], data["settings"]["precision"]) == ("cpu", "float32")
    assert data["models"]["student"]["layers"] == 3
    assert data["models"]["teacher"] == {
        **{"name": "teacher", "kind": "local", "sha256": "ab", "type": "llama", "layers": 4, "dtype": "float32"},
        "params": surgery.parameters(model),
        "limit": 256,
    }
    expected = ask(model, tokenizer, read_task("arc_easy", folder, 4))
    assert found.tasks[0].teacher == expected.mean()
    assert found.tasks[0].metrics["teacher"]["acc_norm"] == expected.mean("acc_norm")
    assert found.text is not None
    assert found.text.difference == pytest.approx(
        math.log(found.text.perplexity / (found.text.teacher_perplexity or math.nan)), rel=1e-4
    )
    for word in ("arc_easy", "copy", "lambada", "retention", "perplexity", "teacher"):
        assert word in printed(found)


def test_an_untouched_student_retains_all_and_loses_nothing(tmp_path: Path) -> None:
    folder, model = write(tmp_path, "arc_easy"), model_of()
    found = evaluate(
        model,
        byte_tokenizer(),
        EvalSpec(["arc_easy"], data_dir=str(folder)),
        Loaded(model, byte_tokenizer(), {}),
        text=TEXT,
    )
    (score,) = found.tasks
    assert score.difference is not None
    assert (score.difference.value, score.difference.low, score.difference.high) == (0, 0, 0)
    assert score.teacher is not None
    assert score.teacher > 0
    assert score.retention is not None
    assert score.retention.value == found.retention[CHOICE].value == 1
    assert json.loads(found.to_json())["mean_retention"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found.text is not None
    assert found.text.difference == 0


def test_a_model_alone_gets_scores_with_errors(tmp_path: Path) -> None:
    spec = EvalSpec(["copy"], 5)
    found = evaluate(model_of(), byte_tokenizer(), spec)
    (score,) = found.tasks
    assert (score.kind, score.metric, score.teacher, score.difference, score.retention) == (
        GENERATION,
        "led",
        *[None] * 3,
    )
    assert found.retention == {}
    assert "score %" in printed(found)
    used = {item.sha256 for item in copy_items(995)}
    (rest,) = evaluate(model_of(), byte_tokenizer(), EvalSpec(["copy"], None), exclude=used).tasks
    assert rest.items == sum(item.sha256 not in used for item in copy_items(1000)) == 5


def test_every_preset_is_a_spec() -> None:
    for name, values in conf_group("eval").items():
        keys = {key: value for key, value in values.items() if key not in ("_target_", "defaults")}
        spec = EvalSpec(**keys)
        assert set(spec.tasks) <= {*TASKS, "copy", "recall"}, name
    assert set(conf_group("eval")["full"]["tasks"]) == {*TASKS, "copy"} - {"cbt"}, "the harness has no cbt"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ["piqa", "piqa"]}, r"eval\.tasks lists 'piqa' twice"),
        ({"tasks": ["helaswag"], "data_dir": "."}, r"unknown task 'helaswag': did you mean 'hellaswag'\?"),
        ({"limit": 0}, r"eval\.limit=0 must be at least 1"),
        ({"window": 1}, r"eval\.window=1 must be at least 2"),
        ({"tasks": []}, r"nothing to evaluate: set eval\.tasks"),
        ({"tasks": ["piqa"], "data_dir": "nowhere"}, r"no local file nowhere/piqa/eval\.jsonl: put its items there"),
        ({"tasks": ["copy"], "text": "nowhere.txt"}, r"eval\.text=.*nowhere\.txt does not exist"),
        ({"tasks": ["copy"], "efficiency_seconds": -1}, r"eval\.efficiency_seconds=-1 must be at least 0"),
    ],
)
def test_bad_specs_are_refused_before_a_run_and_by_itself(values: dict[str, Any], message: str) -> None:
    model, tokenizer = model_of(), byte_tokenizer()
    for ask_ in (
        lambda: evaluate(model, tokenizer, EvalSpec(**values)),
        lambda: check(EvalSpec(**values), Loaded(model, tokenizer, {})),
    ):
        with pytest.raises(ValueError, match=message):
            ask_()


def test_a_begin_token_that_the_harness_cannot_add_is_refused_before_a_run() -> None:
    """Of tasks of its own; ours begin as the run's text does."""
    model, tokenizer = model_of(), byte_tokenizer()
    frame, teacher = framing_of(tokenizer, "document"), Loaded(model, tokenizer, {})
    with pytest.raises(ValueError, match=r"data\.bos asks for a begin token that the tokenizer does not add"):
        check(EvalSpec(["copy", "piqa"], 2), teacher, frame=frame)
    check(EvalSpec(["copy"], 2), teacher, frame=frame)


def test_models_with_other_tokenizers_are_refused() -> None:
    model, same, longer, front = model_of(), byte_tokenizer(), byte_tokenizer(), byte_tokenizer()
    check_same_tokenizer(same, byte_tokenizer())
    longer.add_tokens(["<x>"])
    front.backend_tokenizer.post_processor = TemplateProcessing(single="<|eos|> $A", special_tokens=[("<|eos|>", 256)])
    for other, message in ((longer, r"257 and 258 tokens; '<x>' has id None .* 257"), (front, "is cut into")):
        with pytest.raises(ValueError, match=rf"different tokenizers \(.*{message}.*look at each model alone"):
            evaluate(model, same, EvalSpec(["copy"], 2), Loaded(model, other, {}))
    with pytest.raises(ValueError, match="ids up to 257, the student's embedding 257 rows"):
        evaluate(model, longer, EvalSpec(["copy"], 2))


def test_progress_appears_after_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, stream = [100.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with ProgressLine(stream) as tell:
        for done in range(41):
            tell("texts of piqa", done, 1000)
            now[0] += 0.5
    first, *_, second = stream.getvalue().splitlines()
    assert first == "texts of piqa: 4/1,000, 498 s left"
    assert second.startswith("texts of piqa: 34/1,000")
