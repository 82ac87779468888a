"""One page over many runs: which folders are runs, what differs between them, who is on the Pareto front."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from iskd.evaluation.results import AtContext
from iskd.plan import StageResult
from iskd.report import write_report
from iskd.report.figures import pareto_front
from iskd.report.figures.context import Line, against_context, look_of
from iskd.report.figures.score_curves import score_curve
from iskd.report.read_run import read_run
from iskd.report.run_list import differing, find_runs, flatten, read_runs, telling
from iskd.report.runs_page import runs_file, write_runs_report
from iskd.training.deciding import no_better_than_guessing
from tests.run_folders import EFFICIENCY, EVALUATION, STAGES, Balanced, measured, stage, write_run

HOSTILE = "</pre><script>alert('$x$')</script><img src=https://example.org/a.png>-->&"


def config(seed: int = 0, lr: float = 1e-4, importance: str = "ablation.Ablation", extra: str = "") -> str:
    return (
        f"seed: {seed}\nresume: null\nname: demo\nschedule:\n  lr: {lr}\n  layers: [1, 2]\n"
        f"importance:\n  _target_: iskd.importance.{importance}\n{extra}logger: {{}}\n"
    )


def ending(retention: float, params: int = 3_000_000, **changes: object) -> list[StageResult]:
    """Teacher and one stage."""
    return [stage(0), stage(1, retention=retention, params=params, **changes)]


def write_many(folder: Path) -> Path:
    """A folder with runs of every fate: seeds, a sweep inside, rolled back, stopped, dead before the first stage."""
    for seed, retention in enumerate((0.90, 0.94)):
        write_run(folder / f"good-{seed}", ending(retention), config=config(seed))
    other = config(importance="fixed.Fixed", extra="  order: [3, 1]\n")
    write_run(folder / "fixed-0", STAGES, config=other, files={"efficiency": EFFICIENCY})
    for job in range(2):
        write_run(folder / "sweep" / str(job), ending(0.7, 2_500_000 + job), config=config(lr=job + 1.0))
    (folder / "sweep" / "multirun.yaml").write_text("hydra: {}\n")
    write_run(folder / "lost-0", ending(0.5, 3_500_000, status="rolled_back"), config=config(lr=3.0))
    write_run(folder / "stopped-0", ending(0.8), config=config(lr=4.0), finished=False)
    write_run(folder / "nan-0", ending(math.nan, ppl=math.inf), config=config(lr=5.0))
    unsaid = ending(0.01, ppl=7.7e135, events=[no_better_than_guessing({"ppl": 7.7e135, "teacher_ppl": 9.0}, 257)])
    write_run(folder / "guess-0", unsaid, config=config(lr=8.0))
    for name, export in (("unsaved-0", "export:\n  dtype: auto\n"), ("unasked-0", "export: false\n")):
        write_run(folder / name, ending(0.6), config=config(lr=9.0) + export)
        shutil.rmtree(folder / name / "model")
    write_run(folder / "begun-0", [stage(0)], config=config(lr=10.0), finished=False)
    (folder / "dead-0").mkdir()
    (folder / "dead-0" / "config.yaml").write_text(config(lr=6.0))
    return folder


def test_the_front_is_what_nobody_beats() -> None:
    generator = random.Random(0)
    for better in (False, True):
        points = [(generator.randrange(9) / 1.0, generator.randrange(9) / 1.0) for _ in range(30)]
        front = pareto_front(points, more_is_better=better)
        sign = -1 if better else 1
        beaten = {
            i
            for i, (cost, quality) in enumerate(points)
            for other, (less, more) in enumerate(points)
            if sign * less <= sign * cost and more >= quality and ((less, more) != (cost, quality) or other < i)
        }
        assert sorted(front) == sorted(set(range(30)) - beaten)
        assert [points[i][0] for i in front] == sorted({points[i][0] for i in front}, reverse=better)


def test_differences_are_keys_whose_values_differ() -> None:
    one = dict(flatten({"a": {"b": 1, "c": [1, 2]}, "part": {"_target_": "x.A", "only": 3, "both": 1}, "none": None}))
    two = dict(flatten({"a": {"b": 2, "c": [1, 2]}, "part": {"_target_": "x.B", "both": 2}, "none": None}))
    assert one["a.c"] == "[1, 2]"
    assert one["none"] == "null"
    keys = differing([one, two])
    assert keys == ["a.b", "part._target_", "part.only", "part.both"]
    assert telling([one, two], keys) == ["a.b", "part._target_", "part.both"], "part.only comes with its part"
    assert differing([one, one]) == []


def test_runs_are_found_in_sweeps_and_once(tmp_path: Path) -> None:
    many = write_many(tmp_path / "runs")
    (many / "teacher.json").write_text("{}")
    (many / "empty").mkdir()
    names = [path.name for path in find_runs([many])[0]]
    assert names == [
        *("begun-0", "dead-0", "fixed-0", "good-0", "good-1", "guess-0", "lost-0", "nan-0", "stopped-0", "0", "1"),
        *("unasked-0", "unsaved-0"),
    ]
    paths, problems = find_runs([*sorted(many.iterdir()), many / "good-0" / ".." / "good-0"])
    assert [path.name for path in paths] == names
    assert len(problems) == 2
    assert "empty: no stages.json and no config.yaml" in problems[0]
    assert "teacher.json: not a folder" in problems[1]
    assert runs_file([many]) == many / "runs.html"
    assert runs_file([many / "good-0", many / "sweep" / "1"]) == many / "runs.html"


def test_every_run_has_its_fate(tmp_path: Path) -> None:
    runs, problems = read_runs([write_many(tmp_path / "runs")])
    assert {run.name: run.marks for run in runs} == {
        "begun-0": ["stopped before the end of its first stage (resume= goes on)"],
        "dead-0": ["no stage finished"],
        "fixed-0": ["1 rolled back"],
        "good-0": [],
        "good-1": [],
        "guess-0": ["no better than guessing"],
        "lost-0": ["1 rolled back", "no edit kept"],
        "nan-0": ["diverged"],
        "stopped-0": ["stopped after stage 1 (resume= goes on)"],
        "sweep/0": [],
        "sweep/1": [],
        "unasked-0": [],
        "unsaved-0": ["not exported (resume= goes on)"],
    }
    assert not problems
    good = [run for run in runs if run.name.startswith("good")]
    assert good[0].setting == good[1].setting, "a seed makes no new configuration"


@pytest.mark.filterwarnings("error")
def test_page_is_whole_and_self_contained(tmp_path: Path) -> None:
    many = write_many(tmp_path / "runs")
    (many / "good-0" / "report.html").write_text("")
    write_run(many / "broken-0", STAGES, config=config(lr=7.0))
    (many / "broken-0" / "stages.json").write_text("[{")
    write_run(many / "odd-0", ending(0.6), config="a: [")
    (many / "odd-0" / "efficiency.json").write_text("3")
    out = write_runs_report([many], tmp_path / "pages" / "runs.html")
    page = out.read_text(encoding="utf-8")
    parsed = Balanced(page)
    for text in (
        "broken-0: ",
        "not valid JSON",
        "config.yaml cannot be read",
        "efficiency.json must hold a JSON object",
    ):
        assert text in parsed.text
    for text in ("14 runs of 12 configurations", "92.0 (90.0 to 94.0)", "mean of 2", "Ablation", "Fixed", "diverged"):
        assert text in parsed.text
    assert page.count("<svg") == 5, "parameters, decoding and contexts of the one measured, speed and stages of all"
    assert not {"script", "img"} & parsed.tags
    assert {target for target in parsed.targets if not target.startswith("#")} == {"compared.csv"}, (
        "no way up from here"
    )
    head, *rows = (out.parent / "compared.csv").read_text(encoding="utf-8").splitlines()
    assert head.startswith("iskd_run,marks,retention %,")
    assert len(rows) == 14
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert "importance.order" in parsed.text
    assert page.index("importance.order") > page.index("<details>"), "it comes with its part, so only the list has it"
    assert "resume" not in parsed.text.replace("(resume= goes on)", ""), "no setting of a run"
    assert write_runs_report([many], out).read_text(encoding="utf-8") == page
    inside = Balanced(write_runs_report([many], many / "runs.html").read_text(encoding="utf-8"))
    assert [target for target in inside.targets if not target.startswith("#")] == ["good-0/report.html", "compared.csv"]


@pytest.mark.filterwarnings("error")
def test_tasks_count_where_all_runs_have_them(tmp_path: Path) -> None:
    files = {"evaluation": EVALUATION, "efficiency": EFFICIENCY}
    for seed in range(2):
        write_run(tmp_path / f"run-{seed}", config=config(seed), files=files)
    page = write_runs_report(sorted(tmp_path.iterdir()), tmp_path / "runs.html").read_text(encoding="utf-8")
    text = Balanced(page).text
    assert "Retention: its mean over tasks" in text
    assert "decode at 2048 (ms/token)" in text
    assert page.count("<svg") == 4, "with every run's latency measured, scoring speed says nothing more"


@pytest.mark.parametrize(
    ("key", "same"),
    [("keep", True), ("measure_before", True), ("samples", True), ("score_tokens", False), ("fit_tokens", False)],
)
def test_upkeep_makes_no_new_configuration_and_tokens_that_a_student_comes_from_do(
    key: str, same: bool, tmp_path: Path
) -> None:
    for value in (1, 2):
        write_run(tmp_path / f"run-{value}", ending(0.9), config=config() + f"run:\n  {key}: {value}\n")
    first, second = read_runs([tmp_path])[0]
    assert (first.setting == second.setting) is same


@pytest.mark.parametrize(
    "other",
    [
        *({"seed": 1}, {"limit": 50}, {"data": {"piqa": "another file"}}, {"excluded": 3}),
        *({"fewshot": 5}, {"items": {"cbt_sentence": "another file"}}),
    ],
)
def test_runs_that_were_asked_other_items_are_not_drawn_on_one_axis(other: dict[str, Any], tmp_path: Path) -> None:
    """Their validation text is the same, so that is drawn, and the page says why."""
    settings = {"seed": 0, "limit": 100, "data": {"piqa": "a file"}, "excluded": 0, "device": "cpu"}
    for number, changes in enumerate(({}, {"device": "NVIDIA H200"}, other)):
        evaluation = {**EVALUATION, "settings": {**settings, **changes}}
        write_run(tmp_path / f"run-{number}", config=config(number), files={"evaluation": evaluation})

    def said(count: int) -> str:
        folders = [tmp_path / f"run-{number}" for number in range(count)]
        return Balanced(write_runs_report(folders, tmp_path / "runs.html").read_text(encoding="utf-8")).text

    assert "Retention: its mean over tasks" in said(2)
    assert "Retention: on validation text" in said(3)
    assert "the runs were asked different items" in said(3)
    assert "task retention %" in said(3)


@pytest.mark.filterwarnings("error")
def test_a_sweep_over_mixers_shows_time_and_bytes_against_the_context(tmp_path: Path) -> None:
    """A line per run in a colour per configuration, named by its mixer; one teacher; a column of bytes."""
    for job in range(20):
        cost = copy.deepcopy(EFFICIENCY)
        cost["student"] = measured(0.8, (128, 512, 2048), 1024.0 * (job + 1), growing=False)
        if job == 7:
            del cost["student"]["contexts"][2]
            cost["student"]["left_out"] = {"2048": "not enough memory"}
        mixer = f"mixer:\n  _target_: iskd.mixers.m{job // 2}.Mixer{job // 2}\n"
        write_run(tmp_path / f"run-{job}", config=config(job % 2, extra=mixer), files={"efficiency": cost})
    page = write_runs_report([tmp_path], tmp_path / "runs.html").read_text(encoding="utf-8")
    text = Balanced(page).text
    assert "cache or state at 512 tokens (MB)" in text, "the longest context at which all were measured"
    assert "Cost against context" in text
    assert "Not measured: run-7 at 2,048 tokens (not enough memory)." in text
    drawing = next(figure for figure in page.split("<figure>") if "Time of a token (ms)" in figure)
    legend = Balanced(drawing.split("<figcaption>")[0]).text
    assert legend.count("teacher") == 1
    for number in range(10):
        assert f"{number + 1} Mixer{number}" in legend
    lines = against_context([Line("a", [AtContext(8, 1.0, 0.1, 5.0)], look_of(0))])
    assert lines is None, "one context is no line"


def test_hostile_runs_stay_text(tmp_path: Path) -> None:
    for i in range(2):
        write_run(
            tmp_path / f"{i} <b>'&", ending(0.5), config=json.dumps({"name": HOSTILE * (i + 1), f"{HOSTILE}{i}": 1})
        )
    parsed = Balanced(write_runs_report([tmp_path], tmp_path / "runs.html").read_text(encoding="utf-8"))
    assert not {"script", "img"} & parsed.tags
    assert parsed.text.count(HOSTILE) >= 6
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    (tmp_path / "0 <b>'&" / "config.yaml").write_text(bomb)
    assert "more than 5000 keys" in read_runs([tmp_path])[1][0]


def test_no_run_at_all_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folders in ([tmp_path], [tmp_path / "nowhere"], []):
        with pytest.raises(ValueError, match=r"no run in .*stages\.json or config\.yaml"):
            write_runs_report(folders, tmp_path / "out" / "runs.html")
    assert not (tmp_path / "out").exists()


def test_what_is_somebody_elses_stays(tmp_path: Path) -> None:
    """Pages and tables replace their own kind alone; a link under their name is replaced and never followed."""
    run = write_run(tmp_path / "run", STAGES)
    for name in ("stages.csv", "compared.csv"):
        (tmp_path / name).write_text("mine,too\n")
        (run / name).write_text("mine,too\n")
    assert "stages.csv in this folder is not ours" in write_report(run).read_text(encoding="utf-8")
    assert "compared.csv beside this page" in write_runs_report([run], tmp_path / "runs.html").read_text("utf-8")
    assert {file.read_text() for file in (run / "stages.csv", tmp_path / "compared.csv")} == {"mine,too\n"}
    for page, write in (
        (run / "report.html", lambda: write_report(run)),
        (tmp_path / "runs.html", lambda: write_runs_report([run], tmp_path / "runs.html")),
    ):
        page.write_text("<html>mine</html>")
        with pytest.raises(ValueError, match=f"{page.name} is no page of iskd's and is not overwritten"):
            write()
        assert page.read_text() == "<html>mine</html>"


def asked_along(task: str = "copy", items: int = 6, teacher: float = 0.8) -> dict[str, Any]:
    score = {"task": task, "metric": "led", "items": items, "student": 0.4, "teacher": teacher}
    bounds = {"value": 0.5, "low": 0.4, "high": 0.6}
    return {"tasks": [{**score, "retention": bounds}], "retention": {}, "mean_retention": bounds, "text": None}


def asked_run(folder: Path, name: str, keys: str = "", **asked: Any) -> None:
    stages = [stage(number, evaluation=asked_along(**asked)) for number in (0, 1)]
    write_run(folder / name, stages, config=config() + f"eval:\n  seed: 0\n{keys}")


def along(folder: Path) -> str:
    page = write_runs_report([folder], folder / "runs.html").read_text(encoding="utf-8")
    return page[page.index("Along the runs") :]


@pytest.mark.parametrize(
    ("other", "by_tasks"),
    [({}, True), ({"task": "piqa"}, False), ({"items": 7}, False), ({"keys": "  limit: 3\n"}, False)],
)
def test_runs_that_were_asked_other_items_share_no_axis(other: dict[str, Any], by_tasks: bool, tmp_path: Path) -> None:
    asked_run(tmp_path, "a")
    asked_run(tmp_path, "b", **other)
    said = along(tmp_path)
    assert ("its mean over the tasks that every run was asked" in said) is by_tasks
    assert ("on the validation text of each run" in said) is not by_tasks
    assert ("the runs were asked different items" in said) is not by_tasks


@pytest.mark.parametrize("other", [{"task": "piqa"}, {"items": 7}])
def test_a_run_that_was_continued_with_other_tasks_has_no_mean_along_it(other: dict[str, Any], tmp_path: Path) -> None:
    """What a student loses is not to be told from what other tasks say; of tasks only the same items are one line."""
    asked = [stage(number, evaluation=asked_along(**(other if number == 2 else {}))) for number in range(3)]
    write_run(tmp_path / "run", asked, config=config() + "eval:\n  seed: 0\n")
    assert "on the validation text of each run" in along(tmp_path)
    curve = score_curve("run", read_run(tmp_path / "run").stages, 4)
    assert not curve.by_tasks
    assert [point.tasks is None for point in curve.points] == [True, True, False]


def test_no_run_is_left_out_without_a_word(tmp_path: Path) -> None:
    asked_run(tmp_path, "asked")
    for number in range(13):
        write_run(tmp_path / f"run-{number:02d}", ending(0.9), config=config(number))
    write_run(tmp_path / "begun", [stage(0)], config=config(), finished=False)
    said = along(tmp_path)
    assert said.count("in the order of the table") == 2, "14 lines are two figures"
    assert 'id="scores-' in said
    assert 'id="scores1-' in said
    assert "Without a line, as no stage after the teacher was kept: begun." in said
    assert "not asked after every stage (eval.every=stage) were run-00, run-01," in said
