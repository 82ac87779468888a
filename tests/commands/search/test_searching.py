"""`iskd search` and `experiment=budget`: from a budget to a finished student, by a search of its own or a plan file."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from iskd.commands import compose
from iskd.commands.search import FRONT, front_table, main, searching, write_plans
from iskd.commands.search.searching import plans_of
from iskd.commands.values.config import as_meant, object_of
from iskd.export.student import native_config
from iskd.plan.budget_plan import KEEP, BudgetPlan, choice_map, read_plan
from iskd.report import write_report
from iskd.report.budget import choice_table
from iskd.report.terminal import terminal
from iskd.schedules.budget import Budget, RefusedError, edits_of
from iskd.schedules.budget.options import options_of
from iskd.training import run
from tests.commands.test_cli import ROOT

TINY = [
    *("model=tiny", "model.num_layers=5", "data=sample", "data.seq_len=32", "data.val_tokens=512", "trainer=cpu"),
    *("budget.fit_tokens=256", "budget.held_tokens=96", "budget.score_tokens=256", "budget.epochs=0"),
    *("trainer.progress=false", "budget.rounds=1"),
]
RUN = [
    *("experiment=budget", "schedule.tokens=512", "run.fit_tokens=128", "refit.output.tokens=256"),
    *("refit.output.held_tokens=96", "run.efficiency_seconds=0", "run.samples=0", "run.mfu=false", "export=false"),
    "run.measure_before=false",
]


def parts(folder: Path, *words: str, **others: Any) -> Any:
    return compose.parts([*TINY, *RUN, f"cache_dir={folder}/cache", *words], folder / "run", **others)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[BudgetPlan]]:
    """A folder whose cache has a library, and the plans of three budgets."""
    folder = tmp_path_factory.mktemp("search")
    words = [*TINY, "budget=default", "budget.params=[0.9,70%,0.4]", "budget.use=[slim_50,no_attention,merge,remove]"]
    config, _ = compose.compose_config([*words, f"cache_dir={folder}/cache"], folder)
    return folder, plans_of(config)


def test_many_budgets_are_solved_from_one_library(found: Any, tmp_path: Path) -> None:
    folder, plans = found
    assert len(list((folder / "cache" / "budget").iterdir())) == 1
    assert [plan.asked["params"] for plan in plans] == [0.9, "70%", 0.4]
    sizes, kls = ([plan.costs["params"] for plan in plans], [plan.measured_kl for plan in plans])
    assert sizes == sorted(sizes, reverse=True)
    assert all(kl > 0 for kl in kls)
    front, *files = write_plans(tmp_path, plans)
    assert front.name == FRONT
    assert [read_plan(file) for file in files] == plans
    with front.open() as opened:
        rows = list(csv.DictReader(opened))
    assert [float(row["params"]) for row in rows] == sizes
    assert [row["plan"] for row in rows] == [file.name for file in files]
    assert rows[0]["choice"].split() == list(plans[0].choice)
    with terminal().capture() as _:
        terminal().print(front_table(plans))


def test_a_student_is_not_taken_for_a_teacher(tmp_path: Path) -> None:
    student = run(
        compose.parts(
            [
                *("model=tiny", "data=sample", "data.seq_len=32", "trainer=cpu", "schedule=oneshot", "edit=remove"),
                *("schedule.layers=[2]", "schedule.tokens=64", "refit=[none]", "data.val_tokens=64"),
                *("run.efficiency_seconds=0", "run.samples=0", "run.mfu=false", "run.measure_before=false"),
            ],
            tmp_path / "run",
        )
    ).model_dir
    words = [*TINY, "budget=default", "budget.params=0.7", "budget.use=[remove]", f"cache_dir={tmp_path}/cache"]
    words = [word.replace("model=tiny", f"model={student}") for word in words if not word.startswith("model.")]
    config, _ = compose.compose_config(words, tmp_path)
    with pytest.raises(
        ValueError, match=r"is a student: give model= its teacher, or take the student itself for one: reference="
    ):
        plans_of(config)
    config, _ = compose.compose_config([*words, f"reference={student}"], tmp_path)
    [plan] = plans_of(config)
    assert len(plan.choice) < 6


def test_a_plan_file_becomes_a_student_of_just_that_size(found: Any, tmp_path: Path) -> None:
    folder, plans = found
    file = plans[1].write(tmp_path / "plan.json")
    made = parts(tmp_path, f"budget.plan={file}", f"cache_dir={folder}/cache")
    result = run(made)
    assert sorted(result.record.edits, key=repr) == sorted(edits_of(plans[1]), key=repr)
    assert result.final.params == plans[1].costs["params"]
    assert sum(stage.tokens for stage in result.stages[1:2]) == 0 or len(choice_map(plans[1])) <= 2
    assert result.final.tokens >= 512
    assert read_plan(tmp_path / "run" / "budget.json") == plans[1]
    page = write_report(tmp_path / "run").read_text()
    assert "What every layer became." in page
    assert "budget.json" in page
    # what a resumed run finds: its own plan, without another search
    again = parts(tmp_path, f"budget.plan={file}", f"cache_dir={folder}/cache", resume=True)
    assert again.schedule.steps == made.schedule.steps
    (tmp_path / "run" / "budget.json").write_text(json.dumps({**plans[1].to_json(), "choice": ["keep"] * 4}))
    (page,) = [write_report(tmp_path / "run").read_text()]
    assert "budget.json" in page


def test_a_run_searches_for_itself_and_says_what_it_found(
    tmp_path: Path, found: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, plans = found
    words = ["budget.params=0.4", "budget.use=[slim_50,no_attention,merge,remove]", f"cache_dir={folder}/cache"]
    made = parts(tmp_path, *words, "plan_only=true")
    run(made)
    plan = read_plan(tmp_path / "run" / "budget.json")
    assert plan.choice in {each.choice for each in plans[2].tried}, "the best of the same plans, once refitted"
    said = capsys.readouterr().out
    assert "budget: what every layer becomes" in said
    assert f"{plan.costs['params']:,.0f}" in said
    stages = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert stages[-1]["params"] == plan.costs["params"], "the plan of the run has the very size"
    assert stages[-1]["tokens"] >= 512
    assert not any(row["tokens"] for row in stages[:-1])
    table = choice_table(plan)
    assert table.row_count == len(choice_map(plan))


@pytest.mark.slow
def test_a_native_plan_is_one_that_plain_transformers_opens(tmp_path: Path, found: Any) -> None:
    folder, _ = found
    made = parts(tmp_path, "budget.params=0.7", "budget.native=true", f"cache_dir={folder}/cache")
    plan = read_plan(tmp_path / "run" / "budget.json")
    assert plan.native
    assert set(plan.options) <= {"slim_75", "slim_50", "slim_30", "mlp_50", "merge", "remove"}
    result = run(made)
    assert native_config(result.student) is not None


def test_a_refit_that_the_teacher_cannot_have_is_refused_before_the_search(tmp_path: Path) -> None:
    """Behind what Gemma 2 adds stands a norm: nothing is fitted or scored for a plan that the run would refuse."""
    words = ["budget.params=0.6", "budget.use=[remove]", "model.config.model_type=gemma2", "+model.config.head_dim=16"]
    with pytest.raises(
        ValueError, match=r"refit=output re-solves .* \(gemma2\) a norm stands behind it: use refit=local"
    ):
        parts(tmp_path, *words)
    assert not (tmp_path / "cache" / "budget").exists()


@pytest.mark.slow
def test_processes_that_torchrun_starts_find_the_plan_of_one(tmp_path: Path) -> None:
    """In processes of its own: they share the fits, take one plan, and train its student together."""
    words = ["budget.params=0.6", "budget.use=[slim_50,no_attention]", "budget.rounds=0"]
    parts(tmp_path / "alone", *words, "plan_only=true")
    many = [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "train.py")),
        *(word for word in TINY if word != "trainer=cpu"),
        *(*RUN, *words, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"),
        *(f"cache_dir={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *many], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    plan = read_plan(tmp_path / "run" / "budget.json")
    assert plan.choice == read_plan(tmp_path / "alone" / "run" / "budget.json").choice
    stages = json.loads((tmp_path / "run" / "stages.json").read_text())
    assert stages[-1]["params"] == plan.costs["params"]
    assert stages[-1]["tokens"] >= 512
    files = [sorted(path.name for path in folder.glob("cache/budget/*/*")) for folder in (tmp_path, tmp_path / "alone")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["budget.params=0.5", "schedule=oneshot"], "budget= finds the steps of schedule=mixed: set that too"),
        (["budget.params=0.5", "schedule.steps=[{edit: remove, count: 1}]"], "leave schedule.steps out"),
        (["budget.plan=nowhere.json"], r"budget\.plan=.*nowhere\.json: there is no such file"),
        ([], "say how large or fast the student may be"),
        (["budget.params=[0.5,0.4]", "budget.use=[remove]"], "iskd search solves several"),
        (["budget.params=1.0", "budget.use=[remove]"], "every layer is kept, so nothing would be edited"),
        (["budget.params=0.5", "budget.use=[]"], r"budget\.use=\[\] leaves nothing"),
        (["budget.params=0.001", "budget.use=[slim_50]"], r"budget\.params=0\.001 cannot be met .* smallest student"),
        (["budget.param=0.5"], "budget has no key|param"),
        (["budget.params=0.5", "budget.use=[remove]", "budget.context=4000"], "is longer than the context of 512"),
    ],
)
def test_what_cannot_work_is_told(words: list[str], said: str, tmp_path: Path, found: Any) -> None:
    with pytest.raises(ValueError, match=said):
        parts(tmp_path, *words, f"cache_dir={found[0]}/cache")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("budget.options=[]", r"budget\.options=\[\] is a list, and that key takes keys, as in \{A: 1\}"),
        ("budget.options=5", r"budget\.options=5 must be keys"),
        ("+budget.options.x=5", r"budget\.options\.x=5 says nothing of an edit"),
        ("+budget.options.x={edit: drop}", r"budget\.options\.x\.edit=drop must be replace or remove"),
        (
            "+budget.options.x={edit: convert, mixer: glaa}",
            r"options\.x\.mixer='glaa' is no choice \(did you mean gla\?\)",
        ),
        ("+budget.options.x={edit: convert, mixer: {}}", r"options\.x\.mixer=\{\} is no choice"),
        ("+budget.options.x={edit: convert, mixer: {name: gla, rnak: 4}}", r"options\.x\.mixer\.rnak is no key"),
        ("+budget.options.x={edit: replace, block: {name: slim, ratio: 3}}", r"options\.x\.block\.ratio=3 must be"),
        ("+budget.options.window.mixers={gla: odd}", r"options\.window\.mixers: an option has one mixer"),
        ("+budget.options.slim_50.block.foo.bar=1", r"options\.slim_50\.block\.foo is no key"),
        ("budget.options.slim_50.edit=remove", r"slim_50\.block does not go with edit: remove; drop it, or give"),
    ],
)
def test_options_of_every_wrong_shape_are_told_in_a_sentence(word: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said) as told:
        options_named(tmp_path, word)
    assert "\n" not in str(told.value)


def options_named(folder: Path, *words: str) -> list[Any]:
    config, _ = compose.compose_config([*TINY, "budget=default", "budget.params=0.5", *words], folder)
    budget = object_of(as_meant(config).budget)
    return options_of(budget.options, budget.use)


def test_an_option_names_its_part_as_the_command_line_does(tmp_path: Path) -> None:
    words = (
        "+budget.options.x={edit: convert, mixer: {name: gla, rank: 4}}",
        "+budget.options.y={edit: convert, mixer: gla}",
    )
    found = {option.name: option.described() for option in options_named(tmp_path, *words)}
    full = {"_target_": "iskd.mixers.gla.GLA", **found["x"]["mixer"], "rank": found["y"]["mixer"]["rank"]}
    assert found["x"]["mixer"]["rank"] == 4
    assert found["y"]["mixer"] == full


def test_the_command_line_has_it(
    tmp_path: Path, found: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, "budget.params=[0.9,0.4]", "budget.use=[slim_50,no_attention,merge,remove]"]
    words += [f"cache_dir={found[0]}/cache", f"hydra.run.dir={tmp_path}/out"]
    monkeypatch.setattr(sys, "argv", ["iskd", *words])
    main()
    there = {file.name for file in (tmp_path / "out").iterdir()}
    assert {FRONT, "plan-params-0.4.json", "plan-params-0.9.json"} <= there
    assert "plans by budget" in capsys.readouterr().out
    assert KEEP in read_plan(tmp_path / "out" / "plan-params-0.9.json").choice
    assert Budget(params=0.5).asked == {"params": 0.5}


def test_plans_are_written_before_other_budgets_are_refused(
    tmp_path: Path, found: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def some(_config: Any) -> Any:
        raise RefusedError("budget.decode_ms=1.0 cannot be met", found[1][:2])

    monkeypatch.setattr(searching, "plans_of", some)
    monkeypatch.setattr(sys, "argv", ["iskd", *TINY, "budget.decode_ms=[3,2,1]", f"hydra.run.dir={tmp_path}/out"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    there = {file.name for file in (tmp_path / "out").iterdir()}
    assert {FRONT, "plan-params-0.9.json", "plan-params-70_.json"} <= there
    assert "error: budget.decode_ms=1.0 cannot be met" in capsys.readouterr().err


def test_refits_that_no_plan_could_carry_out_are_refused_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iskd.commands.build.within_budget.plan_for", None)
    words = ("budget.params=0.7", "budget.use=[remove]", "refit=[magnitude,output]")
    with pytest.raises(ValueError, match=r"refit=magnitude .* and refit=output would aim at states"):
        parts(tmp_path, *words)
