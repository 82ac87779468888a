"""The end of a run: what cannot be had again comes first, and a measurement that fails costs nothing but itself."""

from __future__ import annotations

import json
import logging
import os
import random
import shlex
import signal
import string
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from iskd.commands import build
from iskd.commands.compose import compose_config
from iskd.commands.values.config import object_of
from iskd.evaluation import EvalSpec
from iskd.importance.task_accuracy import TaskAccuracy
from iskd.models import surgery
from iskd.plan import Record, Remove
from iskd.plan.options import RunOptions
from iskd.plan.run_files import CONFIG_FILE
from iskd.system import Preempted
from iskd.system.stop_signals import EXIT_CODE, INTERRUPTED, StopSignals
from iskd.training import facts, finish
from iskd.training.parts import Parts, Result
from iskd.training.state import RunState
from tests.run_folders import stage
from tests.runs import make_parts, write_text

SPEC = EvalSpec(["copy"], 4, resamples=20)


class Trainer:
    """As much of Lightning's as the end of a run asks for; says when the other ranks are let go."""

    is_global_zero, global_rank, world_size = True, 0, 1
    root_device = torch.device("cpu")

    def __init__(self, run_dir: Path) -> None:
        self.strategy = self
        self.run_dir, self.there = run_dir, set[str]()

    def barrier(self, name: str) -> None:
        self.there = {path.name for path in self.run_dir.iterdir()}


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    made = make_parts(tmp_path / "run", write_text(tmp_path), tmp_path / "cache")
    made.data.prepare()
    options = RunOptions(efficiency_seconds=0.01)
    source: dict[str, Any] = {"name": "t", "kind": "hub", "sha256": "ab"}
    return replace(made, export=True, options=options, evaluation=SPEC, teacher=replace(made.teacher, source=source))


