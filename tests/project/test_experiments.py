"""Scripts of experiments: their command lines compose, and tables come out of scores of several days."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from iskd.commands.compose import compose_config
from iskd.evaluation.tasks.task_items import read_sentences
from iskd.plan import Record

ROOT = Path(__file__).resolve().parents[2]
CONVERSION = ROOT / "experiments" / "subquadratic-smollm2"
SCRIPTS = sorted((ROOT / "experiments").glob("*/run.sh"))
# In place of Python: notes the arguments of a run, and lets small sums of a script be done.
RECORDER = """#!/usr/bin/env bash
case "$1" in
  train.py) shift
    for word; do case "$word" in hydra.run.dir=*) mkdir -p "${word#*=}" ;; esac; done
    printf '%s\\0' "$@" END >> "$RECORDED" ;;
  -c) exec "$REAL_PYTHON" "$@" ;;
esac
"""
SIX = ("lambada", "winogrande", "arc_easy", "arc_challenge", "piqa", "hellaswag")


def lines_of(folder: Path, **variables: str) -> list[list[str]]:
    """Overrides of every run that run.sh would start."""
    stub = folder / "python"
    stub.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$*" >> "$LINES_TO"\n')
    stub.chmod(0o755)
    listed = {"LINES_TO": str(folder / "lines"), "OUT": str(folder / "out"), "SCORES": str(folder / "scores")}
    environment = {**os.environ, "DATA": "texts", "PYTHON": str(stub), **listed, **variables}
    subprocess.run(["bash", str(CONVERSION / "run.sh")], env=environment, check=True, timeout=60)
    lines = (folder / "lines").read_text().splitlines()
    return [line.split()[1:] for line in lines if line.startswith("train.py")]


def test_every_row_of_the_conversion_table_composes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All mixers by default, those with a score skipped; equal tokens for all that train, none for hybrids."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "gla-copy.json").write_text("{}")
    rows = {
        line[-2 if "plan_only=true" in line else -1].rpartition("/")[2]: line for line in lines_of(tmp_path, PLAN="1")
    }
    mixers = [file.stem for file in (ROOT / "conf" / "mixer").glob("*.yaml")]
    trained = {f"{mixer}-{technique}" for mixer in mixers for technique in ("copy", "local", "all")} - {"gla-copy"}
    hybrids = {f"hybrid-{choice}" for choice in ("restore", "gates", "every_fourth", "every_second")}
    mixed = {"hybrid_sliding-restore", "hybrid_gated_deltanet-restore"}
    assert rows.keys() == trained | hybrids | mixed
    [fourth] = [word for word in rows["hybrid-every_fourth"] if word.startswith("schedule.layers=")]
    assert fourth.count(",") + 1 == 30 - math.ceil(0.25 * 30), "it keeps as many as a share of a quarter"
    (tmp_path / "tiny").mkdir()
    [length] = {
        word for line in lines_of(tmp_path / "tiny", MODEL="tiny") for word in line if word.startswith("data.seq_len=")
    }
    assert int(length.partition("=")[2]) // 2 > 64, "windows of 64 tokens have to miss something, recall too"
    for name in (*sorted(hybrids | mixed), "mamba-copy", "mamba-local", "mamba-all"):
        overrides = [word for word in rows[name] if not word.startswith(("hydra.", "data.path"))]
        config, _ = compose_config([*overrides, "model=tiny"], tmp_path / name)
        assert config.schedule.tokens == (0 if name in hybrids else 8192)
        assert config.plan_only is True
        assert ("refit" in config and "local" in config.refit) == (name.endswith("-local") or name in mixed)
        keeps = {"hybrid-restore", "hybrid-gates"} | mixed
        assert (config.schedule.get("attention_share") == 0.25) == (name in keeps)
    (tmp_path / "lines").unlink()
    fewer = lines_of(tmp_path, TOKENS="32768", MIXERS="gla", HYBRIDS="")
    assert {line[-1].rpartition("/")[2] for line in fewer} == {
        *(f"gla-{technique}@32768" for technique in ("copy", "local", "all")),
        *(f"{name}@32768" for name in mixed),
    }


@pytest.mark.slow
def test_plans_of_the_conversion_table_are_made(tmp_path: Path) -> None:
    """The whole way with random weights, up to the plan."""
    for name in ("wikitext2/train", "wikitext2/valid", "tinystories/train"):
        file = tmp_path / "data" / f"{name}.txt.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(file, "wt") as stream:
            stream.writelines(f"Of cats, and what {name} said on day {day} .\n\n" for day in range(2000))
    chosen = {"MODEL": "tiny", "PLAN": "1", "MIXERS": "mamba", "HYBRIDS": "restore every_fourth", "TRAINER": "cpu"}
    places = {"DATA": str(tmp_path / "data"), "OUT": str(tmp_path / "out"), "ISKD_CACHE": str(tmp_path / "cache")}
    environment = {**os.environ, "PYTHON": sys.executable, **chosen, **places, "SCORES": str(tmp_path / "scores")}
    done = subprocess.run(
        ["bash", str(CONVERSION / "run.sh")], env=environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "scores").exists()


def test_the_conversion_table_is_made_of_scores(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Best first, what was asked alone; some of the items are held against the teacher's own, others are told."""
    kept = tmp_path / "scores"
    kept.mkdir()
    texts = {"kl": 0.0, "retention": 1.0, "ppl_wikitext": 20.0, "ppl_docstrings": 16.0, "lambada_nll": 3.0}
    whole = {**texts, "copy": [0.5], "recall_64": [1.0, 1.0], "recall_256": [1.0]}
    whole |= {task: [1.0, 0.0] for task in SIX}
    facts = {"layers": 30, "attention": 0, "params": 10, "tokens": 64, "seconds": 3}
    worse = {**whole, **facts, "retention": 0.7, "piqa": [0.0, 0.0], "recall_1024": [0.0]}
    halved = {**whole, **facts, "retention": 0.6, **{task: [0.5] for task in SIX}}
    looked = {name: whole[name] for name in ("kl", "ppl_wikitext", "ppl_docstrings", "recall_64", "recall_256")}
    cost = {"student_bytes": 2**20, "teacher_bytes": 2**22, "student_seconds": 0.5, "teacher_seconds": 1.0}
    found = {
        "teacher": whole,
        "gla-all": {**worse, "cost": {}},
        "window-copy": {**worse, "retention": 0.9, "cost": cost},
        "gla-local": halved,
        "gla-copy": {**looked, **facts, "retention": 0.5},
    }
    for name, row in found.items():
        (kept / f"{name}.json").write_text(json.dumps(row))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "table", "--scores", str(kept)])
    runpy.run_path(str(CONVERSION / "evaluate.py"), run_name="__main__")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    order = [["teacher", ""], ["window", "copy"], ["gla", "all"], ["gla", "local"], ["gla", "copy"]]
    assert [row[:2] for row in rows[2:]] == order
    assert rows[3][11:] == ["83.3", "100.0", "100.0", "0.0", "1.0", "25.0", "50.0"]
    assert rows[4][-3:] == ["", "", ""]
    assert rows[5][10:12] == ["50.0", "50.0"], "of the first item of each task, where the teacher has 1"
    assert rows[6][7:16] == ["", "", "", "", "", "100.0", "100.0", "", ""], "a look: no task, no cost"
    assert (tmp_path / "results.csv").read_text().count("\n") == 6
    (kept / "gla-all.json").write_text(json.dumps({**worse, "piqa": [1.0] * 3}))
    with pytest.raises(SystemExit, match=r"gla-all\.json was asked 3 items of piqa, teacher\.json 2"):
        runpy.run_path(str(CONVERSION / "evaluate.py"), run_name="__main__")
    runs = [tmp_path / name for name in ("gla-all", "gla-local", "gla-copy")]
    for run, kl in zip(runs, (0.3, 0.2, 0.1), strict=True):
        (run / "model").mkdir(parents=True)
        (run / "model" / "config.json").write_text("{}")
        row = json.loads((kept / f"{run.name}.json").read_text())
        (kept / f"{run.name}.json").write_text(json.dumps({**row, "kl": kl}))
    nearest = runpy.run_path(str(CONVERSION / "evaluate.py"))["nearest"]
    assert nearest(runs, kept) == runs[2]
    assert nearest(runs[:2], kept) is None, "asked everything already"
    (runs[2] / "model" / "config.json").unlink()
    assert nearest(runs, kept) is None, "its student is gone"


