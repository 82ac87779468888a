"""Exports: what is written loads elsewhere with the same numbers, and what was tampered with does not load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import iskd
from iskd import export as export_module
from iskd import surgery
from iskd.export import export, write
from iskd.plan import Record, Remove, Replace, Spec
from iskd.tokenizer import byte_tokenizer
from tests.factories import FAMILIES, block_specs, tiny, windows


def student(family: str, *edits: Remove | Replace) -> tuple[PreTrainedModel, Record, PreTrainedModel]:
    teacher = tiny(family)
    model = tiny(family)
    return model, surgery.apply(model, Record(4), edits), teacher


def saved(tmp_path: Path, family: str = "llama") -> tuple[Path, PreTrainedModel]:
    model, record, teacher = student(family, Replace(1, Spec("iskd.blocks.slim.Slim", {"ratio": 0.5})))
    write(tmp_path / "model", model, record, teacher.config)
    return tmp_path / "model", model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", sorted(block_specs()))
def test_every_block_in_every_family_reloads_exactly(family: str, block: str, tmp_path: Path) -> None:
    model, record, teacher = student(
        family, Replace(0, block_specs()[block], seed=3), Remove(2), Replace(3, block_specs()[block])
    )
    write(tmp_path, model, record, teacher.config)
    ids = windows()
    loaded = iskd.load(tmp_path)
    assert type(loaded).__mro__[2] is type(model), "a loaded student is the teacher's own class"
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_removals_alone_are_saved_as_the_teachers_own_architecture(family: str, tmp_path: Path) -> None:
    model, record, teacher = student(family, Remove(1), Remove(2))
    write(tmp_path, model, record, teacher.config)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == teacher.config.model_type
    ids = windows()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.num_hidden_layers == 2
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-6)


def test_native_export_loads_where_iskd_is_not(tmp_path: Path) -> None:
    """A fresh interpreter that cannot import iskd; the tokenizer comes along."""
    model, record, teacher = student("llama", Remove(1))
    export(tmp_path / "model", model, record, teacher.config, byte_tokenizer(), verify=False)
    ids = windows()
    torch.save(ids, tmp_path / "ids.pt")
    code = (
        "import sys, torch\nsys.modules['iskd'] = None\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r}).eval()\n"
        f"AutoTokenizer.from_pretrained({str(tmp_path / 'model')!r})\n"
        f"ids = torch.load({str(tmp_path / 'ids.pt')!r}, weights_only=True)\n"
        f"torch.save(m(ids).logits.detach(), {str(tmp_path / 'out.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    with torch.no_grad():
        assert torch.allclose(torch.load(tmp_path / "out.pt", weights_only=True), model(ids).logits, atol=1e-6)


def test_export_is_reopened_in_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, record, teacher = student("llama", Replace(1, Spec("iskd.blocks.slim.Slim", {"ratio": 0.5})))
    target = export(tmp_path / "model", model, record, teacher.config)
    assert sorted(path.name for path in target.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "record.json",
    ]
    text = "".join(path.read_text() for path in target.glob("*.json"))
    assert str(Path.home()) not in text
    assert "_name_or_path" not in text
    before = (target / "model.safetensors").read_bytes()
    original = export_module.model_tensors
    monkeypatch.setattr(export_module, "model_tensors", lambda m: {k: v + 0.1 for k, v in original(m).items()})
    with pytest.raises(RuntimeError, match="other logits"):
        export(target, model, record, teacher.config)
    assert (target / "model.safetensors").read_bytes() == before, "a failed export leaves the earlier one"


def test_saving_a_loaded_student_keeps_its_record(tmp_path: Path) -> None:
    folder, model = saved(tmp_path)
    loaded = iskd.load(folder)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(windows()).logits, model(windows()).logits)


def test_loading_options_are_honoured_or_refused(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="device_map"):
        AutoModelForCausalLM.from_pretrained(folder, device_map="auto")


def test_record_outside_the_allow_list_is_refused(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    data = json.loads((folder / "config.json").read_text())
    data["record"]["edits"][0]["block"]["target"] = "os.system"
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"'os\.system', which is outside the allow-list"):
        iskd.load(folder)


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "truncated", "gone"])
def test_weights_that_do_not_fit_are_refused(damage: str, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if "down_proj" in key)
    if damage == "missing":
        tensors.pop(name)
    elif damage == "unknown":
        tensors["extra"] = torch.zeros(2)
    elif damage == "shape":
        tensors[name] = tensors[name][:, :2].contiguous()
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "gone":
        file.unlink()
    else:
        save_file(tensors, file)
    message = {"shape": "has shape", "truncated": "cannot be read", "gone": "cannot be read"}.get(
        damage, f"is {damage}"
    )
    with pytest.raises(ValueError, match=message):
        iskd.load(folder)


def test_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a model directory: config\.json is missing"):
        iskd.load(tmp_path)
