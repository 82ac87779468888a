"""`iskd evaluate` on folders: student and teacher are found, items that chose layers stay out, files are written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from iskd.commands import evaluate
from iskd.commands.compose import compose_config
from iskd.commands.evaluate import Found
from iskd.commands.generate import generate
from iskd.data import TextData, TextFiles
from iskd.evaluation.tasks.task_items import COPY_POOL, copy_items
from iskd.export import export
from iskd.models import surgery
from iskd.models.tokenizers import byte_tokenizer
from iskd.models.weights import weights_sha256
from iskd.plan import Record, Remove
from iskd.system import files
from iskd.system.files import hash_files
from iskd.teacher import Loaded, TeacherSpec, load_teacher
from tests.factories import tiny
from tests.run_folders import write_run

EVAL = ("eval=quick", "eval.tasks=[copy]", "eval.limit=4", "eval.resamples=20", "trainer=cpu")


def teacher_of(folder: Path, seed: int = 0) -> Loaded:
    """A teacher on disk."""
    tiny("llama", vocab=257, context=256, seed=seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return load_teacher(TeacherSpec("mine", path=str(folder)))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run's folder whose layers were chosen by the first lists of `copy`."""
    loaded = teacher_of(tmp_path / "teacher")
    folder = write_run(tmp_path / "run", finished=False)
    model = {"_target_": "iskd.teacher.load.TeacherSpec", "name": "mine", "path": str(tmp_path / "teacher")}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    (folder / "environment.json").write_text(json.dumps({"teacher": loaded.source}))
    chosen = [item.sha256 for item in copy_items(COPY_POOL - 3)]
    (folder / "data.json").write_text(json.dumps({"selection_sha256": {"copy": chosen}}))
    student = tiny("llama", vocab=257, context=256)
    record = surgery.apply(student, Record(4), [Remove(1)])
    export(
        folder / "model", student, record, loaded.model.config, byte_tokenizer(),
        verify=False, teacher=loaded.source, run_dir=folder,
    )  # fmt: skip
    return folder


def asked(model: Path, out: Path, *overrides: str) -> Found:
    config, _ = compose_config(["model=local", f"model.path={model}", *EVAL, *overrides])
    out.mkdir(exist_ok=True)
    return evaluate.evaluation(config, out)


@pytest.mark.parametrize("inner", ["", "model"])
def test_a_run_is_evaluated_beside_its_own_teacher(inner: str, run_dir: Path, tmp_path: Path) -> None:
    found = asked(run_dir / inner, tmp_path / "out")
    assert found.evaluation is not None
    (score,) = found.evaluation.tasks
    assert score.items == 3, "the others chose layers"
    assert score.teacher is not None
    models = found.evaluation.models
    assert (models["student"]["layers"], models["teacher"]["layers"]) == (3, 4)
    assert models["student"]["sha256"] == weights_sha256(run_dir / "model")
    assert models["teacher"]["sha256"] == weights_sha256(tmp_path / "teacher")
    written = [tmp_path / "out" / "evaluation.json", run_dir / "evaluation.json"]
    assert found.files == [*written, run_dir / "report.html", run_dir / "model" / "README.md"]
    assert len({file.read_text() for file in written}) == 1
    first = written[1].read_text()
    assert asked(run_dir / inner, tmp_path / "out").files[-3] == written[1], "the same again puts nothing aside"
    other = asked(run_dir / inner, tmp_path / "out", "eval.limit=2")
    (aside,) = run_dir.glob("evaluation-*.json")
    assert aside in other.files
    assert aside.read_text() == first != written[1].read_text()
    assert str(tmp_path) not in written[0].read_text()
    assert "Scores by task" in (run_dir / "report.html").read_text()
    assert "## Scores" in (run_dir / "model" / "README.md").read_text()


def test_a_student_is_compared_with_a_student(run_dir: Path, tmp_path: Path) -> None:
    found = asked(run_dir, tmp_path / "out", f"reference={run_dir}")
    assert found.evaluation is not None
    (score,) = found.evaluation.tasks
    assert score.student == score.teacher
    assert found.evaluation.models["student"]["sha256"] == found.evaluation.models["teacher"]["sha256"]
    assert not (run_dir / "evaluation.json").exists(), "it is not the run's teacher"


def test_a_student_of_a_stage_is_asked_as_its_run_asked_it(run_dir: Path, tmp_path: Path) -> None:
    """Without the items that layers were chosen by, framed as there, beside the run's teacher; the run's page stays."""
    told = json.loads((run_dir / "data.json").read_text())
    (run_dir / "data.json").write_text(json.dumps({**told, "bos": "bare"}))
    last = asked(run_dir, tmp_path / "out").evaluation
    (run_dir / "students").mkdir()
    (run_dir / "model").rename(run_dir / "students" / "001")
    (run_dir / "evaluation.json").unlink()
    kept = asked(run_dir / "students" / "001", tmp_path / "out")
    assert kept.evaluation is not None
    assert last is not None
    assert kept.evaluation.to_json() == last.to_json()
    assert kept.evaluation.settings["excluded"] == COPY_POOL - 3
    assert kept.files == [tmp_path / "out" / "evaluation.json"]
    assert not (run_dir / "evaluation.json").exists()


