"""JSON files of runs keep their form: what version 0.1 wrote is read, and written again as it was, byte by byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iskd.evaluation.results import efficiency_of, evaluation_of
from iskd.export.probe import probe_from_json
from iskd.plan import StageResult, to_json
from iskd.plan.reading import record_from_json, stage_from_json
from iskd.training.state import RunState

RECORD = (
    '{"num_layers": 6, "edits": [{"layer": 1, "block": {"target": "iskd.blocks.slim.Slim", "kwargs": {"ratio": 0.5, '
    '"select": "l1"}}, "seed": 7, "op": "replace"}, {"layer": 3, "op": "remove"}, {"layer": 4, "mixer": {"target": '
    '"iskd.mixers.gla.GLA", "kwargs": {"heads": null}}, "seed": 2, "op": "convert"}]}'
)
STAGE = (
    '{"name": "remove 2", "edits": [{"layer": 2, "op": "remove"}], "tokens": 64, "train": "lora", "lr": 1, "lr_new": '
    '0.0003, "fit": false, "lora": {"rank": 4, "alpha": 8, "targets": "mlp", "seed": 3}, "objective": "matrix", '
    '"shape": "wsd", "refit_share": 0.25, "refit_budget": 32, "step": 1, "untrained": 2}'
)
ROW = (
    '{"index": 1, "name": "remove 3", "edits": [{"op": "remove", "layer": 3}], "params": 4000, "block_params": 3000, '
    '"ppl": "Infinity", "kl": 0.5, "top1": 0.25, "retention": "NaN", "before": {"ppl": 90.0, "kl": "Infinity"}, '
    '"intervals": null, "tokens": 64, "seconds": 1.5, "train_tokens_per_s": null, "tokens_per_s": 2.5, '
    '"inside": [{"tokens": 32.0, "kl": 0.75}], "evaluation": {"tasks": [], "text": null}, '
    '"scores": {"0": 0.5, "1": "-Infinity"}, "status": "rolled_back", "events": ["block 1 fitted"]}'
)
TRIALS = f'{{"candidates": [{STAGE}, {STAGE}], "tokens": 4, "kl": [0.5]}}'
STATE = (
    '{"edited": true, "batch": 3, "first_batch": 8, "steps": 4, "total_steps": 20, "total_stages": 2, "tokens": 640, '
    '"seconds": 1.5, "before": {"ppl": 9.0, "kl": 0.1}, "inside": [{"tokens": 600.0, "kl": 0.5}], '
    '"events": ["fitted"], "skipped": 0, "skipped_in_a_row": 0, '
    '"identity": {"seed": 1, "text": "ab", "batch_size": 2, "accumulate": 1, "processes": 1}, '
    f'"record": {RECORD}, "stage": {STAGE}, "tournament": {TRIALS}, "finished": [{STAGE}], "results": [{ROW}], '
    '"scores": {"0": 0.5, "1": 0.25}}'
)
PROBE = (
    '{"ids": [[1, 2], [3, 4]], "columns": [0, 3], "logits": [[0.5, 1.0], [2.0, NaN]], "logsumexp": [[0.1, 0.2], [0.3, '
    '0.4]], "text": [[1, 5], [3, 6]], "margin": null, "tolerance": 0.0001}'
)
EVALUATION = (
    '{"mean_retention": {"high": 1.0, "low": 0.30625, "value": 0.75}, "models": {"student": {"layers": 3}, "teacher": '
    '{"layers": 4}}, "retention": {"choice": {"high": 1.0, "low": 0.30625, "value": 0.75}}, "settings": {"limit": null,'
    ' "seed": 0, "versions": {"torch": "2"}}, "tasks": [{"chance": 0.5, "difference": {"high": 0.0, "low": -0.75, '
    '"value": -0.25}, "items": 4, "kind": "choice", "metric": "acc", "metrics": {"student": {"acc": 0.75}, "teacher": '
    '{"acc": 1.0}}, "retention": {"high": 1.0, "low": 0.30625, "value": 0.75}, "student": 0.75, "student_error": 0.25, '
    '"task": "piqa", "teacher": 1.0, "teacher_error": 0.0}, {"chance": 0.5, "difference": null, "items": 4, "kind": '
    '"generation", "metric": "acc", "metrics": {"student": {"acc": 0.25}}, "retention": {"high": null, "low": null, '
    '"value": null}, "student": 0.25, "student_error": null, "task": "copy", "teacher": null, "teacher_error": null}], '
    '"text": {"bits_per_byte": 1.25, "bytes": 41, "difference": 0.1277, "high": null, "low": 0.1, "perplexity": 12.5, '
    '"sha256": "ab", "teacher_bits_per_byte": 1.125, "teacher_perplexity": 11.0, "tokens": 40, "windows": 2}}'
)
EFFICIENCY = (
    '{"machine": {"device": "a cpu", "cores": 2}, "student": {"params": 2224, "bytes": 8896, "dtype": "float32", '
    '"peak_memory_bytes": 3625664, "contexts": [{"context": 8, "prefill_seconds": null, "decode_seconds_per_token": '
    '0.00513, "cache_bytes": 512, "cache_held_bytes": 512, "peak_memory_bytes": 3625664, "repeats": 1}], "left_out": '
    '{"32": "32 tokens are more than the context of 16"}}}'
)


def evaluation(data: Any) -> Any:
    """The fields alone hold all of it."""
    found = evaluation_of(data)
    assert found.rest == {}
    return json.loads(found.to_json())


@pytest.mark.parametrize(
    ("text", "again"),
    [
        (RECORD, lambda data: to_json(record_from_json(data))),
        (STAGE, lambda data: to_json(stage_from_json(data))),
        (ROW, lambda data: StageResult.from_json(data).to_json()),
        (STATE, lambda data: RunState.from_json(data).to_json()),
        (PROBE, lambda data: probe_from_json(data, Path("export.json")).to_json()),
        (EVALUATION, evaluation),
        (EFFICIENCY, lambda data: efficiency_of(data).to_json()),
    ],
    ids=["record", "stage", "row", "state", "probe", "evaluation", "efficiency"],
)
def test_a_file_is_written_as_it_was_read(text: str, again: Callable[[Any], Any]) -> None:
    assert json.dumps(again(json.loads(text))) == text


@pytest.mark.parametrize(
    "change",
    [
        {"text": 3},
        {"text": "gone"},
        {"text": {"perplexity": "low", "bits_per_byte": 2.0}},
        {"text": {**json.loads(EVALUATION)["text"], "perplexity": None}},
        {"text": {**json.loads(EVALUATION)["text"], "perplexity": True}},
        {"text": {**json.loads(EVALUATION)["text"], "later": [1]}},
        {"models": [1], "settings": None},
        {"models": {"student": {"layers": "three"}}, "settings": {}},
        {"rest": {"tasks": 1}, "other": [1.5, {"a": None}], "none": None},
        {"tasks": 3, "retention": 0.5},
    ],
)
def test_a_damaged_evaluation_is_written_as_it_was_read(change: dict[str, Any]) -> None:
    damaged = {**json.loads(EVALUATION), **change}
    assert json.loads(evaluation_of(damaged).to_json()) == damaged
    assert evaluation_of(damaged).to_json() == json.dumps(damaged, indent=1, sort_keys=True) + "\n"


@pytest.mark.parametrize("key", ["record", "stage", "finished", "results", "scores"])
def test_a_state_without_what_every_version_wrote_is_refused(key: str) -> None:
    data = json.loads(STATE)
    del data[key]
    with pytest.raises(ValueError, match=f"the saved state: key '{key}' is missing; is the checkpoint from another"):
        RunState.from_json(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": -1}, "batch must be between 0 and .* got -1"),
        ({"steps": True}, "steps must be an integer, got True"),
        ({"tokens": 10**400}, "tokens must be between 0 and .* got 1000"),
        ({"edited": 1}, "edited must be true or false, got 1"),
        ({"seconds": "1"}, "seconds must be a number, got '1'"),
        ({"before": {"loss": 1.0}}, "before must have keys among"),
        ({"before": {"ppl": "Infinity"}}, "before: ppl must be a number"),
        ({"inside": [{"kl": 1.0}]}, "inside.*must have the key 'tokens'"),
        ({"events": [3]}, r"events\[0\] must be a string, got 3"),
        ({"identity": {"processes": 0}}, "identity: processes must be an integer from 1, got 0"),
        ({"scores": {"x": 1.0}}, "scores: x: .* must be an integer, got 'x'"),
        ({"later": 1}, "unknown key 'later'; known are record, stage"),
        ({"finished": [{"name": "a", "train": "(a+)+$"}]}, r"finished\[0\]: train: .* could take hours to match"),
        ({"record": {"num_layers": 2, "edits": [{"op": "remove", "layer": 2}]}}, "record: remove 2: the teacher has"),
        (
            {"tournament": {"candidates": [], "tokens": 1, "kl": []}},
            "tournament: candidates must be a list of at least",
        ),
        ({"tournament": json.loads(TRIALS) | {"kl": [1.0, 2.0]}}, "tournament: kl must have fewer numbers"),
    ],
)
def test_a_state_that_nobody_wrote_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"the saved state: {message}"):
        RunState.from_json({**json.loads(STATE), **change})
