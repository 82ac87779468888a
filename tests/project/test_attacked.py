"""Every place that reads a file is attacked by a kind of `tests.fuzz`, or says here why nobody else writes its file."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.fuzz_kinds import SHARES
from tests.project.test_layering import FILES, tree

READERS = {
    *("read_plain", "read_json", "read_object", "read_csv", "read_text", "read_bytes", "json.load", "first_bytes"),
    *("safe_open", "load_file", "memmap", "fromfile", "from_file", "memory_map", "ParquetFile", "imread", "os.pread"),
    *("from_pretrained", "load_dataset", "load_from_disk", "safe_load", "metadata_load", "os.open", "OmegaConf.load"),
}
"""Calls that read a file; `open` counts too, where its mode does not make a new one."""
ATTACKED = {
    "commands/evaluate: read_bytes": "evaluated",
    "commands/evaluate: read_object": "evaluated",
    "commands/evaluate: read_plain": "evaluated",
    "data/files/decoding: file.open": "texts",
    "data/files/decoding: first_bytes": "texts",
    "data/files/decoding: gzip.open": "texts",
    "data/files/kinds: first_bytes": "texts",
    "data/files/readers: read_json": "texts",
    "data/files/rows: ParquetFile": "texts",
    "data/files/rows: memory_map": "texts",
    "data/hub_rows: read_object": "shards",
    "data/shards: memmap": "marks",
    "data/shards: read_json": "shards",
    "evaluation/evaluator: read_text": "texts",
    "evaluation/tasks/task_items: read_plain": "items",
    "export/card: metadata_load": "student",
    "export/card: read_json": "run",
    "export/card_measured: metadata_load": "student",
    "export/card_measured: read_json": "run",
    "export/card_measured: read_plain": "student",
    "export/load_options: read_json": "config",
    "export/loading: from_pretrained": "config",
    "export/loading: load_file": "weights",
    "export/loading: read_json": "config",
    "export/student_files: read_object": "student",
    "export/verification: read_json": "student",
    "export/verification: read_plain": "student",
    "models/model_folder: read_json": "weights",
    "models/model_folder: safe_open": "weights",
    "models/skeletons: from_pretrained": "tokenizer",
    "models/skeletons: read_json": "tokenizer",
    "models/skeletons: safe_open": "weights",
    "models/tokenizers: from_file": "tokenizer",
    "models/tokenizers: from_pretrained": "tokenizer",
    "models/tokenizers: read_bytes": "tokenizer",
    "models/tokenizers: read_plain": "tokenizer",
    "models/weights: file.open": "weights",
    "models/weights: read_json": "weights",
    "models/weights: safe_open": "weights",
    "plan/budget_plan: read_json": "run",
    "plan/failure: read_json": "notes",
    "plan/results: read_json": "stages",
    "plan/run_files: read_object": "evaluated",
    "plan/saved_config: read_plain": "run",
    "report/read_run: read_csv": "run",
    "report/read_run: read_json": "stages",
    "report/read_run: read_plain": "run",
    "system/run_lock: os.open": "notes",
    "system/run_lock: os.pread": "notes",
    "teacher/cache: read_json": "answers",
    "teacher/load: from_pretrained": "tokenizer",
    "teacher/origin: read_object": "student",
    "teacher/row_store: open": "answers",
    "teacher/row_store: os.open": "answers",
    "training/facts: read_object": "notes",
    "training/stages: read_json": "stages",
    "training/metrics/chosen: read_plain": "notes",
    "training/metrics/loggers: read_json": "notes",
    "training/metrics/metrics_file: read_csv": "run",
    "training/profile/plan_ahead: read_json": "student",
    "training/state/checkpoint: load_file": "tensors",
    "training/state/checkpoint: read_json": "state",
    "training/state/checkpoint: safe_open": "tensors",
    "training/state/checkpoint_files: read_json": "manifest",
}
"""Kind of case by file and call."""
NOBODY_ELSES = {
    "teacher/origin: read_text": "the package's own yaml",
    "teacher/origin: safe_load": "the package's own yaml",
    "commands/build/schedule: OmegaConf.load": "the package's own yaml",
    "commands/values/config: read_text": "the package's own yaml",
    "commands/values/config: safe_load": "the package's own yaml",
    "data/hub_rows: load_dataset": "the library's own, of a cache or a stream; its rows go the way of the texts",
    "data/sources: read_bytes": "the modules of this Python, parsed and not run",
    "evaluation/harness: read_text": "the package's own yaml",
    "evaluation/harness: safe_load": "the package's own yaml",
    "export/bundle: read_text": "the sources of parts, whose classes have been imported",
    "export/bundled: from_pretrained": "read by the code beside a student, for whoever trusts it",
    "export/bundled: read_text": "read by the code beside a student, for whoever trusts it",
    "export/hub: metadata_load": "the card of a student that its owner sends",
    "export/hub: read_text": "the card of a student that its owner sends",
    "export/lineage: read_object": "the config of a teacher that was loaded a moment ago",
    "commands/line/keys: read_text": "the package's own yaml",
    "commands/line/steps: read_text": "the package's own yaml",
    "commands/line/steps: safe_load": "the package's own yaml",
    "evaluation/tasks/task_items: load_dataset": "the library's own cache; its rows go the way of the items",
    "report/beside: open": "the first bytes of a plain file, to see whether it is ours",
    "schedules/budget/costs: read_json": "the library of this user: what is no table of times is measured anew",
    "schedules/budget/library: read_json": "the library of this user, bound to its teacher",
    "schedules/budget/library: read_plain": "the library of this user, held against its digest",
    "training/finish: read_json": "the plan that this process, or the one that it goes on from, wrote",
    "training/profile/plan_ahead: read_text": "the package's own yaml",
    "training/profile/plan_ahead: safe_load": "the package's own yaml",
    "export/probe: read_text": "the answer of a process of this one, in a scratch folder",
    "export/student: read_json": "the config that was written a moment ago",
    "blocks/streams: from_file": "a scratch file of this process",
    "system/files: open": "what `read_plain` is",
    "system/files: os.open": "what `read_plain` is",
    "system/files: path.open": "digests: no byte is understood",
    "system/files: read_json": "what `read_object` is",
    "system/files: read_plain": "what `read_json` is",
    "system/files: read_text": "the kernel's /proc",
    "system/machine: read_text": "the kernel's /proc",
    "system/tables: read_plain": "what `read_csv` is",
    "teacher/bundled: from_pretrained": "a file of an installed package, held against the digests of this one",
    "teacher/bundled: read_text": "digests of the package, and a config written a moment ago",
    "training/metrics/loggers: imread": "the picture that was drawn a moment ago",
    "training/metrics/metrics_file: os.open": "to write at the end",
    "training/state/checkpoint_files: os.open": "a folder, to have it on the disk",
    "training/state/checkpoint_files: path.open": "to have it on the disk",
}


def reads(node: ast.Call) -> Iterator[str]:
    """The reader that a call is, by the name it is called by here."""
    name = ast.unparse(node.func)
    last = name.rpartition(".")[2]
    if name in READERS or last in READERS:
        yield name if name in READERS else last
    elif last == "open" and not name[0].isupper():
        given = (*node.args, *(word.value for word in node.keywords))
        said = [each.value for each in given if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        if not any(set(mode) & set("wax") and len(mode) < 4 for mode in said):
            yield name


def test_every_file_that_is_read_is_attacked() -> None:
    found: dict[str, int] = {}
    for file, path in FILES.items():
        for node in ast.walk(tree(path)):
            for call in reads(node) if isinstance(node, ast.Call) else ():
                found.setdefault(f"{file}: {call}", node.lineno)
    told = ATTACKED | NOBODY_ELSES
    wrong = {place: line for place, line in found.items() if place not in told}
    assert not wrong, f"attack it by a kind of tests.fuzz, or say here whose file it is: {wrong}"
    assert not told.keys() - found, "nothing is read there any more"
    assert not ATTACKED.keys() & NOBODY_ELSES
    assert set(ATTACKED.values()) <= set(SHARES)
    assert set(SHARES) - set(ATTACKED.values()) == {"record", "chats"}, "what is read, not how"


def test_the_scan_sees_what_it_is_for() -> None:
    source = """
read_json(path); path.open(); open(path, "rb"); np.memmap(path, mode="r"); AutoModel.from_pretrained(x)
file.open("r+b"); open(path, "w"); path.open("xb"); Cache.open(model); files.write_whole(path, text); json.loads(text)
"""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    assert [(node.lineno, name) for node in calls for name in reads(node)] == [
        *((2, "read_json"), (2, "path.open"), (2, "open"), (2, "memmap"), (2, "from_pretrained"), (3, "file.open"))
    ]
