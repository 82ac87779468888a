"""`iskd verify`: an export that is what it was passes, one that was changed fails, what is no model is named."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import iskd
from iskd.commands.verify import run
from iskd.export import verification
from iskd.export.loading import describe
from iskd.export.probe import Probe, Reopened, ask, differences, probe_from_json
from iskd.export.student_files import read_facts
from iskd.export.verification import verify
from iskd.export.write import export
from iskd.models import surgery
from iskd.models.tokenizers import byte_tokenizer
from iskd.plan import Convert, Edit, Record, Remove, Replace, Spec
from iskd.plan.run_files import FACTS
from tests.factories import tiny

SLIM, MIXER = Spec("iskd.blocks.slim.Slim", {"ratio": 0.5}), Spec("iskd.mixers.linear_attention.LinearAttention", {})
EDITS: dict[str, tuple[Edit, ...]] = {"native": (Remove(1),), "own": (Replace(1, SLIM), Remove(2), Convert(3, MIXER))}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native export in one file and another one in shards; both with a tokenizer."""
    root = tmp_path_factory.mktemp("exports")
    for name, edits in EDITS.items():
        model = tiny("llama", vocab=257)
        record = surgery.apply(model, Record(4), edits)
        size: dict[str, Any] = {"max_shard_bytes": 60_000} if name == "own" else {}
        size["dtype"] = torch.bfloat16 if name == "own" else torch.float16
        export(root / name, model, record, tiny("llama", vocab=257).config, byte_tokenizer(), verify=False, **size)
    return root


@pytest.fixture
def folder(exports: Path, tmp_path: Path) -> Path:
    """A copy of the sharded one, to be damaged."""
    return Path(shutil.copytree(exports / "own", tmp_path / "own"))


