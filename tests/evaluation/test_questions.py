"""Tasks beside those of local files: made here, any of the harness's, written texts; and models of other lengths."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from iskd.data import Framing
from iskd.evaluation import Asking, EvalSpec, evaluate
from iskd.evaluation.evaluator import check
from iskd.evaluation.harness import Drawn, draw
from iskd.evaluation.questions import questions
from iskd.evaluation.results import TaskScore
from iskd.evaluation.tasks.made_items import LENGTHS, copying_items, recall_items
from iskd.evaluation.tasks.passages import Passage
from iskd.evaluation.tasks.task_items import Item, read_sentences, read_task
from iskd.evaluation.written import compared, write_and_score
from iskd.models import Stack, surgery
from iskd.models.tokenizers import byte_tokenizer
from iskd.plan import Convert, Record, Spec
from iskd.teacher import Loaded
from tests.factories import mixer_specs, tiny

MIXER = Spec("iskd.mixers.linear_attention.LinearAttention", {})
BYTES = byte_tokenizer()
MIXERS = mixer_specs()


def model_of(context: int = 256, family: str = "llama") -> PreTrainedModel:
    model = tiny(family, vocab=257, context=context)
    with torch.no_grad():
        Stack(model).head[0].mul_(20)
    return model.eval()


def converted(teacher: PreTrainedModel) -> PreTrainedModel:
    """Its student without any attention."""
    student = copy.deepcopy(teacher)
    surgery.apply(student, Record(4), [Convert(layer, MIXER, seed=layer) for layer in range(4)])
    return student.eval()


def lines(folder: Path, name: str, rows: list[dict[str, Any]], file: str = "eval.jsonl") -> Path:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / file).write_text("\n".join(json.dumps({"id": str(n), **row}) for n, row in enumerate(rows)))
    return folder


def piqa(count: int) -> list[dict[str, Any]]:
    return [{"goal": f"count to {n}", "sol1": f"say {n}", "sol2": f"hum {n}", "label": n % 2} for n in range(count)]


def scores(model: PreTrainedModel, spec: EvalSpec, teacher: PreTrainedModel | None = None) -> dict[str, TaskScore]:
    beside = None if teacher is None else Loaded(teacher, BYTES, {})
    return {task.task: task for task in evaluate(model, BYTES, spec, beside).tasks}


# ---- length ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [64, 100, 512])
def test_recall_texts_have_the_length_that_they_are_named_after(length: int) -> None:
    items = recall_items(BYTES, length, 5)
    tokens = [len(item.contexts[0]) + len(item.continuations[0]) for item in items]
    assert all(length - 12 <= count <= length for count in tokens)
    assert items[:2] == recall_items(BYTES, length, 2)
    for item in items:
        (text,), (answer,) = item.contexts, item.continuations
        key = text.split()[-2]
        assert f"{key} is{answer}." in text[: len(text) // 2 + 40]
        assert text.endswith(f"{key} is")
        assert text.count(answer.strip()) == 1
    assert recall_items(BYTES, length, 1, seed=1) != items[:1]


def test_a_student_without_attention_is_read_beyond_its_teachers_context(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In tasks of ours, of the harness, and in text; the teacher goes by its own limit on the same items."""
    teacher = model_of(context=48)
    student, long = converted(teacher), {"goal": "say a long sentence of many words, again and again", "label": 0}
    folder = lines(tmp_path, "piqa", [{**long, "sol1": f"one {n}", "sol2": f"two {n}"} for n in range(3)])
    (tmp_path / "text.txt").write_text("What was said of cats and dogs was said before. " * 8)
    spec = EvalSpec(
        ["piqa", "recall_128"], 3, str(folder), text=str(tmp_path / "text.txt"), tokens=256, window=128, resamples=5
    )
    with caplog.at_level("WARNING"):
        found = evaluate(student, BYTES, spec, Loaded(teacher, BYTES, {}))
    cut = [record.message for record in caplog.records if "lost their beginning" in record.message]
    assert len(cut) == 2, "of the teacher alone"
    assert all("the context is 48 tokens" in message for message in cut)
    for task in found.tasks:
        assert task.retention is not None
        assert math.isnan(task.retention.value), "the two were not asked the same"
    assert math.isnan(found.mean.value)
    assert found.retention == {}
    assert found.text is not None
    assert (found.text.windows, found.text.tokens) == (2, 2 * 127)
    ids = torch.tensor(list((tmp_path / "text.txt").read_bytes()[:256])).view(2, 128)
    with torch.no_grad():
        ours = student(ids, labels=ids).loss
        pieces = torch.cat([teacher(piece).logits for piece in ids[:, :-1].split(48, 1)], 1)
    theirs = torch.nn.functional.cross_entropy(pieces.flatten(0, 1), ids[:, 1:].flatten())
    assert found.text.perplexity == pytest.approx(ours.exp().item(), rel=1e-4)
    assert found.text.teacher_perplexity == pytest.approx(theirs.exp().item(), rel=1e-4)


