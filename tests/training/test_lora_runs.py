"""Whole runs that heal with adapters: plain students between stages, resume, floors, candidates, two processes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from iskd.export import export
from iskd.models import surgery
from iskd.models.weights import model_tensors
from iskd.plan import Convert, Record, Remove, Replace, Stage
from iskd.plan.stage import LoraSpec
from iskd.schedules.edits import RemoveLayers, ReplaceWith
from iskd.schedules.iterative import Iterative
from iskd.system import Preempted
from iskd.training import StartAgain, run, stages
from iskd.training.parts import Parts
from iskd.training.state import checkpoint, checkpoint_files
from iskd.training.step import adapters
from tests import programs
from tests.factories import hooks, windows
from tests.runs import (
    MIXER,
    SLIM,
    TOKENS,
    At,
    Crash,
    Scripted,
    crash,
    interrupt,
    largest_difference,
    make_parts,
    same,
    weights,
    write_text,
)
from tests.worlds import run_world

SPEC = LoraSpec(rank=3, alpha=6)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def make(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Parts]:
    return partial(make_parts, text=text, cache=tmp_path_factory.getbasetemp() / "cache")


def removals(**changes: Any) -> Iterative:
    values = {"layers": [2, 1], "tokens": 16 * TOKENS, "lr": 1e-2, "train": "lora", "lora": {"rank": 4}}
    return Iterative(RemoveLayers(), **{**values, **changes})


def adapted_names(path: Path) -> list[str]:
    return [name for name in checkpoint.Stored(path, "student") if ".lora." in name]


def test_a_healed_run_leaves_a_plain_student(make: Callable[..., Parts], tmp_path: Path) -> None:
    """Adapters exist inside stages alone; the student loses layers, heals, and loads with plain transformers."""
    folders = tmp_path / "run" / "checkpoints"
    seen: list[tuple[int, int]] = []
    parts = make(tmp_path / "run", schedule=removals(), options={"keep": 50}, dropout=0.0)
    for batch in (1, 17):
        parts.callbacks.append(
            At(batch, lambda m: seen.append((len(adapters.adapters(m.student)), m.position.stage_number)))
        )
    result = run(parts)
    assert seen == [(2 * 7 * 3, 1), (2 * 7 * 2, 2)]
    for path in folders.iterdir():
        assert bool(adapted_names(path)) == path.name.endswith(checkpoint_files.STAGE), path
    plain = surgery.rebuild(parts.teacher.model, result.record)
    assert weights(result).keys() == model_tensors(plain).keys()
    assert hooks(result.student) == 0
    assert result.final.params == surgery.parameters(plain)
    assert [stage.params for stage in result.stages[1:]] == [
        surgery.parameters(surgery.rebuild(parts.teacher.model, Record(4, result.record.edits[:count])))
        for count in (1, 2)
    ]
    for stage in result.stages[1:]:
        assert stage.before is not None
        assert stage.kl < stage.before["kl"], "it heals"
    teacher = model_tensors(parts.teacher.model)
    frozen = [name for name in teacher if "layers" not in name]
    assert all(torch.equal(weights(result)[name], teacher[name]) for name in frozen), "embedding, norm, head"
    student = result.student.eval()
    folder = export(
        tmp_path / "model", student, result.record, parts.teacher.model.config, parts.teacher.tokenizer, verify=False
    )
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(windows()).logits, student(windows()).logits)


def mixed(**settings: Any) -> Scripted:
    """Adapters on every kind of block, a stage in between that trains everything, a stage without training."""
    healed: dict[str, Any] = {"tokens": 4 * TOKENS, "train": "lora", "lr": 1e-2, "fit": False, "lora": SPEC}
    stages = [
        Stage("replace 2", (Replace(2, SLIM, seed=3),), **healed),
        Stage("remove 1", (Remove(1),), **healed),
        Stage("cut 0", (Remove(0),), **{**healed, "tokens": 0}),
        Stage("heal", (), 2 * TOKENS, lr=1e-3),
        Stage("convert 3", (Convert(3, MIXER, seed=5),), **healed),
    ]
    return Scripted(stages, **settings)


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and optimizer state at the end of an uninterrupted mixed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = run(make_parts(folder, text, tmp_path_factory.getbasetemp() / "cache", schedule=mixed(), dropout=0.1))
    return weights(result), moments(folder)


def moments(folder: Path) -> dict[str, Tensor]:
    newest = checkpoint_files.newest(folder / "checkpoints")
    assert newest is not None
    return dict(checkpoint.Stored(newest, "optimizer"))


@pytest.mark.parametrize(
    ("place", "call"), [("batch", 5), ("batch", 8), ("batch", 25), ("signal", 7), ("rewrap", 1), ("save", 6)]
)
def test_a_killed_run_resumes_bit_for_bit(
    place: str,
    call: int,
    whole: tuple[dict[str, Tensor], dict[str, Tensor]],
    make: Callable[..., Parts],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With dropout; the signal comes in the last step of a stage, whose checkpoint still has the adapters."""
    parts = make(tmp_path / "run", schedule=mixed())
    with monkeypatch.context() as patch:
        if place in ("batch", "signal"):
            act = crash if place == "batch" else lambda _: os.kill(os.getpid(), signal.SIGTERM)
            parts.callbacks.append(At(call, act))
        else:
            interrupt(patch.setattr, place, call, crash)
        with pytest.raises((Crash, Preempted)):
            run(parts)
    newest = checkpoint_files.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert place != "signal" or adapted_names(newest)
    resumed = run(make(tmp_path / "run", schedule=mixed(), resume=True))
    assert same(weights(resumed), whole[0])
    assert same(moments(tmp_path / "run"), whole[1])


