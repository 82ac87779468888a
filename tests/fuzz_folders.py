"""More of what `tests.fuzz` attacks: weights in several files, files beside a student, evaluated runs, texts."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pyarrow
import pyarrow.parquet
from omegaconf import OmegaConf

import iskd
from iskd.commands import evaluate
from iskd.data.files.decoding import codec_of
from iskd.data.files.readers import find_splits
from iskd.evaluation.text import read_text
from iskd.export.card import _front_matter, write_card
from iskd.export.card_measured import refresh_card
from iskd.export.loading import describe
from iskd.export.probe import ask
from iskd.export.student import write
from iskd.export.student_files import read_facts
from iskd.export.verification import _expected, _what, changed
from iskd.export.write import _write_facts
from iskd.models import surgery
from iskd.models.tokenizers import byte_tokenizer
from iskd.plan import Record, Remove, Replace, Spec, run_files
from iskd.plan.run_files import FACTS
from iskd.teacher.load import Loaded, TeacherSpec, load_teacher
from iskd.teacher.origin import find_teacher
from tests.factories import tiny
from tests.fuzz import hostile, hostile_tensors, torn
from tests.fuzz_readers import Kind, odd, put
from tests.run_folders import EFFICIENCY, EVALUATION, write_run

LINEAR = Replace(1, Spec("iskd.blocks.linear.Linear", {"ridge": 0.5}))


def weights(folder: Path) -> Kind:
    """Index and weights of students whose weights are several files, one of them native and so a teacher too."""
    for name, edit in (("edited", LINEAR), ("native", Remove(1))):
        model, teacher = tiny("llama", vocab=257), tiny("llama", vocab=257)
        record = surgery.apply(model, Record(4), [edit])
        write(folder / name, model, record, teacher.config, max_shard_bytes=100_000)
    byte_tokenizer().save_pretrained(folder / "native")
    valid = {path: path.read_bytes() for path in sorted(folder.glob("*/model[.-]*"))}
    assert len(valid) > 5
    chosen = [folder / "native"]

    def place(rng: random.Random) -> None:
        for path, content in valid.items():
            put(path, content)
        path = rng.choice(sorted(valid))
        if rng.random() < 0.5:
            path = path.parent / "model.safetensors.index.json"
        chosen[0] = path.parent
        if odd(rng, path):
            return
        if path.suffix == ".json":
            put(path, hostile(rng, json.loads(valid[path])))
        else:
            put(path, hostile_tensors(rng, valid[path]))

    def load() -> bool:
        iskd.load(chosen[0])
        if chosen[0].name == "native":
            load_teacher(TeacherSpec("any", str(chosen[0])))
        return True

    return place, load


def students(folder: Path) -> Kind:
    """What lies beside a student's weights: facts, record, card."""
    model, teacher = tiny("llama", vocab=257), tiny("llama", vocab=257)
    record = surgery.apply(model, Record(4), [LINEAR])
    student = folder / "student"
    write(student, model, record, teacher.config)
    _write_facts(student, ask(model, [[1, 2, 3, 4]]), {"kind": "hub", "name": "a/b"}, native=False)
    write_card(student, record, native=False, parameters=10, model_type="llama", versions={"iskd": "1"})
    run = folder / "run"
    write_run(run, files={"evaluation": EVALUATION, "efficiency": EFFICIENCY})
    names = (FACTS, run_files.RECORD_FILE, "README.md")
    valid = {name: (student / name).read_bytes() for name in names}

    def place(rng: random.Random) -> None:
        for name, content in valid.items():
            put(student / name, content)
        name = rng.choice(names)
        if not odd(rng, student / name):
            text = valid[name]
            put(student / name, torn(rng, text) if name[-2:] == "md" else hostile(rng, json.loads(text)))

    def load() -> bool:
        facts, described = read_facts(student), describe(student)
        find_teacher(student)
        _expected(student, facts, None)
        _what(described)
        _front_matter(student / "README.md")
        return not changed(student, facts) and refresh_card(student, run) is not None

    return place, load


