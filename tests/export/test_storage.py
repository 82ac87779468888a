"""Laws of the type in which weights are stored: what is verified is what is stored, what it cost is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import iskd
from iskd.commands.arguments import arguments
from iskd.commands.build.at_the_end import export_of
from iskd.commands.compose import compose_config
from iskd.commands.resume import resumed
from iskd.commands.values.config import as_meant, plain
from iskd.evaluation import quantize
from iskd.evaluation.text import TextWindows
from iskd.export.probe import ask, differences, probe_from_json
from iskd.export.storage import STORED
from iskd.export.write import export
from iskd.models import surgery
from iskd.models.weights import cast_parameters, served, stored_dtype
from iskd.plan import Convert, Edit, Record, Remove, Replace, Spec
from iskd.plan.run_files import FACTS
from tests.factories import mixer_specs, tiny, windows

OWN: list[Edit] = [
    Convert(0, mixer_specs()["mamba2"]),
    Replace(1, Spec("iskd.blocks.slim.Slim", {"ratio": 0.5})),
    Convert(2, mixer_specs()["gated_deltanet"]),
]


def student(*edits: Edit, **config: Any) -> tuple[PreTrainedModel, Record, PreTrainedModel]:
    teacher, model = tiny("llama", **config), tiny("llama", **config)
    return model, surgery.apply(model, Record(4), edits), teacher


@pytest.mark.parametrize("edits", [[Remove(1)], OWN], ids=["native", "own"])
@pytest.mark.parametrize("kind", STORED)
@torch.no_grad()
def test_a_stored_type_is_what_loads_and_what_was_verified(kind: str, edits: list[Edit], tmp_path: Path) -> None:
    model, record, teacher = student(*edits, tie_word_embeddings=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folder = export(
        tmp_path / "model", model, record, teacher.config, verify=False, dtype=STORED[kind], text=windows(4, 32)
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), (
        "the student is as it was"
    )
    assert stored_dtype(folder) == json.loads((folder / "config.json").read_text())["dtype"] == kind
    facts = json.loads((folder / FACTS).read_text())
    said, card = facts["storage"], (folder / "README.md").read_text()
    assert f"The weights are stored in {kind}." in card
    assert (said["rounded"] > 0) == (said["kl"] > 0) == ("KL from the student before" in card) == (kind != "float32")
    assert said["kl"] < 1e-3
    for name, value in load_file(folder / "model.safetensors").items():
        assert value.dtype == (torch.float32 if name.endswith("A_log") else STORED[kind]), name
    wide: Any = iskd.load(folder)
    assert wide.dtype == torch.float32
    assert not differences(probe_from_json(facts["probe"], folder), ask(wide))[0]
    as_others: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    for narrow in (iskd.load(folder, dtype="auto"), as_others):
        assert narrow.dtype == narrow.config.dtype == STORED[kind]
        assert narrow.get_output_embeddings().weight is narrow.get_input_embeddings().weight
        assert all(buffer.dtype == torch.float32 for name, buffer in narrow.named_buffers() if "inv_freq" in name)
        torch.testing.assert_close(narrow(windows()).logits.float(), wide(windows()).logits, atol=2e-2, rtol=2e-2)
    assert iskd.load(folder, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("mixer", mixer_specs())
@torch.no_grad()
def test_every_mixer_runs_in_half_precision_with_what_it_keeps(mixer: str) -> None:
    model, _, _ = student(Convert(1, mixer_specs()[mixer]))
    said = model(windows()).logits
    cast_parameters(model, torch.bfloat16)
    narrow: Any = model
    torch.testing.assert_close(narrow(windows()).logits.float(), said, atol=3e-2, rtol=3e-2)
    assert narrow.generate(windows()[:, :4], max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 6)


@torch.no_grad()
def test_what_is_measured_in_half_precision_is_what_is_loaded_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary frequencies and decays keep their bits: by cost and in fewer bits a student is the one that is served."""
    model, _, _ = student(Convert(1, mixer_specs()["gated_deltanet"]))
    before = {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    kept = {name for name in before if "inv_freq" in name or name.endswith("A_log")}
    assert len(kept) >= 2
    assert served(model, None) is served(model, torch.float32) is model
    monkeypatch.setattr(quantize, "serving_dtype", lambda _device: torch.bfloat16)
    measured: list[Any] = [served(model, torch.bfloat16)]

    def packed_as(_kind: str, plain: Any) -> Any:
        measured.append(plain)
        raise ValueError("not here")

    monkeypatch.setattr(quantize, "packed_as", packed_as)
    ids = windows()
    quantize.quantized(model, TextWindows(ids, ids[:, 1:], 9), ["int8"], batch_tokens=64, step=lambda *_: None)
    assert len(measured) == 2
    for half in measured:
        for name, value in (*half.named_parameters(), *half.named_buffers()):
            assert torch.equal(value, before[name].to(value.dtype)), name
            assert value.dtype == (torch.float32 if name in kept else torch.bfloat16), name
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@torch.no_grad()
def test_a_weight_beyond_the_type_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    model, record, teacher = student(Remove(1))
    model.get_parameter("model.layers.2.mlp.up_proj.weight")[3, 3] = 70_000.0
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj\.weight holds 70000, .*export\.dtype=bfloat16 or"):
        export(tmp_path / "model", model, record, teacher.config, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def asked_type(value: Any) -> str | None:
    """The type that an export is asked for; None = there is none."""
    found = export_of(value)
    return None if found is None else found["dtype"]


def test_the_key_takes_what_it_took_and_a_type() -> None:
    for overrides, kind in (
        ("export=hf", "auto"),
        ("export=true export.dtype=float16", "float16"),
        ("export.dtype=float16 export=true", "float16"),
        ("export=false", None),
    ):
        config, _ = compose_config(["debug=smoke", *overrides.split()], Path("unused"))
        assert asked_type(plain(as_meant(config).export)) == kind
    assert arguments(["export=true", "seed=1"]) == ["export={}", "seed=1"], "on the command line too"
    assert export_of(True) == export_of({}) == {"dtype": "auto", "code": "iskd"}
    assert export_of({"code": "bundle"}) == {"dtype": "auto", "code": "bundle"}
    with pytest.raises(ValueError, match=r"export\.code=none: choose one of iskd, bundle"):
        export_of({"code": "none"})
    with pytest.raises(ValueError, match=r"export\.dtype=int8: choose one of auto, float32"):
        export_of({"dtype": "int8"})
    with pytest.raises(ValueError, match=r"export has no key 'format': drop it, or use dtype or code"):
        export_of({"dtype": "auto", "format": "gguf"})


def test_a_resumed_run_may_choose_again(tmp_path: Path) -> None:
    """Also a run of a version that knew true and false alone."""
    half: dict[str, str] = {"dtype": "float16"}
    cases: dict[str, list[tuple[Any, str | None]]] = {
        "export=true": [(False, "auto"), (half, "float16")],
        "export.dtype=bfloat16": [(True, "bfloat16"), (False, "bfloat16"), (half, "bfloat16")],
        "seed=0": [("hf", "auto"), (half, "float16"), (False, None)],
        "export=false": [(half, None), (True, None)],
    }
    for override, expected in cases.items():
        asked = ["debug=smoke", f"resume={tmp_path}", override]
        config, _ = compose_config(asked, tmp_path)
        for saved, kind in expected:
            values = plain(config) | {"export": saved}
            (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
            assert asked_type(plain(resumed(config, asked).export)) == kind, (override, saved)
