"""Sweeps whose process, or whose job's own process, is killed; the same command with resume=auto goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

from iskd.plan.run_files import CHECKPOINTS, LOCK_FILE, METRICS_FILE, RECORD_FILE, STAGES_FILE
from iskd.system.files import file_sha256
from iskd.training.state import checkpoint_files
from tests.runs import largest_difference, metric_rows

ROOT = Path(__file__).resolve().parents[1]
JOBS = ("0", "1", "2")
SWEEP = ("-m", "debug=smoke", "run.checkpoint_every=2", "trainer.progress=false", "schedule.tokens=2048")
SWEEP += ("seed=0,1,2", "resume=auto", "export=false", "run.efficiency_seconds=0")  # each would start a process more
PATIENCE_S = 1_200.0
"""For one sweep: with `schedule.restart_at_edit` a dozen processes, one after the other, each with its imports."""


def start(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """The sweep of three seeds into a folder, the first time or again."""
    env = {**os.environ, "ISKD_CACHE": str(folder.parent / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "train.py"), *SWEEP, f"hydra.sweep.dir={folder}", *more]
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder.parent, env=env, stdout=log, stderr=log)


def contents(job: Path) -> dict[str, str]:
    """Digests of what a finished job made: the files of its checkpoints, its stages and its metrics."""
    files = [*(job / CHECKPOINTS).rglob("*.safetensors"), job / STAGES_FILE, job / METRICS_FILE]
    return {str(path.relative_to(job)): file_sha256(path) for path in sorted(files)}


def table(folder: Path, trials: int, seed: int) -> str:
    """One row per process that was killed."""
    draw = random.Random(seed)
    assert start(folder / "whole").wait(PATIENCE_S) == 0, (folder / "whole.log").read_text()[-3000:]
    found = dict[str, list[tuple[bool, bool, bool, float]]]()
    for number in range(trials):
        who = ("the sweep", "a job of its own process")[number % 2]
        found.setdefault(who, []).append(_trial(folder, f"trial{number}", draw.choice(JOBS), own=number % 2 == 1))
        print(who, found[who][-1], flush=True)
    rows = ["| killed | trials | every job once | finished jobs untouched | same metrics | weights |", "|---" * 6 + "|"]
    for who, of in found.items():
        sums = [sum(trial[column] for trial in of) for column in range(3)]
        rows.append(f"| {who} | {len(of)} | {' | '.join(map(str, sums))} | {max(trial[3] for trial in of):g} |")
    return "\n".join(rows)


def _trial(folder: Path, name: str, job: str, *, own: bool) -> tuple[bool, bool, bool, float]:
    """Kill while a job has its second checkpoint, start again; own: with `schedule.restart_at_edit`, its process."""
    sweep, whole = folder / name, folder / "whole"
    more = ("schedule.restart_at_edit=true",) if own else ()
    victim, deadline = start(sweep, *more), time.monotonic() + PATIENCE_S
    while len(list((sweep / job / CHECKPOINTS).glob("[0-9]*"))) < 2:
        assert victim.poll() is None, sweep.with_suffix(".log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if own:
        os.kill(_holder(sweep / job), signal.SIGKILL)
        assert victim.wait(PATIENCE_S) > 0, "a job that was killed fails its sweep"
    else:
        victim.kill()
        victim.wait()
    before = {each: contents(sweep / each) for each in JOBS if each != job and (sweep / each / RECORD_FILE).is_file()}
    assert start(sweep, *more).wait(PATIENCE_S) == 0, sweep.with_suffix(".log").read_text()[-3000:]
    once = sorted(path.name for path in sweep.iterdir() if path.is_dir() and path.name[0] != ".") == [*JOBS]
    once = once and all((sweep / each / RECORD_FILE).is_file() for each in JOBS)
    untouched = all(contents(sweep / each) == digests for each, digests in before.items())
    rows = all(metric_rows(sweep / each) == metric_rows(whole / each) for each in JOBS)
    return once, untouched, rows, max(_difference(sweep / each, whole / each) for each in JOBS)


def _holder(job: Path) -> int:
    """The process that runs in a job's folder."""
    return int(json.loads((job / LOCK_FILE).read_text())["process"])


def _difference(one: Path, other: Path) -> float:
    ends = [checkpoint_files.newest(job / CHECKPOINTS) for job in (one, other)]
    files = [load_file(end / "student.safetensors") for end in ends if end is not None]
    return largest_difference(*files)
