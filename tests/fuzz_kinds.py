"""What `tests.fuzz` attacks: per kind of file how to put a hostile one in its place, and who reads it there."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import logging
import os
import pkgutil
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers.utils.logging import disable_progress_bar

import iskd
import iskd.blocks
import iskd.mixers
from iskd.data.coding import Coding
from iskd.data.hub_rows import is_commit, kept_commit
from iskd.data.shards import open_shards
from iskd.data.splits import SPLITS, Document, Splitter
from iskd.export.card import _settings as card_settings
from iskd.export.card import write_card
from iskd.export.card_measured import measured_section
from iskd.export.student import write
from iskd.models import surgery, weights
from iskd.models.tokenizers import byte_tokenizer
from iskd.plan import Convert, Record, Remove, Replace, Spec, Stage, StageResult, run_files, to_json
from iskd.plan.edits import REMOVALS, Merge
from iskd.plan.reading import record_from_json
from iskd.plan.saved_config import read_config
from iskd.report.figures.edit_map import layer_states
from iskd.report.read_run import read_run
from iskd.report.stage_rows import stage_table
from iskd.system import read_json
from iskd.system.files import clear_place
from iskd.training.metrics import keep_metrics
from iskd.training.state import RunState, checkpoint, checkpoint_files, random_numbers
from iskd.training.state.tournament import Tournament
from iskd.training.step import OptimSpec, make_optimizer, regroup
from iskd.training.step.optimizer import optimizer_tensors
from tests.factories import mixer_specs, tiny
from tests.fuzz import Place, hostile, hostile_tensors, torn
from tests.fuzz_folders import KINDS as FOLDERS
from tests.fuzz_readers import KINDS as READERS
from tests.fuzz_readers import PLAIN, odd
from tests.run_folders import EFFICIENCY, EVALUATION, write_run

# Shares of all cases. `config` is the config.json of an export with its record inside, loaded as a student.
SHARES = {
    "record": 0.12,
    "config": 0.06,
    "weights": 0.03,
    "state": 0.14,
    "shards": 0.08,
    "marks": 0.04,
    "tensors": 0.10,
    "manifest": 0.08,
    "stages": 0.07,
    "notes": 0.04,
    "items": 0.03,
    "chats": 0.02,
    "tokenizer": 0.02,
    "answers": 0.01,
    "run": 0.08,
    "student": 0.02,
    "evaluated": 0.03,
    "texts": 0.03,
}
Kind = tuple[Place, Callable[[], bool]]

SLIM = Replace(0, Spec("iskd.blocks.slim.Slim", {"ratio": 0.5, "select": "l1"}))
LINEAR = Replace(1, Spec("iskd.blocks.linear.Linear", {"ridge": 0.5}), seed=7)
SMALL = Replace(3, Spec("iskd.blocks.bottleneck.Bottleneck", {"reduction": 2, "layers": 1}))
RECORD = Record(4).extended([SLIM, LINEAR, Remove(2), SMALL])
CONVERTED = Record(4).extended([Convert(0, next(iter(mixer_specs().values()))), Merge(2), Remove(3)])
STAGE = Stage("replace 1", (LINEAR,), tokens=64, train=r"layers\.(1|3)\.", lr=1e-3)
IDENTITY = {"seed": 1, "text": "ab" * 8, "teacher": "cd" * 8, "batch_size": 2, "accumulate": 1, "processes": 1}
SIZES: dict[str, Any] = {"hidden": 16, "heads": 4, "kv_heads": 2, "mlp": 32, "vocab": 60}


@dataclass(frozen=True)
class Numbered:
    """Documents of a few bytes."""

    revision: str = "ab" * 20

    def documents(self) -> Iterator[Document]:
        yield from ((f"document {number} " * 3, None) for number in range(200))

    def fingerprint(self) -> str:
        return "numbered"


def kinds(root: Path) -> dict[str, Kind]:
    """Place and reader by kind, each tried on its valid documents: what is lazy in the stack is imported now."""
    logging.disable(logging.CRITICAL)
    disable_progress_bar()
    for package in (iskd.blocks, iskd.mixers):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    made = {
        "record": _record(root / "record"),
        "config": _config(root / "config"),
        "state": _state(root / "state"),
        "shards": _shards(root / "shards"),
        "marks": _marks(root / "marks"),
        "tensors": _tensors(root / "tensors"),
        "manifest": _manifest(root / "manifest"),
        "stages": _stages(root / "stages"),
        "run": _run(root / "run"),
        **{name: make(root / name) for name, make in (READERS | FOLDERS).items()},
    }
    for name, (_, load) in made.items():
        assert load(), f"the valid {name} is refused"
    return made


def _record(folder: Path) -> Kind:
    """record.json: parsed, its classes resolved, and the student that it describes built for its shapes."""
    folder.mkdir()
    teacher = tiny("llama", **SIZES)
    file = folder / "record.json"
    file.write_text(json.dumps(to_json(RECORD)))

    def load() -> bool:
        record = record_from_json(read_json(file))
        assert record_from_json(to_json(record)) == record
        for edit in record.edits:
            if not isinstance(edit, REMOVALS):
                (edit.block if isinstance(edit, Replace) else edit.mixer).resolve()
        if record.num_layers == 4:
            surgery.rebuild(teacher, record, "meta")
        return True

    return lambda rng: _put(file, hostile(rng, to_json(rng.choice((RECORD, CONVERTED))))), load


def _config(folder: Path) -> Kind:
    """config.json and generation_config.json of an export with its weights: `iskd.load`."""
    for name, record in (("edited", RECORD), ("native", Record(4).extended([Remove(1)]))):
        model, teacher = tiny("llama", **SIZES), tiny("llama", **SIZES)
        surgery.apply(model, Record(4), record.edits)
        write(folder / name, model, record, teacher.config)
    chosen = [folder / "native"]
    iskd.load(folder / "edited")
    valid = {path: path.read_bytes() for path in sorted(folder.rglob("*config.json"))}

    def place(rng: random.Random) -> None:
        for path, content in valid.items():
            _put(path, content)
        chosen[0] = folder / rng.choice(("edited", "edited", "native"))
        name = rng.choice(("config.json",) * 9 + ("generation_config.json",))
        document = json.loads(valid[chosen[0] / name])
        if name == "config.json" and rng.random() < 0.5:
            host = document.get("teacher", document)
            host[rng.choice(sorted(host))] = rng.choice((10**5, 10**12, -1, 0, True, 1.5, None, "x", [1], {"a": 1}))
        _put(chosen[0] / name, hostile(rng, document))

    return place, lambda: iskd.load(chosen[0]) is not None


def _state(folder: Path) -> Kind:
    """state.json, as a resumed run takes it up: inside a stage, or among the trials of candidates."""
    folder.mkdir()
    teacher = tiny("llama", **SIZES)
    row = _row(0, "teacher")
    state = RunState(RECORD, STAGE, True, 3, 8, 4, 20, 2, 640, 1.5, identity=dict(IDENTITY), finished=(STAGE,))
    state.before, state.events, state.results = {"ppl": 9.0, "kl": 0.1}, ["fitted"], [row]
    state.scores = dict.fromkeys(range(4), 0.5)
    document = state.to_json()
    race = Tournament((STAGE, Stage("remove 2", (Remove(2),), tokens=64), STAGE), 32, (0.5, float("nan")))
    racing = dataclasses.replace(state, tournament=race, stage=race.stage).to_json()
    _put(folder / "state.json", json.dumps(document).encode())

    def load() -> bool:
        found = checkpoint.read_state(folder)
        found.take_up(IDENTITY)
        found.to_json()
        if found.tournament is not None and found.stage is not None:
            found.trial_judged(0.1)
        if found.record.num_layers == 4:
            surgery.rebuild(teacher, found.record, "meta")
        return True

    return lambda rng: _put(folder / "state.json", hostile(rng, rng.choice((document, racing)))), load


@dataclass(frozen=True)
class Chats(Numbered):
    """Conversations of two turns."""

    def documents(self) -> Iterator[Document]:
        for text, split in super().documents():
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "so"}]
            yield json.dumps({"messages": turns}), split


def _marks(folder: Path) -> Kind:
    """The shards of chats: beside each token file one that says which tokens are learned."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PLAIN
    coding = Coding.of(tokenizer, chat_loss="assistant", seq_len=16)
    return _shards(folder, Chats(), tokenizer, coding)


