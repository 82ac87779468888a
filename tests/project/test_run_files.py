"""The files of runs and exports: written by one function, named in one list, whole after a kill, never through a link.

That nothing is written in another way is read off the source; the two laws are held against every writer.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from omegaconf import OmegaConf

from iskd.commands.build.folder import save_config
from iskd.commands.evaluate import _kept
from iskd.evaluation import Efficiency, efficiency
from iskd.evaluation.results import efficiency_of
from iskd.export.card import write_card
from iskd.export.card_measured import refresh_card
from iskd.export.probe import ask
from iskd.export.student import write
from iskd.export.write import _write_facts
from iskd.importance import LayerScore
from iskd.plan import Record, Remove, Replace, Spec, run_files
from iskd.plan.results import write_stages
from iskd.plan.run_files import write_record
from iskd.report import read_curve, write_curves, write_report, write_runs_report
from iskd.report.run_page import picture
from iskd.report.scores import write_scores
from iskd.system import files
from iskd.training.facts import write_facts
from iskd.training.metrics.metrics_file import MetricsFile, keep_metrics
from iskd.training.profile.profile import Profile, write_profile
from tests.factories import tiny
from tests.project.test_layering import FILES, tree
from tests.run_folders import EFFICIENCY, STAGES, write_run

# ---- the source ------------------------------------------------------------------------------------------------------

WRITERS = {
    "write_text",
    "write_bytes",
    "savefig",
    "json.dump",
    "OmegaConf.save",
    "os.open",
    "os.replace",
    "os.rename",
    "rename",
    "save_file",
}
"""Calls that write or move a file. `open` counts where its mode writes."""
ALLOWED = {
    "training/metrics/metrics_file: os.open": "without following a link",
    "system/files: open": "the one place",
    "system/files: os.replace": "the one place",
    "data/writer: open": "token shards as they come, in a folder that is moved as a whole",
    "system/files: os.open": "to read, without waiting at a pipe",
    "report/figures/style: savefig": "into memory",
    "training/metrics/metrics_file: open": "rows at the end of a file, without following a link",
    "system/run_lock: os.open": "a lock is of the file itself, which therefore is never replaced",
    "export/student: save_file": "safetensors' own writer, in a folder that is moved as a whole",
    "export/write: os.replace": "an export: the folder as a whole",
    "training/state/checkpoint: save_file": "safetensors' own writer, in a folder that is moved as a whole",
    "training/state/checkpoint: os.replace": "a checkpoint: the folder as a whole",
    "training/state/checkpoint_files: os.open": "a folder, to have it on the disk",
    "data/building: os.replace": "shards into their place, the file that names them last",
    "blocks/streams: open": "a scratch file whose room is taken before it is mapped",
    "teacher/row_store: open": "rows at their places in a file of the cache, each with its digest",
    "teacher/row_store: os.open": "without following a link",
    "teacher/bundled: rename": "a converted teacher: the folder as a whole",
}


def _writes(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    last = name.rpartition(".")[2]
    modes = (*node.args, *(word.value for word in node.keywords if word.arg == "mode"))
    if last == "open" and name != "os.open":
        said = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
        yield from (last for mode in said if re.fullmatch(r"[rwaxbt+]{1,3}", mode) and re.search(r"[wax+]", mode))
    yield from {name, last} & WRITERS


def test_files_are_written_in_one_way() -> None:
    found: dict[str, int] = {}
    for file, path in FILES.items():
        for node in ast.walk(tree(path)):
            for call in _writes(node) if isinstance(node, ast.Call) else ():
                found.setdefault(f"{file}: {call}", node.lineno)
    wrong = {place: line for place, line in found.items() if place not in ALLOWED}
    assert not wrong, f"write with iskd.system.write_whole, or say here why not: {wrong}"
    assert not set(ALLOWED) - set(found), "allowed without need"


def test_the_scan_sees_what_it_is_for() -> None:
    source = """
