"""Laws of the plan: values survive JSON, and nothing is read from a file that cannot be carried out."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest

from iskd.plan import edits
from iskd.plan.edits import Convert, Edit, Merge, Record, Remove, Replace, Spec, describe
from iskd.plan.reading import record_from_json, stage_from_json, to_json
from iskd.plan.stage import Stage
from iskd.system import read_json
from iskd.system.reading import read_as

SPEC = Spec("iskd.blocks.linear.Linear", {"ridge": 0.5, "deep": {"list": [1, None, True]}})
RECORD = Record(6).extended([Replace(1, SPEC, seed=7), Remove(3), Convert(4, SPEC, seed=2), Remove(1)])
MERGED = Record(6).extended([Merge(2), Merge(3, ridge=0.5), Remove(1), Replace(0, SPEC)])
STAGE = Stage("two", (Replace(0, SPEC), Remove(2)), tokens=64, train="new", lr=1e-3, lr_new=2e-3, fit=False)


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(to_json(value)))


def test_every_value_survives_json() -> None:
    assert read_as(Spec, through_json(SPEC), "spec") == SPEC
    assert [read_as(Edit, through_json(edit), "edit") for edit in RECORD.edits] == list(RECORD.edits)
    assert record_from_json(through_json(RECORD)) == RECORD
    assert record_from_json(through_json(MERGED)) == MERGED
    assert stage_from_json(through_json(STAGE)) == STAGE
    assert record_from_json({"num_layers": 3}) == Record(3)
    assert stage_from_json({"name": "heal"}) == Stage("heal")


REPLACE = to_json(Replace(1, SPEC))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"op": "explode", "layer": 1}, "unknown op 'explode'; known are .'convert', 'merge', 'remove', 'replace'"),
        ({"layer": 1}, "unknown op None"),
        ({"op": ["remove"], "layer": 1}, "unknown op"),
        ({"op": {}, "layer": 1}, "unknown op"),
        ("remove", r"edits\[0\] must be an object, got 'remove'"),
        (None, r"edits\[0\] must be an object, got None"),
        ({"op": "remove", "layer": 1, "force": True}, "remove: unknown key 'force'"),
        ({"op": "merge", "layer": 1, "ridge": -1}, "merge: ridge"),
        ({"op": "merge", "layer": 1, "ridge": math.nan}, "merge: ridge"),
        ({"op": "merge", "layer": 0}, "merge 0: no layer is left below it"),
        ({"op": "remove"}, "remove: key 'layer' is missing"),
        ({"op": "remove", "layer": True}, "remove: layer must be an integer, got True"),
        ({"op": "remove", "layer": 1.0}, "remove: layer must be an integer, got 1.0"),
        ({"op": "remove", "layer": "1"}, "remove: layer must be an integer, got '1'"),
        (REPLACE | {"seed": False}, "replace: seed must be an integer, got False"),
        (REPLACE | {"seed": None}, "replace: seed must be an integer, got None"),
        (REPLACE | {"block": "iskd.blocks.linear.Linear"}, "replace: block must be an object, got 'iskd"),
        (REPLACE | {"block": {"kwargs": {}}}, "replace: block: key 'target' is missing"),
        (REPLACE | {"block": {"target": 3}}, "replace: block: target must be a string, got 3"),
        (REPLACE | {"block": {"target": "a", "kwargs": None}}, "replace: block: kwargs must be an object"),
        (REPLACE | {"block": {"target": "a", "kwargs": [1]}}, "replace: block: kwargs must be an object"),
        (REPLACE | {"block": {"target": "a", "code": "x"}}, "replace: block: unknown key 'code'"),
        ({"op": "remove", "layer": 9}, "remove 9: the teacher has layers 0..3"),
        ({"op": "remove", "layer": -1}, "remove: layer must be between 0 and 9999, got -1"),
        ({"op": "remove", "layer": 10**40}, "remove: layer must be between 0 and 9999, got 10000"),
        (REPLACE | {"seed": -1}, "replace: seed must be between 0 and 9223372036854775807, got -1"),
        (REPLACE | {"seed": 2**63}, "replace: seed must be between 0 and"),
        *[
            (
                REPLACE | {"block": {"target": "iskd.blocks.slim.Slim", "kwargs": {"a": [bad]}}},
                f"replace: block: kwargs: .*{message}",
            )
            for bad, message in (
                (10**9, "must be between -1000000 and 1000000, got 1000000000"),
                (-(10**400), "must be between"),
                (math.nan, "must be between .* got nan"),
                (math.inf, "must be between .* got inf"),
                ("x" * 10_001, "a string of at most 10000 characters"),
                ({"k" * 257: 0}, "a string of at most 256 characters"),
                ([0] * 1_001, "more than 1000 values"),
            )
        ],
        (REPLACE | {"block": {"target": "iskd.blocks.slim.Slim", "kwargs": {"a": [{1}]}}}, "must be plain JSON"),
        (REPLACE | {"block": {"target": "iskd.blocks." + "x" * 300}}, "target must be a string of at most 256"),
    ],
)
def test_an_edit_that_says_anything_else_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record_from_json({"num_layers": 4, "edits": [data]})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"Record must be an object, got \[\]"),
        ({}, "Record: key 'num_layers' is missing"),
        ({"num_layers": 4, "layers": [0]}, "Record: unknown key 'layers'"),
        *[({"num_layers": bad}, "num_layers must be between 1 and 10000") for bad in (0, -1, 10**9, 10**12)],
        *[({"num_layers": bad}, "num_layers must be an integer") for bad in (True, 2.0, "4", None, math.nan)],
        ({"num_layers": 4, "edits": {}}, "Record: edits must be a list"),
        ({"num_layers": 4, "edits": None}, "Record: edits must be a list"),
        ({"num_layers": 4, "edits": [{"op": "remove", "layer": 1}] * 2}, "removed by an earlier edit"),
    ],
)
def test_a_record_that_says_anything_else_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record_from_json(data)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "iskd",
        "iskd.models.surgery.apply",
        "iskd.blocksx.Linear",
        ".iskd.blocks.linear.Linear",
        "",
        "iskd.blocks.linear.Linear()",
        "iskd.blocks.linear:Linear",
        "iskd.blocks.linear.Linear\n",
        "iskd.blocks.../os.system",
        "iskd.blocks.slim.Tensor",
        "iskd.blocks.slim.Stack",
        "iskd.blocks.slim.__class__",
    ],
)
def test_names_outside_the_allow_list_are_refused(target: str) -> None:
    with pytest.raises(ValueError, match="outside the allow-list"):
        Spec(target).resolve()


@pytest.mark.parametrize(
    "target",
    [
        "iskd.blocks.slicing.torch.hub.load",
        "iskd.blocks..x",
        "iskd.blocks.",
        "iskd.blocks.linear",
        "iskd.blocks.linear.Missing",
        "iskd.blocks.missing.Linear",
        "iskd.blocks.linear.Linear.from_block",
    ],
)
def test_names_that_lead_to_no_class_are_refused(target: str) -> None:
    with pytest.raises(ValueError, match=r"cannot import|not a class"):
        Spec(target).resolve()


@pytest.mark.parametrize("target", ["iskd.blocks.slicing.torch", "iskd.blocks.slim.cut", "iskd.blocks.slim.__name__"])
def test_what_is_no_class_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="not a class"):
        Spec(target).resolve()


def test_a_user_can_allow_a_package_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edits, "_ALLOWED", list(edits._ALLOWED))
    mine = Spec("collections.abc.Iterable")
    with pytest.raises(ValueError, match=r"iskd.plan.allow"):
        mine.resolve()
    edits.allow("collections.")
    edits.allow("collections.")
    assert mine.resolve().__name__ == "Iterable"
    assert len(edits._ALLOWED) == 3
    with pytest.raises(ValueError, match="outside the allow-list"):
        Spec("collectionsx.Iterable").resolve()
    for bad in ("", ".", "collections"):
        with pytest.raises(ValueError, match="ends with a dot"):
            edits.allow(bad)


def test_shipped_blocks_resolve() -> None:
    assert SPEC.resolve().__name__ == "Linear"


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([Remove(1), Remove(1)], r"remove 1: that layer was removed by an earlier edit; left are \[0, 2\]"),
        ([Remove(1), Replace(1, SPEC)], "replace 1: that layer was removed by an earlier edit"),
        ([Remove(1), Convert(1, SPEC)], "convert 1: that layer was removed by an earlier edit"),
        ([Replace(1, SPEC), Replace(1, SPEC)], "replace 1: it was replaced by an earlier edit"),
        ([Convert(1, SPEC), Convert(1, SPEC)], "convert 1: its mixer was converted by an earlier edit"),
        ([Remove(0), Remove(2), Remove(1)], "remove 1: it is the last layer; a student needs at least one"),
        ([Merge(1), Remove(1)], r"remove 1: that layer was removed by an earlier edit; left are \[0, 2\]"),
        ([Remove(0), Merge(1)], r"merge 1: no layer is left below it that could take it over; remove it"),
        (
            [Replace(0, SPEC), Remove(1), Merge(2)],
            r"merge 2 into 0: only blocks of the teacher's own .* replace 0 before",
        ),
        ([Convert(2, SPEC), Merge(2)], r"merge 2 into 1: only blocks of the teacher's own .* convert 2 before"),
        ([Remove(3)], r"remove 3: the teacher has layers 0\.\.2"),
        ([Replace(-1, SPEC)], r"replace -1: the teacher has layers 0\.\.2"),
    ],
)
def test_illegal_chains_are_refused(edits: list[Edit], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Record(3).extended(edits)


def test_extending_leaves_the_record_as_it_was() -> None:
    before = Record(3)
    after = before.extended([Remove(0)]).extended([Replace(1, SPEC), Remove(1)])
    assert before == Record(3)
    assert after.edits == (Remove(0), Replace(1, SPEC), Remove(1))
    assert after.layers == (2,)


def test_layers_keep_their_number_across_gaps() -> None:
    record = Record(8).extended([Remove(0), Remove(4), Remove(3), Replace(2, SPEC), Remove(7)])
    assert record.layers == (1, 2, 5, 6)
    assert record.edited == (0, 2, 3, 4, 7)
    assert {layer: record.state_after(layer) for layer in record.layers} == {1: 1, 2: 4, 5: 5, 6: 7}
    assert [Record(3).state_after(layer) for layer in range(3)] == [0, 1, 2]


def test_descriptions_group_by_operation() -> None:
    assert describe([Replace(3, SPEC), Remove(7), Replace(5, SPEC)]) == "replace 3, 5; remove 7"
    assert describe([]) == "heal"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": None}, "name must be a string"),
        ({"name": "a", "edits": {"op": "remove"}}, "Stage 'a': edits must be a list"),
        ({"name": "a", "tokens": -1}, "tokens must be between 0 and"),
        ({"name": "a", "tokens": 1.5}, "tokens must be an integer, got 1.5"),
        ({"name": "a", "tokens": True}, "tokens must be an integer, got True"),
        ({"name": "a", "tokens": math.inf}, "tokens must be an integer, got inf"),
        ({"name": "a", "lr": math.nan}, "lr must be a finite number >= 0, got nan"),
        ({"name": "a", "lr": -1e-3}, "lr must be a finite number >= 0, got -0.001"),
        ({"name": "a", "lr": 10**400}, "lr must be a finite number"),
        ({"name": "a", "lr_new": "1e-4"}, "lr_new must be a finite number >= 0, got '1e-4'"),
        ({"name": "a", "fit": 1}, "fit must be true or false, got 1"),
        ({"name": "a", "train": ["all"]}, "train must be a string"),
        ({"name": "a", "train": "(["}, "neither all/edited/new/adjacent/lora nor a regular expression"),
        ({"name": "a", "train": "(" * 250}, "nor a regular expression"),
        ({"name": "a", "train": "a{99999999999999999999}"}, "nor a regular expression"),
    ],
)
def test_a_stage_that_says_anything_else_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage_from_json(data)


def test_a_budget_may_be_written_as_a_whole_float() -> None:
    tokens = stage_from_json({"name": "a", "tokens": 1e6}).tokens
    assert tokens == 1_000_000
    assert isinstance(tokens, int)


NAME = "model.layers.10.self_attn.inner_projection_of_a_block.weight"


@pytest.mark.parametrize(
    "slow", ["(a+)+$", "(.*)*x", "(.|.)" * 40 + "x", ".*" * 9 + "x", ".?" * 60 + "x", r"(\w|\.){2,90}x"]
)
def test_an_expression_that_takes_for_ever_is_refused(slow: str) -> None:
    with pytest.raises(ValueError, match="could take hours to match"):
        stage_from_json({"name": "a", "train": slow})


@pytest.mark.parametrize(
    "train",
    ["all", r"layers\.(3|5|17)\.", r".*mlp.*(gate|up).*weight", "norm|bias", r"(?:q|k)_proj\.weight$", "[(*+{|]"],
)
def test_an_expression_that_ends_soon_is_taken(train: str) -> None:
    assert stage_from_json({"name": "a", "train": train}).train == train
    started = time.perf_counter()
    re.search(train, NAME)
    assert time.perf_counter() - started < 0.1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "is not valid JSON"),
        (b"[" * 40 + b"]" * 40, "nested deeper than 32 levels"),
        (b'{"a": 1, "a": 2}', "key 'a' stands twice"),
        (b'{"a": ', "is not valid JSON"),
        (b'"\xff"', "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"9" * 5000, "is not valid JSON"),
        (b" " * 101, "more than the 100"),
    ],
)
def test_json_that_nobody_wrote_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(file, max_bytes=100 if message.startswith("more") else 1_000_000)


def test_json_is_read_from_plain_files_only(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, NaN]}')
    assert read_json(tmp_path / "a.json")["a"][0] == 1
    with pytest.raises(ValueError, match="not a plain file"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")


def test_the_longest_legal_record_is_read_at_once() -> None:
    layers = range(edits.MAX_LAYERS)
    found = [to_json(Replace(layer, SPEC)) for layer in layers] + [to_json(Remove(layer)) for layer in layers[1:]]
    started = time.perf_counter()
    assert record_from_json({"num_layers": len(layers), "edits": found}).layers == (0,)
    assert time.perf_counter() - started < 5
