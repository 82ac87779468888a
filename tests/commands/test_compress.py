"""`iskd.compress` is `train.py` as a function: same numbers, no traces in the process, errors that say what to do."""

from __future__ import annotations

import ast
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from transformers import PreTrainedModel

import iskd
from iskd.commands import build
from iskd.commands.compose import compose_config
from iskd.commands.resume import resumed
from iskd.data import given_texts
from iskd.data.given import GivenTexts
from iskd.data.sources import TextFiles
from iskd.models.tokenizers import byte_tokenizer
from iskd.models.weights import model_tensors
from iskd.teacher.given import given_teacher
from iskd.training import Result, run
from tests.factories import CONF, digest, modes, tiny

KEYS = (
    *("schedule.count=1", "data.seq_len=32", "data.val_tokens=512", "data.batch_size=2", "run.measure_before=false"),
    *("run.efficiency_seconds=0", "run.samples=0", "run.mfu=false"),
    *("run.fit_tokens=64", "run.score_tokens=64", "trainer=cpu", "trainer.precision=32-true", "trainer.progress=false"),
)
CALL: dict[str, Any] = {"schedule": "iterative", "edit": "replace", "block": "linear", "importance": "block_influence"}
CALL |= {"loss": ["kl", "ce"], "tokens": 512, "seed": 3, "export": False}


CHAT = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}]


def model() -> PreTrainedModel:
    return tiny("llama", vocab=257, layers=3)


def documents() -> list[str]:
    return [f"Document {n} says that {n} times {n % 9} is {n * (n % 9)}. " * 4 for n in range(300)]


def same(a: Result, b: Result) -> bool:
    """Equal stages but for times, equal weights."""
    rows = [[(s.name, s.edits, s.ppl, s.kl, s.tokens, s.scores) for s in result.stages] for result in (a, b)]
    first, second = model_tensors(a.student), model_tensors(b.student)
    return rows[0] == rows[1] and all(torch.equal(first[name], second[name]) for name in first)


