"""Two processes on one machine give what one process gives, through every edit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from iskd import checkpoint
from tests.test_cli import SMOKE, train

pytestmark = pytest.mark.slow


def test_two_processes_equal_one(tmp_path: Path) -> None:
    common = (*SMOKE, "trainer.precision=32-true", "block=bottleneck", "edit.fit=false", "schedule.layers=[2,1]")
    train(*common, "data.batch_size=4", f"hydra.run.dir={tmp_path}/one", cwd=tmp_path)
    ddp = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.progress=false", "data.batch_size=2")
    train(*common, *ddp, f"hydra.run.dir={tmp_path}/two", cwd=tmp_path)
    ends = [checkpoint.newest(tmp_path / name / "checkpoints") for name in ("one", "two")]
    one, two = (load_file(end / "student.safetensors") for end in ends if end is not None)
    assert one.keys() == two.keys()
    worst = max((one[name] - two[name]).abs().max().item() for name in one)
    assert worst < 5e-5, worst
    states = [checkpoint.read_state(end) for end in ends if end is not None]
    assert states[0].record == states[1].record
    for a, b in zip(states[0].results, states[1].results, strict=True):
        assert (a.tokens, a.params) == (b.tokens, b.params)
        assert a.kl == pytest.approx(b.kl, abs=1e-5)
        assert torch.isfinite(torch.tensor(b.ppl))
