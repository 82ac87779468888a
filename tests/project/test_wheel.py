"""What `pip install` puts on a user's machine: every room, conf/, the harness's tasks, py.typed."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import types
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


def test_the_description_of_a_package_has_no_link_into_a_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a home named links lead there, without one they are words; what is hidden in the README is not there."""
    hook = types.ModuleType("hatchling.metadata.plugin.interface")
    hook.MetadataHookInterface = object  # type: ignore[attr-defined]
    for name in ("hatchling", "hatchling.metadata", "hatchling.metadata.plugin"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, hook.__name__, hook)
    described = runpy.run_path(str(ROOT / "docs" / "metadata.py"))["described"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for home in ("", "https://example.org/iskd"):
        said = described(text, home, "v1")
        targets = re.findall(r"\]\(([^)]+)\)", said)
        assert all("://" in target or target.startswith("#") for target in targets)
        assert "<!-- test:" not in said
        assert (f"{home}/raw/v1/docs/example-report/report.png" in targets) == bool(home)
        assert (f"{home}/blob/v1/docs/after.md" in targets) == bool(home)


def test_a_student_opens_without_what_a_run_needs(tmp_path: Path) -> None:
    """And the commands say which extra brings it."""
    missing = ("hydra", "omegaconf", "lightning", "matplotlib", "rich", "torchmetrics", "wandb", "datasets")
    code = (
        f"import sys\nfor name in {missing}: sys.modules[name] = None\n"
        f"import iskd\nassert iskd.load({str(ROOT / 'tests' / 'files' / '0.1' / 'export')!r}).config.vocab_size\n"
        "import importlib.util\nimportlib.util.find_spec = lambda name: None\n"
        "try: iskd.compress\nexcept ImportError as error: print(error)\n"
        "from iskd.__main__ import main\n"
        "try: main(['verify', 'somewhere'])\nexcept SystemExit as end: print(end.code)\nmain(['--help'])"
    )
    places = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=places)
    assert found.returncode == 0, found.stderr
    assert "pip install 'iskd[train]'" in found.stdout
    assert "error: the commands of iskd need" in found.stderr
    assert "\n2\n" in found.stdout
    assert "examples:" in found.stdout


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
