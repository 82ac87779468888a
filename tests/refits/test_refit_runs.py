"""Runs with refits: they end and resume as others do, whatever breaks them off, and in any number of processes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from iskd.losses.kl import KL
from iskd.plan import Remove, Replace, Stage
from iskd.refits import base
from iskd.refits.local import Local
from iskd.refits.output import Output
from iskd.teacher import TeacherCacheSpec
from iskd.training import Parts, Result, run
from tests import programs
from tests.runs import SLIM, TOKENS, Crash, Scripted, crash, largest_difference, make_parts, same, weights, write_text
from tests.worlds import run_world

SIZES: dict[str, Any] = {"tokens": 512, "held_tokens": 128}
UNEVEN: dict[str, Any] = {"tokens": 13 * 32, "held_tokens": 5 * 32}  # windows of 32 tokens for two ranks
REFITS = (Output(**SIZES, folds=3, projections=("attention", "mlp")), Local(**SIZES, lr=1e-3, epochs=2))


def stages() -> list[Stage]:
    return [
        Stage("remove 1", (Remove(1),), tokens=4 * TOKENS, lr=1e-3, fit=False),
        Stage("slim 2", (Replace(2, SLIM, seed=3),), tokens=4 * TOKENS, lr=1e-3),
        Stage("remove 0", (Remove(0),), tokens=0, fit=False),
    ]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Parts]:
    folder = tmp_path_factory.mktemp("refits")
    text = write_text(folder)

    def parts(run_dir: Path, **changes: Any) -> Parts:
        given = {"schedule": Scripted(stages()), "refits": REFITS, **changes}
        return make_parts(run_dir, text, folder / "cache", **given)

    return parts


@pytest.fixture(scope="module")
def whole(make: Callable[..., Parts], tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(make(tmp_path_factory.mktemp("whole") / "run"))


def test_every_edit_is_followed_by_the_refits_in_order(whole: Result) -> None:
    for stage in whole.stages[1:]:
        told = [event for event in stage.events if event.startswith("refit")]
        judged = [event.split(":")[0] for event in told if "held-out KL" in event]
        assert judged == ["refit output", "refit local"], stage.events
    assert whole.stages[-1].tokens == whole.stages[-2].tokens, "a stage without training is refitted too"


@pytest.mark.parametrize("act", ["crash", "signal"])
@pytest.mark.parametrize("call", [10, 70])
def test_a_run_broken_off_in_a_refit_resumes_bit_for_bit(
    act: str, call: int, make: Callable[..., Parts], whole: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = base._teacher_block, iter(range(10**6))
    acts: dict[str, Callable[[], None]] = {"crash": crash, "signal": lambda: os.kill(os.getpid(), signal.SIGTERM)}

    def wrapped(*args: Any, **keys: Any) -> Any:
        if next(calls) == call:
            acts[act]()
        return original(*args, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(base, "_teacher_block", wrapped)
        with pytest.raises((Crash, SystemExit)) as stop:
            run(make(tmp_path / "run"))
    assert act == "crash" or stop.value.args == (143,)
    resumed = run(make(tmp_path / "run", resume=True))
    assert same(weights(resumed), weights(whole))
    times = "seconds", "events", "speed"
    for one, other in zip(resumed.stages, whole.stages, strict=True):
        assert (one.name, one.ppl, one.kl, one.before) == (other.name, other.ppl, other.kl, other.before), times


def test_a_run_with_kept_states_of_the_teacher_resumes_bit_for_bit(
    make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off once some states are kept and others are not: the rest is computed, and the student is the same."""
    original, calls = base._teacher_block, iter(range(10**6))

    def wrapped(*args: Any, **keys: Any) -> Any:
        if next(calls) == 10:
            crash()
        return original(*args, **keys)

    def cached(name: str, **changes: Any) -> Parts:
        changes |= {"schedule": Scripted(stages()[2:]), "terms": {"kl": (KL(), 1.0)}}
        parts = make(tmp_path / name, teacher_cache=TeacherCacheSpec(), **changes)
        parts.data.cache_dir = tmp_path / f"{name} cache" / "data"
        return parts

    expected = run(cached("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(base, "_teacher_block", wrapped)
        with pytest.raises(Crash):
            run(cached("run"))
    kept = len(list((tmp_path / "run cache" / "teacher").rglob("*.rows")))
    assert kept, "some states were kept"
    resumed = run(cached("run", resume=True))
    assert same(weights(resumed), weights(expected))
    assert [(s.name, s.kl, s.before) for s in resumed.stages] == [(s.name, s.kl, s.before) for s in expected.stages]


def test_processes_add_up(tmp_path: Path) -> None:
    """DDP and FSDP2: the text is shared out, the sums are one, so the student is that of one process.

    Also where the ranks have unequally many windows: in shards every pass of a block is a collective.
    """
    write_text(tmp_path)
    # a firm ridge: a weak one makes differences of rounding large
    changes = {"schedule": Scripted(stages()), "refits": (replace(REFITS[0], ridge=0.3, **UNEVEN),)}
    ends = {}
    for name, size, strategy in (("one", 1, None), ("ddp", 2, "ddp"), ("fsdp", 2, "fsdp")):
        run_world(
            size, programs.refitted_unevenly, tmp_path, name, size, strategy, changes, folder=tmp_path / "logs" / name
        )
        seen = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(size)]
        assert all(len(set(step)) == 1 for one in seen for step in one["digests"]), "ranks differ after a step"
        ends[name] = dict(load_file(tmp_path / f"{name}.safetensors"))
    assert largest_difference(ends["one"], ends["ddp"]) < 5e-5
    assert largest_difference(ends["one"], ends["fsdp"]) < 5e-5


@pytest.mark.slow
def test_layers_are_shared_out_bit_for_bit(tmp_path: Path) -> None:
    """On the teacher's stream two processes train the layers in turns, and end with the student of one."""
    programs.refitted_by_layers(0, tmp_path, 1)
    run_world(2, programs.refitted_by_layers, tmp_path, 2, folder=tmp_path / "logs")
    one, *two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert [seen["trained"] for seen in (one, *two)] == [[0, 1, 2, 3], [0, 2], [1, 3]]
    assert {seen["told"] for seen in two} == {one["told"]}
    expected = load_file(tmp_path / "1-0.safetensors")
    for rank in (0, 1):
        found = load_file(tmp_path / f"2-{rank}.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