def _shards(folder: Path, source: Any = None, tokenizer: Any = None, coding: Coding | None = None) -> Kind:
    """meta.json and the token files beside it."""
    arguments = (source or Numbered(), tokenizer or byte_tokenizer(), Splitter(), folder, coding)
    before, _, behind = repr(arguments[0]).partition(repr(Numbered.revision))
    opened = open_shards(*arguments)
    meta, train = opened.folder / "meta.json", opened.folder / "train.bin"
    document, stream = json.loads(meta.read_text()), train.read_bytes()
    marks = b"" if coding is None else (opened.folder / "train.targets.bin").read_bytes()

    def place(rng: random.Random) -> None:
        shutil.rmtree(opened.folder)
        opened.folder.mkdir()
        for split in SPLITS:
            _put(opened.folder / f"{split}.bin", stream if split == "train" else b"")
            if marks:
                _put(opened.folder / f"{split}.targets.bin", marks if split == "train" else b"")
        changed = json.loads(json.dumps(document))
        for split in SPLITS[1:]:
            changed["splits"][split] |= {"tokens": 0, "sha256": hashlib.sha256(b"").hexdigest()}
            if marks:
                changed["splits"][split]["targets"] = hashlib.sha256(b"").hexdigest()
        kind = rng.random()
        if kind < 0.15:
            forged = torn(rng, stream)
            _put(train, forged)
            changed["splits"]["train"] |= {"tokens": len(forged) // 2, "sha256": hashlib.sha256(forged).hexdigest()}
        elif kind < 0.2:
            train.unlink()
            train.symlink_to(rng.choice(("/dev/zero", "/etc/passwd", "..", "train.bin", meta)))
        elif marks and kind < 0.4:
            file = opened.folder / "train.targets.bin"
            if not odd(rng, file):
                forged = torn(rng, marks)
                _put(file, forged)
                changed["splits"]["train"]["targets"] = hashlib.sha256(forged).hexdigest()
        _put(meta, json.dumps(changed).encode() if kind < 0.15 else hostile(rng, changed))

    def load() -> bool:
        commit = kept_commit(before, behind, folder)
        assert commit is None or is_commit(commit)
        shards = open_shards(*arguments)
        assert commit == Numbered.revision
        for split in SPLITS:
            if shards.tokens(split) >= 16:
                assert int(shards.windows(split, 16).max(initial=0)) <= shards.meta.max_id
                learned = shards.targets(split, 16)
                assert learned is None or int(learned.max(initial=0)) <= 1
        return True

    return place, load


def _tensors(folder: Path) -> Kind:
    """The safetensors of a checkpoint: restored, one optimizer step taken, random numbers drawn."""
    folder.mkdir()
    model = tiny("llama", **SIZES)
    surgery.apply(model, Record(4), RECORD.edits)
    optimizer = make_optimizer(OptimSpec())
    regroup(optimizer, model, RECORD, Stage("all"), {})
    _step(model, optimizer)
    save_file(weights.model_tensors(model), folder / "student.safetensors")
    save_file(optimizer_tensors(optimizer, model), folder / "optimizer.safetensors")
    save_file({f"{key}/0": value for key, value in random_numbers.rng_tensors().items()}, folder / "rng.safetensors")
    valid = {path: path.read_bytes() for path in sorted(folder.iterdir())}

    def place(rng: random.Random) -> None:
        for path, content in valid.items():
            _put(path, content)
        path = rng.choice(sorted(valid))
        _put(path, hostile_tensors(rng, valid[path]))

    def load() -> bool:
        checkpoint.restore(folder, model, optimizer)
        _step(model, optimizer)
        random.random()
        np.random.random(2_000)
        torch.rand(2_000)
        return True

    return place, load


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def _manifest(folder: Path) -> Kind:
    """A checkpoint's manifest.json and its files, beside a whole older checkpoint: found, then pruned."""
    names = ("student.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")
    contents = {name: name.encode() for name in names}
    entries = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in contents.items()}
    outside = folder / "outside"
    root, newer = folder / "checkpoints", folder / "checkpoints" / "000002-stage"

    def fresh() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        outside.mkdir(parents=True)
        for path in (root / "000001-boundary", newer):
            path.mkdir(parents=True)
            for name, content in {**contents, "manifest.json": json.dumps({"files": entries}).encode()}.items():
                _put(path / name, content)
        _put(outside / "kept", b"kept")

    def place(rng: random.Random) -> None:
        fresh()
        document = {"files": {name: dict(entry) for name, entry in entries.items()}}
        if rng.random() < 0.2:
            name = rng.choice(names)
            (newer / name).unlink()
            kind = rng.randrange(4)
            if kind == 0:
                os.mkfifo(newer / name)
            elif kind == 1:
                (newer / name).mkdir()
            else:
                (newer / name).symlink_to("/dev/zero" if kind == 2 else outside)
            document["files"][name]["bytes"] = rng.choice((0, 4096, (newer / name).stat().st_size))
        if rng.random() < 0.1:
            (root / rng.choice(("0x-stage", "9-9-stage", "\u0663-stage", "9" * 50 + "-stage"))).mkdir()
            (root / "000003-stage").symlink_to(outside)
        _put(newer / "manifest.json", hostile(rng, document))

    def load() -> bool:
        found = checkpoint_files.newest(root)
        checkpoint_files.prune(root, keep=1)
        assert (outside / "kept").is_file(), "a file outside of the run directory is gone"
        return found == newer

    fresh()
    return place, load