def test_one_student_of_two_sizes_is_scored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row is written for the other size too, with that one's limit; that of another choice or seed is not."""
    budget = ROOT / "experiments" / "budget-smollm2"
    monkeypatch.setattr(sys, "path", [*sys.path])
    evaluate = runpy.run_path(str(budget / "evaluate.py"))["again"]
    evaluate.__globals__["SCORES"] = tmp_path
    plan = {size: budget / "plans" / "width" / f"plan-params-{size}.json" for size in ("0.9", "0.8", "0.7")}
    (tmp_path / "width-0.8-1.json").write_text(json.dumps({"kl": 0.25, "predicted_kl": 9.0, "limits": {}}))
    (tmp_path / "slim-0.9-1.json").write_text(json.dumps({"kl": 0.5}))
    for name, size in {"width-0.9-1": "0.9", "width-0.9-untrained": "0.9", "width-0.7-1": "0.7"}.items():
        evaluate(name, plan[size])
    for method in ("slim", "mixed"):  # one choice
        (alike := tmp_path / "plans" / method).mkdir(parents=True)
        shutil.copy(budget / "plans" / "slim" / "plan-params-0.9.json", alike)
    evaluate("mixed-0.9-1", alike / "plan-params-0.9.json")
    written = ["mixed-0.9-1", "slim-0.9-1", "width-0.8-1", "width-0.9-1"]
    assert sorted(file.stem for file in tmp_path.glob("*.json")) == written
    assert json.loads((tmp_path / "mixed-0.9-1.json").read_text())["kl"] == 0.5, "it chose what slimming alone does"
    row, asked = json.loads((tmp_path / "width-0.9-1.json").read_text()), json.loads(plan["0.9"].read_text())
    assert row["kl"] == 0.25
    assert (row["limits"], row["predicted_kl"]) == (asked["limits"], asked["predicted_kl"])