def evaluated(folder: Path) -> Kind:
    """What `iskd evaluate` asks the files of the run that a student is of."""
    write_run(folder)
    documents: dict[str, Any] = {
        run_files.DATA_FILE: {"content": "ab", "bos": "document", "selection_sha256": {"piqa": ["ab", "cd"]}},
        run_files.ENVIRONMENT_FILE: {"teacher": {"name": "a/b", "sha256": "ab"}},
        run_files.EVALUATION_FILE: EVALUATION,
        run_files.CONFIG_FILE: {"model": {"name": "a/b"}, "seed": 1},
    }
    config = OmegaConf.create({"data": {}})
    teacher = Loaded(cast(Any, None), cast(Any, None), {"sha256": "ab"})

    def fresh() -> None:
        for name, document in documents.items():
            put(folder / name, json.dumps(document).encode())

    def place(rng: random.Random) -> None:
        fresh()
        name = rng.choice(sorted(documents))
        if not odd(rng, folder / name):
            put(folder / name, hostile(rng, documents[name]))

    def load() -> bool:
        found = run_files.selected_in(folder), evaluate._bos(config, folder), evaluate._is_its_teacher(folder, teacher)
        evaluate._kept(folder / run_files.EVALUATION_FILE, json.dumps(EVALUATION))
        find_teacher(folder / run_files.MODEL)
        return found == ({"piqa": ["ab", "cd"]}, evaluate._bos(config, folder), True)

    fresh()
    return place, load


def texts(folder: Path) -> Kind:
    """Documents of every kind of file, packed too, and the list of splits of a saved data set."""
    folder.mkdir()
    rows = [{"text": f"a text {n}", "n": n} for n in range(5)]
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    table = pyarrow.Table.from_pylist(rows)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    parquet = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, parquet)
    comma = "text,n\n" + "".join(f'"a text {n}",{n}\n' for n in range(5))
    valid = {
        **{"a.txt": b"a text\n\nanother\n" * 30, "a.jsonl": lines, "a.json": json.dumps(rows).encode()},
        **{"a.csv": comma.encode(), "a.tsv": comma.replace(",", "\t").encode()},
        **{"a.jsonl.gz": gzip.compress(lines), "a.jsonl.bz2": bz2.compress(lines), "a.jsonl.xz": lzma.compress(lines)},
        **{"a.arrow": sink.getvalue().to_pybytes(), "a.parquet": parquet.getvalue().to_pybytes()},
        "saved/dataset_dict.json": b'{"splits": ["train", "test"]}',
    }
    for name in ("train", "test"):
        (folder / "saved" / name).mkdir(parents=True)
        for file in ("state.json", "dataset_info.json"):
            put(folder / "saved" / name / file, b"{}")
        put(folder / "saved" / name / "data-00000-of-00001.arrow", valid["a.arrow"])
    chosen = ["a.txt"]

    def place(rng: random.Random) -> None:
        chosen[0] = rng.choice(sorted(valid))
        for name, content in valid.items():
            put(folder / name, content)
        if rng.random() < 0.05:
            return
        content = valid[chosen[0]]
        if chosen[0].endswith(".json") and rng.random() < 0.7:
            put(folder / chosen[0], hostile(rng, json.loads(content)))
        else:
            put(folder / chosen[0], torn(rng, content))

    def load() -> bool:
        if "/" in chosen[0]:
            return len(find_splits(str(folder / "saved"), "data.path")) == 2
        return len(read_text(folder / chosen[0], 1_000_000)) > 0

    for mark in (b"\xff\xfe", b"\xff\xfe\0\0", b""):  # a mark names its codec, which is a module
        "".encode(codec_of(mark))
    for name, content in valid.items():  # what each kind imports is imported now
        put(folder / name, content)
        chosen[0] = name
        assert load(), name
    return place, load


KINDS: dict[str, Callable[[Path], Kind]] = {
    "weights": weights,
    "student": students,
    "evaluated": evaluated,
    "texts": texts,
}
