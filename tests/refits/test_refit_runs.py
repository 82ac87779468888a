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
from safetensors.torch import load_file
from torch import Tensor

from iskd.losses.kl import KL
from iskd.models.weights import model_tensors
from iskd.plan import Remove, Replace, Stage
from iskd.plan.edits import Merge
from iskd.refits import walk as walking
from iskd.refits.local import Local
from iskd.refits.output import Output
from iskd.system import Ranks
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
    original, calls = walking.teacher_block, iter(range(10**6))
    acts: dict[str, Callable[[], None]] = {"crash": crash, "signal": lambda: os.kill(os.getpid(), signal.SIGTERM)}

    def wrapped(*args: Any, **keys: Any) -> Any:
        if next(calls) == call:
            acts[act]()
        return original(*args, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(walking, "teacher_block", wrapped)
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
    original, calls = walking.teacher_block, iter(range(10**6))

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
        patch.setattr(walking, "teacher_block", wrapped)
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
def test_processes_that_train_unlike_layers_stay_in_step(tmp_path: Path) -> None:
    """On the teacher's stream each trains layers of its own for as many epochs as these need: a run holds all the same.

    And of three layers one process has two and the other one.
    """
    write_text(tmp_path)
    cut = Scripted([Stage("remove 1", (Remove(1),), fit=False), Stage("remove 3", (Remove(3),), fit=False)])
    local = Local(**SIZES, lr=3e-2, epochs=6, step_tokens=64, inputs="teacher")
    changes = {"schedule": cut, "refits": (local,)}
    for name, size, strategy in (("one", 1, None), ("ddp", 2, "ddp")):
        run_world(size, programs.train, tmp_path, name, size, strategy, changes, folder=tmp_path / "logs" / name)
    one, ddp = (dict(load_file(tmp_path / f"{name}.safetensors")) for name in ("one", "ddp"))
    assert same(one, ddp), "layers are trained by one process each"


def test_any_number_of_processes_gives_the_same_student(tmp_path: Path) -> None:
    """Every refit and a merge, on whole weights and in shards: to the last bit on all ranks, to rounding as one does.

    On the teacher's stream two processes with whole weights train the layers in turns, so to the last bit there too.
    """
    programs.edited(0, tmp_path, 1)
    run_world(2, programs.edited, tmp_path, 2, folder=tmp_path / "logs", seconds=300)

    students = {
        name: dict(load_file(tmp_path / f"{name}.safetensors"))
        for name in ("one-0", "ddp-0", "ddp-1", "fsdp-0", "fsdp-1")
    }

    def student(name: str, case: str) -> dict[str, Tensor]:
        return {key.split()[1]: value for key, value in students[name].items() if key.startswith(f"{case} ")}

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return sum(float((a[key] - b[key]).square().sum()) for key in b) ** 0.5

    for case, (edits, _) in programs.EDITED.items():
        removed = [Remove(edit.layer) if isinstance(edit, Merge) else edit for edit in edits]
        plain = model_tensors(programs.edited_as(case, removed, (), Ranks(), in_shards=False)[0].student)
        expected = student("one-0", case)
        assert largest_difference(plain, expected) > 1e-3, f"{case} changes something"
        for strategy in ("ddp", "fsdp"):
            assert same(student(f"{strategy}-0", case), student(f"{strategy}-1", case)), "ranks differ"
            # of what was changed: AdamW makes steps of rounding where a gradient is next to nothing
            off = distance(student(f"{strategy}-0", case), expected) / distance(plain, expected)
            assert off < (2e-3 if case in ("local", "layers") else 1e-5), (strategy, case)
    assert same(student("ddp-0", "layers"), student("one-0", "layers"))
    shares = [json.loads((tmp_path / f"ddp-{rank}.json").read_text())["layers"]["trained"] for rank in (0, 1)]
    assert shares == [[0, 2], [1, 3]]