def test_along_a_run_a_student_reads_the_text_as_by_itself(tmp_path: Path) -> None:
    """In windows of its own limit once it reads further than its teacher, and as short ones before."""
    teacher, file = Loaded(model_of(context=48), BYTES, {}), tmp_path / "text.txt"
    student = converted(teacher.model)
    file.write_text("What was said of cats and dogs was said before. " * 8)
    spec = EvalSpec(text=str(file), tokens=256, window=128, resamples=5)
    asking = Asking(spec, BYTES, teacher)
    for model, windows in ((teacher.model, 5), (student, 2), (teacher.model, 5)):
        along = asking.ask(model, BYTES, {})
        assert along.to_json() == evaluate(model, BYTES, spec, teacher).to_json()
        assert along.text is not None
        assert along.text.windows == windows


def test_recall_stands_for_one_task_per_length() -> None:
    spec = EvalSpec(["copy", "recall"], 2, lengths=[64, 96])
    assert list(scores(model_of(), spec)) == ["copy", "recall_64", "recall_96"]
    assert list(questions(EvalSpec(["recall"], 1), BYTES, ())) == [f"recall_{length}" for length in LENGTHS]
    alone = EvalSpec(["recall"], 2, lengths=[64, 96], metrics={"recall_96": "led", "recall": "log_p"}, resamples=5)
    assert [task.metric for task in scores(model_of(), alone).values()] == ["log_p", "led"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tasks": ["recall_16"]}, r"task 'recall_16': the length must be between 64 and 8192 tokens"),
        ({"tasks": ["recall"], "lengths": []}, r"eval.lengths=\[\]: give one or more lengths from 64 to 8192"),
        ({"tasks": ["recall"], "lengths": [10]}, r"eval.lengths=\[10\]: give one or more lengths from 64 to 8192"),
        ({"tasks": ["recall", "niah"], "lengths": [16384]}, r"eval.lengths=\[16384\]: .* from 64 to 8192"),
        ({"tasks": ["niah"], "lengths": [262144]}, r"eval.lengths=\[262144\]: .* from 64 to 131072"),
        ({"tasks": ["copy"], "metrics": {"piqa": "acc"}}, r"eval.metrics.piqa is of a task that is not asked"),
        ({"tasks": ["recall"], "metrics": {"recall_100": "acc"}}, r"eval.metrics.recall_100 is of a task that is not"),
        (
            {"tasks": ["recall"], "metrics": {"recall_64": "f1"}},
            r"'recall_64' reports no metric 'f1': set eval.metrics",
        ),
        (
            {"tasks": ["summary"], "metrics": {"summary": "rouge"}},
            r"no metric 'rouge': did you mean 'rouge.'\? set eval",
        ),
        ({"tasks": ["copy", "recall"], "fewshot": 2}, r"eval.fewshot=2: none of copy, recall takes examples"),
        ({"tasks": ["copy"], "fewshot": -1}, r"eval.fewshot=-1 must be at least 0"),
    ],
)
def test_bad_specs_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(EvalSpec(**keys), Loaded(model_of(), BYTES, {}))


# ---- the harness ----------------------------------------------------------------------------------------------------


