"""The plan of a run on a student whose teacher is out of reach: by the student's own folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from iskd.commands import build
from iskd.commands.compose import compose_config
from iskd.export import export
from iskd.models import surgery
from iskd.models.tokenizers import byte_tokenizer
from iskd.plan import Edit, Record, Remove, Replace
from iskd.plan.run_files import PLAN_FILE
from iskd.system.faults import UnavailableError
from tests.factories import tiny
from tests.runs import SLIM


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("native", [True, False])
def test_a_chained_run_is_planned_from_its_student(native: bool, family: str, tmp_path: Path) -> None:
    teacher = tiny(family, vocab=257)
    edits: list[Edit] = [Remove(2)] if native else [Remove(2), Replace(1, SLIM, seed=3)]
    student, record = surgery.rebuild(teacher, Record(4)), Record(4)
    record = surgery.apply(student, record, edits)
    folder, source = tmp_path / "model", {"kind": "hub", "name": "OWNER/AWAY"}
    export(
        folder, student, record, teacher.config, byte_tokenizer(), verify=False, teacher=source, run_dir=None,
    )  # fmt: skip
    keys = [f"model={folder}", "data=sample", "schedule=oneshot", "edit=remove", "schedule.count=1"]
    config, run_dir = compose_config([*keys, "schedule.order=alternate", "plan_only=true"], tmp_path / "run")
    build.plan_without(config, run_dir, UnavailableError("OWNER/AWAY is away"))
    rows: Any = json.loads((run_dir / PLAN_FILE).read_text())
    assert rows[0]["params"] == surgery.parameters(teacher), "the teacher's, whole"
    assert rows[-1]["params"] < surgery.parameters(student)
    assert [edit["layer"] for edit in rows[-1]["edits"]] == [1 if native else 3], "of those that are left"
