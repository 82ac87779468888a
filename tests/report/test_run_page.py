"""What people look at after a run: stages.json, the stage table, report.html, the picture."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from iskd.evaluation import Interval
from iskd.evaluation.results import evaluation_of
from iskd.plan import StageResult
from iskd.plan.metric_names import METRICS, NOT_LOSSES, X_AXIS
from iskd.plan.results import read_stages, write_stages
from iskd.report import run_page
from iskd.report.figures import style
from iskd.report.figures.edit_map import layer_states
from iskd.report.figures.importance_rounds import rounds
from iskd.report.figures.score_curves import score_curve, task_curves
from iskd.report.figures.timeline import tokens_by_stage
from iskd.report.run_page import picture, write_report
from iskd.report.runs_page import write_runs_report
from iskd.report.stage_rows import COLUMNS, stage_rows, stage_table
from iskd.system import number
from iskd.system.text import layers_text
from tests.documents import ROOT
from tests.run_folders import EFFICIENCY, EVALUATION, LAYERS, LENGTHS, STAGES, Balanced, stage, write_run

_TRAINED = re.compile(r'"(train/[a-z_]+)"')
HOSTILE = "</pre><script>alert('$x$')</script><img src=https://example.org/a.png>-->&"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run with every file that the report always reads."""
    return write_run(tmp_path / "demo")


def test_stage_result_round_trips(tmp_path: Path) -> None:
    odd = stage(6, ppl=math.inf, scores={"0": -math.inf}, before=None)
    path = write_stages(tmp_path, [*STAGES, odd])
    assert read_stages(tmp_path) == [*STAGES, odd]
    assert "Infinity" not in re.sub(r'"-?Infinity"', "", path.read_text()), "non-finite floats are strings: strict JSON"
    assert [p.name for p in tmp_path.iterdir()] == ["stages.json"], "the draft is gone"
    assert math.isnan(StageResult.from_json(stage(1, kl=math.nan).to_json()).kl)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"perplexity": 3.0}, "stage 1: unknown key 'perplexity'; known are index, name"),
        ({"params": 1.5}, "params must be an integer"),
        ({"ppl": "low"}, "ppl must be a number"),
        ({"status": "lost"}, "status must be one of"),
        ({"edits": [{"op": "swap", "layer": 1}]}, r"edits\[0\] must have 'op' in .*'replace'"),
        ({"before": {"loss": 1.0}}, "before must have keys among"),
        ({"scores": {"first": 1.0}}, "scores must have layers as keys"),
    ],
)
def test_a_broken_stage_is_named(change: dict[str, object], message: str, tmp_path: Path) -> None:
    data = stage(1).to_json() | change
    (tmp_path / "stages.json").write_text(json.dumps([data]), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path)


