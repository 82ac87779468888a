"""What 0.1 left on its users' disks (tests/files/0.1/README.md): exports, records and runs open, and runs go on."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_object
from safetensors.torch import load_file, save_file

from iskd.commands import evaluate, report
from iskd.commands.compose import compose_config
from iskd.commands.generate import generate
from iskd.commands.line import parse
from iskd.export import verify
from iskd.models import surgery
from iskd.plan import Record, StageResult
from iskd.plan.reading import record_from_json
from iskd.plan.renamed import RENAMED, renamed
from iskd.plan.results import read_stages
from iskd.report.read_run import read_run
from iskd.report.run_list import differing, read_runs
from tests.conf_defaults import defaults
from tests.factories import tiny, windows
from tests.worlds import Command

ROOT = Path(__file__).resolve().parents[2]
OLD = ROOT / "tests" / "files" / "0.1"
PARTS: dict[str, dict[str, Any]] = json.loads((OLD / "parts.json").read_text())
RECORDS: dict[str, Any] = json.loads((OLD / "records.json").read_text())
# The command line of the runs in finished/ and interrupted/, without what is free at a resume.
SETTINGS = (
    *("debug=smoke", "model=local", "model.path=teacher", "data=text", "data.path=text.txt", "data.val_tokens=1024"),
    *("trainer=cpu", "trainer.precision=32-true", "run.checkpoint_every=2", "block.ratio=0.5"),
    *("schedule.lr=3e-3", "schedule.lr_new=3e-3", "loss=[kl,hidden]", "schedule.rescore=true", "block.ridge=0.01"),
    *("trainer.progress=false", "cache_dir=cache", "run.efficiency_seconds=0", "run.samples=0"),
)
# A process knows nothing of iskd when transformers runs the code beside the weights, or imports it first.
WAYS = {
    "trust_remote_code": "models = [AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)]",
    "import iskd": "import iskd; models = [iskd.load(folder), AutoModelForCausalLM.from_pretrained(folder)]",
}


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, as the working directory that their relative paths speak of."""
    monkeypatch.chdir(shutil.copytree(OLD, tmp_path / "old"))
    return tmp_path / "old"


