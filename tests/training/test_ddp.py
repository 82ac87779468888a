"""Two processes as users start them: by the script itself and by torchrun, DDP and FSDP2, end as one process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from iskd.training.state import checkpoint, checkpoint_files
from tests.commands.test_cli import ROOT, SMOKE, train
from tests.runs import largest_difference

pytestmark = pytest.mark.slow
COMMON = (*SMOKE, "trainer.precision=32-true", "block=bottleneck", "edit.fit=false", "schedule.layers=[2,1]")
TWO = ("trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processes")
    train(*COMMON, "data.batch_size=4", f"hydra.run.dir={path}/one", cwd=path)
    return path


def compare(folder: Path, name: str) -> None:
    ends = [checkpoint_files.newest(folder / run / "checkpoints") for run in ("one", name)]
    one, two = (load_file(end / "student.safetensors") for end in ends if end is not None)
    assert largest_difference(one, two) < 5e-5
    states = [checkpoint.read_state(end) for end in ends if end is not None]
    assert states[0].record == states[1].record
    for a, b in zip(states[0].results, states[1].results, strict=True):
        assert (a.tokens, a.params) == (b.tokens, b.params)
        assert a.kl == pytest.approx(b.kl, abs=1e-5)
        assert torch.isfinite(torch.tensor(b.ppl))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_script_starts_its_own_processes(strategy: str, folder: Path) -> None:
    train(*COMMON, f"trainer={strategy}", *TWO, f"hydra.run.dir={folder}/{strategy}", cwd=folder)
    compare(folder, strategy)


def test_torchrun_and_a_fresh_process_for_every_edit(folder: Path) -> None:
    """Under torchrun the processes end with code 75 before an edit, and the same command goes on."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    values = ("trainer=fsdp", *TWO, "schedule.restart_at_edit=true", "resume=auto", f"hydra.run.dir={folder}/torchrun")
    env = {**os.environ, "ISKD_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    for start in range(3):
        done = subprocess.run(
            [*command, str(ROOT / "train.py"), *COMMON, *values],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert (done.returncode == 0) == (start == 2), done.stderr[-3000:]
        assert start == 2 or "saved before an edit: start again with resume=" in done.stderr
    compare(folder, "torchrun")


def test_a_sweep_with_a_fresh_process_for_every_edit(folder: Path) -> None:
    """Every job in a process of its own, which is replaced at every edit; the sweep's own process only waits."""
    values = ("-m", *COMMON, "schedule.restart_at_edit=true", "data.batch_size=4", f"hydra.sweep.dir={folder}/sweep")
    train(*values, "seed=0,1", cwd=folder)
    ends = [checkpoint_files.newest(folder / run / "checkpoints") for run in ("one", "sweep/0")]
    one, restarted = (load_file(end / "student.safetensors") for end in ends if end is not None)
    assert largest_difference(one, restarted) == 0
    assert (folder / "sweep" / "1" / "record.json").is_file()
