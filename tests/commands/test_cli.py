"""The commands as users run them, in processes of their own: kill -9 and resume, a sweep, the plan, the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

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


def test_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    train(*SMOKE, f"hydra.run.dir={tmp_path}/whole", cwd=tmp_path)
    env = {**os.environ, "ISKD_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    victim = subprocess.Popen(
        command(*SMOKE, f"hydra.run.dir={tmp_path}/killed"), cwd=tmp_path, env=env, stdout=subprocess.DEVNULL
    )
    places, deadline = tmp_path / "killed" / "checkpoints", time.monotonic() + 120
    while victim.poll() is None and time.monotonic() < deadline and len(list(places.glob("00000[3-9]-*"))) < 1:
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    train(f"resume={tmp_path}/killed", cwd=tmp_path)
    ends = [checkpoint_files.newest(tmp_path / name / "checkpoints") for name in ("whole", "killed")]
    for file in ("student.safetensors", "optimizer.safetensors"):
        whole, killed = (load_file(end / file) for end in ends if end is not None)
        assert whole.keys() == killed.keys()
        assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_sweep_plan_and_report(tmp_path: Path) -> None:
    out = train(
        "-m", *SMOKE, "schedule.count=1,2", "schedule.tokens=1024", f"hydra.sweep.dir={tmp_path}/sweep", cwd=tmp_path
    )
    assert "replace" in out
    jobs = sorted(path.parent for path in (tmp_path / "sweep").rglob("stages.json"))
    assert len(jobs) == 2
    assert sorted(len(json.loads((job / "record.json").read_text())["edits"]) for job in jobs) == [1, 2]
    (jobs[0] / "report.html").unlink()
    code = "import sys; sys.argv = ['iskd', 'report', sys.argv[1]]; from iskd.__main__ import main; main()"
    subprocess.run([sys.executable, "-c", code, str(jobs[0])], cwd=ROOT, check=True, timeout=120)
    assert (jobs[0] / "report.html").is_file()
