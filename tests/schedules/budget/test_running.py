"""Laws of a run's plan: found once for what was asked, found anew for anything else, never changed under a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from iskd.export.student import native_config
from iskd.models import Stack
from iskd.models.packing import Separator
from iskd.plan.budget_plan import KEEP, BudgetPlan, read_plan
from iskd.plan.run_files import BUDGET_FILE, STAGES_FILE
from iskd.schedules.budget import running
from iskd.schedules.budget.running import Asked, plan_for
from iskd.schedules.budget.settings import Budget
from tests.factories import louder, tiny
from tests.schedules.budget.test_library import OPTIONS, SMALL, text

VALUES: dict[str, Any] = {"options": OPTIONS, "use": ["remove", "no_attention"], "context": 32, "epochs": 0}
VALUES |= {"rounds": 0, "plans": 1, "pairs": 0, **SMALL}
BUDGET = Budget(params=0.7, **VALUES)


def asked_of(teacher: PreTrainedModel, folder: Path) -> Asked:
    return Asked(
        teacher=teacher, windows=text, separator=None, trainer={"accelerator": "cpu", "precision": "32-true"},
        cache_dir=folder / "cache", stored="float32",
        native=lambda model: native_config(model) is not None, refits=(), note=lambda _said: None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Asked, BudgetPlan]:
    """What a search needs of a run of a small teacher, and the plan of one."""
    folder = tmp_path_factory.mktemp("found")
    asked = asked_of(louder(tiny("llama", layers=3)), folder)
    (folder / "run").mkdir()
    return asked, plan_for(BUDGET, asked, folder / "run")


def test_a_plan_is_found_once(found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, plan = found
    plan.write(tmp_path / BUDGET_FILE)
    monkeypatch.setattr(running, "plans_for", None)
    assert plan_for(BUDGET, asked, tmp_path) == plan
    elsewhere = replace(BUDGET, library=str(tmp_path / "other"))
    assert plan_for(elsewhere, replace(asked, stored="bfloat16"), tmp_path) == plan, "neither decides anything here"


OTHERS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"params": 0.8}, {}),
    ({"use": ["remove"]}, {}),
    ({"options": {**OPTIONS, "no_attention": OPTIONS["linear_attention"]}}, {}),
    ({"rounds": 1}, {}),
    ({"score_tokens": 256}, {}),
    ({"plans": 2}, {}),
    ({"epochs": 1}, {}),
    ({"native": True, "use": ["remove"]}, {}),
    ({"context": 16}, {}),
    ({"batch": 2}, {}),
    ({}, {"windows": lambda tokens: [batch + 1 for batch in text(tokens)]}),
]


@pytest.mark.parametrize(("keys", "of_run"), OTHERS)
def test_a_plan_of_another_question_is_found_anew_and_refused_under_a_run(
    keys: dict[str, Any], of_run: dict[str, Any], found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, plan = found
    plan.write(tmp_path / BUDGET_FILE)
    searched: list[Budget] = []
    anew = replace(plan, found="anew")
    monkeypatch.setattr(running, "plans_for", lambda budget, _asked: searched.append(budget) or [anew])
    other, run = replace(BUDGET, **keys), replace(asked, **of_run)
    assert plan_for(other, run, tmp_path) == anew == read_plan(tmp_path / BUDGET_FILE)
    assert searched == [other]
    plan.write(tmp_path / BUDGET_FILE)
    (tmp_path / STAGES_FILE).write_text("[]")
    with pytest.raises(
        ValueError, match=r"holds stages\.json of the plan in its budget\.json, and its budget, options"
    ):
        plan_for(other, run, tmp_path)
    assert searched == [other]
    assert plan_for(BUDGET, asked, tmp_path) == plan


def test_bytes_are_those_of_the_type_that_is_exported(found: Any, tmp_path: Path) -> None:
    asked, _ = found
    budget = replace(BUDGET, params=None, bytes=0.7)
    plan = plan_for(budget, asked, tmp_path)
    half = plan_for(budget, replace(asked, stored="bfloat16"), tmp_path)
    assert half.limits["bytes"] == plan.limits["bytes"] / 2


def test_a_plan_file_is_carried_out_as_it_is(found: Any, tmp_path: Path) -> None:
    asked, plan = found
    (tmp_path / "run").mkdir()
    file = plan.write(tmp_path / "plan.json")
    for keys in ({}, {"params": 0.7}, {"use": ["no_attention", "remove", "merge"]}, {"context": None}, {"rounds": 3}):
        budget = replace(BUDGET, **{"params": None, "use": None, **keys}, plan=str(file))
        assert plan_for(budget, asked, tmp_path / "run") == plan
    (tmp_path / "run" / STAGES_FILE).write_text("[]")
    assert plan_for(budget, asked, tmp_path / "run") == plan
    other = replace(plan, choice=("remove", KEEP, KEEP) if plan.choice[0] == KEEP else (KEEP, "remove", KEEP))
    with pytest.raises(ValueError, match=r"and budget\.plan=.*other\.json is another plan: leave that as it was"):
        plan_for(replace(budget, plan=str(other.write(tmp_path / "other.json"))), asked, tmp_path / "run")
    finished = replace(plan, finished={"decode_ms": 1.0})
    finished.write(tmp_path / "run" / BUDGET_FILE)
    assert plan_for(budget, asked, tmp_path / "run") == finished, "what the run has measured stays"
    file.unlink()  # work_in: stages.json
    assert plan_for(budget, asked, tmp_path / "run") == finished, "the run goes on with its own"
    (tmp_path / "new").mkdir()
    plan.write(tmp_path / "new" / BUDGET_FILE)  # of a run that has come to nothing: the name may be a slip of the pen
    with pytest.raises(ValueError, match=r"budget\.plan=.*plan\.json: there is no such file"):
        plan_for(budget, asked, tmp_path / "new")
    finished.write(file)
    assert plan_for(budget, asked, tmp_path / "new") == plan, "another run has yet to be finished"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"params": 0.5}, r"was searched for with budget\.params=0\.7, not 0\.5: leave that out, or search again"),
        ({"bytes": 0.7}, r"was searched for with budget\.bytes=null, not 0\.7"),
        ({"params": [0.7, 0.5]}, "a run has one budget"),
        ({"context": 16}, r"was searched for with budget\.context=32, not 16"),
        ({"batch": 4}, r"was searched for with budget\.batch=1, not 4"),
        ({"use": ["merge"]}, r"has (no_attention|no_attention, remove), and budget\.use does not: leave that out"),
        ({"native": True}, r"makes a student that plain transformers does not open, and budget\.native=true"),
    ],
)
def test_other_keys_beside_a_plan_file_that_say_otherwise_are_refused(
    keys: dict[str, Any], said: str, found: Any, tmp_path: Path
) -> None:
    asked, plan = found
    plan = replace(plan, choice=("no_attention", KEEP, KEEP))
    budget = replace(BUDGET, **{"params": None, "use": None, **keys}, plan=str(plan.write(tmp_path / "plan.json")))
    with pytest.raises(ValueError, match=said) as told:
        plan_for(budget, asked, tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("kept_apart", [None, Separator(3)])
def test_a_plan_of_a_teacher_that_tells_documents_apart_is_found_again(
    found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_apart: Separator | None
) -> None:
    """Of a resumed run and of a plan file, whether the teacher does so already or is yet to."""
    asked = replace(found[0], separator=Separator(3))
    Stack(asked.teacher).keep_apart(kept_apart)
    try:
        plan = plan_for(BUDGET, asked, tmp_path)
        assert plan.teacher != found[1].teacher
        monkeypatch.setattr(running, "plans_for", None)
        assert plan_for(BUDGET, asked, tmp_path) == plan
        (tmp_path / "other").mkdir()
        assert plan_for(replace(BUDGET, plan=str(tmp_path / BUDGET_FILE)), asked, tmp_path / "other") == plan
        assert Stack(asked.teacher).separator == kept_apart
    finally:
        Stack(asked.teacher).keep_apart(None)
