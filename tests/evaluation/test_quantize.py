"""The student in fewer bits: asked for by name, refused in a sentence, measured beside itself, shown on its page."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from iskd.evaluation import EvalSpec, Evaluation, evaluate, quantize
from iskd.evaluation.evaluator import check
from iskd.evaluation.quantize import KINDS, packed_as, quantized, weight_bytes
from iskd.evaluation.results import evaluation_of
from iskd.evaluation.text import TextWindows
from iskd.models.tokenizers import byte_tokenizer
from iskd.report import evaluation_table
from iskd.report.measured import quantized_section
from iskd.report.terminal import print_table, terminal
from iskd.teacher import Loaded
from tests.factories import digest, tiny, windows

VOCAB = 257
TEXT = "Once upon a time there was a student of few layers. " * 12


def rounded(kind: str, model: Any) -> Any:
    """In the place of torchao: weights on a grid of so many bits; 4 bits are what this machine cannot have."""
    if kind == "int4":
        raise ValueError("kernels are for\nanother machine")
    packed = copy.deepcopy(model)
    for part in packed.modules():
        if isinstance(part, nn.Linear) and part is not packed.get_output_embeddings():
            scale = part.weight.data.abs().max() / 127
            part.weight.data = (part.weight.data / scale).round() * scale
    return packed


@pytest.fixture
def as_if(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "packed_as", rounded)
    monkeypatch.setattr(quantize, "find_spec", lambda name: name)


def asked(**changes: Any) -> Evaluation:
    model = tiny("llama", vocab=VOCAB)
    spec = EvalSpec(quantize=["int8", "int4"], tokens=128, window=64, **changes)
    before = digest(model)
    found = evaluate(model, byte_tokenizer(), spec, text=TEXT)
    assert digest(model) == before, "the student stays as it is"
    return found


@pytest.mark.usefixtures("as_if")
def test_a_row_for_the_student_and_one_for_every_kind() -> None:
    as_it_is, eight, four = asked().quantized
    assert (as_it_is.kind, eight.kind, four.kind) == ("float32", "int8", "int4")
    assert as_it_is.perplexity > 1
    assert eight.perplexity == pytest.approx(as_it_is.perplexity, rel=0.05)
    assert eight.perplexity != as_it_is.perplexity
    assert min(as_it_is.tokens_per_s, eight.tokens_per_s, as_it_is.bytes) > 0
    assert four.why == "kernels are for another machine"
    assert all(map(math.isnan, (four.bytes, four.perplexity, four.tokens_per_s)))


@pytest.mark.usefixtures("as_if")
def test_it_is_kept_in_the_file_and_shown_to_people(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked()
    assert evaluation_of(json.loads(found.to_json())).to_json() == found.to_json()
    assert "quantize" not in found.settings, "rows say it"
    page = quantized_section(found)
    for said in ("Weights in fewer bits", "float32", "int8", "kernels are for another machine"):
        assert said in page
    monkeypatch.setenv("COLUMNS", "140")
    out = io.StringIO()
    print_table(evaluation_table(found), console=terminal(out))
    assert "weights in int8: " in out.getvalue()
    assert "weights in int4: kernels are for another machine" in out.getvalue()
    plain = dataclasses.replace(found, quantized=())
    assert quantized_section(plain) == quantized_section(None) == ""
    assert "quantized" not in json.loads(plain.to_json())


def test_broken_rows_of_a_file_are_left_out() -> None:
    told = {"tasks": [], "quantized": [{"kind": "int8", "bytes": "many"}, 7, {"kind": 3}]}
    rows = evaluation_of(told).quantized
    assert [row.kind for row in rows][:1] == ["int8"]
    assert math.isnan(rows[0].bytes)
    assert evaluation_of({"tasks": [], "quantized": {"a": 1}}).quantized == ()


def test_what_cannot_be_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Loaded(tiny("llama", vocab=VOCAB), byte_tokenizer(), {})
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs torchao, which is not installed: pip install torchao$"):
        check(EvalSpec(quantize=["int8"], text=str(file)), teacher)
    with pytest.raises(ValueError, match=r"eval\.quantize='int3' is unknown: choose from int8, int4"):
        check(EvalSpec(quantize=["int3"], text=str(file)), teacher)
    with pytest.raises(ValueError, match=r"name a text that was not trained on, eval\.text=FILE"):
        check(EvalSpec(quantize=["int8"], tasks=["copy"]), teacher)


def test_bytes_are_those_of_what_a_weight_is_packed_in() -> None:
    model = tiny("llama", vocab=VOCAB)
    assert weight_bytes(model) == sum(p.nbytes for p in model.parameters())

    class Packed(torch.Tensor):
        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["low", "scale"], None

    packed = torch.zeros(8, 8).as_subclass(Packed)
    packed.low, packed.scale = torch.zeros(8, 8, dtype=torch.int8), torch.zeros(8)  # type: ignore[attr-defined]
    assert quantize._bytes(packed) == 64 + 32


def test_what_4_bits_cannot_do_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.prototype.quantization.int4", None)  # as before 0.18
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["torchao"].quantization = sys.modules["torchao.quantization"]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="of a size that 4 bits take"):
        packed_as("int4", tiny("llama", vocab=VOCAB, mlp=40))
    with pytest.raises(ValueError, match="for CUDA devices and CPUs"):
        quantize._config("int4", "mps", 32)
    with pytest.raises(ValueError, match=r"need torchao 0\.18 or newer"):
        quantize._config("int4", "cpu", 32)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_torchao_packs_a_student(kind: str) -> None:
    pytest.importorskip("torchao")
    model = tiny("llama", vocab=VOCAB, hidden=64, heads=4, kv_heads=2, mlp=208)  # 32 divides the first, 16 both
    ids = windows(vocab=VOCAB, seed=3)
    text = TextWindows(ids, ids[:, 1:], ids.numel())
    as_it_is, row = quantized(model, text, [kind], batch_tokens=256, step=lambda done, of: None)
    assert not row.why
    head = model.get_output_embeddings()
    maps = [part for part in packed_as(kind, model).modules() if isinstance(part, nn.Linear)]
    packed = [part for part in maps if type(part.weight.data) is not torch.Tensor]
    divided = [part for part in maps if kind == "int8" or part.in_features % 32 == 0]
    assert len(packed) == len(divided) - (head is not None), "all but the head"
    assert len(divided) == len(maps) - 4 * (kind == "int4"), "the second map of each MLP"
    assert row.bytes < 0.75 * as_it_is.bytes
    assert row.perplexity == pytest.approx(as_it_is.perplexity, rel=0.05)
    assert row.tokens_per_s > 0
