"""Laws of a run's position: it has one owner, and its file keeps the keys that runs have written."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path

import pytest

import iskd
from iskd.plan import Record
from iskd.training.state import RunState

FIELDS = {field.name for field in dataclasses.fields(RunState)}
CHANGING = {"append", "extend", "insert", "pop", "clear", "remove", "update", "setdefault", "sort", "reverse"}


def changed(code: str) -> list[str]:
    """Fields of a state that code sets, deletes, or changes in place."""
    found: list[ast.expr] = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Attribute | ast.Subscript):
            continue
        if not isinstance(node.ctx, ast.Load):
            found.append(node if isinstance(node, ast.Attribute) else node.value)
        elif isinstance(node, ast.Attribute) and node.attr in CHANGING:
            found.append(node.value)
    fields = [node for node in found if isinstance(node, ast.Attribute) and node.attr in FIELDS]
    return [ast.unparse(node) for node in fields if ast.unparse(node.value).rpartition(".")[2] == "state"]


def test_nobody_but_the_state_changes_its_fields() -> None:
    everyway = "state.batch += 1; a.state.tokens = 0; state.events.append(1); state.scores[0] = 1; del state.before"
    assert len(changed(everyway)) == 5
    assert changed("state.batch.bit_length(); row.events.append(1); state.take_up({}); state.scores[0]") == []
    package = Path(str(iskd.__file__)).parent
    found = {path.name: changed(path.read_text(encoding="utf-8")) for path in package.rglob("*.py")}
    assert not {name: fields for name, fields in found.items() if fields}


def test_the_file_keeps_its_keys() -> None:
    state = RunState(Record(2), first_step=3)
    saved = json.loads(json.dumps(state.to_json()))
    assert (saved["steps"], "first_step" in saved) == (3, False)
    assert RunState.from_json(saved) == state
    with pytest.raises(ValueError, match=r"unknown key 'first_step'; known are .* first_batch, steps, total_steps"):
        RunState.from_json({**saved, "first_step": 3})
