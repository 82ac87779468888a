"""The stage loop by itself: no Trainer, no Lightning hook; what it does is what a Lightning run does."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import pytest
import torch

import iskd
from iskd.models.weights import model_tensors
from iskd.plan import Record, Remove, Replace, Stage, StageResult
from iskd.plan.edits import Merge
from iskd.schedules.edits import RemoveLayers
from iskd.schedules.iterative import Iterative
from iskd.training.editing import Editor
from iskd.training.live import Live
from iskd.training.parts import Parts
from iskd.training.runner import make_module, run
from iskd.training.stages import StageLoop
from iskd.training.state import RunState, checkpoint, checkpoint_files
from iskd.training.step.optimizer import OptimSpec
from tests.runs import SLIM, TOKENS, Scripted, every_edit, make_parts, same, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def make(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Parts]:
    return partial(make_parts, text=text, cache=tmp_path_factory.getbasetemp() / "cache", accumulate=1)


class Plain:
    """A run without a Trainer: a loop, a module and the few lines that train."""

    def __init__(self, parts: Parts, state: RunState | None = None, stop_after: int = 10**9) -> None:
        L.seed_everything(parts.seed, verbose=False)
        parts.data.prepare()
        self.state = state or RunState(record=Record(int(parts.teacher.model.config.num_hidden_layers)))
        self.module = make_module(parts, self.state)
        self.optimizer = self.module.configure_optimizers()
        editor = Editor(windows=parts.data.calibration, window=parts.data.seq_len, fit_tokens=parts.options.fit_tokens)
        places = parts.run_dir, self.state, parts.options
        self.loop = StageLoop(parts.schedule, parts.importance, parts.data, *places, editor=editor)
        self.live, self.left, self.seen = Live(self.module, self.optimizer), stop_after, list[str]()

    def train(self, stage: Stage) -> None:
        """What Lightning does in an epoch, with clipping as in `DistillModule`."""
        self.seen.append(stage.name)
        self.loop.before_training()
        for batch in self.loop.data.train_dataloader():
            self.loop.before_batch()
            self.module.step(batch["input_ids"]).loss.backward()
            self.loop.before_step()
            self.module.on_before_optimizer_step(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([cast(torch.Tensor, p.grad) for p in parameters])
            assert self.module.optim.clip is not None
            torch.nn.utils.clip_grads_with_norm_(parameters, self.module.optim.clip, norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.loop.after_batch(batch)
            self.left -= 1
            if not self.left:
                raise InterruptedError

    def run(self, resume_from: Path | None = None) -> None:
        self.loop.run(self.live, self.train, resume_from)


def numbers(row: StageResult) -> dict[str, Any]:
    return {key: value for key, value in row.to_json().items() if "seconds" not in key and not key.endswith("per_s")}


SCHEDULES: dict[str, Callable[[], Any]] = {
    "every edit": lambda: Scripted(every_edit(steps=3)),
    "no training": lambda: Scripted([Stage("one", (Merge(1),)), Stage("two", (Replace(2, SLIM),), tokens=0, fit=True)]),
    "trials": lambda: Iterative(
        RemoveLayers(), count=1, tokens=TOKENS * 2, rescore=True, candidates=2, trial_tokens=TOKENS
    ),
    "rolled back": lambda: Scripted([Stage("one", (Remove(0),), tokens=TOKENS)], floor=5.0),
    "nothing": lambda: Scripted([]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_loop_alone_is_the_run(name: str, make: Callable[..., Parts], tmp_path: Path) -> None:
    """Weights, record and table are those of a Lightning run, bit for bit."""
    plain = Plain(make(tmp_path / "plain", schedule=SCHEDULES[name]()))
    plain.run()
    result = run(make(tmp_path / "lightning", schedule=SCHEDULES[name]()))
    assert plain.state.stage is None
    assert plain.state.record == result.record
    assert [numbers(row) for row in plain.state.results] == [numbers(row) for row in result.stages]
    assert same(model_tensors(plain.module.student), model_tensors(result.student))


def test_it_goes_on_from_any_checkpoint(make: Callable[..., Parts], tmp_path: Path) -> None:
    merge = Stage("merge 1", (Merge(1),), tokens=3 * TOKENS, lr=1e-3)
    stages = [merge, *(stage for stage in every_edit(steps=3) if stage.name != "remove 1")]
    make_run = partial(make, schedule=Scripted(stages), options={"checkpoint_every": 1, "keep": 3})
    whole = Plain(make_run(tmp_path / "whole"))
    whole.run()
    for stop_after in (2, 3, 7):
        broken = Plain(make_run(tmp_path / f"broken-{stop_after}"), stop_after=stop_after)
        with pytest.raises(InterruptedError):
            broken.run()
        newest = checkpoint_files.newest(broken.loop.saver.root)
        assert newest is not None
        again = Plain(make_run(tmp_path / f"broken-{stop_after}"), checkpoint.read_state(newest))
        again.run(newest)
        assert same(model_tensors(again.module.student), model_tensors(whole.module.student)), stop_after


@pytest.mark.parametrize("anew", [False, True])
def test_moments_survive_a_stage_or_start_anew(
    anew: bool, make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make(tmp_path / "run", schedule=Scripted(every_edit(steps=2)[1:3]), optim=OptimSpec(anew=anew))
    plain, steps = Plain(parts), list[set[float]]()
    train = plain.train

    def told_first(stage: Stage) -> None:
        steps.append({float(state["step"]) for state in plain.optimizer.state.values()})
        train(stage)

    monkeypatch.setattr(plain, "train", told_first)
    plain.run()
    assert steps[0] == set()
    assert bool(steps[1]) is not anew


def test_an_edit_begins_in_one_place_and_before_its_training(
    make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    plain = Plain(make(tmp_path / "run", schedule=Scripted([*every_edit(steps=2)[:2], Stage("bare", (Remove(3),))])))
    for name in ("begin", "edit", "end"):
        original = getattr(plain.loop, name)

        def told_first(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            told.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(plain.loop, name, told_first)
    train = plain.train
    monkeypatch.setattr(plain, "train", lambda stage: (told.append("train"), train(stage)))
    plain.run()
    assert told == ["begin", *["edit", "train", "end"] * 2, "edit", "end"]


def test_a_stop_is_heard_at_the_end_of_a_stage(make: Callable[..., Parts], tmp_path: Path) -> None:
    plain = Plain(make(tmp_path / "run", schedule=Scripted(every_edit(steps=2))))
    plain.live = replace(plain.live, stop_wanted=lambda: True)
    plain.run()
    assert plain.loop.preempted
    assert plain.loop.leaving
    assert plain.seen == ["replace 2"]
    assert plain.state.stage is not None
    assert checkpoint_files.newest(plain.loop.saver.root) is not None


def test_a_plan_is_all_that_plan_only_makes(make: Callable[..., Parts], tmp_path: Path) -> None:
    parts = make(tmp_path / "run", options={"plan_only": True})
    plain = Plain(parts)
    plain.run()
    assert not plain.seen
    assert not plain.loop.leaving
    assert not plain.loop.saver.root.exists()
    assert (parts.run_dir / "plan.json").is_file()


def test_the_module_is_told_where_it_stands(make: Callable[..., Parts], tmp_path: Path) -> None:
    places: list[tuple[int, int, int]] = []
    plain = Plain(make(tmp_path / "run", schedule=Scripted(every_edit(steps=2)[:2])))
    step = plain.module.step

    def watched(input_ids: torch.Tensor, *args: Any) -> Any:
        at = plain.module.position
        if not plain.seen:  # the step that the plan measures
            return step(input_ids, *args)
        assert at.rate > 0
        places.append((at.tokens, at.stage_number, at.step))
        return step(input_ids, *args)

    plain.module.step = watched  # type: ignore[method-assign]
    plain.run()
    micro = 2 * 32
    steps = len(places)
    assert [place[0] for place in places] == [micro * n for n in range(steps)]
    assert [place[2] for place in places] == list(range(steps)), "accumulate=1: a step is a micro-batch"
    assert [place[1] for place in places] == [1] * (steps // 2) + [2] * (steps // 2)


def test_nobody_but_the_module_sets_its_attributes() -> None:
    wrong = []
    for path in (Path(str(iskd.__file__)).parent / "training").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                owner = ast.unparse(node.value).rpartition(".")[2]
                wrong += [f"{path.name}:{node.lineno}"] if owner in ("module", "pl_module") else []
    assert not wrong


def test_counts_come_from_one_state(make: Callable[..., Parts], tmp_path: Path) -> None:
    plain = Plain(make(tmp_path / "run", schedule=Scripted(every_edit(steps=2)[:1])))
    plain.loop.begin(replace(plain.live, accumulate=2))
    assert plain.loop.advance() is not None
    count = plain.loop.count
    assert (count.in_stage, count.in_run, count.stage_number) == (0, 0, 1)
    before = count.batches_left
    plain.state.batch += 3
    assert (count.in_stage, count.in_run, count.batches_left) == (1, 1, before - 3)
