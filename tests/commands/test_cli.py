"""The commands as users run them, in processes of their own: a sweep, the plan, the report."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from iskd.__main__ import main
from iskd.system.version import COMMAND

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ("debug=smoke", "export=false", "run.checkpoint_every=2", "trainer.progress=false", "schedule.tokens=8192")
NAME = 'it\'s é, a=b (1) [0] {x} $y ~z; & "q" \\ #'
"""A name that people give, and more than they do."""


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *arguments]


def train(*arguments: str, cwd: Path) -> str:
    env = {**os.environ, "ISKD_CACHE": str(cwd / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command(*arguments), cwd=cwd, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder of a name that people give, and more than they do."""
    folder = tmp_path / NAME
    folder.mkdir()
    return folder


def test_sweep_plan_and_report(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = train(
        "-m", *SMOKE, "schedule.count=1,2", "schedule.tokens=1024", f"hydra.sweep.dir={place}/a [/b] [x]", cwd=place
    )
    assert "replace" in out
    jobs = sorted(path.parent for path in (place / "a [/b] [x]").rglob("stages.json"))
    assert len(jobs) == 2
    assert sorted(len(json.loads((job / "record.json").read_text())["edits"]) for job in jobs) == [1, 2]
    assert all(f"report: {job}/report.html" in out for job in jobs)
    told = json.loads((jobs[0] / "environment.json").read_text())
    assert told["commands"][0].startswith("iskd train -m debug=smoke export=false ")
    assert told["versions"].keys() == {"iskd", "python", "torch", "transformers", "lightning", "cuda"}
    page = (jobs[0] / "report.html").read_text(encoding="utf-8")
    assert "iskd train -m debug=smoke" in page
    assert "95 %: " in page
    assert html.escape(told["host"]) in page
    (jobs[0] / "report.html").unlink()
    monkeypatch.setattr(sys, "argv", ["iskd"])
    monkeypatch.setenv(COMMAND, "")
    main(["report", str(jobs[0])])
    assert (jobs[0] / "report.html").is_file()
    main(["report", str(place)])
    linked = re.findall(r'<a href="([^"]+/report.html)"', (place / "runs.html").read_text(encoding="utf-8"))
    assert sorted(place / unquote(html.unescape(link)) for link in linked) == [job / "report.html" for job in jobs]
