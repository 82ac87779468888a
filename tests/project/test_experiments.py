"""The scripts of experiments/: every command line of theirs is one that the programs take."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from iskd.commands.compose import compose_config

ROOT = Path(__file__).resolve().parents[2]
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