def test_broken_files_are_clear_errors(tmp_path: Path) -> None:
    missing = stage(1).to_json()
    del missing["kl"]
    for text, message in (
        ("[{", "not valid JSON"),
        ("{}", "must hold a list"),
        ("[3]", "a stage must be an object"),
        (json.dumps([missing]), "stage 1: key 'kl' is missing"),
        (json.dumps([stage(1).to_json()] * 2), "indices must differ"),
    ):
        (tmp_path / "stages.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_stages(tmp_path)
    with pytest.raises(ValueError, match="is not a directory"):
        write_report(tmp_path / "nowhere")


def test_metric_names_agree() -> None:
    """Whatever a run logs under train/ beside its terms is known, and no loss."""
    logged = {
        name for file in (ROOT / "iskd" / "training").rglob("*.py") for name in _TRAINED.findall(file.read_text())
    }
    assert X_AXIS in METRICS
    assert set(METRICS) >= NOT_LOSSES == logged - {"train/loss"}


def test_layer_states_follow_only_what_was_kept() -> None:
    states = layer_states(STAGES, LAYERS)
    assert states[0] == ["original"] * LAYERS
    assert states[2][2] == "compact", "the rolled-back row shows what was tried"
    assert states[-1] == ["original", "compact", "original", "removed", "converted", "original"]
    with pytest.raises(ValueError, match="edits layer 4, but the teacher has 3 layers"):
        layer_states([stage(1, edits=[{"op": "remove", "layer": 4}])], 3)


def test_tables_have_one_row_per_stage() -> None:
    rows = stage_rows(STAGES)
    assert len(rows) == len(STAGES)
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert rows[1] == [
        "1",
        "replace 1 (Slim)",
        "3.97",
        "99.0",
        "90.00 -> 21.00",
        "0.050",
        "98.0",
        "97.0",
        "5000",
        "100",
        "kept",
    ]
    assert "rolled back" in rows[2]


def test_terminal_rows_do_not_wrap_at_120_columns() -> None:
    edits = [{"op": "replace", "layer": 23, "block": "iskd.blocks.bottleneck.Bottleneck"}]
    sizes = {"params": 3_085_938_688, "block_params": 2_774_773_760, "tokens": 120_000_000, "tokens_per_s": 12_345.0}
    quality = {"ppl": 1234.5, "kl": 12.345, "before": {"ppl": 98_765.4}, "status": "rolled_back"}
    widest = stage(12, name="replace 23", edits=edits, **sizes, **quality)
    table = stage_table([*STAGES, widest])
    assert table.row_count == len(STAGES) + 1
    terminal = io.StringIO()
    Console(width=120, file=terminal).print(table)
    lines = [line.split() for line in terminal.getvalue().splitlines()]
    first = next(number for number, line in enumerate(lines) if line[:1] == ["0"])
    rows = lines[first : first + table.row_count]
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4", "5", "12"]
    assert [row[-1] for row in rows] == ["kept", "kept", "back", "kept", "kept", "kept", "back"]


def test_numbers_keep_their_meaning() -> None:
    assert [number(v) for v in (None, math.nan, math.inf, 0.0, 17.128, 5120.4, 1.5e9, 2e-7)] == [
        "-", "-", "inf", "0", "17.1", "5120", "1.50e+09", "2.00e-07",
    ]  # fmt: skip
    assert layers_text([7, 0, 1, 2, 4, 5]) == "0-2, 4, 5, 7"


def test_report_is_whole_and_self_contained(run_dir: Path) -> None:
    page = write_report(run_dir).read_text(encoding="utf-8")
    parsed = Balanced(page)
    for result in STAGES:
        assert result.name in parsed.text
    for text in ("rolled back", "retention is under the floor", "seed: 7", "2,391,884", "(99 in all)", "2.13.0"):
        assert text in parsed.text
    assert page.count("<svg") == 7
    assert "Not in this report" not in parsed.text
    assert "script" not in parsed.tags
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    files = {target for target in parsed.targets if not target.startswith("#")}
    assert {"metrics.csv", "stages.csv", "stages.json", "config.yaml"} <= files, "raw data is linked and nothing loaded"
    assert all((run_dir / file).is_file() for file in files)
    assert len(set(parsed.ids)) == len(parsed.ids), "figures must not share ids"
    assert {target[1:] for target in parsed.targets if target.startswith("#")} <= set(parsed.ids)
    assert "DejaVu" not in page, "figures use the page's font"
    assert len(page) < 400_000


def test_measurements_are_shown_where_there_are_any(tmp_path: Path) -> None:
    files = {"efficiency": EFFICIENCY, "evaluation": EVALUATION}
    page = write_report(write_run(tmp_path / "all", files=files)).read_text(encoding="utf-8")
    parsed = Balanced(page)
    assert page.count("<svg") == 9
    assert len(set(parsed.ids)) == len(parsed.ids)
    rows = [["peak memory (MB)", "90.0", "72.0", "0.80"], ["cache at 2,048 (MB)", "3.15", "0.262", "0.08"]]
    rows += [
        ["decoding after 512 (ms per token)", "4.00", "3.20", "0.80"],
        ["piqa", "89.7", "84.0 to 95.0", "0.610", "0.680", "-", "200"],
    ]
    for row in rows:
        assert "".join(row) in parsed.text
    for text in ("name cpu of a test; threads 1", "69.8 %", "mean retention, 2 tasks", "sizes.piqa"):
        assert text in parsed.text


@pytest.mark.filterwarnings("error")
def test_what_a_context_costs_is_drawn_and_what_was_left_out_is_told(tmp_path: Path) -> None:
    told = copy.deepcopy(EFFICIENCY)
    told["teacher"]["left_out"] = {"8192": "no time left of 60 s", "odd": "never said", "4096": 3}
    told["student"]["left_out"] = {"8192": "no time left of 60 s"}
    for model in ("teacher", "student"):
        told[model]["contexts"][2]["prefill_seconds"] = None
    page = write_report(write_run(tmp_path / "run", files={"efficiency": told})).read_text(encoding="utf-8")
    text = Balanced(page).text
    for said in (
        "Time of a token (ms)",
        "Cache or state (MB)",
        "Not measured: teacher, student at 8,192 tokens (no time left of 60 s).",
        "At 2,048 tokens no prompt of that length was read",
        "prefill of 2,048 tokens (ms)---",
    ):
        assert said in text
    assert "never said" not in text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("efficiency", [], "efficiency.json must hold a JSON object, got list"),
        ("efficiency", {"machine": "x"}, "neither 'teacher' nor 'student'"),
        (
            "efficiency",
            {"student": {"contexts": [{"context": "long"}, 3, {"context": 8}, {"context": 10**400}], "bytes": "many"}},
            "on",
        ),
        (
            "efficiency",
            {"student": {"contexts": {}}, "teacher": 3, "machine": ["a", "b"]},
            "Measured, not computed, on: a, b",
        ),
        ("evaluation", 3, "evaluation.json must hold a JSON object, got int"),
        ("evaluation", {"tasks": [1, 2], "mean_retention": "high"}, "1, 2"),
        ("evaluation", {"tasks": [], "retention": {"choice": {"value": 0.5}}}, "mean, choice50.0"),
        ("evaluation", {"tasks": {"x": {"student": None, "retention": True}}, "other": {"a": 1}}, "other.a"),
    ],
)
def test_odd_measurements_do_not_fail(name: str, value: object, told: str, tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "odd", files={name: value})).read_text(encoding="utf-8")
    assert told in Balanced(page).text


