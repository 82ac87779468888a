"""What only a CUDA device can show; run with `make test-gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.test_cli import SMOKE, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_run_resume_and_export_on_a_gpu(tmp_path: Path) -> None:
    """bf16 autocast through edits and fits; the export is verified on the CPU."""
    train(
        *SMOKE[:1], *SMOKE[2:], "trainer=gpu", "trainer.progress=false", f"hydra.run.dir={tmp_path}/run", cwd=tmp_path
    )
    stages = json.loads((tmp_path / "run" / "stages.json").read_text())
    assert [stage["status"] for stage in stages] == ["kept"] * 3
    assert stages[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    before = (tmp_path / "run" / "record.json").read_text()
    train(f"resume={tmp_path}/run", cwd=tmp_path)
    assert (tmp_path / "run" / "record.json").read_text() == before