def test_a_fresh_process_for_every_edit(
    whole: tuple[dict[str, Tensor], dict[str, Tensor]], make: Callable[..., Parts], tmp_path: Path
) -> None:
    """`restart_at_edit`: adapters are attached before the strategy wraps anything."""
    starts = 0
    while starts < 8:
        try:
            result = run(make(tmp_path / "run", schedule=mixed(restart_at_edit=True), resume=starts > 0))
            break
        except StartAgain:
            starts += 1
    assert starts == 4, "the stage without edits needs none"
    assert same(weights(result), whole[0])


def test_a_missed_floor_takes_the_adapters_back(
    make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second stage misses it: the run ends, to the bit, with the student that the first one's adapters healed."""
    measure, calls = stages.measure_quality, iter(range(10))

    def measured(student: Any, *others: Any, **how: Any) -> dict[str, float]:
        assert not adapters.adapters(student), "what is measured is a plain student"
        return {**measure(student, *others, **how), "retention": 0.1 if next(calls) == 2 else 0.9}

    monkeypatch.setattr(stages, "measure_quality", measured)
    options = {"keep": 50, "measure_before": False}
    result = run(make(tmp_path / "run", schedule=removals(floor=0.5), options=options))
    assert [stage.status for stage in result.stages] == ["kept", "kept", "rolled_back"]
    states = {path: checkpoint.read_state(path) for path in (tmp_path / "run" / "checkpoints").glob("*-boundary")}
    (first,) = [path for path, state in states.items() if len(state.finished) == 1 and state.stage is not None]
    assert same(weights(result), dict(checkpoint.Stored(first, "student")))
    assert same(moments(tmp_path / "run"), dict(checkpoint.Stored(first, "optimizer")))
    assert all(p.requires_grad for p in result.student.parameters())
    assert hooks(result.student) == 0


def test_candidates_are_healed_with_adapters_each(make: Callable[..., Parts], tmp_path: Path) -> None:
    """The winner is trained as if there had been no trials: nothing of them is left."""
    guard = {"layers": None, "count": 2, "rescore": True, "candidates": 3, "trial_tokens": 2 * TOKENS}
    guarded = run(make(tmp_path / "guarded", schedule=removals(**guard), dropout=0.0))
    chosen = [edit.layer for edit in guarded.record.edits]
    plain = run(make(tmp_path / "plain", schedule=removals(layers=chosen), dropout=0.0))
    assert same(weights(guarded), weights(plain))
    for stage in guarded.stages[1:]:
        assert sum(event.startswith("KL after") for event in stage.events) == 1


def test_new_blocks_train_at_their_own_rate(make: Callable[..., Parts], tmp_path: Path) -> None:
    schedule = Iterative(ReplaceWith(SLIM), layers=[2], tokens=2 * TOKENS, lr=1e-3, lr_new=3e-3, train="lora")
    groups: list[dict[str, int]] = []

    def look(module: Any) -> None:
        rates = {}
        for group in module._optimizer().param_groups:
            rates[group["name"]] = rates.get(group["name"], 0) + len(group["params"])
        groups.append(rates)

    parts = make(tmp_path / "run", schedule=schedule)
    parts.callbacks.append(At(1, look))
    result = run(parts)
    assert groups == [{"base": 2 * 7 * 3, "new": 9}]
    assert not adapters.adapters(result.student)


@pytest.mark.slow
def test_two_processes_equal_one(text: Path, tmp_path: Path) -> None:
    """Adapters are part of what DDP synchronises."""
    write_text(tmp_path)
    changes = {"schedule": mixed()}
    seen = []
    for name, size, strategy in (("one", 1, None), ("ddp", 2, "ddp")):
        run_world(size, programs.train, tmp_path, name, size, strategy, changes, folder=tmp_path / "logs" / name)
        seen.append([json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(size)])
    (one,), many = seen
    for mine in many:
        assert all(len(set(step)) == 1 for step in mine["digests"]), "ranks differ after a step"
        assert mine["sums"] == pytest.approx(one["sums"], rel=1e-6)
        assert mine["leaked"] == 0
    ends = [dict(checkpoint.load_file(tmp_path / f"{name}.safetensors")) for name in ("one", "ddp")]
    assert largest_difference(*ends) < 5e-5