def test_exports_pass_in_a_clean_process(exports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loading, logits, text and times of both kinds, in words and as the exit code 0."""
    found = verify(exports / "native")
    assert found.passed
    assert found.kind == "native"
    assert found.largest_difference is not None
    assert found.tolerance is not None
    assert found.largest_difference <= found.tolerance
    assert found.text.startswith("Once upon a time")
    assert set(found.seconds) == {"load", "prefill", "decode"}
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert run([str(exports / "own")]) == 0
    printed = capsys.readouterr().out
    for said in (
        "model_type iskd",
        "Removed 1 of 4 layers: 2.",
        "Replaced the block of layer 1",
        "Converted",
        "passed",
    ):
        assert said in printed
    assert f"in {len(list((exports / 'own').glob('*.safetensors')))} weight files" in printed
    assert "tokens/s" in printed


def test_changed_weights_fail(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = next(file for file in sorted(folder.glob("*.safetensors")) if "lm_head.weight" in load_file(file))
    tensors = load_file(file)
    tensors["lm_head.weight"][5] += 0.1
    save_file(tensors, file, metadata={"format": "pt"})
    assert run([str(folder), "--no-timing"]) == 1
    printed = capsys.readouterr().out
    assert f"FAILED: {file.name} was changed after it was exported" in printed
    assert "FAILED: it gives other logits after loading" in printed


def nothing_opened(*_: Any, **__: Any) -> Reopened:
    raise AssertionError("a folder that cannot be right was opened")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("none", "is not a folder"),
        ("config", r"not a model directory: config\.json is missing"),
        ("shard", r"lacks 1 of \d+ weight files: model-00001-of-"),
        ("weights", "is missing beside it, or holds nothing"),
        (
            "truncated",
            r"model-00001-of-\d+\.safetensors cannot be read: it is cut short, [\d,]+ bytes where its header",
        ),
        ("header", r"it has 4 bytes and is no safetensors file"),
        ("garbage", "is no safetensors file"),
        ("version", r"unknown key 'from_the_future'.*written by iskd 9\.9 \(here .*transformers 99\.0"),
        ("list", r"export\.json must hold an object"),
        ("probe", r"export\.json: the probe cannot be read"),
        ("tokenizer", "has no tokenizer that can be loaded"),
    ],
)
def test_bad_folders_are_named(
    damage: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verification, "reopen", nothing_opened)
    first, config = sorted(folder.glob("*.safetensors"))[0], folder / "config.json"
    if damage == "none":
        shutil.rmtree(folder)
    elif damage == "config":
        config.unlink()
    elif damage == "shard":
        first.unlink()
    elif damage == "weights":
        for file in folder.glob("model*"):
            file.unlink()
    elif damage in ("truncated", "header", "garbage"):
        content = {"truncated": first.read_bytes()[:-10], "header": b"abcd", "garbage": b"\x02" + bytes(7) + b"[]"}
        first.write_bytes(content[damage])
    elif damage == "version":
        data = json.loads(config.read_text())
        data["record"]["edits"][0]["from_the_future"] = 1
        config.write_text(json.dumps({**data, "iskd_version": "9.9", "transformers_version": "99.0"}))
    elif damage == "list":
        (folder / FACTS).write_text("[1]")
    elif damage == "probe":
        (folder / FACTS).write_text(json.dumps({"probe": {"ids": [["x"]]}}))
    else:
        (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        verify(folder)
    assert run([str(folder)]) == 2
    assert "error: " in capsys.readouterr().err


def test_what_cannot_be_compared_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a record of the export there are no logits to compare with; a reference takes its place."""
    answer = Reopened(ask(iskd.load(folder)))

    def opened(*_: Any, **__: Any) -> Reopened:
        return answer

    monkeypatch.setattr(verification, "reopen", opened)
    assert verify(folder).passed
    reference = verify(folder, folder)
    assert reference.passed
    assert reference.largest_difference == 0
    (folder / FACTS).unlink()
    found = verify(folder)
    assert found.passed
    assert found.largest_difference is None
    assert "compared with nothing" in found.lines()[-2]
    answer = dataclasses.replace(answer, missing=["lm_head.weight"])
    assert verify(folder).problems == ("the weights lack lm_head.weight",)
    broken = dataclasses.replace(answer.probe, logsumexp=[[math.nan] * 16] * 2)
    answer = Reopened(broken)
    assert verify(folder).problems == ("its logits are not finite",)


def test_probe_survives_its_file_and_sees_every_logit(exports: Path) -> None:
    probe = probe_from_json(read_facts(exports / "native")["probe"], exports / FACTS)
    model: Any = iskd.load(exports / "native")
    again = ask(model)
    problems, largest = differences(probe, again)
    assert not problems
    assert largest <= probe.tolerance
    assert probe.ids == again.ids
    kept = set(probe.columns)
    with torch.no_grad():
        other = next(column for column in range(257) if column not in kept)
        model.get_output_embeddings().weight[other] *= 30
    assert differences(probe, ask(model))[0], "an entry of the vocabulary whose logit is not kept"
    nan = dataclasses.replace(probe, logits=[[math.nan] * len(row) for row in probe.logits])
    assert differences(probe, nan)[0]
    other_text = dataclasses.replace(probe, text=[[1] * len(row) for row in probe.text])
    assert bool(differences(probe, other_text)[0]) == (probe.margin > 2 * probe.tolerance)
    near = dataclasses.replace(probe, margin=probe.tolerance)
    assert not differences(near, other_text)[0], "a near-tie may fall the other way elsewhere"
    for change in ({"columns": [1]}, {"ids": []}, {"logsumexp": [[1.0]]}, {"margin": "x"}):
        with pytest.raises(ValueError, match="the probe"):
            probe_from_json({**probe.to_json(), **change}, exports / FACTS)


def test_description_reads_no_weights(exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Probe:
        raise AssertionError("weights were read")

    monkeypatch.setattr("iskd.export.loading.load_file", never)
    monkeypatch.setattr("iskd.export.loading.AutoModelForCausalLM.from_pretrained", never)
    assert [describe(exports / name).native for name in EDITS] == [True, False]
    assert describe(exports / "own").record.layers == (0, 1, 3)
