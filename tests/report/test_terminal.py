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
from iskd.report.stage_rows import SPARE
from iskd.report.terminal import print_table, terminal
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
def test_names_are_printed_as_they_are(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide enough for no name to be broken."""
    monkeypatch.setenv("COLUMNS", "400")
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


WIDE: dict[str, Callable[[], Table]] = {
    **TABLES,
    "stages": lambda: stage_table([replace(each, tokens_per_s=123456.0, ppl=12345.6) for each in STAGES]),
    "evaluation": lambda: evaluation_table(
        Evaluation(
            tuple(TaskScore(name, "choice", "acc_norm", 1000, 0.2, 0.5, 0.01, 0.6, 0.01, BAND, BAND) for name in NAMES),
            {"choice": BAND}, BAND, None, {}, {},
        )
    ),
}  # fmt: skip
NAMES = ("arc_challenge", "winograd_wsc", "lambada")
BAND = Interval(0.876, 0.812, 0.934)
SPARES = {"stages": SPARE, "evaluation": ("chance %", "metric", "items")}


@pytest.mark.parametrize("what", ["stages", "evaluation", "efficiency", "profile"])
@pytest.mark.parametrize("columns", [80, 100])
def test_no_word_is_broken_on_a_narrow_terminal(what: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns are left out, and named, before a number or a name loses a sign."""
    monkeypatch.setenv("COLUMNS", str(columns))
    narrow, wide = io.StringIO(), io.StringIO()
    console = terminal(narrow)
    assert console.width == columns
    print_table(WIDE[what](), spare=SPARES.get(what, ()), console=console)
    monkeypatch.setenv("COLUMNS", "400")
    print_table(WIDE[what](), spare=SPARES.get(what, ()), console=terminal(wide))
    assert max(map(len, narrow.getvalue().splitlines())) <= columns
    both = [
        {word.rstrip(",") for word in said.getvalue().partition("left out here")[0].split() if word.isascii()}
        for said in (narrow, wide)
    ]
    assert both[0] - both[1] == set()
    left = narrow.getvalue().partition("left out here: ")[2].partition(" (")[0]
    assert not left or set(left.split(", ")) <= set(SPARES[what])
    assert "left out here" not in wide.getvalue()


def test_the_width_is_that_of_columns_or_of_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert terminal(io.StringIO()).width == 120
    for columns, width in (("90", 90), ("0", 120), ("many", 120), ("", 120)):
        monkeypatch.setenv("COLUMNS", columns)
        assert terminal(io.StringIO()).width == width
