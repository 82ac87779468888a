"""What a release is held together by: one version, and workflows that call what developers call."""

from __future__ import annotations

import re
from pathlib import Path

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