def test_examples_stand_before_the_question(tmp_path: Path) -> None:
    folder = lines(tmp_path, "piqa", piqa(5))
    lines(tmp_path, "piqa", [{**row, "goal": f"example {n}"} for n, row in enumerate(piqa(3))], "fewshot.jsonl")
    model = model_of(1024)
    (drawn,) = draw(["piqa"], data_dir=folder, limit=2, seed=0, fewshot=2)
    found = scores(model, EvalSpec(["piqa"], 2, str(folder), fewshot=2, resamples=5))
    assert found["piqa"].items == 2
    (task,) = drawn.leaves.values()
    assert task.config.num_fewshot == 2
    assert sorted(doc["goal"] for doc in task.fewshot_docs()) == ["example 0", "example 1", "example 2"]
    with pytest.raises(
        ValueError, match=r"eval.fewshot=4: task 'iskd_piqa' has 3 examples to show beside the question"
    ):
        next(draw(["piqa"], data_dir=folder, limit=2, seed=0, fewshot=4))
    (tmp_path / "piqa" / "fewshot.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"eval.fewshot=5: task 'iskd_piqa' has 4 examples to show beside the question"
    ):
        next(draw(["piqa"], data_dir=folder, limit=2, seed=0, fewshot=5))


ECHO = """
task: echo
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE, other: FILE}}
output_type: generate_until
validation_split: validation
fewshot_split: SPLIT
num_fewshot: 3
doc_to_text: "Q: {{text}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.parametrize("where", ["same file", "copied questions", "validation", "other", "first_n"])
def test_a_question_is_never_among_its_own_examples(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the prompts themselves: of local files, and of tasks whose examples are of the split that is asked."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    options: dict[str, Any] = {"limit": None, "seed": 0}
    if where in ("same file", "copied questions"):
        folder, name, head = lines(tmp_path, "piqa", piqa(6)), "piqa", "Question: {goal}\n"
        rows: list[dict[str, Any]] = piqa(6)
        if where == "copied questions":  # under other names, and with the choices in another order
            turned = [{**row, "sol1": row["sol2"], "sol2": row["sol1"], "label": 1 - row["label"]} for row in rows]
            lines(tmp_path, "piqa", [*turned[::-1], *rows], "fewshot.jsonl")
        options |= {"data_dir": folder, "fewshot": 4}
    else:
        name, head, rows = "echo", "Q: {text}\n", [{"text": f"number {n} of all", "answer": str(n)} for n in range(6)]
        rows.append(rows[0])
        file, tasks = lines(tmp_path, "rows", rows) / "rows" / "eval.jsonl", tmp_path / "tasks"
        tasks.mkdir()
        split = "validation" if where == "first_n" else where
        config = ECHO.replace("FILE", str(file)).replace("SPLIT", split)
        config += "fewshot_config: {sampler: first_n}\n" if where == "first_n" else ""
        (tasks / "echo.yaml").write_text(config.replace('"Q: {{text}}"', '"Q: {{text}}\\n"'))
        options |= {"data_dir": tmp_path, "task_dir": tasks}
    (drawn,) = draw([name], **options)
    ((leaf, task),) = drawn.leaves.items()
    for _ in range(3):
        task.set_fewshot_seed(1234)
        task.build_all_requests(samples=list(drawn.rows[leaf]))
        prompts = {each.doc_id: each.args[0] for each in task.instances}
        assert len(prompts) == len(rows)
        shown = {n: {head.format(**row) for row in rows if head.format(**row) in prompts[n]} for n in prompts}
        for n, row in enumerate(rows):
            assert prompts[n].count(head.format(**row)) == 1, "the question itself"
            assert sum(prompts[n].count(text) for text in shown[n]) == 1 + task.config.num_fewshot


def test_the_metric_that_is_compared_can_be_chosen(tmp_path: Path) -> None:
    folder = lines(tmp_path, "piqa", piqa(4))
    spec: dict[str, Any] = {"tasks": ["piqa", "copy"], "limit": 2, "data_dir": str(folder), "resamples": 5}
    found = scores(model_of(), EvalSpec(**spec, metrics={"piqa": "acc_norm", "copy": "log_p"}))
    assert [found[name].metric for name in ("piqa", "copy")] == ["acc_norm", "log_p"]
    with pytest.raises(ValueError, match=r"'piqa' reports no metric 'f1': set eval.metrics.piqa to acc or acc_norm"):
        check(EvalSpec(**spec, metrics={"piqa": "f1"}), Loaded(model_of(), BYTES, {}))
    with pytest.raises(ValueError, match=r"'copy' reports no metric 'leds': did you mean 'led'\? set eval.metrics"):
        EvalSpec(**spec, metrics={"copy": "leds"})


def test_tasks_that_take_no_examples_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = lines(tmp_path, "piqa", piqa(5))
    file = str(folder / "piqa" / "eval.jsonl")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "fixed.yaml").write_text(
        ECHO.replace("FILE", file)
        .replace("SPLIT", "validation")
        .replace("num_fewshot: 3", "num_fewshot: 0")
        .replace("echo", "fixed")
        .replace("{{text}}", "{{goal}}")
        .replace("{{answer}}", "{{sol1}}")
    )
    ways: dict[str, Any] = {"data_dir": str(folder), "task_dir": str(tmp_path / "tasks"), "fewshot": 2}
    with caplog.at_level("WARNING"):
        asked = questions(EvalSpec(["piqa", "copy", "fixed"], 2, **ways), BYTES, ())
    assert [record.message for record in caplog.records] == [
        "eval.fewshot=2: no examples stand before the questions of copy",
        "eval.fewshot=2: task 'fixed' takes no examples, it is asked without",
    ]
    counts = [asked[name].leaves[leaf].config.num_fewshot for name, leaf in (("piqa", "iskd_piqa"), ("fixed", "fixed"))]
    assert counts == [2, 0]


OF_A_FILE = "dataset_path: json\ndataset_kwargs: {data_files: {test: FILE}}\ntest_split: test"
NEEDLES = (
    OF_A_FILE
    + """
