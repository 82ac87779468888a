"""What `pip install` puts on a user's machine: every room, conf/, the harness's tasks, py.typed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def packed() -> dict[str, Path]:
    """Files of a checkout by the name they have in the wheel."""
    files = [path for folder in ("iskd", "conf") for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
    files = [path for path in files if "__pycache__" not in path.parts]
    names = {path: path.relative_to(ROOT).as_posix() for path in files}
    return {f"iskd/{name}" if name.startswith("conf/") else name: path for path, name in names.items()}


def test_the_wheel_leaves_out_what_git_ignores() -> None:
    """The builder reads .gitignore: a room called runs/ or data/ under a wrong pattern would be missing."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = "\n".join(path.relative_to(ROOT).as_posix() for path in packed().values())
    found = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"], input=names, cwd=ROOT, capture_output=True, text=True
    )
    assert found.stdout == ""


@pytest.mark.slow
def test_the_wheel_holds_every_file(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = packed()
    assert held == expected.keys()
    assert {"iskd/py.typed", "iskd/conf/config.yaml", "iskd/evaluation/harness_tasks/piqa.yaml"} <= held