def test_compress_is_the_command_line_and_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From memory, in a thread, inside a Hydra application: the numbers of a composed run on the same files."""
    monkeypatch.setenv("ISKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["notebook", "--not-for-us"])
    teacher, tokenizer, texts = model(), byte_tokenizer(), documents()
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = ["model=local", f"model.path={tmp_path}/teacher", "data=text", f"data.path={tmp_path}/texts.jsonl"]
    given = ["edit=replace", "block=linear", "importance=block_influence", "loss=[kl,ce]", "schedule.tokens=512"]
    config, _ = compose_config([*files, *given, "seed=3", "export=false", *KEYS])
    command = run(build.parts(config, tmp_path / "command"))

    teacher.train()
    next(teacher.parameters()).requires_grad_(False)
    flags, before, training = [p.requires_grad for p in teacher.parameters()], digest(teacher), modes(teacher)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    folder, found = os.getcwd(), []
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):  # somebody else's application

        def work() -> None:
            found.append(
                iskd.compress(teacher, tokenizer, iter(texts), run_dir=tmp_path / "memory", **CALL, overrides=KEYS)
            )

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        by_name = iskd.compress(
            tmp_path / "teacher", None, str(tmp_path / "texts.jsonl"), run_dir=tmp_path / "name", **CALL, overrides=KEYS
        )
        assert compose("config", overrides=["seed=5"]).seed == 5
    GlobalHydra.instance().clear()

    assert same(found[0], command)
    assert same(by_name, command)
    assert digest(teacher) == before
    assert modes(teacher) == training
    assert [p.requires_grad for p in teacher.parameters()] == flags
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == handlers
    assert (os.getcwd(), sys.argv) == (folder, ["notebook", "--not-for-us"])
    assert not HydraConfig.initialized() or HydraConfig.get() is not None
    result = found[0]
    assert isinstance(result, iskd.Result)
    assert result.final.tokens == 512
    assert result.report == tmp_path / "memory" / "report.html"
    facts = json.loads((tmp_path / "memory" / "environment.json").read_text())
    assert (facts["teacher"]["kind"], len(facts["teacher"]["sha256"])) == ("memory", 64)

    with pytest.raises(ValueError, match="holds another run"):
        iskd.compress(teacher, tokenizer, texts, run_dir=tmp_path / "memory", **CALL, overrides=KEYS)
    again = iskd.compress(teacher, tokenizer, texts, run_dir=tmp_path / "memory", resume=True, **CALL, overrides=KEYS)
    assert same(again, command)
    other = {**CALL, "seed": 4}
    with pytest.raises(ValueError, match="changes seed: 3 -> 4;"):
        iskd.compress(teacher, tokenizer, texts, run_dir=tmp_path / "memory", resume=True, **other, overrides=KEYS)
    # the command line cannot have what was in memory, and says where it was
    config, _ = compose_config([f"resume={tmp_path}/memory"], tmp_path)
    with pytest.raises(ValueError, match=r"the model given to iskd\.compress"):
        build.parts(resumed(config, []), tmp_path / "memory")


def test_a_run_directory_is_never_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `run_dir` every call has a folder of its own, also in the same second, where the command would put it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ISKD_CACHE", str(tmp_path / "cache"))
    plan = [*KEYS, "plan_only=true", "hydra.run.dir=runs/${name}"]
    folders = [
        iskd.compress(
            model(),
            byte_tokenizer(),
            documents(),
            experiment="shortgpt",
            overrides=[*plan, "schedule.target_layers=2", "schedule.count=null"],
        ).run_dir
        for _ in range(2)
    ]
    assert folders == [Path("runs/shortgpt"), Path("runs/shortgpt-2")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 5}, "model must be a transformers model, a directory or a name, got int"),
        ({"model": "no where", "tokenizer": None}, "no directory, no model config .*smollm2.* and no name on the hub"),
        ({"model": "tiny"}, "comes with its own tokenizer"),
        ({"tokenizer": None}, "needs its tokenizer, got NoneType"),
        ({"texts": "nowhere.txt"}, r"no data config .*docstrings.*texts=\[text\]"),
        ({"texts": ["a", 3]}, r"texts\[1\] is int, not a string and no chat"),
        ({"texts": [{"text": "a"}]}, r"texts\[0\] is dict, .*row\['text'\] for row in rows"),
        ({"texts": ["a", {"messages": CHAT}]}, r"texts mixes texts and chats, up to texts\[1\]"),
        ({"texts": [{"messages": [{"content": "a"}]}]}, r"texts\[0\]: field 'messages', message 1 has no role"),
        ({"texts": [{"messages": CHAT}], "overrides": ["data.chat.loss=null"]}, "set it to assistant or all"),
        ({"overrides": ["data.chat.loss=all"]}, "wants rows of chats, and GivenTexts has texts"),
        ({"texts": [" ", "\n"]}, "holds no document"),
        ({"texts": ["broken \ud800"], "overrides": ["data.seq_len=32"]}, "half a character"),
        ({"schedule": "sometimes"}, "schedule has no choice 'sometimes'; choose align, .*oneshot"),
        ({"loss": ["kl", "guess"]}, "loss has no choice 'guess'; choose ce"),
        ({"overrides": ["schedule.cout=3"]}, "schedule.cout"),
        ({"overrides": ["schedule.count=["]}, "schedule.count"),
        ({"overrides": ["schedule.restart_at_edit=true"]}, "replaces the process at every edit"),
        (
            {"schedule": "mixed", "overrides": ["schedule.steps=[{edit: remove, count: 1, restart_at_edit: true}]"]},
            "replaces the process at every edit",
        ),
        ({"resume": True}, "pass run_dir too"),
    ],
)
def test_bad_arguments_are_refused_with_the_fix(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ISKD_CACHE", str(tmp_path / "cache"))
    arguments = {"model": model(), "tokenizer": byte_tokenizer(), "texts": documents(), **changes}
    with pytest.raises(ValueError, match=message):
        iskd.compress(**arguments)
    late = ("half", "assistant or all", "rows of chats")  # said when the run's folder is there
    assert not (tmp_path / "runs").exists() or any(words in message for words in late)


def test_rows_of_chats_are_those_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same documents, under the keys of data=chat."""
    rows = [{"messages": CHAT}, {"prompt": "Is it?", "completion": "It is not."}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = given_texts(rows)
    assert list(given.documents()) == list(TextFiles(str(tmp_path / "chats.jsonl"), chat=True).documents())
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    asked: list[Any] = []
    monkeypatch.setattr(sys.modules[iskd.compress.__module__], "run", asked.append)
    monkeypatch.setenv("ISKD_CACHE", str(tmp_path / "cache"))
    iskd.compress(model(), tokenizer, rows, run_dir=tmp_path / "run", **CALL, overrides=KEYS)
    assert (asked[0].data.chat_loss, asked[0].data.source) == ("assistant", given)


def test_texts_are_known_by_their_content() -> None:
    source = given_texts(text for text in ["one", " ", "two\n"])
    assert [text for text, _ in source.documents()] == ["one", "two"]
    assert source.fingerprint() == GivenTexts(("one", "two")).fingerprint()
    assert source.fingerprint() != GivenTexts(("onet", "wo")).fingerprint()
    assert "one" not in repr(source)
    assert source.fingerprint() in repr(source)


def test_a_teacher_in_memory_is_known_by_its_weights() -> None:
    first, second = model(), model()
    assert given_teacher(first, byte_tokenizer()).source == given_teacher(second, byte_tokenizer()).source
    with torch.no_grad():
        next(second.parameters())[0, 0] += 1
    assert given_teacher(first, byte_tokenizer()).source != given_teacher(second, byte_tokenizer()).source
    assert given_teacher(model().bfloat16(), byte_tokenizer()).source["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match=r"ids up to 256, the embedding of LlamaForCausalLM only 101 rows"):
        given_teacher(tiny("llama"), byte_tokenizer())


def test_importing_the_package_does_not_import_what_runs() -> None:
    """Hydra, W&B and the reports cost seconds, which `iskd.load` does not need; read off the source."""
    reached, todo = set(), ["iskd", "iskd.export.loading"]
    while todo:
        name = todo.pop()
        file = CONF.parent.joinpath(*name.split("."))
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        if name in reached or not file.is_file():
            continue
        reached.add(name)
        for node in ast.parse(file.read_text(encoding="utf-8")).body:  # what is inside functions is not imported yet
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    assert "iskd.export.loading" in reached
    assert not reached & {
        "iskd.commands.compress",
        "iskd.commands.build",
        "iskd.training.runner",
        "iskd.report.run_page",
        "iskd.training.metrics.loggers",
    }
    assert {"compress", "Result", "load"} <= set(dir(iskd))
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        iskd.compres  # noqa: B018


def test_arguments_of_a_wrong_kind_are_named() -> None:
    for texts in ("Once upon a time there was a fox. " * 40, 5, None):
        with pytest.raises(ValueError, match="texts"):
            iskd.compress("tiny", None, texts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model='xxx"):
        iskd.compress("x" * 5000, None, "sample")
