"""Saved students in a process that has never seen them: the same logits and the same text, for every mixer."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from iskd.export.student import write
from iskd.models import surgery
from iskd.plan import Convert, Record, Remove
from tests.documents import ROOT
from tests.factories import louder, mixer_specs, mixer_variants, tiny, windows

SPECS = {**mixer_specs(), **mixer_variants()}
# imports iskd and nothing of the tests; `answers` of both processes are made by these lines
ANSWERS = """
import sys, torch, iskd
from pathlib import Path
from safetensors.torch import load_file, save_file

@torch.no_grad()
def answers(model, ids):
    text = model.generate(
        ids[:, :5], attention_mask=torch.ones_like(ids[:, :5]), max_new_tokens=7, min_new_tokens=7, do_sample=False
    )
    return {"logits": model(input_ids=ids).logits, "text": text}
"""
FRESH = """
torch.set_num_threads(1)
folder = Path(sys.argv[1])
ids = load_file(folder / "ids.safetensors")["ids"]
found = {}
for name in sys.argv[2:]:
    found |= {f"{name}.{kind}": value for kind, value in answers(iskd.load(folder / name), ids).items()}
save_file(found, folder / "fresh.safetensors")
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits and greedy cached text of every saved student, by `mixer.kind`: here, and in one fresh process."""
    folder = tmp_path_factory.mktemp("saved")
    here: dict[str, Tensor] = {}
    namespace: dict[str, Any] = {}
    exec(ANSWERS, namespace)
    ids = windows()
    save_file({"ids": ids}, folder / "ids.safetensors")
    for name, spec in SPECS.items():
        model, teacher = tiny("qwen3"), tiny("qwen3")
        edits = [Convert(0, spec, seed=3), Remove(2), Convert(3, spec, seed=4)]
        record = surgery.apply(model, Record(4), edits)
        write(folder / name, louder(model), record, teacher.config)
        here |= {f"{name}.{kind}": value for kind, value in namespace["answers"](model, ids).items()}
    subprocess.run([sys.executable, "-c", ANSWERS + FRESH, str(folder), *SPECS], cwd=ROOT, check=True, timeout=600)
    return here, load_file(folder / "fresh.safetensors")


@pytest.mark.parametrize("name", SPECS)
def test_a_fresh_process_reads_the_same_student(name: str, both: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    here, fresh = both
    for kind in ("logits", "text"):
        assert torch.equal(fresh[f"{name}.{kind}"], here[f"{name}.{kind}"]), kind
    assert here[f"{name}.logits"].isfinite().all()
    assert here[f"{name}.text"].shape == (2, 12)


def test_students_with_different_mixers_say_different_things(
    both: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> None:
    """Or the comparison above would compare one model with itself."""
    logits = [both[1][f"{name}.logits"] for name in SPECS]
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in pairwise(logits))