def test_both_ways_to_list_tasks_are_read() -> None:
    bounds = {"value": 0.9, "low": 0.8, "high": 1.0}
    listed = [{"task": "copy", "student": 0.9, "teacher": 1.0, "retention": bounds, "items": 50, "kind": "generation"}]
    listed += [{"task": "piqa", "student": 0.5, "teacher": 0.0, "retention": None}]
    found = evaluation_of({"tasks": listed, "retention": {"generation": bounds}, "settings": {"seed": 1}})
    by_name = {"copy": {"student": 0.9, "teacher": 1.0, "retention": 0.9, "low": 0.8, "high": 1.0, "items": 50}}
    by_name["copy"]["kind"] = "generation"
    assert found.tasks[:1] == evaluation_of({"tasks": by_name}).tasks
    assert found.tasks[0].retention == found.mean == Interval(0.9, 0.8, 1.0)
    assert found.tasks[1].retention is None
    assert (found.settings, found.rest) == ({"seed": 1}, {})
    several = {kind: {"value": value} for kind, value in (("choice", 0.2), ("generation", 0.4))}
    assert evaluation_of({"tasks": listed, "retention": several}).mean.value == 0.9, "over tasks, not over kinds"
    assert evaluation_of({"tasks": listed, "mean_retention": 0.3}).mean.value == 0.3


def test_rounds_rank_the_layers_that_are_left() -> None:
    scores = [{"0": 5.0, "1": 1.0, "2": 3.0, "3": 3.0}, {"0": 0.2, "1": 9.0, "2": 0.1, "3": math.nan}]
    taken = [
        stage(1, edits=[{"op": "remove", "layer": 1}], scores=scores[0]),
        stage(2, edits=[{"op": "remove", "layer": 3}], scores=scores[0], status="rolled_back"),
        stage(3, edits=[{"op": "remove", "layer": 2}], scores=scores[1]),
    ]
    found = rounds(taken, 4)
    assert [result.index for result, _ in found] == [1, 3], "stage 2 went by the scores of stage 1"
    assert found[0][1] == {0: 1.0, 1: 0.0, 2: 0.5, 3: 0.5}, "equal scores share their rank"
    assert found[1][1] == {0: 1.0, 2: 0.0}, "layer 1 is gone, layer 3 has no score, both whatever the file says"