task: needles
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
process_results: !function needles.process
metric_list:
  - {metric: "64", aggregation: mean, higher_is_better: true}
  - {metric: "96", aggregation: mean, higher_is_better: true}
generation_kwargs: {do_sample: false, max_gen_toks: 4, until: ["."]}
"""
)
PROCESS = """
def process(doc, results):
    return {"64": -1.0, "96": -1.0, str(doc["length"]): float(len(results[0]) > 0) if doc["length"] == 64 else 0.5}
"""
WRITING = (
    OF_A_FILE
    + """
task: writing
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: bleu, aggregation: bleu, higher_is_better: true}
  - {metric: chrf, aggregation: chrf, higher_is_better: true}
generation_kwargs: {do_sample: false, max_gen_toks: 6, until: ["."]}
"""
)


ROLLED = (
    OF_A_FILE
    + """
task: rolled
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
"""
)


def test_tasks_of_a_folder_are_generated_and_scored_by_any_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Metrics that are named after lengths, as RULER's, and those whose items are aggregated."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"number {n} is", "answer": f"{n}", "length": 64 + 32 * (n % 2)} for n in range(4)]
    file = lines(tmp_path, "rows", rows) / "rows" / "eval.jsonl"
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "needles.yaml").write_text(NEEDLES.replace("FILE", str(file)))
    (folder / "needles.py").write_text(PROCESS)
    (folder / "writing.yaml").write_text(WRITING.replace("FILE", str(file)))
    (folder / "rolled.yaml").write_text(ROLLED.replace("FILE", str(file)))
    spec = EvalSpec(["needles", "writing", "rolled"], None, str(tmp_path), task_dir=str(folder), resamples=5)
    found = scores(model_of(), spec, model_of())
    needles, writing, rolled = found["needles"], found["writing"], found["rolled"]
    assert (needles.metric, needles.items, needles.kind) == ("string_match", 4, "generation")
    assert needles.student == needles.teacher
    assert needles.student in (0.25, 0.5, 0.75)
    assert writing.metric == "bleu"
    assert 0 <= writing.student <= 1
    assert writing.retention is not None
    assert 0 <= writing.metrics["student"]["chrf"] == writing.metrics["teacher"]["chrf"] <= 1
    assert (rolled.metric, rolled.kind, rolled.per_cent) == ("byte_perplexity", "likelihood", False)
    nats = bytes_ = 0.0
    for row in rows:  # a byte a token; the first one behind the token that starts every text
        ids = torch.tensor([[BYTES.eos_token_id, *row["text"].encode()]])
        with torch.no_grad():
            nats += model_of()(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        bytes_ += ids.shape[1] - 1
    assert rolled.student == rolled.teacher == pytest.approx(math.exp(nats / bytes_), rel=1e-4)
    assert rolled.retention is not None
    assert rolled.retention.value == 1
    alone = replace(spec, tasks=["rolled"])
    with caplog.at_level("WARNING"):
        assert math.isfinite(scores(model_of(context=8), alone)["rolled"].student)
    assert not caplog.records, "windows lose nothing"
    broken = model_of()
    with torch.no_grad():
        Stack(broken).head[0].fill_(math.nan)
    with pytest.raises(ValueError, match="rolled: the model gives nan for"):
        scores(broken, alone)


def test_answers_leave_room_for_the_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where an answer might take the whole context, and where the prompt is too long even so; ours cut alike."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"number {n} is" + " one" * 30 * n, "answer": f"{n}", "length": 64} for n in range(2)]
    folder, tasks = lines(tmp_path, "rows", rows), tmp_path / "tasks"
    tasks.mkdir()
    config = WRITING.replace("FILE", str(folder / "rows" / "eval.jsonl")).replace("max_gen_toks: 6", "max_gen_toks: 64")
    (tasks / "writing.yaml").write_text(config)
    lines(tmp_path, "summary", [{"text": row["text"], "summary": "ten"} for row in rows])
    spec = EvalSpec(["writing", "summary"], None, str(folder), task_dir=str(tasks), resamples=5)
    with caplog.at_level("WARNING"):
        found = scores(model_of(context=64), spec)
    assert [task.items for task in found.values()] == [2, 2]
    assert [record.message for record in caplog.records] == [
        "writing: answers may have 32 tokens and not 64: half of the context is the question's",
        "writing: 1 texts lost their beginning: the context is 64 tokens",
        "summary: 1 texts lost their beginning: the context is 64 tokens",
    ]


LONG = """
task: long
dataset_path: ""
dataset_name: ""
custom_dataset: !function long.make
output_type: generate_until
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
process_results: !function long.process
metric_list: [{metric: "4096", aggregation: mean, higher_is_better: true}]
generation_kwargs: {do_sample: false, max_gen_toks: 4, until: ["."]}
"""
MAKE = """
import datasets
def make(max_seq_lengths, tokenizer, **_):
    if min(max_seq_lengths) < 200:
        raise ValueError(f"Could not generate any sample at max_seq_length={min(max_seq_lengths)}.")
    rows = [{"text": "one of many", "max_length": length} for length in max_seq_lengths]
    return {"test": datasets.Dataset.from_list(rows)}
