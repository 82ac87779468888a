"""Decided on the device or by the host: the same steps are skipped, and the former asks the device nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from iskd.losses.hidden import HiddenMatch
from iskd.losses.kl import KL
from iskd.models.weights import model_tensors
from iskd.plan import Convert, Replace, Stage
from iskd.system import Preempted
from iskd.system.faults import NonFiniteError, Verdict
from iskd.training.parts import Parts
from iskd.training.runner import run
from iskd.training.state import RunState, checkpoint, checkpoint_files
from iskd.training.step.guard import StepGuard
from iskd.training.step.module import StepResult
from tests import programs
from tests.runs import BOTTLENECK, MIXER, TOKENS, At, Scripted, make_parts, same, write_text
from tests.training.test_faults import break_steps
from tests.worlds import run_world

# operators whose result the host must have before it can go on
LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "item", "equal")
NAN = float("nan")


@pytest.fixture
def make(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Callable[..., Parts]:
    cache = tmp_path_factory.getbasetemp() / "cache"
    return partial(make_parts, text=write_text(tmp_path), cache=cache, dropout=0.0)


def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the decision to the optimizer on a CPU too, where torch's fused AdamW takes the same flag."""
    monkeypatch.setattr(StepGuard, "ahead", True)


class Seen(Callback):
    """All weights after every batch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append({name: value.clone() for name, value in model_tensors(pl_module.student).items()})


def last_state(folder: Path) -> RunState:
    newest = checkpoint_files.newest(folder / "checkpoints")
    assert newest is not None
    return checkpoint.read_state(newest)


def spoil(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """The losses of steps 1, 4, 6 and 9; the second one alone, without its gradient.

    Two calls are the plan's, then come two micro-batches a step, six steps a stage.
    """

    def act(number: int, _: Any, result: StepResult) -> StepResult:
        if number == 8:
            return StepResult(result.loss + value, result.terms)
        return StepResult(result.loss * value, result.terms) if number in (2, 13, 18) else result

    break_steps(monkeypatch, act)


@pytest.mark.parametrize(("clip", "value"), [(1.0, NAN), (None, float("inf"))])
def test_the_device_skips_what_the_host_would(
    value: float, clip: float | None, make: Callable[..., Parts], tmp_path: Path
) -> None:
    """Weights after every batch, messages and counts; a loss alone, its gradients too, the first step and the last."""
    runs = []
    for name in ("host", "device"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "device":
                on_device(patch)
            spoil(patch, value)
            parts, seen = make(tmp_path / name), Seen()
            parts.optim = type(parts.optim)(clip=clip)
            parts.callbacks.append(seen)
            result = run(parts)
            state = last_state(tmp_path / name)
            events = [[event for event in stage.events if "skipped" in event] for stage in result.stages]
            runs.append((seen.weights, events, (state.skipped, state.skipped_in_a_row)))
    (host, *told), (device, *same_told) = runs
    assert told == same_told == [[[], *([f"step {n} skipped: the loss or a gradient was not finite" for n in numbers]
                                        for numbers in ((1, 4, 6), (9,)))], (4, 0)]  # fmt: skip
    assert len(host) == len(device) == 24
    assert all(same(a, b) for a, b in zip(host, device, strict=True))


def test_steps_that_stay_not_finite_end_the_run_one_step_later(
    make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device(monkeypatch)
    calls: list[int] = []

    def act(number: int, _: Any, result: StepResult) -> StepResult:
        calls.append(number)
        return StepResult(result.loss * NAN, result.terms) if number > 5 else result

    break_steps(monkeypatch, act)
    parts = make(tmp_path / "run", options={"max_skipped": 1, "checkpoint_every": 100, "movement_steps": 1})
    with pytest.raises(NonFiniteError, match=r"in 2 optimizer steps in a row \(run.max_skipped=1\)"):
        run(parts)
    assert calls[-1] == 5 + 2 * (2 + 1)  # the second bad step is known when the third is made


def test_a_stop_is_heard_one_step_later_and_the_run_goes_on_as_if_without(
    make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint counts the step that was still open, a skipped one."""
    on_device(monkeypatch)
    whole = run(make(tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        break_steps(patch, lambda n, _, r: StepResult(r.loss * NAN, r.terms) if n == 8 else r)
        spoiled = run(make(tmp_path / "spoiled"))
        assert not same(model_tensors(whole.student), model_tensors(spoiled.student))
    with pytest.MonkeyPatch.context() as patch:
        break_steps(patch, lambda n, _, r: StepResult(r.loss * NAN, r.terms) if n == 8 else r)
        parts = make(tmp_path / "run", options={"checkpoint_every": 100, "movement_steps": 1})
        # during step 3: heard after step 4, whose own verdict is still open then
        parts.callbacks.append(At(5, lambda module: setattr(module, "_stop_wanted", lambda: True)))
        with pytest.raises(Preempted):
            run(parts)
    state = last_state(tmp_path / "run")
    assert (state.batch, state.skipped, state.skipped_in_a_row) == (8, 1, 1)
    resumed = run(make(tmp_path / "run", resume=True))
    assert same(model_tensors(resumed.student), model_tensors(spoiled.student))


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_ranks_agree_on_the_device(strategy: str, tmp_path: Path) -> None:
    """One rank's loss is infinite, its gradient is not: both skip, with whole parameters and with shards."""
    write_text(tmp_path)
    for name, ahead in (("host", False), ("device", True)):
        run_world(2, programs.poisoned, tmp_path, name, 1, ahead, strategy, folder=tmp_path / f"logs-{name}")
    seen = [json.loads((tmp_path / f"device-{rank}.json").read_text()) for rank in (0, 1)]
    assert seen[0]["skipped"] == seen[1]["skipped"] == 1
    assert all(len(set(step)) == 1 for step in seen[0]["digests"])
    assert same(*(load_file(tmp_path / f"{name}.safetensors") for name in ("host", "device")))


class Looks(TorchDispatchMode):
    """Counts the operators whose result the host has to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, indices = func.overloadpacket.__name__, args[1] if func.overloadpacket.__name__ == "index" else ()
        by_mask = any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in indices)
        asked = name in LOOKS or by_mask
        self.found[name] += asked
        return func(*args, **(kwargs or {}))


class Watched(Callback):
    """Looks during the steps of a run, by the number of the micro-batch."""

    def __init__(self) -> None:
        self.by_batch: list[Counter[str]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.mode = Looks().__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self.mode.__exit__(None, None, None)
        self.by_batch.append(+self.mode.found)


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
@pytest.mark.parametrize("boundaries", [False, True])
def test_a_step_waits_for_nothing(
    boundaries: bool,
    checkpointing: Any,
    make: Callable[..., Parts],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the proof that an edit took and the stage's last step, where nothing is logged or saved."""
    on_device(monkeypatch)
    options = {"checkpoint_every": 100, "gradient_checkpointing": checkpointing}
    parts, watched = make(tmp_path / "run", options=options), Watched()
    parts.schedule = Scripted([Stage("edit", (Replace(1, BOTTLENECK), Convert(2, MIXER)), tokens=8 * TOKENS, lr=1e-3)])
    parts.data.boundaries = boundaries
    parts.terms = {"kl": (KL(), 1.0), "hidden": (HiddenMatch("normalized"), 0.1)}  # ce looks, on a CPU alone
    parts.trainer["log_every_n_steps"] = 1000
    parts.callbacks.insert(0, watched)
    run(parts)
    assert len(watched.by_batch) == 16
    assert watched.by_batch[5]["equal"], "here the new parameters are compared with what they were"
    steps = watched.by_batch[6:14]  # two micro-batches a step; before are three steps of proof, behind is the last step
    # whether a window holds more than one document: transformers once in both passes, and the mixer
    asked = Counter(_local_scalar_dense=(4 if checkpointing else 3) if boundaries else 0)
    assert all(found == +asked for found in steps)


def test_verdicts_come_in_order_and_a_stop_brings_all() -> None:
    guard, weight = StepGuard(), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], fused=True)
    guard.ahead = True
    for number, (finite, stop) in enumerate([(True, False), (False, False), (True, True)], 1):
        guard.judge(number, optimizer, torch.tensor(finite), stop=stop)
    assert guard.settle(now=False) == [Verdict(1, False, False), Verdict(2, True, False)]
    guard.judge(4, optimizer, torch.tensor(False))
    assert guard.settle(now=False) == [Verdict(3, False, True), Verdict(4, True, False)]
    assert guard.settle(now=True) == []
    guard.ahead = None  # on a CPU the host decides
    weight.grad = torch.ones(2)
    guard.judge(5, optimizer, torch.tensor(False))
    assert guard.settle(now=False) == [Verdict(5, True, False)]
    assert weight.grad is None
    assert optimizer.found_inf is None  # type: ignore[attr-defined]
