"""What a user is told before an alignment runs: its objective, its steps, what is too short, what cannot be aligned."""

from __future__ import annotations

import io
import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from iskd.models import sharding
from iskd.plan import Convert, Record, Remove, Replace, Spec, Stage
from iskd.schedules.align import Align
from iskd.schedules.edits import ConvertTo
from iskd.training import Parts, run, stages
from iskd.training.plan_table import ALIGN_STEPS, check_plan, plan_rows, print_plan, too_short
from tests.documents import ROOT
from tests.factories import mixer_specs, tiny
from tests.runs import TOKENS, make_parts, write_text

SPECS = mixer_specs()
GLA = SPECS["gla"]
WITHOUT_MATRIX = ("mamba", "deltaproduct", "mlstm_window")


@pytest.fixture
def make(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Callable[..., Parts]:
    cache = tmp_path_factory.getbasetemp() / "cache"
    return lambda run_dir, **changes: make_parts(run_dir, write_text(tmp_path), cache, **changes)


def objectives(spec: Spec, mixers: str) -> list[str]:
    return [stage.objective for stage in Align(ConvertTo(spec), mixers=mixers).stages]


@pytest.mark.parametrize("name", SPECS)
def test_auto_compares_matrices_where_there_are_some(name: str) -> None:
    has = getattr(SPECS[name].resolve(), "exposes_matrix", False)
    assert objectives(SPECS[name], "auto") == ["matrix" if has else "mixer_output", "hidden", "loss"]
    assert has == (name not in WITHOUT_MATRIX)
    assert objectives(SPECS[name], "matrix") == ["matrix", "hidden", "loss"], "who asks for matrices gets no outputs"


def test_auto_aligns_a_mixer_without_a_matrix_and_matrix_refuses_it(make: Callable[..., Parts], tmp_path: Path) -> None:
    shares: dict[str, Any] = {"mixers_share": 0.4, "hidden_share": 0.2, "tokens": 5 * TOKENS, "layers": [1]}
    strict = make(tmp_path / "strict", schedule=Align(ConvertTo(SPECS["mamba"]), mixers="matrix", **shares))
    with pytest.raises(ValueError, match=r"layer 1: Mamba has no mixing matrix .* schedule\.mixers=mixer_output"):
        run(strict)
    auto = run(make(tmp_path / "auto", schedule=Align(ConvertTo(SPECS["mamba"]), mixers="auto", **shares)))
    plan = json.loads((tmp_path / "auto" / "plan.json").read_text())
    assert [(row["stage"], row["objective"], row["steps"]) for row in plan] == [
        ("teacher", "", 0),
        ("mixers", "mixer_output", 2),
        ("hidden", "hidden", 1),
        ("end to end", "loss", 2),
    ]
    assert auto.stages[1].events[-1].startswith("mixer_output by layer in the last step: 1: ")


def printed(rows: list[Any]) -> str:
    console = Console(file=io.StringIO(), width=120)
    print_plan(rows, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("steps", [1, ALIGN_STEPS - 1, ALIGN_STEPS])
def test_a_stage_too_short_to_align_anything_is_warned_of(steps: int) -> None:
    first, *others = Align(ConvertTo(GLA)).stages
    stages = [replace(first, edits=(Convert(1, GLA),)), *others]
    rows = plan_rows(tiny("llama"), stages, [steps, steps, 1], 64, 0.0)
    assert [(row["steps"], row["tokens"]) for row in rows] == [(n, 64 * n) for n in (0, steps, steps, 1)]
    told, text = too_short(rows), printed(rows)
    assert all(word in text for word in ("objective", "steps", "matrix", "hidden", "loss"))
    if steps == ALIGN_STEPS:
        assert not told
        assert "warning" not in text
        return
    assert len(told) == 2, "a short end does no harm"
    for sentence, stage in zip(told, ("mixers", "hidden"), strict=True):
        assert sentence.startswith(f"stage {stage!r} ")
        assert f"has {steps} optimizer steps" in sentence
        assert f"raise schedule.tokens, or schedule.{stage}_share" in sentence
        assert f"warning: {sentence}" in text


def test_a_run_warns_with_its_plan(make: Callable[..., Parts], tmp_path: Path, capsys: Any) -> None:
    parts = make(tmp_path / "run", schedule=Align(ConvertTo(GLA), tokens=60 * TOKENS, hidden_share=0.5))
    run(replace(parts, options=replace(parts.options, plan_only=True)))
    [warning] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: stage 'mixers' (matrix) has 2 optimizer steps")


def test_a_student_in_shards_is_refused_before_anything_is_measured(
    make: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh run and a resumed one; without alignment the same schedule is not refused."""

    def measured(*_: Any, **how: Any) -> Any:
        raise RuntimeError("the teacher was measured")

    monkeypatch.setattr(sharding, "is_sharded", lambda _: True)
    monkeypatch.setattr(stages, "measure_quality", measured)
    settings: dict[str, Any] = {"tokens": 10 * TOKENS, "mixers_share": 0.2, "hidden_share": 0.2}
    for name, resume in (("fresh", False), ("resumed", True)):
        with pytest.raises(ValueError, match=r"use trainer=ddp, or schedule\.mixers=null schedule\.hidden=false"):
            run(make(tmp_path / name, schedule=Align(ConvertTo(GLA), **settings), resume=resume))
    plain = Align(ConvertTo(GLA), mixers=None, hidden=False, **settings)
    with pytest.raises(RuntimeError, match="the teacher was measured"):
        run(make(tmp_path / "plain", schedule=plain))


def test_the_table_of_the_grid_says_what_its_columns_mean(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"status": "kept", "kl": 1.0, "ppl": 9.0, "retention": 0.5, "params": 1000, "tokens": 64, "seconds": 1.0}
    for name in ("gla-matrix", "mamba-matrix"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stages.json").write_text(json.dumps([row]))
        (tmp_path / name / "report.html").touch()
    script = ROOT / "experiments" / "subquadratic-stories" / "table.py"
    monkeypatch.setattr(sys, "argv", ["table.py", str(tmp_path), str(tmp_path / "results.csv")])
    runpy.run_path(str(script), run_name="__main__")
    text = capsys.readouterr().out
    assert text.count("| mamba* | 1 k |") == text.count("| gla | 1 k |") == 2
    assert "* mamba has no mixing matrix: its columns '+ matrix' and 'all' align outputs" in text


def test_mixers_larger_than_their_attention_do_not_hide_what_removals_save() -> None:
    """A student may grow by conversions; what is meant to shrink it has to."""
    teacher, mixer = tiny("llama", layers=4), SPECS["gated_deltanet"]
    convert = Stage("convert", tuple(Convert(layer, mixer) for layer in (0, 1, 2)))
    check_plan(teacher, [convert], Record(4))
    check_plan(teacher, [Stage("remove", (Remove(3),)), convert], Record(4))
    wide = Replace(3, Spec("iskd.blocks.bottleneck.Bottleneck", {"reduction": 1, "layers": 2}))
    with pytest.raises(ValueError, match=r"the edits remove nothing: .* block parameters .* after, mixers left out;"):
        check_plan(teacher, [convert, Stage("replace", (wide,))], Record(4))
    check_plan(teacher, [convert], Record(4, (Remove(3),)))