def process(doc, results):
    return {"4096": -1.0, str(doc["max_length"]): 1.0}
"""


def test_tasks_of_the_harness_are_made_at_the_lengths_that_are_asked(tmp_path: Path) -> None:
    """As RULER's; below those that it lists as metrics too."""
    (tmp_path / "long.yaml").write_text(LONG)
    (tmp_path / "long.py").write_text(MAKE)
    ways: dict[str, Any] = {"task_dir": str(tmp_path), "resamples": 5}
    for lengths, made in (([512, 4096, 16384], [512, 4096, 16384]), (None, [4096, 8192])):
        (drawn,) = questions(EvalSpec(["long"], None, lengths=lengths, **ways), BYTES, ()).values()
        assert isinstance(drawn, Drawn)
        assert [row["max_length"] for row in drawn.leaves["long"].eval_docs] == made
    found = scores(model_of(), EvalSpec(["long"], None, lengths=[512, 1024], **ways))["long"]
    assert (found.metric, found.items, found.student) == ("string_match", 2, 1.0)
    with pytest.raises(ValueError, match=r"'long' cannot be made at eval.lengths=\[128, 512\]: a length is too short"):
        questions(EvalSpec(["long"], None, lengths=[128, 512], **ways), BYTES, ())


# ---- scored here ----------------------------------------------------------------------------------------------------


def test_a_question_that_chose_layers_is_asked_in_no_other_form(tmp_path: Path) -> None:
    """Of the Children's Book Test there are two: with the sentences before and without."""
    rows = [{"question": f"{n} XXXXX went .", "options": ["Ann", "Bob"], "answer": "Bob"} for n in range(3)]
    folder = lines(tmp_path, "cbt", [{"sentences": [f"It was {n} .", "x"], **row} for n, row in enumerate(rows)])
    spec = EvalSpec(["cbt", "cbt_sentence"], None, str(folder))
    for chosen in (read_task("cbt", folder)[1], read_sentences(folder)[1]):
        asked = questions(spec, BYTES, [chosen.sha256])
        drawn, sentences = asked["cbt"], asked["cbt_sentence"]
        assert isinstance(drawn, Drawn)
        assert drawn.ids == ("0", "2")
        assert [item.id for item in sentences if isinstance(item, Item)] == ["0", "2"]


