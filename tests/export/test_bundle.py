"""Students that need nothing but torch and transformers: the code beside their weights, for every block and mixer."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import iskd
from iskd.export import verify
from iskd.export.bundle import PACKAGES, bundled
from iskd.export.student import write
from iskd.export.student_files import CODE
from iskd.export.write import export
from iskd.models import surgery
from iskd.plan import Convert, Edit, Record, Remove, Replace
from iskd.plan.edits import Merge
from iskd.system.version import __version__
from tests.factories import block_specs, louder, mixer_specs, tiny, windows

PARTS: dict[str, tuple[str, list[Edit]]] = {
    **{name: ("llama", [Replace(1, spec, seed=3), Remove(2)]) for name, spec in block_specs().items()},
    **{name: ("qwen3", [Convert(0, spec, seed=3), Merge(2), Convert(3, spec)]) for name, spec in mixer_specs().items()},
    "both_in_gpt2": ("gpt2", [Replace(0, block_specs()["slim"]), Convert(0, mixer_specs()["gla"]), Remove(3)]),
    "both_in_phi": ("phi", [Replace(1, block_specs()["bottleneck"]), Convert(0, mixer_specs()["mamba"])]),
}
# Neither iskd nor what it is made with: what is not installed beside torch and transformers cannot be imported.
CHILD = """
import sys, torch
for name in ("iskd", "pydantic", "lightning", "hydra", "omegaconf", "wandb", "fla"):
    sys.modules[name] = None
from pathlib import Path
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
root, found = Path(sys.argv[1]), {}
ids = torch.load(root / "ids.pt", weights_only=True)

@torch.no_grad()
def answers(model):
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    return model(input_ids=ids).logits, model.generate(ids[:, :5], **greedy)

for folder in sorted(root.glob("student_*")):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    found[folder.name] = answers(model)
model = AutoModelForCausalLM.from_pretrained("owner/name", trust_remote_code=True, dtype=torch.float32, device_map="cpu")
found["hub"] = answers(model)
model.save_pretrained(root / "again", max_shard_size="20KB")
found["again"] = answers(AutoModelForCausalLM.from_pretrained(root / "again", trust_remote_code=True))
torch.save(found, root / "found.pt")
"""
COMMIT = "c0ffee" + "0" * 34
Answers = dict[str, tuple[Tensor, Tensor]]


def student(name: str) -> tuple[PreTrainedModel, Record, PreTrainedModel]:
    family, edits = PARTS[name]
    model, teacher = tiny(family), tiny(family)
    record = surgery.apply(model, Record(4), edits)
    return (louder(model) if name in mixer_specs() else model), record, teacher


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answers, Answers]:
    """The folder of all students, what they say here, and what they say in one process without iskd."""
    root = tmp_path_factory.mktemp("bundled")
    here: Answers = {}
    torch.save(windows(), root / "ids.pt")
    for name in PARTS:
        model, record, teacher = student(name)
        assert not write(root / f"student_{name}", model, record, teacher.config, code="bundle")
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            here[name] = model(windows()).logits, model.generate(windows()[:, :5], **options)  # type: ignore[operator]
    # a student in the cache of a hub, as a download leaves it
    hub = root / "hub" / "models--owner--name"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text(COMMIT)
    model, record, teacher = student("gla")
    write(hub / "snapshots" / COMMIT, model, record, teacher.config, code="bundle", max_shard_bytes=20_000)
    places = {"HF_HUB_CACHE": str(root / "hub"), "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-W", "error", "-c", CHILD, str(root)]
    subprocess.run(run, check=True, timeout=300, env={**os.environ, **places}, cwd=root)
    return root, here, torch.load(root / "found.pt", weights_only=True)


@pytest.mark.parametrize("name", PARTS)
def test_every_part_says_the_same_where_iskd_is_not(name: str, both: tuple[Path, Answers, Answers]) -> None:
    root, here, found = both
    logits, text = found[f"student_{name}"]
    assert torch.equal(logits, here[name][0])
    assert torch.equal(text, here[name][1])
    code = (root / f"student_{name}" / CODE).read_text()
    assert code.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert f"iskd {__version__}" in code
    imports = [node for node in ast.parse(code).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    assert {name.partition(".")[0] for name in names} <= {*PACKAGES, *sys.stdlib_module_names}
