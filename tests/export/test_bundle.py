"""Students that need nothing but torch and transformers: the code beside their weights, for every block and mixer."""

from __future__ import annotations

import os
import re
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
from iskd.plan import Convert, Edit, Record, Remove, Replace, Spec
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
model = AutoModelForCausalLM.from_pretrained("owner/name", trust_remote_code=True, device_map="cpu")
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
    assert set(re.findall(r"^(?:import|from) (\w+)", code, re.M)) <= {*PACKAGES, *sys.stdlib_module_names}


def test_a_student_keeps_its_code_wherever_it_is_saved(both: tuple[Path, Answers, Answers]) -> None:
    """By iskd too, which runs none of it; from a hub and from shards it says the same."""
    root, here, found = both
    for name in ("hub", "again"):
        assert torch.equal(found[name][0], here["gla"][0])
        assert torch.equal(found[name][1], here["gla"][1])
    assert len(list((root / "again").glob("*.safetensors"))) > 1
    loaded = iskd.load(root / "again")
    assert torch.equal(loaded(windows()).logits, here["gla"][0])
    loaded.save_pretrained(root / "third")
    codes = [(root / folder / CODE).read_text() for folder in ("student_gla", "again", "third")]
    assert codes[0] == codes[1] == codes[2]


def test_verify_runs_the_code_that_iskd_writes_and_no_other(tmp_path: Path) -> None:
    model, record, teacher = student("linear")
    folder = export(tmp_path / "model", model, record, teacher.config, code="bundle")
    assert "modeling_iskd.py` needs torch and transformers" in (folder / "README.md").read_text()
    found = verify(folder, timed=False)
    assert found.passed
    assert any("opens it where iskd is not installed" in note for note in found.notes)
    file, ran = folder / CODE, tmp_path / "ran"
    file.write_text(file.read_text() + f"\nPath({str(ran)!r}).touch()\n")
    found = verify(folder, timed=False)
    assert not ran.exists()
    assert any("changed after it was exported" in problem for problem in found.problems)
    assert any("was not run" in note for note in found.notes)


def test_what_cannot_be_bundled_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of somebody's is followed like iskd's own; one that needs another package is refused."""
    monkeypatch.setattr("iskd.plan.edits._ALLOWED", ["iskd.blocks.", "theirs."])
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "plain.py").write_text("from .half import half as halved\nclass Mine: value = halved(2)\n")
    (tmp_path / "theirs" / "half.py").write_text("from math import floor\ndef half(x): return floor(x / 2)\n")
    (tmp_path / "theirs" / "other.py").write_text("import numpy as np\nclass Mine: value = np.zeros(2)\n")
    found = bundled(Record(2, (Replace(0, Spec("theirs.plain.Mine", {})),)), "0")
    assert "def half(x): return floor(x / 2)" in found
    assert "value = half(2)" in found
    with pytest.raises(ValueError, match=r"theirs\.other needs numpy, .* export\.code=iskd"):
        bundled(Record(2, (Replace(0, Spec("theirs.other.Mine", {})),)), "0")