def places(folder: Path) -> dict[str, str]:
    """Variables that keep all that is written in a folder."""
    return {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf"), "ISKD_CACHE": str(folder / "cache")}


def python(*arguments: str, cwd: Path) -> None:
    environment = {**os.environ, **places(cwd)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]


# ---- exports and records ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_an_export_says_what_it_said(way: str, tmp_path: Path) -> None:
    said = load_file(OLD / "logits.safetensors")
    save_file({"ids": said["ids"]}, tmp_path / "ids.safetensors")
    code = f"""
import sys
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, ids = sys.argv[1], load_file("ids.safetensors")["ids"]
assert "iskd" not in sys.modules
{WAYS[way]}
logits = {{str(i): model(ids).logits.detach().contiguous() for i, model in enumerate(models)}}
save_file(logits, "now.safetensors")
slow = {{"hydra", "lightning", "matplotlib", "torchmetrics", "wandb"}} & sys.modules.keys()
assert not slow, f"nobody who opens a student waits for {{slow}}"
"""
    python("-c", code, str(OLD / "export"), cwd=tmp_path)
    for logits in load_file(tmp_path / "now.safetensors").values():
        torch.testing.assert_close(logits, said["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_opens(name: str) -> None:
    """The student it describes is built; what blocks and mixers are called is part of every export."""
    record = record_from_json(RECORDS[name])
    student = tiny("llama", hidden=24, heads=6, kv_heads=3, mlp=96)
    surgery.apply(student, Record(4), record.edits)
    assert torch.isfinite(student(windows(1, 8)).logits).all()


# ---- the folder of a finished run ------------------------------------------------------------------------------------


def test_a_run_has_its_page(old: Path) -> None:
    files = read_run(old / "finished")
    assert not files.faults
    assert files.evaluation is not None
    assert files.efficiency is not None
    for asked, page in ((["finished"], "finished/report.html"), (["finished", "interrupted"], "runs.html")):
        report.main(parse(["report", *asked]).values)
        assert "405.4" in (old / page).read_text(), "the perplexity of the student"


def test_a_student_finds_its_teacher(old: Path) -> None:
    assert verify(old / "finished", timed=False).passed
    found = generate(old / "finished", None, "Ten times 3", max_new_tokens=4, device="cpu")
    assert found.notes == (), "its own teacher"
    asked = ("eval=quick", "eval.tasks=[piqa]", "eval.data_dir=items", "eval.limit=10", "trainer=cpu")
    config, _ = compose_config(["model=local", "model.path=finished", "trainer.precision=32-true", *asked])
    (old / "out").mkdir()
    scores = evaluate.evaluation(config, old / "out").evaluation
    assert scores is not None
    (before,) = (
        t for t in json.loads((OLD / "finished" / "evaluation.json").read_text())["tasks"] if t["task"] == "piqa"
    )
    (score,) = scores.tasks
    assert (score.student, score.teacher, score.items) == (before["student"], before["teacher"], before["items"])


# ---- configs and resumed runs ----------------------------------------------------------------------------------------


def nodes(values: Any) -> Iterator[dict[str, Any]]:
    """Every dict with a `_target_`."""
    if isinstance(values, dict) and "_target_" in values:
        yield values
    for item in values.values() if isinstance(values, dict) else values if isinstance(values, list) else ():
        yield from nodes(item)


@pytest.mark.parametrize("name", [name for name in PARTS if "_target_" in json.dumps(PARTS[name])])
def test_a_part_of_a_saved_config_takes_every_key_it_had(name: str) -> None:
    found = list(nodes(renamed(PARTS[name])))
    assert found
    for node in found:
        part: Any = get_object(node["_target_"])
        assert isinstance(part, type), "what a resumed config may name"
        taken = {*inspect.signature(getattr(part, "from_block", part)).parameters, *defaults(node["_target_"])}
        if not node["_target_"].startswith("lightning."):  # they pass some on
            assert node.keys() <= {*taken, "_target_", "weight"}, node["_target_"]


def test_renamed_parts_are_where_the_table_says() -> None:
    for now in RENAMED.values():
        assert isinstance(get_object(now), type), now
        assert not now.startswith(("iskd.blocks.", "iskd.mixers.")), "records name them too"


def numbers(stage: StageResult) -> dict[str, Any]:
    """What a stage did and found, without the time it took."""
    rows = {name: getattr(stage, name) for name in ("ppl", "kl", "top1", "retention")}
    rows |= {f"before {name}": value for name, value in (stage.before or {}).items()}
    return rows | {f"score {layer}": value for layer, value in (stage.scores or {}).items()}


def test_an_interrupted_run_goes_on_to_the_same_end(old: Path) -> None:
    """By the command that started it; a run of today says the same numbers of what no fit has touched."""
    for where in ("resume=interrupted", "hydra.run.dir=today"):
        run = Command(("train", *SETTINGS, "export=false", where), old, old / "output.log", places(old))
        code, output = run.end()
        assert code == 0, output[-2000:]
    resumed, today, before = (read_stages(old / name) for name in ("interrupted", "today", "finished"))
    for stage, *others in zip(before, resumed, today, strict=True):
        for other in others:
            for name in ("index", "name", "edits", "params", "block_params", "tokens", "status"):
                assert getattr(other, name) == getattr(stage, name)
            assert len(other.events) == len(stage.events)
            assert numbers(other).keys() == numbers(stage).keys()
            if not stage.edits:  # blocks are fitted in another way than they were then
                assert numbers(other) == pytest.approx(numbers(stage), rel=1e-3, abs=1e-4)  # processors differ
    runs, problems = read_runs([old / "interrupted", old / "today"])
    assert not problems
    parts = {key: {run.config.get(key) for run in runs} for key in differing([run.config for run in runs])}
    assert {key for key in parts if "_target_" in key} <= {"eval._target_"}, "only one of them was asked"
