"""`make test-floor`: with the lowest versions that pyproject.toml allows, students open and a run goes through.

`python -m tests.floor` in an environment with the package alone, `python -m tests.floor train` in one with its extra.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("hydra", "lightning", "matplotlib", "omegaconf", "rich", "torchmetrics", "wandb")


def unreached(extra: str) -> list[str]:
    """Lowest versions of pyproject.toml that are not those installed here: nobody can have them together."""
    found = []
    for line in importlib.metadata.requires("iskd") or ():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
            continue
        lowest = max((Version(each.version) for each in wanted.specifier if each.operator == ">="), default=None)
        here = Version(importlib.metadata.version(wanted.name)).public
        if lowest is not None and Version(here) != lowest:
            found.append(f"{wanted.name}>={lowest}, installed is {here}")
    return found


def main(extra: str) -> None:
    """Raise AssertionError where a floor is not true."""
    assert not (wrong := unreached(extra)), "; ".join(wrong)
    import iskd

    if not extra:
        assert not [name for name in HEAVY if name in sys.modules], "a student needs less than a run"
    model = iskd.load(ROOT / "tests" / "files" / "0.1" / "export")
    print(f"iskd.load: {sum(p.numel() for p in model.parameters()):,} parameters")
    if extra:
        with tempfile.TemporaryDirectory() as place:
            run = [sys.executable, "train.py", "debug=smoke", "export.code=bundle", f"hydra.run.dir={place}/run"]
            subprocess.run(run, cwd=ROOT, check=True)
            subprocess.run([sys.executable, "-m", "iskd", "verify", f"{place}/run"], cwd=ROOT, check=True)
    print(f"floors hold: {sys.version.split()[0]}, {extra or 'the package alone'}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