def test_tokens_by_stage_are_differences_of_the_cumulative_counts() -> None:
    assert tokens_by_stage([stage(0, tokens=0), stage(1, tokens=30), stage(2, tokens=30), stage(3, tokens=70)]) == [
        0, 30, 0, 40,
    ]  # fmt: skip


def test_same_files_same_bytes(run_dir: Path, tmp_path: Path) -> None:
    page = write_report(run_dir).read_bytes()
    run_page._DRAWN.clear()
    assert write_report(run_dir).read_bytes() == page
    picture(run_dir, tmp_path / "a.png")
    picture(run_dir, tmp_path / "b.png")
    image = (tmp_path / "a.png").read_bytes()
    assert image == (tmp_path / "b.png").read_bytes()
    assert [int.from_bytes(image[i : i + 4], "big") for i in (16, 20)] == [1200, 600]


def test_a_page_that_is_written_again_draws_what_changed_alone(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, drawn, render = write_report(run_dir).read_text(), list[object](), style._rendered
    monkeypatch.setattr(style, "_rendered", lambda figure: (drawn.append(figure), render(figure))[1])
    assert write_report(run_dir).read_text() == first
    assert not drawn
    (run_dir / "metrics.csv").unlink()
    assert write_report(run_dir).read_text() != first
    assert not drawn, "one figure less, and no other one is made of this file"
    write_stages(run_dir, STAGES[:3])
    shorter = write_report(run_dir).read_text()
    assert drawn
    run_page._DRAWN.clear()
    assert write_report(run_dir).read_text() == shorter


def test_hostile_text_stays_text(run_dir: Path) -> None:
    hostile = dataclasses.replace(STAGES[1], name=HOSTILE, events=[HOSTILE])
    write_stages(run_dir, [STAGES[0], hostile, *STAGES[2:]])
    (run_dir / "config.yaml").write_text(HOSTILE, encoding="utf-8")
    for name in ("data", "environment"):
        (run_dir / f"{name}.json").write_text(json.dumps({HOSTILE: [HOSTILE]}), encoding="utf-8")
    (run_dir / "metrics.csv").write_text(f"tokens,train/{HOSTILE}\n1,2\n5,oops\n9,1\n", encoding="utf-8")
    page = write_report(run_dir).read_text(encoding="utf-8")
    parsed = Balanced(page)
    assert not {"script", "img"} & parsed.tags
    assert parsed.text.count(HOSTILE) >= 7
    assert "1 cells of loss columns are not numbers" in parsed.text
    Console(width=120, quiet=True).print(stage_table([dataclasses.replace(hostile, name="[/red] [bold")]))


def test_missing_files_are_told(tmp_path: Path) -> None:
    text = Balanced(write_report(tmp_path).read_text(encoding="utf-8")).text
    for name in ("stages.json", "metrics.csv", "config.yaml", "record.json", "data.json", "environment.json", "model/"):
        assert f"{name} is missing" in text
    with pytest.raises(ValueError, match="no kept stage"):
        picture(tmp_path, tmp_path / "a.png")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "stages",
    [
        [stage(0)],
        [stage(1), stage(2)],
        [stage(1, status="rolled_back")],
        [stage(0), stage(1, ppl=math.inf, kl=math.nan, retention=math.nan, scores={"0": 0.0, "1": 9.0, "2": 0.1})],
        [stage(0, block_params=0, params=0, kl=0.0, scores={"0": 0.0, "1": -1.0})],
        [
            stage(
                i,
                scores={str(j): (i * j) % 7 + 0.5 for j in range(40)},
                edits=[{"op": "convert", "layer": j, "mixer": "m.M"} for j in range(48)],
            )
            for i in range(60)
        ],
    ],
    ids=["teacher only", "no teacher", "nothing kept", "not finite", "zeros", "sixty stages"],
)
def test_unusual_runs_are_drawn(stages: list[StageResult], tmp_path: Path) -> None:
    write_stages(tmp_path, stages)
    (tmp_path / "record.json").write_text("{not json", encoding="utf-8")
    text = Balanced(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "record.json is not valid JSON" in text
    if any(result.status == "kept" for result in stages):
        picture(tmp_path, tmp_path / "a.png")


def test_perplexities_of_tasks_are_drawn_as_they_are_beside_shares() -> None:
    rows = []
    for index in range(3):
        tasks = {"piqa": (0.8 - 0.1 * index, "acc"), "wikitext": (20.0 + 5 * index, "word_perplexity")}
        tasks["lambada"] = (0.7 + 0.05 * index, "bits_per_byte")
        edits = [{"op": "remove", "layer": index}] if index else []
        asked = {"tasks": [{"task": task, "student": score, "metric": name} for task, (score, name) in tasks.items()]}
        rows.append(stage(index, edits=edits, evaluation=asked))
    drawn = task_curves(score_curve("run", rows, LAYERS))
    assert drawn is not None
    assert [drawn.count(f">{heading}<") for heading in ("Score by task (%)", "Score by task")] == [1, 1]
    assert max(float(tick) for tick in re.findall(r">([\d.]+)<", drawn)) <= 100
    said = [dataclasses.replace(row, evaluation={"text": {"perplexity": 30.0 - row.index}}) for row in rows]
    assert "text perplexity" in (task_curves(score_curve("run", said, LAYERS)) or "")
    bits = [dataclasses.replace(row, evaluation={"tasks": (row.evaluation or {})["tasks"][2:]}) for row in rows]
    assert "Score by task (%)" not in (task_curves(score_curve("run", bits, LAYERS)) or "(%)")
    alone = [dataclasses.replace(row, evaluation={"tasks": (row.evaluation or {})["tasks"][:1]}) for row in rows]
    assert ">Score by task<" not in (task_curves(score_curve("run", alone, LAYERS)) or "")


def test_recall_and_loss_are_drawn_by_length(tmp_path: Path) -> None:
    """Each curve up to what its model reads, the numbers beside the page; over runs, a teacher that all share once."""
    runs = [
        write_run(tmp_path / f"run-{i}", config=f"seed: 7\na: {i}\n", files={"evaluation": LENGTHS}) for i in range(2)
    ]
    page = write_report(runs[0]).read_text(encoding="utf-8")
    assert page.count("Recall (% of the items)") == page.count("Loss by position (nats") == 1
    assert "The teacher reads at most 256 tokens at once" in page
    head, *rows = csv.reader((runs[0] / "lengths.csv").read_text(encoding="utf-8").splitlines())
    assert head == ["iskd_run", "measure", "tokens", "model", "value", "standard_error"]
    assert [row[1:5] for row in rows] == [
        *(["recall", length, "teacher", "0.9"] for length in ("64", "256")),
        *(["loss", last, "teacher", nats] for last, nats in (("16", "3.25"), ("32", "3.0"))),
        *(["recall", length, "student", score] for length, score in (("64", "0.8"), ("256", "0.5"), ("1024", "0.1"))),
        *(["loss", last, "student", nats] for last, nats in (("16", "3.5"), ("32", "3.25"), ("64", "3.0"))),
    ]
    compared = write_runs_report(runs, tmp_path / "runs.html").read_text(encoding="utf-8")
    figure = compared.partition('aria-label="Recall and loss')[2].partition("</figure>")[0]
    assert [figure.count(f">{label}<") for label in ("teacher", "1 run-0", "2 run-1")] == [1, 1, 1]
    assert len((tmp_path / "compared_lengths.csv").read_text(encoding="utf-8").splitlines()) == 21
    alone = write_run(tmp_path / "alone", files={"evaluation": EVALUATION})
    assert "By length" not in write_report(alone).read_text(encoding="utf-8")
    assert not (alone / "lengths.csv").exists()
