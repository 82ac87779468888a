"""Cost of using a model: cache bytes by formula, contexts and time that are kept to, models left as they were."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel

from iskd.evaluation import efficiency
from iskd.evaluation.results import efficiency_of
from iskd.models import surgery
from iskd.models.cache import cache_bytes, cache_held_bytes
from iskd.plan import Convert, Record, Remove, Spec
from iskd.report import tables
from iskd.system import machine
from tests.factories import digest, modes, tiny

QUICK: dict[str, Any] = {"decode_tokens": 2, "repeats": 2}
LINEAR = Spec("iskd.mixers.linear_attention.LinearAttention", {})


def llama(context: int = 64) -> PreTrainedModel:
    return tiny("llama", context=context)  # 4 layers, 3 key-value heads of width 8


def measured(models: dict[str, PreTrainedModel], **options: Any) -> dict[str, Any]:
    """What efficiency.json would hold."""
    return json.loads(json.dumps(efficiency.measure(models, **options).to_json(), allow_nan=False))


def alone(model: PreTrainedModel, **options: Any) -> dict[str, Any]:
    """What is measured of a single model."""
    return measured({"student": model}, **options)["student"]


def converted() -> PreTrainedModel:
    student = copy.deepcopy(llama())
    surgery.apply(student, Record(4), [Convert(layer, LINEAR) for layer in range(4)])
    return student


def test_the_cache_of_attention_grows_by_the_formula_and_a_state_does_not() -> None:
    grown = {row["context"]: row for row in alone(llama(), contexts=[8, 32], **QUICK)["contexts"]}
    assert {context: row["cache_bytes"] for context, row in grown.items()} == {
        context: 2 * 4 * 3 * 8 * context * 4 for context in (8, 32)
    }
    states = alone(converted(), contexts=[8, 32], **QUICK)["contexts"]
    assert states[0]["cache_bytes"] == states[1]["cache_bytes"] > 0
    assert all(row["cache_held_bytes"] >= row["cache_bytes"] for row in [*grown.values(), *states])


def test_models_are_measured_as_they_are_served_whatever_a_caller_computes_in() -> None:
    model, seen = llama(), list[bool]()
    model.get_submodule("model.layers.0").register_forward_pre_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    )
    with torch.autocast("cpu", torch.bfloat16):
        alone(model, contexts=[8], **QUICK)
        assert torch.is_autocast_enabled("cpu")
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "gemma"])
def test_every_kind_of_family_is_measured(family: str) -> None:
    (row,) = alone(tiny(family), contexts=[8], **QUICK)["contexts"]
    assert row["prefill_seconds"] > 0
    assert row["decode_seconds_per_token"] > 0
    assert row["repeats"] == 2
    assert row["cache_bytes"] > 0


def test_contexts_beyond_the_model_are_left_out_and_named() -> None:
    found = alone(llama(), contexts=[64, 128, 8], **QUICK)
    assert [row["context"] for row in found["contexts"]] == [8, 64]
    assert found["left_out"] == {"128": "128 tokens are more than the context of 64"}
    # learned positions have to last for the decoded tokens too
    found = alone(tiny("gpt2"), contexts=[8, 64], **QUICK)
    assert found["left_out"] == {"64": "66 tokens are more than the table of 64 learned positions"}


def test_a_model_without_attention_has_no_context_of_its_own() -> None:
    """The teacher stops at its context, the converted student is measured beyond it."""
    result = measured({"teacher": llama(), "student": converted()}, contexts=[8, 200], **QUICK)
    assert [row["context"] for row in result["student"]["contexts"]] == [8, 200]
    assert list(result["teacher"]["left_out"]) == ["200"]
    assert result["student"]["left_out"] == {}


def test_where_there_is_no_time_to_read_a_prompt_the_cache_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are those of a prompt, decoding is timed, reading is not."""
    read = alone(llama(), contexts=[8, 32], **QUICK)["contexts"][1]
    monkeypatch.setattr(efficiency._Clock, "allows", lambda _, context, reading, longer=0: not reading or context == 8)
    monkeypatch.setattr(efficiency, "_SHORT", 5)
    found = efficiency.measure({"student": llama()}, contexts=[8, 32], **QUICK)
    short, filled = found.to_json()["student"]["contexts"]
    assert short["prefill_seconds"] > 0
    assert filled["prefill_seconds"] is None
    assert filled["decode_seconds_per_token"] > 0
    assert filled["repeats"] == 2
    assert filled["cache_bytes"] == read["cache_bytes"]
    console = Console(record=True, width=120)
    console.print(tables.efficiency_table(found))
    assert "no prefill where the cache was filled" in " ".join(console.export_text().split())


