"""What a release is held together by: one version, and workflows that call what developers call."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from iskd.system.version import __version__

ROOT = Path(__file__).parents[2]


def test_there_is_one_version() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert declared is not None
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert declared[1] == __version__ == cited["version"]
    assert cited["license"] == "Apache-2.0"


def test_workflows_call_what_developers_call() -> None:
    for file in sorted((ROOT / ".github").rglob("*.yml")):
        assert yaml.safe_load(file.read_text(encoding="utf-8"))["name"], file
    ci = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    calls = [step["run"] for job in ci["jobs"].values() for step in job["steps"] if "run" in step]
    assert calls == [".ci/run", "make test-floor"]
    supported = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert ci["jobs"]["test"]["strategy"]["matrix"]["python"] == supported


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("make") is None, reason="make on Linux")
@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there the default build is the right one")
@pytest.mark.parametrize(
    ("given", "flags"),
    [([], ""), (["TORCH_CPU_INDEX=X"], "-i X"), (["TORCH_CPU_INDEX=X", "PIP_TORCH_FLAGS=--pre"], "--pre")],
)
def test_an_index_of_cpu_builds_is_for_torch_alone(given: list[str], flags: str) -> None:
    own = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("MAKE", "MFLAGS", "PIP_TORCH", "TORCH", "ISKD"))
    }
    command = ["make", "-n", "-B", "setup", *given]
    said = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True).stdout
    installs = [line.split("--no-input")[1].split() for line in said.splitlines() if "--no-input" in line]
    assert [words for words in installs if "'torch==" in words[-1]] == [[*flags.split(), installs[1][-1]]]
    assert sum(flags != "" and flags.split()[0] in words for words in installs) == (flags != "")