def test_sentences_that_a_folder_lacks_are_those_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As every other task's are: the folder may hold more tasks, or none."""
    row = {"sentences": ["x", "y"], "question": "Ann XXXXX .", "options": ["ran", "sat"], "answer": "sat"}
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [row])
    assert [item.id for item in read_sentences(tmp_path)] == ["cbt_sentence-0"]
    here = lines(tmp_path, "cbt", [row, {**row, "question": "Bob XXXXX ."}])
    assert len(read_sentences(here)) == 2


def test_a_sentence_of_cbt_is_scored_by_the_mean_loss_of_its_tokens(tmp_path: Path) -> None:
    """As ISKD's code does it: transformers' own loss of the sentence, nothing before it."""
    words = ["cat", "horse", "sun", "a", "elephant", "tree", "road", "x", "house", "boat"]
    rows = [{"question": f"XXXXX went to the {w}.", "options": words, "answer": words[3]} for w in words[:3]]
    rows += [{"question": f"The {w} saw a XXXXX there.", "options": words, "answer": w} for w in words[:3]]
    folder, model = lines(tmp_path, "cbt", [{"sentences": ["x"] * 2, **row} for row in rows]), model_of()
    right = []
    for item in read_sentences(folder):
        ids = [torch.tensor([list(text.encode())]) for text in item.continuations]
        with torch.no_grad():
            losses = [model(each, labels=each).loss.item() for each in ids]
        right.append(losses.index(min(losses)) == item.gold)
    found = scores(model, EvalSpec(["cbt_sentence"], None, str(folder), resamples=5))["cbt_sentence"]
    assert found.student == pytest.approx(sum(right) / len(right))
    assert (found.metric, found.chance) == ("acc_token", pytest.approx(0.1))


def test_documents_are_copied_whole_and_by_paragraph() -> None:
    for name in ("copy_doc", "copy_para"):
        items = copying_items(name, 3)
        for item in items:
            (context,), (rest,) = item.contexts, item.continuations
            assert rest.strip() in context
        assert items == copying_items(name, 3)


def test_translations_and_summaries_are_written_and_compared(tmp_path: Path) -> None:
    pairs = [{"source": f"{n} Katzen", "target": f"{n} cats", "source_language": "German"} for n in range(4)]
    texts = [{"text": f"{n} cats sat down. They slept.", "summary": f"{n} cats slept."} for n in range(4)]
    folder = lines(lines(tmp_path, "translation", pairs), "summary", texts)
    spec: dict[str, Any] = {"tasks": ["translation", "summary"], "limit": 2, "data_dir": str(folder), "resamples": 5}
    found = scores(model_of(), EvalSpec(**spec, fewshot=1), model_of())
    assert [(task.metric, task.items, task.kind) for task in found.values()] == [
        ("bleu", 2, "generation"),
        ("rougeL", 2, "generation"),
    ]
    assert found["translation"].metrics["student"].keys() == {"bleu", "chrf", "rouge1", "rouge2", "rougeL"}
    model = Loaded(model_of(), BYTES, {})
    with pytest.raises(ValueError, match=r"eval.fewshot=4: task 'translation' has 3 examples to show beside"):
        check(EvalSpec(**spec, fewshot=4), model)
    with pytest.raises(ValueError, match=r"'summary' is read from a local file, which is not there .*text, summary"):
        check(EvalSpec(["summary"]), model)
    lines(tmp_path, "summary", [{"text": "a"}])
    with pytest.raises(ValueError, match=r"line 1 is no item of summary: field 'summary' must be a text"):
        check(EvalSpec(**spec), model)


def shown(count: int) -> list[Passage]:
    """Passages behind two examples; the first two of them, which are those of the others, behind others."""
    texts = [f"{chr(97 + n) * 3}: " for n in range(count)]
    return [
        Passage(str(n), "".join(f"{text}is seen\n" for text in texts if text != own)[: 2 * 13] + own, "is seen too")
        for n, own in enumerate(texts)
    ]