@pytest.mark.parametrize(("slowness", "reached"), [(1.0, 4), (0.5, 4), (20.0, 1)])
def test_a_minute_reaches_the_longest_context(slowness: float, reached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine where a token is read in 4 ms and decoded in 45 ms, more after a long context: SmolLM2 on a core."""
    now = [0.0]

    def use(model: PreTrainedModel, context: int, passes: Any, reads: bool) -> Any:
        prefill = 0.004 * (context if reads else 64) * slowness
        decode = 0.045 * (1 + context / 6000) * slowness
        now[0] += prefill + decode * passes.decode_tokens
        return prefill, decode, (1, 1)

    monkeypatch.setattr(efficiency, "_use", use)
    monkeypatch.setattr(efficiency, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    result = measured({"teacher": llama(8192), "student": llama(8192)}, seconds=60)
    rows = result["student"]["contexts"]
    assert [row["context"] for row in rows] == list(efficiency.CONTEXTS[:reached])
    assert rows[0]["prefill_seconds"] == pytest.approx(0.004 * 128 * slowness)
    assert len(result["student"]["left_out"]) == 4 - reached
    if reached == 4:
        assert now[0] < 66
        assert rows[-1]["prefill_seconds"] is None


def test_time_is_kept_to_and_what_falls_to_it_is_named() -> None:
    start = time.perf_counter()
    found = alone(llama(4096), contexts=[8, 4096], decode_tokens=2, repeats=1000, seconds=0.01)
    assert time.perf_counter() - start < 20
    assert [row["context"] for row in found["contexts"]] == [8]
    assert "no time left" in found["left_out"]["4096"]


def test_a_comparison_is_written_shown_and_read_by_the_report(tmp_path: Path) -> None:
    teacher, student = llama(), copy.deepcopy(llama())
    surgery.apply(student, Record(4), [Remove(1)])
    student.train()
    before = digest(teacher), digest(student), modes(student), torch.get_rng_state()
    steps: list[tuple[int, int]] = []
    found = efficiency.measure(
        {"teacher": teacher, "student": student},
        contexts=[8, 16],
        progress=lambda _, done, total: steps.append((done, total)),
        **QUICK,
    )
    assert (digest(teacher), digest(student), modes(student)) == before[:3]
    assert torch.equal(torch.get_rng_state(), before[3])
    assert steps == [(done, 6) for _ in range(2) for done in range(6)], "each model is warmed up and timed twice"
    result = found.to_json()
    assert result["student"]["params"] < result["teacher"]["params"] == surgery.parameters(teacher)
    assert result["teacher"]["bytes"] == 4 * result["teacher"]["params"]
    assert result["teacher"]["peak_memory_bytes"] >= result["teacher"]["bytes"]
    assert result["student"]["contexts"][1]["cache_bytes"] * 4 == result["teacher"]["contexts"][1]["cache_bytes"] * 3
    path = efficiency.write(tmp_path, found)
    assert efficiency_of(json.loads(path.read_text())) == found
    console = Console(record=True, width=120)
    console.print(tables.efficiency_table(found))
    assert "cache after 16 (MiB)" in console.export_text()


def test_a_copy_in_another_dtype_is_measured_and_the_model_stays() -> None:
    model = llama()
    found = alone(model, contexts=[8], dtype=torch.bfloat16, **QUICK)
    assert found["dtype"] == "bfloat16"
    assert found["bytes"] == 2 * found["params"]
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("bad", [{"contexts": []}, {"contexts": [0]}, {"decode_tokens": 0}, {"repeats": 0}])
def test_bad_values_are_named(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"efficiency needs {next(iter(bad))} of at least 1"):
        alone(llama(), **bad)


def test_what_does_not_fit_into_memory_is_left_out_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    use = efficiency._use

    def full(model: PreTrainedModel, context: int, decode_tokens: int, reads: bool) -> Any:
        if context > 8:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 byte")
        return use(model, context, decode_tokens, reads)

    monkeypatch.setattr(efficiency, "_use", full)
    found = alone(llama(), contexts=[8, 16, 32], **QUICK)
    assert [row["context"] for row in found["contexts"]] == [8]
    assert found["left_out"] == {"16": "not enough memory", "32": "not enough memory"}
    monkeypatch.setattr(efficiency, "_use", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        alone(llama(), contexts=[8], **QUICK)


def test_a_model_alone_is_shown_alone() -> None:
    console = Console(record=True, width=120)
    console.print(tables.efficiency_table(efficiency.measure({"student": llama()}, contexts=[8], **QUICK)))
    text = console.export_text()
    assert "student" in text
    assert "teacher" not in text
    with pytest.raises(ValueError, match="a teacher and a student, got one named 'machine'"):
        efficiency.measure({"machine": llama()}, contexts=[8], **QUICK)


def test_a_view_holds_what_it_was_cut_from() -> None:
    class Layer:
        def __init__(self) -> None:
            row = torch.zeros(1, 100)
            self.state = (row[:, :3], row[:, 3:4])
            self.keys = None

    class Cache:
        layers = [Layer()]  # noqa: RUF012

    assert cache_bytes(Cache) == 16
    assert cache_held_bytes(Cache) == 400


def test_memory_of_a_piece_of_work_is_seen() -> None:
    size = 64 << 20
    with machine.PeakMemory(torch.device("cpu")) as memory:
        held = torch.ones(size, dtype=torch.uint8)
        time.sleep(0.05)
        del held
    assert size * 0.8 < memory.rise < size * 4


def test_the_machine_is_named_without_its_host() -> None:
    import platform

    facts = machine.describe("cpu")
    assert {"device", "cores", "threads", "torch", "note"} <= facts.keys()
    assert "this machine only" in facts["note"]
    assert len(platform.node()) < 4 or platform.node() not in json.dumps(facts)