path.open("w"); open(path, mode="ab"); path.write_text(text); json.dump(value, file); file.open("r+b"); os.replace(a, b)
path.open(); path.open("rb"); gzip.open(file, "rt", encoding=codec); open(path); text.replace(a, b); Cache.open(model)
"""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    assert sorted({(node.lineno, name) for node in calls for name in _writes(node)}) == [
        (2, "json.dump"),
        (2, "open"),
        (2, "os.replace"),
        (2, "write_text"),
    ]


NAMES = {name: value for name, value in vars(run_files).items() if name.isupper() and isinstance(value, str)}
FOLDERS = {"CHECKPOINTS", "MODEL", "STUDENTS"}


def _literals(path: Path) -> Iterator[tuple[str, int]]:
    """Names of a run's files in the strings of a module, docstrings apart; of its folders where a path is built."""
    spoken = {node.value for node in ast.walk(tree(path)) if isinstance(node, ast.Expr)}
    file_names = "|".join(re.escape(value) for name, value in NAMES.items() if name not in FOLDERS)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in spoken:
            yield from (
                (name, node.lineno) for name in re.findall(rf"(?<![\w.-])(?:{file_names})(?![\w-])", node.value)
            )
        sides = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and ast.unparse(node.left) != "CONF":
            sides = [node.right]
        elif isinstance(node, ast.Compare) and ast.unparse(node.left).endswith(".name"):
            sides = node.comparators
        for side in sides:
            if isinstance(side, ast.Constant) and side.value in {NAMES[name] for name in FOLDERS}:
                yield str(side.value), side.lineno


def test_names_of_a_runs_files_stand_in_one_list() -> None:
    assert len(set(NAMES.values())) == len(NAMES)
    wrong = [
        f"iskd/{file}.py:{line} spells {name!r}: take it from iskd.plan.run_files"
        for file, path in FILES.items()
        if file != "plan/run_files"
        for name, line in _literals(path)
    ]
    assert not wrong, "\n".join(wrong)


# ---- the laws --------------------------------------------------------------------------------------------------------

RECORDS = [Record(8), Record(8).extended([Remove(1)])]
SIZES: dict[str, Any] = {"native": False, "model_type": "llama", "versions": {"iskd": "1"}}


def _facts(folder: Path, turn: int) -> None:
    manifest = {"content": str(turn)}
    teacher = SimpleNamespace(source={"name": str(turn)})
    parts = SimpleNamespace(
        run_dir=folder,
        resume=False,
        teacher=teacher,
        importances=(),
        start=None,
        data=SimpleNamespace(manifest=lambda: manifest),
    )
    write_facts(cast(Any, parts), cast(Any, SimpleNamespace(precision="32-true", world_size=1 + turn)))


def _metrics(folder: Path, turn: int) -> None:
    if turn:
        keep_metrics(folder, below=2, results=1)
    MetricsFile(folder).log_metrics({"tokens": turn, f"train/{turn}": 0.5}, 0)


def _export(folder: Path, turn: int) -> None:
    model = tiny("llama", layers=2)
    teacher = tiny("llama", layers=2).config
    write(folder, model, Record(2).extended([Replace(turn, Spec("iskd.blocks.identity.Identity"))]), teacher)


def _profile(folder: Path, turn: int) -> None:
    write_profile(folder, Profile("heal", 8, {"loss": 1.0}, 1.0 + turn, {"loss": 1}, 1.0, "float32", 1))


def _layer_scores(folder: Path, turn: int) -> None:
    scores = [LayerScore(layer, turn + layer / 2, 0.1, -1.0, 3.0, False) for layer in range(2)]
    write_scores(folder, scores, torch.rand(2, 3), "random", torch.rand(2, 2))


def _export_facts(folder: Path, turn: int) -> None:
    model = tiny("llama", layers=2)
    _write_facts(folder, ask(model, [[1, 2, 3 + turn, 4]]), {"name": str(turn)}, native=True)


