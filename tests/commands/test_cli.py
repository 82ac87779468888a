"""The commands as users run them, in processes of their own: kill -9 and resume, a sweep, the plan, the report."""

from __future__ import annotations

import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import load_file

from iskd.__main__ import main
from iskd.commands import verify
from iskd.commands.train import COMMAND
from iskd.training.state import checkpoint_files

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ("debug=smoke", "export=false", "run.checkpoint_every=2", "trainer.progress=false", "schedule.tokens=8192")


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
    folder = tmp_path / 'it\'s é, a=b (1) [0] {x} $y ~z; & "q" \\ #'
    folder.mkdir()
    return folder


def test_killed_run_resumes_bit_for_bit(place: Path) -> None:
    """Below a folder of any name, until its student is verified."""
    train(*SMOKE, f"hydra.run.dir={place}/whole", cwd=place)
    env = {**os.environ, "ISKD_CACHE": str(place / "cache"), "PYTHONPATH": str(ROOT)}
    victim = subprocess.Popen(
        command(*SMOKE, f"hydra.run.dir={place}/killed"), cwd=place, env=env, stdout=subprocess.DEVNULL
    )
    places, deadline = place / "killed" / "checkpoints", time.monotonic() + 120
    while victim.poll() is None and time.monotonic() < deadline and len(list(places.glob("00000[3-9]-*"))) < 1:
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    train(f"resume={place}/killed", "export=true", cwd=place)
    ends = [checkpoint_files.newest(place / name / "checkpoints") for name in ("whole", "killed")]
    for file in ("student.safetensors", "optimizer.safetensors"):
        whole, killed = (load_file(end / file) for end in ends if end is not None)
        assert whole.keys() == killed.keys()
        assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert verify.run([f"{place}/killed", "--no-timing"]) == 0
    assert (place / "cache" / "data").is_dir()


def test_sweep_plan_and_report(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = train(
        "-m", *SMOKE, "schedule.count=1,2", "schedule.tokens=1024", f"hydra.sweep.dir={place}/a [sweep]", cwd=place
    )
    assert "replace" in out
    jobs = sorted(path.parent for path in (place / "a [sweep]").rglob("stages.json"))
    assert len(jobs) == 2
    assert sorted(len(json.loads((job / "record.json").read_text())["edits"]) for job in jobs) == [1, 2]
    (jobs[0] / "report.html").unlink()
    monkeypatch.setattr(sys, "argv", ["iskd"])
    monkeypatch.setenv(COMMAND, "")
    main(["report", str(jobs[0])])
    assert (jobs[0] / "report.html").is_file()
    main(["report", str(place)])
    linked = re.findall(r'<a href="([^"]+/report.html)"', (place / "runs.html").read_text(encoding="utf-8"))
    assert sorted(place / unquote(html.unescape(link)) for link in linked) == [job / "report.html" for job in jobs]
