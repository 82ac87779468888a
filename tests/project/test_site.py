"""The site: every page is in it, links lead on from there, the API is what faces name; quickstarts run.

`make docs`, which .ci/run calls, builds it and refuses any warning and any dead link; here is what needs no mkdocs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.site import api, notebook, pages, relinked
from tests.documents import ROOT

QUICKSTART = ROOT / "docs" / "quickstart"
NOTEBOOK = QUICKSTART / "notebook.ipynb"


def nav_of(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        for value in entry.values():
            yield from nav_of(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(nav_of(config["nav"]))
    folders = tuple(value for value in listed if value.endswith("/"))
    missing = {address for address in pages().values() if address not in listed and not address.startswith(folders)}
    assert not missing
    assert len(listed) == len(set(listed))
    assert {address for address in listed if not address.endswith("/")} <= set(pages().values())


@pytest.mark.parametrize(
    ("source", "target", "there"),
    [
        ("docs/tutorials/speed.md", "../../benchmarks/README.md#step", "../benchmarks/README.md#step"),
        ("docs/tutorials/compare.md", "../../experiments/iskd-smollm2", "../experiments/iskd-smollm2/README.md"),
        ("docs/quickstart/laptop.md", "notebook.ipynb", "notebook.md"),
        ("docs/quickstart/slurm.md", "iskd.sbatch", "iskd.sbatch"),
        ("README.md", "docs/example-report/report.png", "example-report/report.png"),
        ("README.md", "docs/tutorials/iskd.md", "tutorials/iskd.md"),
        ("README.md", "#results", "#results"),
        ("docs/parts.md", "../iskd/blocks/slim.py", "ELSEWHERE/iskd/blocks/slim.py"),
        ("docs/tutorials/tracking.md", "../wandb/workspace.py", "../ELSEWHERE/docs/wandb/workspace.py"),
        ("experiments/ild-smollm2/README.md", "curve.csv", "../../ELSEWHERE/experiments/ild-smollm2/curve.csv"),
        ("docs/data.md", "https://example.org/a.md", "https://example.org/a.md"),
    ],
)
def test_links_of_the_repository_are_links_of_the_site(source: str, target: str, there: str) -> None:
    assert relinked(f"a [b]({target}) c", source, pages(), lambda path: f"ELSEWHERE/{path}") == f"a [b]({there}) c"


def test_files_that_are_no_page_lead_to_the_projects_home_where_it_is_named() -> None:
    text = relinked("[x](../pyproject.toml)", "docs/data.md", pages(), lambda path: f"https://h/blob/v1/{path}")
    assert text == "[x](https://h/blob/v1/pyproject.toml)"


def test_the_api_shows_what_faces_name() -> None:
    import iskd
    import iskd.plan

    shown = dict(api())
    top = shown["api/iskd.md"]
    for name in set(iskd.__all__) - {"__version__"}:
        assert f".{name}\n" in top
    for name in iskd.plan.__all__:
        assert f".{name}\n" in shown["api/iskd.plan.md"]
    assert len(shown) > 20
    assert "::: iskd.commands.compress.compress\n" in top, "where it is written, so that a static reader finds it"


def test_a_notebook_becomes_a_page() -> None:
    page = notebook(NOTEBOOK.read_text(encoding="utf-8"))
    assert page.startswith("# Quickstart: a notebook\n")
    assert page.count("```python\n") == sum(
        cell["cell_type"] == "code" for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    )


def test_a_change_must_build_the_site_and_main_publishes_it() -> None:
    assert "step make docs" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "docs.yml").read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == ["make docs"]
    assert any("deploy-pages" in step.get("uses", "") for step in steps)


# ---- quickstarts that are files --------------------------------------------------------------------------------------


def test_the_notebook_is_kept_without_what_it_printed() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_in_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    read = nbformat.read(NOTEBOOK, as_version=4)
    done = nbclient.NotebookClient(read, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    check_notebook("".join(str(cell.get("outputs", "")) for cell in done.cells), tmp_path)


@pytest.mark.slow
def test_the_cells_of_the_notebook_run(tmp_path: Path) -> None:
    """Where there is no kernel: the same cells, one after the other, in a fresh Python."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    check_notebook(done.stdout, tmp_path)


def check_notebook(said: str, folder: Path) -> None:
    assert "8 new tokens" in said
    assert "('remove', " in said
    assert (folder / "runs" / "quickstart" / "report.html").is_file()


@pytest.mark.skipif(shutil.which("bash") is None, reason="a batch script")
@pytest.mark.parametrize(
    ("codes", "runs", "queued", "ends"),
    [([0], 1, False, 0), ([143], 1, True, 143), ([138], 1, True, 138), ([75, 75, 0], 3, False, 0), ([2], 1, False, 2),
     ([75, 143], 2, True, 143)],
)  # fmt: skip
def test_the_batch_script_goes_on_and_queues_itself(
    codes: list[int], runs: int, queued: bool, ends: int, tmp_path: Path
) -> None:
    """With stand-ins for srun, which ends with one code after the other, and scontrol."""
    (tmp_path / "codes").write_text("\n".join(map(str, codes)) + "\n")
    srun = 'echo "$@" >> calls\nread -r code < codes\nsed -i 1d codes\nexit "$code"\n'
    for name, body in (("srun", srun), ("scontrol", 'echo "$@" > queued\n')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(QUICKSTART / "iskd.sbatch"), "experiment=gpu_80gb", "data.path=my text"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (ends, "")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == runs
    assert len(set(calls)) == 1, "resume=auto makes the same words mean go on"
    assert (
        "trainer.devices=4 +trainer.num_nodes=2 resume=auto hydra.run.dir=runs/7 experiment=gpu_80gb data.path=my text"
        in calls[0]
    )
    assert (tmp_path / "queued").exists() == queued
    assert not queued or (tmp_path / "queued").read_text() == "requeue 7\n"