def _stages(folder: Path) -> Kind:
    """stages.json and record.json of a finished run, as the report reads them."""
    folder.mkdir()
    rows = [_row(0, "teacher").to_json(), _row(1, "replace 1").to_json()]
    record = to_json(RECORD)
    _put(folder / "stages.json", json.dumps(rows).encode())
    _put(folder / "record.json", json.dumps(record).encode())

    def place(rng: random.Random) -> None:
        on_record = rng.random() < 0.25
        _put(folder / "stages.json", json.dumps(rows).encode() if on_record else hostile(rng, rows))
        _put(folder / "record.json", hostile(rng, record) if on_record else json.dumps(record).encode())

    def load() -> bool:
        run = read_run(folder)
        layer_states(run.stages, run.num_layers)
        stage_table(run.stages)
        return True

    return place, load


TEACHER = {"name": "a/b", "kind": "hub", "sha256": "ab"}
RUN_FILES: dict[str, Any] = {
    run_files.CONFIG_FILE: {"seed": 1, "model": {"name": "tiny", "path": None}, "loss": ["kl"]},
    run_files.ENVIRONMENT_FILE: {"teacher": TEACHER, "versions": {"iskd": "1"}},
    run_files.DATA_FILE: {"source": "text", "content": "ab", "tokens": {"train": 64}},
    run_files.EVALUATION_FILE: EVALUATION,
    run_files.EFFICIENCY_FILE: EFFICIENCY,
    run_files.PLAN_FILE: [{"stage": "teacher", "tokens": 0, "params": 9, "train_seconds": 0.5, "end_seconds": 2.0}],
    run_files.BUDGET_FILE: {
        **{"teacher": "ab", "choice": ["keep", "remove"], "options": {"remove": {"edit": "remove"}}},
        **{"asked": {"params": 0.5}, "costs": {"params": 9.0}, "predicted_kl": 0.5},
        "tried": [{"choice": ["keep"], "predicted": 0.5, "measured": 0.4}],
    },
    run_files.SAMPLES_FILE: [{"prompt": "Once", "teacher": " upon a", "student": " upon the", "same": 1, "tokens": 3}],
    run_files.METRICS_FILE: "lr/base,stage,step,tokens,train/loss\n" + "0.1,1,2,64,3.5\n0.1,1,3,96,3.4\n" * 9,
}
"""What no other kind attacks."""