def ended(parts: Parts, trainer: Any = None, signals: StopSignals | None = None) -> Result:
    """The end of a run whose student has lost a layer."""
    teacher = parts.teacher.model
    record = Record(4).extended([Remove(1)])
    module: Any = SimpleNamespace(student=surgery.rebuild(teacher, record), teacher=teacher)
    state = RunState(record=record, results=[stage(0, scores=None), stage(1, scores=None)])
    return finish.finish(parts, trainer or Trainer(parts.run_dir), module, state, signals or StopSignals())


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that is not reopened, short contexts."""
    export, measure = finish.export, finish.efficiency.measure
    monkeypatch.setattr(finish, "export", lambda *args, **options: export(*args, **options, verify=False))
    monkeypatch.setattr(
        finish.efficiency, "measure", lambda *a, **o: measure(*a, **o, contexts=[8], decode_tokens=1, repeats=1)
    )


def test_student_and_tables_come_before_what_is_measured(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    trainer, run_dir = Trainer(parts.run_dir), parts.run_dir
    result = ended(parts, trainer)
    assert {"stages.json", "record.json", "data.json", "report.html", "model"} <= trainer.there
    assert trainer.there.isdisjoint({"evaluation.json", "efficiency.json"})
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert evaluation["models"]["student"]["layers"] == 3
    assert len(evaluation["models"]["student"]["sha256"]) == 64
    assert evaluation["models"]["teacher"]["name"] == "t"
    assert result.report is not None
    page = result.report.read_text()
    assert "Scores by task" in page
    assert "Measured, not computed" in page
    card = (run_dir / "model" / "README.md").read_text()
    assert "model-index" in card
    assert "## Scores" in card
    assert "## Efficiency" in card


def test_a_measurement_that_fails_is_named_with_its_command(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quick(monkeypatch)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def gone(*_: Any, **__: Any) -> Any:
        raise ValueError("no lm_eval")

    monkeypatch.setattr(finish.efficiency, "measure", full)
    monkeypatch.setattr(finish.AlongTheRun, "ask", gone)
    monkeypatch.setattr(finish, "log_end", gone)
    monkeypatch.setattr(finish, "write_report", gone)
    with caplog.at_level(logging.ERROR):
        result = ended(parts)
    run_dir = parts.run_dir
    said = [record.getMessage() for record in caplog.records]
    reports = [message for message in said if f"Again: iskd report {run_dir}" in message]
    assert len(reports) == 2, "before what is measured and after"
    said = [message for message in said if message not in reports]
    assert len(said) == 3
    assert "FAILED: efficiency (OutOfMemoryError: CUDA out of memory)" in said[0]
    assert f"Again: iskd evaluate model={run_dir} 'eval.tasks=[]' eval.efficiency_seconds=0.01" in said[0]
    assert "FAILED: evaluation (ValueError: no lm_eval)" in said[1]
    keys = "eval=quick 'eval.tasks=[copy]' eval.limit=4 eval.resamples=20"
    assert f"Again: iskd evaluate model={run_dir} {keys}" in said[1]
    assert "what the logger shows at the end" in said[2]
    assert result.model_dir is not None
    assert (result.model_dir / "model.safetensors").is_file()
    assert result.report is None


def test_an_export_that_fails_is_raised_after_the_measurements(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("cannot be trusted")

    monkeypatch.setattr(finish, "export", broken)
    with pytest.raises(RuntimeError, match="cannot be trusted"):
        ended(parts)
    assert "Scores by task" in (parts.run_dir / "report.html").read_text()


def test_in_shards_speed_and_fewer_bits_are_measured_by_a_command(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(finish.sharding, "is_sharded", lambda model: model is parts.teacher.model)
    monkeypatch.setattr("iskd.evaluation.evaluator.check_quantize", lambda *_: None)  # its package is not needed here
    spec = replace(SPEC, quantize=("int8",), text=str(parts.run_dir.parent / "text.txt"))
    with caplog.at_level(logging.WARNING):
        ended(replace(parts, evaluation=spec))
    said = [record.getMessage() for record in caplog.records if "in shards" in record.getMessage()]
    assert [message.partition(" was")[0] for message in said] == ["efficiency", "the student in fewer bits"]
    assert all("On one device: iskd evaluate model=" in message for message in said)
    found = json.loads((parts.run_dir / "evaluation.json").read_text())
    assert [task["task"] for task in found["tasks"]] == ["copy"]
    assert not found.get("quantized")
    assert not (parts.run_dir / "efficiency.json").exists()


def test_a_process_that_ends_while_writing_tells_those_that_wait_to_ask(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(finish.sharding, "is_sharded", lambda model: model is parts.teacher.model)
    monkeypatch.setattr(finish, "_leave", told.append)
    monkeypatch.setattr(finish, "write_stages", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        ended(parts)
    assert len(told) == 1


def test_the_command_names_what_is_nowhere_on_disk(parts: Parts) -> None:
    """A teacher in memory needs a name; without an export the run itself is continued, which measures again."""
    memory = replace(parts, teacher=replace(parts.teacher, source={"kind": "memory", "name": "x"}))
    assert finish.again(memory, parts.run_dir / "model", None).endswith(" reference=TEACHER")
    assert finish.again(parts, None, None) == f"iskd train resume={parts.run_dir}"
    assert finish.again(parts, None, EvalSpec(["a", "b"], None)) == (
        f"iskd train resume={parts.run_dir} eval=quick 'eval.tasks=[a,b]' eval.limit=null"
    )


def test_the_command_asks_the_same_again() -> None:
    """Every field of a spec, whatever kind of value it has."""
    own: dict[str, Any] = {
        "limit": None,
        "data_dir": "a, (b)",
        "task_dir": "c=d",
        "metrics": {"gsm8k": "exact_match,flexible-extract"},
    }
    own |= {"fewshot": 0, "lengths": (64, 128), "text": "it's.txt", "quantize": ("int8", "int4")}
    numbers = {"seed", "batch_size", "batch_tokens", "tokens", "window", "resamples", "efficiency_seconds"}
    own |= dict.fromkeys(numbers, 3)
    spec = EvalSpec(["gsm8k", "copy"], **own)
    told = {field.name for field in fields(EvalSpec)} - {"tasks", "every"}
    assert told == own.keys(), "each has another value than its own"
    assert all(getattr(spec, name) != getattr(EvalSpec(), name) for name in told)
    _, *words = shlex.split(shlex.join(["iskd", *finish._keys(spec)]))
    config, _ = compose_config(["debug=smoke", *words], Path("unused"))
    assert object_of(config.eval) == spec


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.data_dir=nowhere", "eval.tasks=[piqa]"], r"no local file nowhere/piqa/eval\.jsonl: put its items"),
        (["eval.tasks=[copy]", "eval.text=nowhere.txt"], r"nowhere\.txt does not exist"),
        (["eval.tasks=[]"], "nothing to evaluate"),
        (["eval.tasks=[]", "eval.every=stage"], r"nothing to evaluate: .* inside stages alone, eval\.every=TOKENS"),
        (["eval.tasks=[copy]", "eval.efficiency_seconds=5"], r"for a run set run\.efficiency_seconds"),
        (["eval.tasks=[]", "eval.every=64", "eval.efficiency_seconds=5"], r"for a run set run\.efficiency_seconds"),
        (
            ["eval.tasks=[]", "eval.every=64", "eval.quantize=[int8]"],
            r"eval\.quantize=\['int8'\] is measured at the end",
        ),
    ],
)
def test_an_evaluation_that_cannot_work_stops_the_run_at_its_start(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    keys = ["debug=smoke", f"cache_dir={tmp_path}/cache", "eval=quick", *overrides]
    config, _ = compose_config(keys, Path("unused"))
    with pytest.raises(ValueError, match=message):
        build.parts(config, tmp_path / "run")
    assert not (tmp_path / "run" / CONFIG_FILE).exists(), "the folder is free for the next try"


def test_a_report_on_text_that_the_run_sees_is_refused_or_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the file is called and however it is packed: passages are compared, not files."""
    rng = random.Random(0)
    documents = [" ".join(rng.choices(string.ascii_lowercase, k=120)) for _ in range(400)]
    (tmp_path / "train.txt").write_text("\n\n".join(documents))
    seen = "\n\n".join(documents[40:60])
    new = [" ".join(rng.choices(string.ascii_lowercase, k=120)) for _ in range(20)]
    (tmp_path / "all.jsonl").write_text(json.dumps({"text": seen}))
    (tmp_path / "some.txt").write_text("\n\n".join([*new, *documents[40:42]]))
    (tmp_path / "new.txt").write_text("\n\n".join(new))

    def built(name: str) -> None:
        keys = ["debug=smoke", "data=text", f"data.path={tmp_path}/train.txt", f"cache_dir={tmp_path}/cache"]
        config, _ = compose_config([*keys, "eval=quick", "eval.tasks=[]", f"eval.text={tmp_path}/{name}"], Path("x"))
        build.parts(config, tmp_path / name.partition(".")[0])

    with pytest.raises(ValueError, match=r"of the passages of eval\.text=.*all\.jsonl are in what the student trains"):
        built("all.jsonl")
    built("some.txt")
    assert "scores on it flatter the student" in caplog.text
    caplog.clear()
    built("new.txt")
    assert "flatter" not in caplog.text