def test_items_that_chose_the_layers_of_either_student_are_left_out(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    (other / "data.json").write_text(json.dumps({"selection_sha256": {}}))
    for model, reference in ((run_dir, other), (other, run_dir)):
        found = asked(model, tmp_path / "out", f"reference={reference}").evaluation
        assert found is not None
        assert [task.items for task in found.tasks] == [3]


def test_a_run_without_a_student_says_how_to_get_it(run_dir: Path, tmp_path: Path) -> None:
    shutil.rmtree(run_dir / "model")
    for look in (lambda: asked(run_dir, tmp_path / "out"), lambda: generate(run_dir, "Once")):
        with pytest.raises(ValueError, match=rf"wrote no student \(export=false\): resume={run_dir} export=true"):
            look()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        generate(tmp_path, "Once")


def test_a_run_is_not_reported_on_what_it_was_trained_on(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "seen.txt").write_text("What was seen in training. " * 40)
    (tmp_path / "new.txt").write_text("What was not seen. " * 40)
    data = {"content": f"{hash_files([tmp_path / 'seen.txt'])}-0-0", "selection_sha256": {}}
    (run_dir / "data.json").write_text(json.dumps(data))
    for text in ("seen.txt", "*.txt"):
        with pytest.raises(ValueError, match="text that it never sees"):
            asked(run_dir, tmp_path / "out", f"eval.text={tmp_path}/{text}")
    found = asked(run_dir, tmp_path / "out", f"eval.text={tmp_path}/new.txt")
    assert found.evaluation is not None


def test_nor_on_passages_of_it(run_dir: Path, tmp_path: Path) -> None:
    """Other files with the same text, and that of a run before."""
    text = "\n\n".join(f"{number} ships were seen by Tom, and {number * number} by Ann." for number in range(300))
    (tmp_path / "seen.txt").write_text(text)
    (tmp_path / "part.txt").write_text("Now. " + text[1000:3000])
    coding = {"seq_len": 32, "cache_dir": tmp_path / "cache" / "data", "calibration_fraction": 0.3}
    cache = TextData(
        TextFiles(str(tmp_path / "seen.txt"), val_path=str(tmp_path / "part.txt")), byte_tokenizer(), **coding
    )
    before = {"content": "0-0-0", "cache": cache.manifest()["cache"]}
    for data in (before, {"content": "1-1-1", "before": [before]}):
        (run_dir / "data.json").write_text(json.dumps({"selection_sha256": {}, **data}))
        with pytest.raises(ValueError, match=r"9\d\.\d % of the passages of eval.text"):
            asked(run_dir, tmp_path / "out", f"cache_dir={tmp_path}/cache", f"eval.text={tmp_path}/part.txt")
    (tmp_path / "new.txt").write_text("What was not seen. " * 40)
    found = asked(run_dir, tmp_path / "out", f"cache_dir={tmp_path}/cache", f"eval.text={tmp_path}/new.txt")
    assert found.evaluation is not None


def test_another_reference_says_nothing_about_the_run(run_dir: Path, tmp_path: Path) -> None:
    other = teacher_of(tmp_path / "other", seed=1)
    found = asked(run_dir, tmp_path / "out", f"reference={tmp_path}/other")
    assert found.evaluation is not None
    assert found.evaluation.models["teacher"]["sha256"] == other.source["sha256"]
    assert found.files == [tmp_path / "out" / "evaluation.json"]
    assert not (run_dir / "evaluation.json").exists()


def test_the_same_teacher_elsewhere_is_still_the_runs(run_dir: Path, tmp_path: Path) -> None:
    """As after iskd.compress, whose teacher was in memory: `reference` says where it is."""
    (tmp_path / "teacher").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"no folder here .*reference=DIR_OR_NAME"):
        asked(run_dir, tmp_path / "out")
    assert run_dir / "evaluation.json" in asked(run_dir, tmp_path / "out", f"reference={tmp_path}/moved").files


def test_any_model_is_evaluated_alone_or_beside_a_reference(run_dir: Path, tmp_path: Path) -> None:
    alone = asked(tmp_path / "teacher", tmp_path / "out")
    assert alone.evaluation is not None
    assert alone.evaluation.tasks[0].teacher is None
    assert alone.evaluation.tasks[0].items == 4
    assert alone.files == [tmp_path / "out" / "evaluation.json"]
    both = asked(tmp_path / "teacher", tmp_path / "out", f"reference={tmp_path}/teacher")
    assert both.evaluation is not None
    assert both.evaluation.tasks[0].difference is not None
    assert both.evaluation.tasks[0].difference.value == 0


def test_efficiency_is_measured_again_without_tasks(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = evaluate.efficiency.measure
    monkeypatch.setattr(
        evaluate.efficiency, "measure", lambda *a, **o: measure(*a, **o, contexts=[8], decode_tokens=1, repeats=1)
    )
    found = asked(run_dir, tmp_path / "out", "eval.tasks=[]", "eval.efficiency_seconds=1")
    assert found.evaluation is None
    assert found.efficiency is not None
    assert found.efficiency.models.keys() == {"teacher", "student"}
    assert run_dir / "efficiency.json" in found.files
    assert "## Efficiency" in (run_dir / "model" / "README.md").read_text()
    with pytest.raises(ValueError, match="nothing to evaluate"):
        asked(run_dir, tmp_path / "out", "eval.tasks=[]")


def test_a_result_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = files.write_whole(tmp_path / "evaluation.json", "old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(file, "new")
    assert file.read_text() == "old"
