"""Where iskd is installed students open, the command line answers and a run goes through, exported and verified.

`make test-floor`, with the lowest versions that pyproject.toml allows: `python -m tests.floor` in an environment with
the package alone, `python -m tests.floor train` in one with its extra. `make test-pythons`, with the newest versions
for each interpreter: `python -m tests.floor train any`.
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


def iskd_runs(*words: str) -> None:
    """A command of iskd in a process of its own, with a code of 0."""
    subprocess.run([sys.executable, "-m", "iskd", *words], cwd=ROOT, check=True)


def main(extra: str, versions: str) -> None:
    """Raise an error where the installation does not work, with `versions` "lowest" also where a floor is not true."""
    assert versions in ("lowest", "any"), versions
    assert versions == "any" or not (wrong := unreached(extra)), "; ".join(wrong)
    import iskd

    if not extra:
        assert not [name for name in HEAVY if name in sys.modules], "a student needs less than a run"
    model = iskd.load(ROOT / "tests" / "files" / "0.1" / "export")
    print(f"iskd.load: {sum(p.numel() for p in model.parameters()):,} parameters")
    if extra:
        with tempfile.TemporaryDirectory() as place:
            iskd_runs("--version")
            iskd_runs("train", "--help")
            iskd_runs("train", "debug=smoke", "export.code=bundle", f"hydra.run.dir={place}/run")
            iskd_runs("verify", f"{place}/run")
    here = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    print(f"installed and runs: Python {sys.version.split()[0]}, {here}, {extra or 'the package alone'}")


if __name__ == "__main__":
    main(*(sys.argv[1:] + ["", "lowest"][len(sys.argv) - 1 :]))
