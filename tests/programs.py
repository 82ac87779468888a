"""What the processes of tests/worlds.py run: functions that are found by name, with plain arguments."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import os
import signal
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop as TrainingEpochLoop
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from iskd.blocks import merge
from iskd.losses.kl import KL
from iskd.models import Stack, sharding
from iskd.models.weights import model_tensors
from iskd.plan import Convert, Edit, Record, Remove, Spec, Stage
from iskd.plan.edits import Merge
from iskd.refits import Refit, Text, carrying_out, divided, reading
from iskd.refits.calibrate import Calibrate
from iskd.refits.local import Local
from iskd.refits.magnitude import Magnitude
from iskd.refits.replaceme import ReplaceMe
from iskd.refits.values import Values
from iskd.system import Ranks, watchdog
from iskd.training import Parts, finish, run
from iskd.training.editing import carry_out
from iskd.training.state import checkpoint, checkpoint_files
from iskd.training.step import DistillModule, OptimSpec, StepGuard
from iskd.training.step.module import StepResult
from iskd.training.strategies import ranks_of
from tests.factories import louder, text_of, tiny, windows
from tests.runs import PLACES, At, Scripted, every_edit, interrupt, kill, make_parts


def layout(size: int, strategy: str | None, accelerator: str, precision: str) -> dict[str, Any]:
    """Four windows in every optimizer step, however many processes share them."""
    trainer = {"devices": size, "accelerator": accelerator, "precision": precision}
    trainer |= {"strategy": strategy} if strategy else {}
    return {"batch_size": 2 // size, "trainer": trainer}


class Watch(Callback):
    """Writes down what the equality tests compare: losses, weights after every step, edits, freed blocks."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.digests: list[list[str]] = []
        self.sums: list[float] = []
        self.alive: list[weakref.ref[nn.Module]] = []
        self.leaked = 0
        self.roots = 0
        self.moved: dict[str, bool] = {}
        self.start: dict[str, tuple[nn.Parameter, Tensor]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        new = next(g["params"] for g in trainer.optimizers[0].param_groups if g["name"] == "new" and g["decays"])
        if batch_idx == 0:
            sharding.reshard(pl_module.student)
            names = {id(p): n for n, p in pl_module.student.named_parameters()}
            self.start = {names[id(p)]: (p, sharding.whole(p.detach()).clone()) for p in new}
            gc.collect()
            now = {id(m) for m in pl_module.student.modules()}
            self.leaked += sum(ref() is not None and id(ref()) not in now for ref in self.alive)
            self.alive = [weakref.ref(block) for block in Stack(pl_module.student).layers]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        ranks = ranks_of(trainer)
        self.losses.append(sum(ranks.gather(float(outputs["loss"]))) / ranks.size)
        if (trainer.fit_loop.epoch_loop.batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        fsdp = [m for m in pl_module.student.modules() if isinstance(m, FSDPModule)]
        self.roots = max(self.roots, sum(bool(m._get_fsdp_state()._is_root) for m in fsdp))
        weights = {n: sharding.whole(v) for n, v in model_tensors(pl_module.student).items()}
        self.sums.append(sum(value.double().abs().sum().item() for value in weights.values()))
        self.digests.append(ranks.gather(digest(weights)))
        here = {n: not torch.equal(sharding.whole(p.detach()), before) for n, (p, before) in self.start.items()}
        self.moved.update({f"{len(pl_module.record.edits)} {n}": moved for n, moved in here.items()})


def digest(weights: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def parts_of(
    folder: Path,
    name: str,
    size: int,
    strategy: str | None,
    *,
    restart: bool = False,
    floor: float | None = None,
    accelerator: str = "cpu",
    precision: str = "32-true",
    **changes: Any,
) -> Parts:
    if accelerator == "gpu":
        sharding.UNTESTED = None  # tests/training/test_gpu.py is what tells whether the installed torch may be trusted
    defaults = {"schedule": Scripted(every_edit(), restart_at_edit=restart, floor=floor), "dropout": 0.0}
    return make_parts(
        folder / name,
        folder / "text.txt",
        folder / "cache",
        **{**defaults, **layout(size, strategy, accelerator, precision), **changes},
    )


def train(rank: int, folder: Path, name: str, size: int, strategy: str | None, changes: Mapping[str, Any]) -> None:
    """One run; every rank writes what `Watch` saw, and rank 0 the final weights."""
    watched(rank, folder, name, parts_of(folder, name, size, strategy, **changes))


def refitted_unevenly(
    rank: int, folder: Path, name: str, size: int, strategy: str | None, changes: Mapping[str, Any]
) -> None:
    """`train` with batches of a window or two in its refits, so that the windows of the ranks fill not as many."""
    reading._BATCH = 1
    train(rank, folder, name, size, strategy, changes)


def watched(rank: int, folder: Path, name: str, parts: Parts) -> None:
    watch = Watch()
    parts.callbacks.append(watch)
    result = run(parts)
    seen = {
        "losses": watch.losses,
        "digests": watch.digests,
        "sums": watch.sums,
        "leaked": watch.leaked,
        "roots": watch.roots,
        "skipped": sum("skipped: the loss" in event for stage in result.stages for event in stage.events),
        "moved": watch.moved,
        "stages": [[s.name, s.ppl, s.kl, s.tokens, s.params, s.status] for s in result.stages],
        "asked": [s.evaluation for s in result.stages],
    }
    (folder / f"{name}-{rank}.json").write_text(json.dumps(seen))
    if rank == 0:
        save_file(model_tensors(result.student), folder / f"{name}.safetensors")


class Tokens(Callback):
    """Leaves the number of tokens trained so far in a file, for whoever finds the run dead."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.path.write_text(str(pl_module.position.tokens))


def counted(rank: int, folder: Path, name: str, size: int, strategy: str | None, changes: Mapping[str, Any]) -> None:
    """`train`, and how often each place was passed."""
    parts_of(folder, name, size, strategy, **changes).data.prepare()  # later runs find the token shards made
    counts = dict.fromkeys(PLACES, 0)

    def counting(place: str, original: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counts[place] += 1
            return original(*args, **kwargs)

        return wrapped

    for place, (target, attribute) in PLACES.items():
        setattr(target, attribute, counting(place, getattr(target, attribute)))
    train(rank, folder, name, size, strategy, changes)
    (folder / f"{name}-{rank}.counts.json").write_text(json.dumps(counts))


def killed(
    rank: int,
    folder: Path,
    name: str,
    size: int,
    strategy: str | None,
    changes: Mapping[str, Any],
    victim: int,
    place: str,
    call: int,
) -> None:
    """A run of which one process kills itself in the middle of something."""
    parts = parts_of(folder, name, size, strategy, **changes)
    if rank == 0:
        parts.callbacks.append(Tokens(folder / name / "tokens.txt"))
    if rank == victim and place in PLACES:
        interrupt(setattr, place, call, kill)
    run(parts)


def stopped(
    rank: int,
    folder: Path,
    name: str,
    size: int,
    strategy: str | None,
    changes: Mapping[str, Any],
    victim: int,
    batch: int,
) -> None:
    """A run of which one process gets SIGTERM during a micro-batch."""
    parts = parts_of(folder, name, size, strategy, **changes)
    if rank == victim:
        parts.callbacks.append(At(batch, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
    run(parts)


def stopped_inside(rank: int, folder: Path, name: str, strategy: str, place: str, call: int) -> None:
    """Rank 1 gets SIGTERM in the middle of long work that all do alike, at the n-th call of a place's function."""
    parts = parts_of(folder, name, 2, strategy, options={"samples": 1 if place == "samples" else 0})
    teacher = parts.teacher.model

    def long_work() -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(2000):
            teacher(torch.zeros(1, 8, dtype=torch.long))
            time.sleep(0.05)
        raise AssertionError("the signal was not obeyed")

    if place == "samples":  # at the end, in shards
        finish.samples = lambda *_: long_work()  # type: ignore[assignment, return-value]
    else:
        interrupt(setattr, place, call, long_work)
    run(parts)


def forgetful(rank: int, folder: Path, name: str) -> None:
    """FSDP2 without the reset that an edit needs."""
    sharding.reset_roots = sharding.reshard
    train(rank, folder, name, 2, "fsdp", {})


def poisoned(rank: int, folder: Path, name: str, victim: int, ahead: bool | None = None, strategy: str = "ddp") -> None:
    """One rank's loss is infinite in one step; its gradient is not."""
    StepGuard.ahead = ahead
    del TrainingEpochLoop._broadcast_sigterm_tensor  # Lightning's own question to all ranks, which nobody is to ask
    parts, steps = parts_of(folder, name, 2, strategy), iter(range(1000))
    original = DistillModule.step

    def infinite(self: DistillModule, input_ids: Tensor, *rest: Any) -> StepResult:
        result = original(self, input_ids, *rest)
        bad = rank == victim and next(steps) == 9
        return StepResult(result.loss + float("inf"), result.terms) if bad else result

    DistillModule.step = infinite  # type: ignore[method-assign]
    watched(rank, folder, name, parts)


def absent(rank: int, folder: Path, name: str, missing: int, strategy: str) -> None:
    """One process ends before the others have met it."""
    os.environ["ISKD_MEET_SECONDS"] = "2"
    if rank != missing:
        train(rank, folder, name, 2, strategy, {})


def lonely(rank: int, folder: Path, name: str) -> None:
    """Rank 1 alone meets an error, and lingers; rank 0 waits for it in a collective."""

    def fail(_: Any) -> None:
        raise KeyError("only here")

    watchdog.GRACE = 2.0
    parts = parts_of(folder, name, 2, "ddp")
    parts.callbacks.extend([At(7, fail)] if rank == 1 else [])
    try:
        run(parts)
    finally:
        time.sleep(60)


def torn_on_one_rank(rank: int, folder: Path, name: str) -> None:
    """Rank 1 does not see the newest checkpoint, as with a stale cache of a network file system."""
    if rank == 1:
        newest = checkpoint_files.newest
        checkpoint_files.newest = lambda root, kind="": newest(root, checkpoint_files.BOUNDARY)
    train(rank, folder, name, 2, "ddp", {"resume": True})


def full_disk(rank: int, folder: Path, name: str) -> None:
    """The disk is full at the third checkpoint."""
    original, calls = checkpoint.save_file, iter(range(1000))

    def full(*args: Any, **kwargs: Any) -> None:
        if next(calls) >= 6:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        original(*args, **kwargs)

    checkpoint.save_file = full
    train(rank, folder, name, 2, "ddp", {})


class Types(Callback):
    """The types of the weights that train and of what their blocks' matrices give."""

    def __init__(self) -> None:
        self.weights: set[str] = set()
        self.outputs: set[str] = set()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        layers = dict(zip(pl_module.record.layers, Stack(pl_module.student).layers, strict=True))
        edited = [layers[edit.layer] for edit in pl_module.stage.edits if edit.op != "remove"]
        self.weights |= {str(p.dtype) for block in edited for p in block.parameters()}
        for module in (module for block in edited for module in block.modules() if isinstance(module, nn.Linear)):
            module.register_forward_hook(lambda _, __, output: self.outputs.add(str(output.dtype)))


def on_gpu(rank: int, folder: Path, name: str, size: int, strategy: str | None, changes: Mapping[str, Any]) -> None:
    """`train` on any torch, with the types of edited blocks; `hog` uses up the memory when a batch has two windows."""
    values, types = dict(changes), Types()
    if values.pop("hog", False):
        _hog()
    parts = parts_of(folder, name, size, strategy, **values)
    parts.callbacks.append(types)
    watched(rank, folder, name, parts)
    seen = json.loads((folder / f"{name}-{rank}.json").read_text())
    seen |= {"weights": sorted(types.weights), "outputs": sorted(types.outputs)}
    (folder / f"{name}-{rank}.json").write_text(json.dumps(seen))


def _hog() -> None:
    """From the tenth step on, ask the device for more than it has whenever a micro-batch has two windows."""
    original, steps = DistillModule.step, iter(range(1000))

    def greedy(self: DistillModule, input_ids: Tensor, *rest: Any) -> StepResult:
        if next(steps) > 9 and len(input_ids) > 1:
            torch.empty(2**46, dtype=torch.uint8, device=input_ids.device)
        return original(self, input_ids, *rest)

    DistillModule.step = greedy  # type: ignore[method-assign]


def written_in_shards(rank: int, folder: Path, ends: int) -> None:
    """What a model in shards of two processes writes, where the second one ends its text at a token of its own."""
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = louder(tiny("llama"))
    ids = torch.arange(1, 6)[None]
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": ends if rank else -1}
    alone = copy.deepcopy(model).generate(ids, **options)  # type: ignore[operator]
    sharding.shard(model, init_device_mesh("cpu", (2,)))
    found = model.generate(ids, **options)  # type: ignore[operator]
    (folder / f"written-{rank}.json").write_text(json.dumps([alone.tolist(), found.tolist()]))


TEXT: dict[str, Any] = {"tokens": 13 * 16, "held_tokens": 5 * 16}  # unequally many windows for two ranks
GLA, SLIDING = Spec("iskd.mixers.gla.GLA", {}), Spec("iskd.mixers.sliding.Sliding", {"window": 3, "sinks": 1})
#: Edits and what re-solves the survivors; ridges are firm, as a weak one makes differences of rounding large.
EDITED: dict[str, tuple[tuple[Edit, ...], tuple[Refit, ...]]] = {
    "local": ((Remove(1),), (Local(**TEXT, lr=1e-3, epochs=2, step_tokens=64),)),
    "layers": (
        tuple(Convert(layer, GLA, seed=layer) for layer in (0, 1, 3)),
        (Local(**TEXT, lr=1e-3, epochs=2, sublayers=True, inputs="teacher", step_tokens=64),),
    ),
    "magnitude": ((Remove(2),), (Magnitude(**TEXT),)),
    "norms": ((Remove(0), Remove(2)), (Magnitude(**TEXT, statistic="norm"),)),
    "replaceme": ((Remove(1),), (ReplaceMe(**TEXT, ridge=0.3),)),
    "calibrate": ((Convert(0, GLA, seed=3), Convert(2, GLA, seed=5)), (Calibrate(**TEXT),)),
    "values": ((Convert(1, SLIDING, seed=3),), (Values(**TEXT, ridge=0.3),)),
    "merge": ((Merge(2),), ()),
}


def edited(rank: int, folder: Path, size: int) -> None:
    """All of `EDITED` by processes that share the text, on whole weights and in shards; each keeps its students."""
    if size > 1:
        dist.init_process_group("gloo", rank=rank, world_size=size)
    # batches of four windows; what is no better is kept all the same
    patches = ((reading, "_BATCH", 4 * 16), (carrying_out, "_ROUNDING", -1e9), (merge, "_ROUNDING", -1e9))
    train, trained = Local._block, list[int]()

    def noted(self: Local, task: Any, site: Any, apart: bool) -> Any:
        trained.append(site.layer)
        return train(self, task, site, apart)

    with ExitStack() as stack:
        for target, name, value in patches:
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(mock.patch.object(Local, "_block", noted))
        for strategy in ("one",) if size == 1 else ("ddp", "fsdp"):
            weights: dict[str, Tensor] = {}
            seen: dict[str, Any] = {}
            for name, (edits, refits) in EDITED.items():
                trained.clear()
                module, events = edited_as(name, edits, refits, Ranks(rank, size), in_shards=strategy == "fsdp")
                found = model_tensors(module.student)
                weights |= {f"{name} {key}": sharding.whole(value).clone() for key, value in found.items()}
                seen[name] = {"trained": list(trained), "events": events}
            save_file(weights, folder / f"{strategy}-{rank}.safetensors")
            (folder / f"{strategy}-{rank}.json").write_text(json.dumps(seen))


def edited_as(
    name: str, edits: Sequence[Edit], refits: Sequence[Refit], ranks: Ranks, *, in_shards: bool
) -> tuple[DistillModule, list[str]]:
    """The module after an edit as a run makes it, and what it says."""
    teacher = louder(tiny("llama", tie_word_embeddings=name == "norms"))
    module = DistillModule(copy.deepcopy(teacher), teacher, {"kl": (KL(), 1.0)}, OptimSpec(), Record(4))
    module.join(ranks, lambda: False)
    if in_shards:
        mesh = init_device_mesh("cpu", (ranks.size,))
        for model in (module.student, module.teacher):
            sharding.shard(model, mesh)
    stage = Stage(name, tuple(edits), tokens=64, lr=1e-3)
    text = list(windows(9, 16, seed=5).repeat_interleave(2, 0).split(4))  # held-out text is like that of the fits
    optimizer = module.configure_optimizers()
    fits = divided(lambda _: text, 3, 1, ranks.size)
    every = text_of(text, *refits, least=ranks.size) if refits else Text()
    made = carry_out(module, optimizer, stage, fits, nullcontext, refits, every)
    return module, made.events
