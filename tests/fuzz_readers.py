"""More of what `tests.fuzz` attacks: notes of a run, task items, chats, tokenizers, teacher caches."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from iskd.data import TextFiles
from iskd.data.chat_template import ChatTemplate
from iskd.evaluation.tasks.task_items import read_task
from iskd.export.student_files import tokenizer_of
from iskd.importance.task_accuracy import _load as named_tokenizer
from iskd.models.tokenizers import byte_tokenizer
from iskd.plan import run_files
from iskd.plan.failure import read_failure, write_failure
from iskd.system import run_lock
from iskd.system.files import clear_place
from iskd.teacher import TeacherCache
from iskd.teacher.load import TeacherSpec, load_teacher
from iskd.training.metrics import sweep_of, tracked_as
from iskd.training.metrics.loggers import resumed
from tests.factories import tiny, windows
from tests.fuzz import Place, hostile, torn

Kind = tuple[Place, Callable[[], bool]]
NOTES: dict[str, Any] = {
    run_files.FAILURE_FILE: {"error": "ValueError", "message": "a value"},
    run_files.TRACKING_FILE: {"wandb": "ab12cd34", "resumed_at": [64, 128]},
    run_files.LOCK_FILE: {"process": 17, "machine": "here", "since": "2026-01-01 00:00:00"},
    ".hydra/hydra.yaml": "hydra:\n  mode: MULTIRUN\n",
}
"""What a run says of itself beside its results."""
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}.\n{% endfor %}"
CHATS = [
    {"messages": [{"role": "user", "content": f"hi {n}"}, {"role": "assistant", "content": "so"}]} for n in range(9)
]


def odd(rng: random.Random, file: Path) -> bool:
    """Now and then, put something in the place of a file that is no plain file; whether it was."""
    if rng.random() >= 0.1:
        return False
    clear_place(file)
    target = rng.choice(("/dev/zero", "/etc/passwd", "..", file.name, "", "/"))
    if target == "/":
        file.mkdir()
    elif target:
        file.symlink_to(target)
    else:
        os.mkfifo(file)
    return True


def put(file: Path, content: bytes) -> None:
    clear_place(file)
    file.write_bytes(content)


def notes(folder: Path) -> Kind:
    """Failure, W&B run, lock and Hydra's note; accepted where all are as they were."""
    (folder / ".hydra").mkdir(parents=True)

    def fresh() -> None:
        for name, document in NOTES.items():
            put(folder / name, document.encode() if isinstance(document, str) else json.dumps(document).encode())

    def place(rng: random.Random) -> None:
        fresh()
        name = rng.choice(sorted(NOTES))
        if not odd(rng, folder / name):
            text = isinstance(NOTES[name], str)
            put(folder / name, torn(rng, NOTES[name].encode()) if text else hostile(rng, NOTES[name]))

    def load() -> bool:
        found = [read_failure(folder), resumed(folder), sweep_of(folder)]
        if (folder / run_files.TRACKING_FILE).is_file():
            found.append(tracked_as(folder))
        lock = folder / run_files.LOCK_FILE
        try:
            if lock.is_file() and not lock.is_symlink():
                opened = os.open(lock, os.O_RDONLY)
                found.append(run_lock._owner(opened))
                os.close(opened)
            run_lock.hold(lock)
        finally:
            run_lock.release(lock)
        return found == intact

    fresh()
    write_failure(folder, ValueError("a value"))
    intact = [read_failure(folder), resumed(folder), sweep_of(folder), "ab12cd34"]
    intact.append("another run (process 17 on here, since 2026-01-01 00:00:00)")
    return place, load


def items(folder: Path) -> Kind:
    """eval.jsonl of a task."""
    (folder / "piqa").mkdir(parents=True)
    file = folder / "piqa" / "eval.jsonl"
    rows = [{"id": str(n), "goal": f"g {n}", "sol1": "a", "sol2": "b", "label": n % 2} for n in range(4)]
    return _lines(file, rows, lambda: len(read_task("piqa", folder)) == len(rows))


def chats(folder: Path) -> Kind:
    """Rows of messages, through a chat template."""
    folder.mkdir()
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PLAIN
    template = ChatTemplate(tokenizer, "assistant")

    def load() -> bool:
        found = [template.encode(text) for text, _ in TextFiles(str(folder / "chat.jsonl"), chat=True).documents()]
        return len(found) == len(CHATS)

    return _lines(folder / "chat.jsonl", CHATS, load)


def _lines(file: Path, rows: list[Any], load: Callable[[], bool]) -> Kind:
    valid = b"\n".join(json.dumps(row).encode() for row in rows)
    put(file, valid)

    def place(rng: random.Random) -> None:
        if not odd(rng, file):
            lines = valid.split(b"\n")
            at = rng.randrange(len(lines))
            lines[at] = hostile(rng, rows[at])
            put(file, b"\n".join(lines) if rng.random() < 0.8 else torn(rng, valid))

    return place, load


def tokenizers(folder: Path) -> Kind:
    """Tokenizer and config of a teacher's and of a student's folder; now and then one of them is missing."""
    tiny("llama", vocab=257).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    valid = {path: path.read_bytes() for path in sorted(folder.glob("*.json"))}

    def place(rng: random.Random) -> None:
        for path, content in valid.items():
            put(path, content)
        path = rng.choice(sorted(valid))
        if rng.random() < 0.05:
            path.unlink()
        elif not odd(rng, path):
            put(path, hostile(rng, json.loads(valid[path])) if rng.random() < 0.5 else torn(rng, valid[path]))

    def load() -> bool:
        tokenizer_of(folder)
        named_tokenizer(folder)
        load_teacher(TeacherSpec("any", str(folder)))
        return True

    return place, load


def teacher_caches(folder: Path) -> Kind:
    """Index and rows of a teacher cache."""
    folder.mkdir()
    model, texts = tiny("llama", layers=2), windows(6).numpy().astype("uint16")
    made = TeacherCache.open(model, texts, folder).fill()
    valid = {path: path.read_bytes() for path in sorted(made.folder.iterdir())}
    said = made.read(range(6))["last_hidden"]

    def place(rng: random.Random) -> None:
        for path, content in valid.items():
            put(path, content)
        path = made.folder / "meta.json" if rng.random() < 0.5 else rng.choice(sorted(valid))
        if not odd(rng, path):
            json_file = path.suffix == ".json"
            put(path, hostile(rng, json.loads(valid[path])) if json_file else torn(rng, valid[path]))

    def load() -> bool:
        found = TeacherCache.open(model, texts, folder).read(range(6))["last_hidden"]
        assert torch.equal(found, said), "rows that nobody wrote"
        return True

    return place, load


KINDS: dict[str, Callable[[Path], Kind]] = {
    "notes": notes,
    "items": items,
    "chats": chats,
    "tokenizer": tokenizers,
    "answers": teacher_caches,
}