def _run(folder: Path) -> Kind:
    """The other files of a run, as a report, a card and a resumed run read them.

    A page shows what is left of a file, so a case counts as accepted where all is there as it was.
    """
    write_run(folder)
    (folder / "card").mkdir()
    valid = {name: text if isinstance(text, str) else json.dumps(text) for name, text in RUN_FILES.items()}

    def fresh() -> None:
        for name, content in valid.items():
            clear_place(folder / name)
            _put(folder / name, content.encode())

    def place(rng: random.Random) -> None:
        fresh()
        name = rng.choice(sorted(RUN_FILES))
        document, kind = RUN_FILES[name], rng.random()
        if kind < 0.1:
            (folder / name).unlink()
            target = rng.choice(("/dev/zero", "/etc/passwd", "/proc/self/environ", "..", name, ""))
            (folder / name).symlink_to(target) if target else os.mkfifo(folder / name)
        elif isinstance(document, str):
            wide = ",".join(map(str, range(5_000))) + "\n"
            extra = rng.choice(("", "", "", '"' * 140_000, wide, "\0" * 9, "=1+1,," * 9, "nan,inf,-inf,1e999,1\n"))
            _put(folder / name, torn(rng, rng.choice((extra + document, document + extra)).encode()))
        else:
            _put(folder / name, hostile(rng, document))

    def load() -> bool:
        found = read_run(folder)
        measured_section(folder)
        keep_metrics(folder, below=90, results=1)
        card_settings(folder)
        write_card(folder / "card", RECORD, native=False, parameters=1, model_type="llama", versions={}, run_dir=folder)
        read_config(folder / run_files.CONFIG_FILE)
        return repr(found) == intact

    fresh()
    intact = repr(read_run(folder))
    return place, load


def _row(index: int, name: str) -> StageResult:
    return StageResult(
        index=index,
        name=name,
        edits=[{"op": "replace", "layer": 1, "block": "iskd.blocks.linear.Linear"}] if index else [],
        params=4_000,
        block_params=3_000,
        ppl=20.0,
        kl=0.1,
        top1=0.9,
        retention=0.98,
        before={"ppl": 90.0, "kl": float("inf")} if index else None,
        tokens=100 * index,
        seconds=1.5,
        scores={str(layer): 0.1 * layer for layer in range(4)},
        events=["block 1 fitted"],
    )


def _put(file: Path, content: bytes) -> None:
    file.write_bytes(content)