def test_plans_of_a_comparison_are_of_one_size() -> None:
    """Those drawn by lot too: none is larger than was asked for."""
    files = sorted((ROOT / "experiments" / "budget-smollm2" / "plans").glob("*/plan-params-*.json"))
    assert files
    for file in files:
        plan = json.loads(file.read_text())
        assert plan["costs"]["params"] <= plan["limits"]["params"], file


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.parent.name)
def test_every_run_composes(script: Path, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(RECORDER)
    fake.chmod(0o755)
    recorded = tmp_path / "recorded"
    given = {"DATA": str(tmp_path), "SEEDS": "0", "OUT": str(tmp_path / "out"), "PYTHON": str(fake)}
    # every run anew, whatever has its scores already
    copied = tmp_path / "experiments" / script.parent.name / "run.sh"
    copied.parent.mkdir(parents=True)
    copied.write_bytes(script.read_bytes())
    if (plans := script.parent / "plans").is_dir():
        (copied.parent / "plans").symlink_to(plans)
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    environment = {**os.environ, **given, "RECORDED": str(recorded), "REAL_PYTHON": sys.executable}
    done = subprocess.run(["bash", str(copied)], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = recorded.read_text().split("END\0")[:-1]
    assert lines
    for line in lines:
        words = line.split("\0")[:-1]
        if words[0] == "-m":  # a sweep: the first of every list of parts
            words = [re.sub(r"^(mixer=[^,]+),.*", r"\1", word) for word in words[1:] if "hydra.sweep" not in word]
        compose_config(words, tmp_path)


def test_gaps_in_stories_have_ten_nouns_to_choose_from(tmp_path: Path) -> None:
    """Of the story itself, behind two sentences at least, and two gaps in one at most, so that no story decides."""
    names = ["cat", "dog", "hat", "car", "bed", "box", "tree", "park", "ball", "bird"]
    stories = [
        "\n".join([f"Once upon a time there was Ann {day} .", *(f"On that day she saw the {name}." for name in names)])
        for day in range(5)
    ]
    one_before = "Once upon a time there was " + ", ".join(f"the {name}" for name in names)
    stories.insert(0, f"{one_before}. On that day she saw the cat. So it was.")
    (tmp_path / "data" / "tinystories").mkdir(parents=True)
    with gzip.open(tmp_path / "data" / "tinystories" / "valid.txt.gz", "wt") as stream:
        stream.write("\n\n".join(stories))
    command = [sys.executable, str(ROOT / "experiments" / "papers-smollm2" / "gaps.py")]
    for count, told in (("10", ""), ("11", "the stories give 10 items of 11")):
        out = tmp_path / count
        done = subprocess.run(
            [*command, str(tmp_path / "data"), str(out), "--items", count], capture_output=True, text=True
        )
        assert told in done.stderr
        assert (done.returncode != 0) == bool(told)
    assert (tmp_path / "10" / "tinystories" / "valid.txt.gz").is_file()
    items = read_sentences(tmp_path / "10")
    assert len(items) == 10
    assert all(len(item.continuations) == 10 for item in items)
    assert len({item.id.rpartition("-")[0] for item in items}) == 5


def test_scripts_have_types(tmp_path: Path) -> None:
    """A name of a module that something else takes, or a keyword that is gone, would show after an hour of training."""
    for script in [*(ROOT / "experiments").glob("*.py"), *(ROOT / "experiments").glob("*/*.py")]:
        apart = script.name in ("evaluate.py", "run.py")  # several are called so
        (tmp_path / (f"{script.parent.name}_{script.name}".replace("-", "_") if apart else script.name)).write_bytes(
            script.read_bytes()
        )
    command = [sys.executable, "-m", "mypy", *map(str, tmp_path.glob("*.py"))]  # of what the check has typed its cache
    environment = {**os.environ, "MYPYPATH": "."}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_method_of_the_refits_table_is_one() -> None:
    """Edits that leave as many layers as the depth says, on text that training does not see."""
    grid = runpy.run_path(str(ROOT / "experiments" / "refit-smollm2" / "methods.py"))
    source = (ROOT / "experiments" / "refit-smollm2" / "run.py").read_text()
    calibrated = int(re.findall(r"^SKIPPED = ([\d_]+)", source, re.MULTILINE)[0])
    for depth, layers in grid["LAYERS"].items():
        methods = grid["methods"](depth)
        assert len(methods) >= 10
        for name, method in methods.items():
            gone = method.layers or layers
            left = Record(30).extended(method.edits(gone)).layers
            gaps = sum(layer - 1 not in gone for layer in gone)
            assert len(left) == depth + (gaps if name.startswith("linear") else 0)
            assert all(refit.tokens + refit.held_tokens <= calibrated for refit in method.refits)
            assert method.recipe.step % method.recipe.window == 0