def written(model: Any, groups: list[list[Passage]]) -> dict[tuple[int, ...], Tensor]:
    """Logits [new, V] of all that a model writes, by the ids of prompt and text; groups are asked together."""
    found, generate = dict[tuple[int, ...], Tensor](), model.generate

    def noted(*args: Any, **options: Any) -> Tensor:
        made = generate(*args, **options, output_logits=True, return_dict_in_generate=True)
        found[tuple(made.sequences[0].tolist())] = torch.cat(made.logits)
        sequences: Tensor = made.sequences
        return sequences

    model.generate = noted
    for group in groups:
        write_and_score(model, BYTES, "summary", group, metric=None, step=lambda *_: None, frame=Framing())
    model.generate = generate
    return found


def check_written(model: PreTrainedModel, passages: list[Passage]) -> tuple[int, int]:
    """Asked together or one by one, passages give the same; the tokens that are read for either."""
    read = list[int]()
    model.get_input_embeddings().register_forward_pre_hook(lambda _, given: read.append(given[0].numel()))
    together, once = written(model, [passages]), sum(read)
    apart = written(model, [[passage] for passage in passages])
    assert together.keys() == apart.keys()
    assert len(together) == len(passages)
    for text, logits in apart.items():
        torch.testing.assert_close(together[text], logits, atol=1e-3, rtol=1e-4)
    return once, sum(read) - once


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma", "gemma3_text"])
def test_examples_of_several_passages_are_read_once(family: str) -> None:
    together, apart = check_written(model_of(family=family), shown(6))
    # four passages begin with the same 26 characters, the other two with examples of their own
    assert apart - together == 3 * 26


@pytest.mark.parametrize("mixer", MIXERS)
def test_texts_go_on_from_the_state_of_a_mixer(mixer: str) -> None:
    model, passages = model_of(), shown(4)[2:]
    surgery.apply(model, Record(4), [Convert(layer, MIXERS[mixer], seed=layer) for layer in range(0, 4, 2)])
    together, apart = check_written(model.eval(), passages)
    assert apart - together == 26


def test_texts_are_compared_by_torchmetrics() -> None:
    assert set(compared("the cat sat on it", "the cat sat on it").values()) == {1.0}
    assert set(compared("", "the cat sat").values()) == {0.0}
    some = compared("a cat sat on the mat", "the cat sat on the mat")
    assert all(0.5 < value < 1 for value in some.values())


@pytest.mark.parametrize(
    ("text", "reference", "rouge1"),
    [
        ("Кошка спит, на окне!", "кошка спит на столе", 0.75),
        ("Կատուն քնած է պատուհանին", "կատուն քնած է պատուհանին", 1),
        ("القطة نائمة على النافذة الكبيرة", "القطة نائمة على النافذة", 8 / 9),
        ("बिल्ली सो रही है", "बिल्ली सो गई है", 0.75),
        ("猫坐在窗上", "猫睡在窗上。", 0.8),
        ("ねこが寝る", "ねこが見る", 0.8),
        ("แมวนอน", "แมวนั่ง", 6 / 11),
        ("the Cat's 2 mats", "the cat s 2 mats", 1),
    ],
)
def test_words_of_any_script_are_compared(text: str, reference: str, rouge1: float) -> None:
    found = compared(text, reference)
    assert found["rouge1"] == pytest.approx(rouge1)
    assert 0 < found["rougeL"] <= found["rouge1"] + 1e-6
    assert [compared(reference, reference)[name] for name in ("bleu", "rouge1", "rougeL")] == [1, 1, 1]


@pytest.mark.parametrize("reference", ["猫坐在窗户上面看雨", "ねこがまどのそばで寝る", "แมวนอนอยู่บนหน้าต่าง"])
def test_bleu_reads_characters_where_there_are_no_spaces(reference: str) -> None:
    assert 0.5 < compared(reference[:-1] + "x", reference)["bleu"] < 1


@pytest.mark.parametrize(
    ("metric", "scores", "per_cent"),
    [
        ("acc", (0.4, 0.5), True),
        ("bits_per_byte,none", (0.7, 0.6), False),
        ("word_perplexity", (12.0, 0.9), False),
        ("mcc", (-0.2, 0.1), True),
        ("bleu", (31.0, 40.0), False),
    ],
)
def test_only_shares_are_told_in_per_cent(metric: str, scores: tuple[float, float], per_cent: bool) -> None:
    assert TaskScore("task", metric=metric, student=scores[0], teacher=scores[1]).per_cent is per_cent