def test_a_task_on_text_that_the_run_trains_on_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Documents of the standard library are asked by name, and are the text where nobody names another."""
    rng = random.Random(0)
    own = "\n\n".join(" ".join(rng.choices(string.ascii_lowercase, k=120)) for _ in range(400))
    (tmp_path / "own.txt").write_text(own)
    for data, told in (
        (["data=docstrings", "data.source.max_documents=600"], True),
        (["data=text", f"data.path={tmp_path}/own.txt"], False),
    ):
        keys = ["debug=smoke", *data, f"cache_dir={tmp_path}/cache", "eval=quick", "eval.limit=8"]
        config, _ = compose_config([*keys, "eval.tasks=[copy_doc,copy,recall_64]"], Path("x"))
        build.parts(config, tmp_path / str(told))
        assert ("of eval.tasks=[copy_doc] are in what the student trains or calibrates on" in caplog.text) == told
        assert "[copy]" not in caplog.text
        caplog.clear()


def test_items_that_chose_layers_are_known() -> None:
    assert facts.selected(TaskAccuracy(tasks=["copy"], items=8)).keys() == {"copy"}
    assert facts.selected(object()) == {}


@pytest.mark.parametrize(
    "place", ["export", "write_report", "efficiency.measure", "AlongTheRun.ask", "samples", "log_end"]
)
def test_a_signal_ends_what_comes_after_training(place: str, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it comes: the other ranks are let go, what was finished stays, and nothing is half-written."""
    quick(monkeypatch)
    owner, _, name = place.rpartition(".")
    target = getattr(finish, owner) if owner else finish
    number = signal.SIGINT if name == "ask" else signal.SIGTERM

    def stopped(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(0)
        pytest.fail("the work went on")

    monkeypatch.setattr(target, name, stopped)
    trainer, signals = Trainer(parts.run_dir), StopSignals()
    signals.install()
    try:
        with pytest.raises(Preempted) as stop:
            ended(parts, trainer, signals)
    finally:
        signals.uninstall()
    assert stop.value.code == (INTERRUPTED if number == signal.SIGINT else EXIT_CODE)
    assert {"stages.json", "record.json"} <= trainer.there, "the others were let go after the tables were written"
    there = {path.name for path in parts.run_dir.iterdir()}
    assert not any("draft" in name for name in there)
    assert ("model" in there) == (place not in ("export", "write_report"))
    assert signals._saved is None


def test_a_signal_of_before_ends_it_at_its_start(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "export", lambda *_, **__: pytest.fail("exported"))
    signals = StopSignals()
    signals.install()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Preempted):
            ended(parts, None, signals)
    finally:
        signals.uninstall()