def _run(folder: Path, turn: int) -> Path:
    run = folder / "demo"
    if not run.exists():
        write_run(run)
    write_stages(run, STAGES[: 2 + turn])
    return run


def _card(folder: Path, turn: int) -> None:
    write_card(folder, RECORDS[turn], parameters=10 + turn, **SIZES)


def _new_card(folder: Path, turn: int) -> None:
    efficiency.write(folder, efficiency_of({**EFFICIENCY, "machine": {"name": f"cpu {turn}"}}))
    if (folder / "README.md").is_symlink():
        with pytest.raises(ValueError, match="link out of its folder"):  # what it names is not published either
            refresh_card(folder, folder)
        (folder / "README.md").unlink()
    (folder / "README.md").is_file() or (folder / "README.md").write_text("# Mine\n")
    refresh_card(folder, folder)


Write = Callable[[Path, int], object]
LAWFUL: dict[str, tuple[Write, tuple[str, ...]]] = {
    "config": (lambda folder, turn: save_config(OmegaConf.create({"seed": turn}), folder), ("config.yaml",)),
    "facts": (_facts, ("environment.json", "data.json")),
    "metrics": (_metrics, ("metrics.csv",)),
    "stages": (lambda folder, turn: write_stages(folder, STAGES[: 1 + turn]), ("stages.json",)),
    "record": (lambda folder, turn: write_record(folder, RECORDS[turn]), ("record.json",)),
    "efficiency": (lambda folder, turn: efficiency.write(folder, Efficiency({"turn": turn})), ("efficiency.json",)),
    "profile": (_profile, ("profile.json",)),
    "report": (lambda folder, turn: write_report(_run(folder, turn)), ("demo/report.html",)),
    "picture": (lambda folder, turn: picture(_run(folder, turn), folder / "run.png"), ("run.png",)),
    "runs": (lambda folder, turn: write_runs_report([_run(folder, turn)], folder / "runs.html"), ("runs.html",)),
    "curves": (
        lambda folder, turn: write_curves([read_curve(_run(folder, -turn))], folder / "curve.png"),
        ("curve.png", "curve.csv"),
    ),
    "scores": (_layer_scores, ("scores.csv", "rows.csv", "scores.png", "runs.csv")),
    "export": (_export, ("record.json",)),
    "facts of an export": (_export_facts, ("export.json",)),
    "card": (_card, ("README.md",)),
    "measured card": (_new_card, ("README.md", "efficiency.json")),
}


@pytest.mark.parametrize("kind", LAWFUL)
def test_a_link_is_replaced_and_what_it_names_untouched(kind: str, tmp_path: Path) -> None:
    put, names = LAWFUL[kind]
    folder, outside = tmp_path / "run", tmp_path / "outside"
    folder.mkdir()
    put(folder, 0)
    outside.write_bytes((folder / names[0]).read_bytes())
    before = outside.read_bytes()
    for name in names:
        (folder / name).unlink()
        (folder / name).symlink_to(outside)
    put(folder, 1)
    assert outside.read_bytes() == before
    assert not [name for name in names if (folder / name).is_symlink() or not (folder / name).is_file()]


@pytest.mark.parametrize("kind", LAWFUL)
def test_a_kill_leaves_the_old_file_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, names = LAWFUL[kind]
    put(tmp_path, 0)
    before = {name: (tmp_path / name).read_bytes() for name in names}
    replace, killed = files.os.replace, list[Path]()

    def kill(draft: Path, file: Path) -> None:
        if any(Path(file) == tmp_path / name for name in names):
            killed.append(Path(file))
            raise KeyboardInterrupt
        replace(draft, file)

    monkeypatch.setattr(files.os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path, 1)
    assert killed
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    assert not list(tmp_path.rglob("*.draft"))


def test_an_earlier_evaluation_is_put_aside_and_stays_until_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = files.write_whole(tmp_path / "evaluation.json", "old")
    (aside,) = _kept(file, "new")
    assert (aside.read_text(), file.read_text()) == ("old", "old")
    assert _kept(file, "old") == []
