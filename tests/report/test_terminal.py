"""What users name is printed as it is, on iskd's own console and by tables on any other."""

from __future__ import annotations

import ast
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

import iskd
from iskd.evaluation import Efficiency, Evaluation, Interval
from iskd.evaluation.results import Measured, TaskScore
from iskd.report import efficiency_table, evaluation_table, score_table, stage_table
from iskd.report.terminal import terminal
from iskd.training import finish
from iskd.training.plan_table import print_plan
from iskd.training.profile import profile_table
from iskd.training.profile.profile import Profile
from tests.run_folders import STAGES

NAME = "a[/b] [x] :x:"


def calls_of(name: str) -> list[tuple[str, ast.Call]]:
    """Every call of a function or class of that name in the package, with its file."""
    package = Path(iskd.__file__).parent
    return [
        (path.relative_to(package).as_posix(), node)
        for path in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and name == getattr(node.func, "attr", getattr(node.func, "id", None))
    ]


def test_there_is_one_console() -> None:
    """Nor does a column of a progress bar, which asks no console, read markup."""
    assert [file for file, _ in calls_of("Console")] == ["report/terminal.py"]
    assert all("markup" in {word.arg for word in call.keywords} for _, call in calls_of("TextColumn"))


TABLES: dict[str, Callable[[], Table]] = {
    "stages": lambda: stage_table([replace(STAGES[1], name=NAME)]),
    "scores": lambda: score_table([], NAME),
    "profile": lambda: profile_table(Profile(NAME, 1, {"rest": 1.0}, 1.0, {}, 1.0, NAME, 0)),
    "efficiency": lambda: efficiency_table(
        Efficiency({"device": NAME, "threads": 1, "torch": "", "note": NAME}, student=Measured(dtype=NAME))
    ),
    "evaluation": lambda: evaluation_table(Evaluation((TaskScore(NAME),), {NAME: Interval(1.0)}, None, None, {}, {})),
}


@pytest.mark.parametrize("what", TABLES)
def test_names_are_printed_as_they_are(what: str) -> None:
    """Wide enough for no name to be broken."""
    own, other = io.StringIO(), io.StringIO()
    terminal(own).print(TABLES[what](), width=400)
    Console(file=other, width=400).print(TABLES[what]())
    assert NAME in own.getvalue()
    assert other.getvalue() == own.getvalue()


def test_the_plan_and_the_end_of_a_run_say_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"stage": NAME, "objective": "hidden", "params": 1, "block_params": 1, "steps": 1, "tokens": 1}]
    print_plan([{**row, "train_seconds": 0.0} for row in rows])
    finish._print_end([], tmp_path / NAME / "report.html", tmp_path / NAME / "model")
    out = capsys.readouterr().out
    assert f"warning: stage {NAME!r} (hidden)" in out
    assert f"report: {tmp_path / NAME / 'report.html'}" in out
    assert f"model:  {tmp_path / NAME / 'model'}" in out
