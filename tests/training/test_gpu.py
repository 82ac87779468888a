"""What only a CUDA device can show: NCCL, bf16 autocast on edited blocks, a run from its command line to its export.

Run with `make test-gpu`. One device is enough; with two, two processes share a run as in tests/training/test_ranks.py.
FSDP2 is edited with whatever torch is installed: if this file passes, the minor may be added to
`iskd.models.sharding.TESTED`.
"""

from __future__ import annotations

import copy
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from iskd.losses.kl import KL
from iskd.mixers.ops import fla
from iskd.models import surgery
from iskd.models.weights import model_tensors
from iskd.plan import Convert, Record, Replace, Stage
from iskd.training.runner import run
from iskd.training.step import DistillModule, OptimSpec
from iskd.training.step.module import StepResult
from tests import programs
from tests.commands.test_cli import SMOKE, train
from tests.factories import mixer_specs, tiny, windows
from tests.runs import BOTTLENECK, MIXER, TOKENS, At, Scripted, largest_difference, make_parts, same, write_text
from tests.training.test_faults import break_steps
from tests.worlds import World, run_world

DEVICES = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not DEVICES, reason="no CUDA device")]
WORLDS = [
    pytest.param(size, strategy, marks=pytest.mark.skipif(size > DEVICES, reason=f"{size} CUDA devices needed"))
    for size in (1, 2)
    for strategy in ("ddp", "fsdp")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu")
    write_text(path)
    return path


def trained(folder: Path, name: str, size: int = 1, strategy: str | None = None, **changes: Any) -> dict[str, Any]:
    """What rank 0 saw of a finished run with every kind of edit."""
    changes = {"accelerator": "gpu", **changes}
    run_world(size, programs.on_gpu, folder, name, size, strategy, changes, folder=folder / "logs" / name, seconds=280)
    return json.loads((folder / f"{name}-0.json").read_text())


def ends(folder: Path, *names: str) -> float:
    first, second = (load_file(folder / f"{name}.safetensors") for name in names)
    return largest_difference(first, second)


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """One device without a strategy."""
    return trained(folder, "one")


def test_the_device_computes_what_the_cpu_computes(folder: Path, one: dict[str, Any]) -> None:
    cpu = trained(folder, "cpu", accelerator="cpu")
    assert one["losses"] == pytest.approx(cpu["losses"], rel=1e-3)
    assert [stage[3:] for stage in one["stages"]] == [stage[3:] for stage in cpu["stages"]]


@pytest.mark.parametrize(("size", "strategy"), WORLDS)
def test_nccl_equals_one_device(size: int, strategy: str, folder: Path, one: dict[str, Any]) -> None:
    """Losses, weights, ranks after every step, freed blocks, one FSDP root, moved parameters."""
    seen = trained(folder, f"{strategy}{size}", size, strategy)
    assert max(abs(a - b) for a, b in zip(seen["losses"], one["losses"], strict=True)) < 1e-6
    assert all(len(set(step)) == 1 for step in seen["digests"])
    assert seen["moved"]
    assert all(seen["moved"].values())
    assert seen["leaked"] == 0
    assert seen["roots"] == (1 if strategy == "fsdp" else 0)
    assert ends(folder, f"{strategy}{size}", "one") < 5e-5


@pytest.mark.parametrize(("size", "strategy"), [*WORLDS, pytest.param(1, None)])
def test_bf16_autocast_on_edited_blocks(size: int, strategy: str | None, folder: Path, one: dict[str, Any]) -> None:
    """Master weights of new blocks stay float32 like all others, their matrices multiply in bf16."""
    name = f"bf16-{strategy}{size}"
    seen = trained(folder, name, size, strategy, precision="bf16-mixed")
    assert set(seen["weights"]) == {"torch.float32"}
    assert set(seen["outputs"]) == {"torch.bfloat16"}
    assert seen["stages"][0][2] == pytest.approx(0, abs=1e-6), "an untouched student has no distance to its teacher"
    assert seen["losses"] == pytest.approx(one["losses"], rel=0.1)
    assert all(seen["moved"].values())


@pytest.mark.parametrize(("size", "strategy"), [*WORLDS, pytest.param(1, None)])
def test_a_killed_run_resumes(size: int, strategy: str | None, folder: Path, one: dict[str, Any]) -> None:
    name, changes = f"killed-{strategy}{size}", {"accelerator": "gpu"}
    arguments = (folder, name, size, strategy, changes, 0, "save", 9)
    world = World(size, programs.killed, arguments, folder / "logs" / name)
    assert world.wait(280)[0] == -signal.SIGKILL, world.said()
    trained(folder, name, size, strategy, resume=True)
    assert ends(folder, name, "one") < 5e-5


@pytest.mark.parametrize(("size", "strategy"), [*WORLDS, pytest.param(1, None)])
def test_a_signal_saves_and_the_run_goes_on(size: int, strategy: str | None, folder: Path, one: dict[str, Any]) -> None:
    """To the last rank; under FSDP2 every rank writes its own part."""
    name, options = f"stopped-{strategy}{size}", {"checkpoints": "sharded" if strategy == "fsdp" else "full"}
    options["checkpoint_every"] = 2
    changes = {"accelerator": "gpu", "options": options}
    arguments = (folder, name, size, strategy, changes, size - 1, 11)
    world = World(size, programs.stopped, arguments, folder / "logs" / name)
    assert world.wait(280) == [143, 0][:size], world.said()
    trained(folder, name, size, strategy, resume=True, options=options)
    assert ends(folder, name, "one") < 5e-5


@pytest.mark.parametrize(("size", "strategy"), WORLDS)
def test_a_fresh_process_for_every_edit(size: int, strategy: str, folder: Path, one: dict[str, Any]) -> None:
    name, codes = f"restart-{strategy}{size}", [[75]]
    while codes[-1][0] == 75 and len(codes) < 8:
        changes = {"accelerator": "gpu", "restart": True, "resume": len(codes) > 1}
        world = World(size, programs.on_gpu, (folder, name, size, strategy, changes), folder / "logs" / name)
        codes.append(world.wait(280))
    assert codes[-1] == [0] * size, world.said()
    assert len(codes) == 6
    assert ends(folder, name, "one") < 5e-5


@pytest.mark.parametrize(("size", "strategy"), WORLDS)
def test_a_missed_floor_rolls_back(size: int, strategy: str, folder: Path) -> None:
    seen = trained(folder, f"floor-{strategy}{size}", size, strategy, floor=1e9)
    assert [stage[-1] for stage in seen["stages"]] == ["kept", "rolled_back"]


def test_run_resume_and_export_on_a_gpu(tmp_path: Path) -> None:
    """bf16 autocast through edits and fits from the command line; the export is verified on the CPU."""
    train(
        *SMOKE[:1], *SMOKE[2:], "trainer=gpu", "trainer.progress=false", f"hydra.run.dir={tmp_path}/run", cwd=tmp_path
    )
    stages = json.loads((tmp_path / "run" / "stages.json").read_text())
    assert [stage["status"] for stage in stages] == ["kept"] * 3
    assert stages[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    before = (tmp_path / "run" / "record.json").read_text()
    train(f"resume={tmp_path}/run", cwd=tmp_path)
    assert (tmp_path / "run" / "record.json").read_text() == before


class NoWaiting(Callback):
    """From the seventh micro-batch of a stage on, torch raises when the host waits for the device inside a step."""

    def __init__(self) -> None:
        self.told: list[bool] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if 6 <= batch_idx < 14 else "default")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        torch.cuda.set_sync_debug_mode("default")
        if 6 <= batch_idx < 14 and batch_idx % 2:
            self.told.append(isinstance(trainer.optimizers[0].found_inf, torch.Tensor) and bool(pl_module.guard._asked))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_host_does_not_wait_inside_a_step(precision: str, tmp_path: Path) -> None:
    """As test_guard.py counts on a CPU: after the proof that an edit took, before the stage's last step."""
    settings = {"accelerator": "gpu", "devices": 1, "precision": precision, "log_every_n_steps": 1000}
    parts = make_parts(
        tmp_path / "run", write_text(tmp_path), tmp_path / "cache", options={"checkpoint_every": 100}, trainer=settings
    )
    parts.schedule = Scripted(
        [Stage("convert", (Replace(1, BOTTLENECK), Convert(2, MIXER)), tokens=8 * TOKENS, lr=1e-3)]
    )
    watched = NoWaiting()
    parts.callbacks.append(watched)
    try:
        result = run(parts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [stage.status for stage in result.stages] == ["kept"] * 2
    assert watched.told == [True] * 4, "the optimizer is told on the device, and the host has not yet looked"


@pytest.mark.parametrize("how", [True, "selective"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputed_blocks_draw_the_same_random_numbers(family: str, how: Any) -> None:
    """Fused attention with dropout, and dropout behind it: a kept result would leave the generator behind."""
    found = []
    for again in (False, how):
        teacher = tiny(family, layers=3, dropout=0.2).to("cuda")
        student = copy.deepcopy(teacher)
        terms: dict[str, Any] = {"kl": (KL(), 1.0)}
        module = DistillModule(student, teacher, terms, OptimSpec(), Record(3), gradient_checkpointing=again)
        torch.manual_seed(5)
        with torch.autocast("cuda", torch.bfloat16):
            loss = module.step(windows().to("cuda")).loss
        loss.backward()
        found.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, msg=name)


def test_a_step_that_is_not_finite_is_skipped_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By fused AdamW's own flag: weights after the skipped step are those before it."""
    break_steps(monkeypatch, lambda n, _, r: StepResult(r.loss * float("nan"), r.terms) if n == 8 else r)
    parts = make_parts(
        tmp_path / "run",
        write_text(tmp_path),
        tmp_path / "cache",
        trainer={"accelerator": "gpu", "devices": 1},
        dropout=0.0,
    )
    before: list[dict[str, torch.Tensor]] = []
    for batch in (6, 8):
        keep = lambda m: before.append({k: v.clone() for k, v in model_tensors(m.student).items()})  # noqa: E731
        parts.callbacks.append(At(batch, keep))
    result = run(parts)
    assert same(before[0], before[1])
    assert "step 4 skipped" in " ".join(result.stages[1].events)


def test_running_out_of_memory_halves_the_micro_batch(folder: Path, one: dict[str, Any]) -> None:
    """A real one: the process may use a sliver of the device and asks for more."""
    seen = trained(folder, "memory", options={"on_oom": "halve"}, hog=True)
    assert seen["stages"][-1][3] == one["stages"][-1][3]
    assert "run.on_oom=halve: going on with data.batch_size=1" in (folder / "logs" / "memory" / "rank0.log").read_text()


# one mixer per kernel of fla, two where it serves with a decay and without
CONVERTED = ("linear_attention", "retnet", "gla", "deltanet", "gated_deltanet", "kda")


@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_model_trains_and_speaks_in_bf16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernels where they serve: it learns a batch under autocast; in bf16 a state says what no state says."""
    served = converted_in_bf16(name, "cuda", monkeypatch)
    refused = name in ("retnet", "gated_deltanet") and fla.refuses_scalar_gradients()
    if fla.ops() is not None:
        assert served["generate"] > 0
        assert (served["train"] > 0) != refused


def converted_in_bf16(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Train and generate; how many calls the kernels served in each."""
    calls: list[str] = []
    original = fla.chunk

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append("chunk")
        return original(*args, **kwargs)

    monkeypatch.setattr(fla, "chunk", counted)
    model: Any = tiny("llama", hidden=128, heads=4, kv_heads=2, layers=2)
    surgery.apply(model, Record(2), [Convert(layer, mixer_specs()[name], seed=layer) for layer in range(2)])
    model.to(device).train()
    ids, losses = windows(4, 48).to(device), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(15):
        with torch.autocast(device, torch.bfloat16):
            loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    trained = len(calls)
    model.eval().bfloat16()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        text = model.generate(ids[:, :17], attention_mask=torch.ones_like(ids[:, :17]), **options)
        past = model(text[:, :17], use_cache=True).past_key_values
        by_state = [model(token, past_key_values=past).logits for token in text[:, 17:].split(1, dim=1)]
        whole = model(text).logits[:, 17:].float()
    assert text.shape == (4, 25)
    assert (torch.cat(by_state, 1).float() - whole).norm() < 5e-2 * whole.norm()
    return {"train": trained, "generate": len(calls) - trained}
