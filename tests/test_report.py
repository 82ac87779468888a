"""What people look at after a run: stages.json, the stage table, report.html, the picture."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from iskd.edit_map import layer_states
from iskd.report import picture, write_report
from iskd.table import COLUMNS, layers_text, number, plain_table, stage_table
from iskd.tracking import METRICS, NOT_LOSSES, X_AXIS, StageResult, read_stages, write_stages

LAYERS = 6
HOSTILE = "</pre><script>alert('$x$')</script><img src=https://example.org/a.png>-->&"
VOID = {"meta", "br", "hr", "img", "link", "input"}


def stage(index: int, **changes: object) -> StageResult:
    """A plausible stage; `changes` override its fields."""
    values: dict[str, object] = {
        "index": index,
        "name": "teacher" if index == 0 else f"replace {index}",
        "edits": [{"op": "replace", "layer": index, "block": "iskd.blocks.slim.Slim"}] if index else [],
        "params": 4_000_000 - 30_000 * index,
        "block_params": 3_000_000 - 30_000 * index,
        "ppl": 20.0 + index,
        "kl": 0.05 * index,
        "top1": 1.0 - 0.02 * index,
        "retention": 1.0 - 0.03 * index,
        "before": {"ppl": 90.0 * index**3, "kl": 0.5, "top1": 0.4, "retention": 0.7} if index else None,
        "tokens": 100_000 * index,
        "seconds": 12.5,
        "tokens_per_s": 5000.0,
        "scores": {str(i): 0.01 * 4.0**i for i in range(LAYERS)} if index < 2 else None,
    }
    return StageResult(**(values | changes))  # type: ignore[arg-type]


STAGES = [
    stage(0),
    stage(1),
    stage(2, status="rolled_back", events=["retention is under the floor"]),
    stage(3, name="remove 3", edits=[{"op": "remove", "layer": 3}]),
    stage(4, name="convert 4", edits=[{"op": "convert", "layer": 4, "mixer": {"target": "iskd.mixers.gla.GLA"}}]),
    stage(5, name="finetune", edits=[], before=None),
]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run with every file that the report reads."""
    run = tmp_path / "demo"
    (run / "model").mkdir(parents=True)
    (run / "model" / "model.safetensors").write_bytes(bytes(1000))
    write_stages(run, STAGES)
    rows = [f"{1000 * i},{i},1,{3 + 1 / (i + 1)},{1 / (i + 1)},0.5,\n" for i in range(500)]
    header = "tokens,step,stage,train/loss,train/kl,train/grad_norm,val/ppl\n"
    (run / "metrics.csv").write_text(header + "".join(rows) + ",,,,,,21.5\n", encoding="utf-8")
    (run / "config.yaml").write_text("seed: 7\n", encoding="utf-8")
    for name, value in (
        ("record", {"num_layers": LAYERS, "edits": [e for s in STAGES for e in s.edits if s.status == "kept"]}),
        ("data", {"train": {"sha256": "ab" * 32, "tokens": 2_391_884}, "windows": [str(i) for i in range(99)]}),
        ("environment", {"torch": "2.13.0"}),
    ):
        (run / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return run


class Balanced(HTMLParser):
    """Checks nesting and collects tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.targets += [value or "" for name, value in attrs if name in ("href", "xlink:href", "src")]


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
        ({"perplexity": 3.0}, r"stage 1 has unknown keys \['perplexity'\]"),
        ({"params": 1.5}, "'params': expected an integer"),
        ({"ppl": "low"}, "'ppl': expected a number"),
        ({"status": "lost"}, "expected one of"),
        ({"edits": [{"op": "swap", "layer": 1}]}, "an edit has 'op'"),
        ({"before": {"loss": 1.0}}, "expected keys among"),
        ({"scores": {"first": 1.0}}, "expected layers as keys"),
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
        ("[3]", "a stage is a JSON object"),
        (json.dumps([missing]), r"stage 1 lacks the keys \['kl'\]"),
        (json.dumps([stage(1).to_json()] * 2), "indices must differ"),
    ):
        (tmp_path / "stages.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_stages(tmp_path)
    with pytest.raises(ValueError, match="is not a directory"):
        write_report(tmp_path / "nowhere")


def test_metric_names_agree() -> None:
    assert X_AXIS in METRICS
    assert set(METRICS) >= NOT_LOSSES


def test_layer_states_follow_only_what_was_kept() -> None:
    states = layer_states(STAGES, LAYERS)
    assert states[0] == ["original"] * LAYERS
    assert states[2][2] == "compact", "the rolled-back row shows what was tried"
    assert states[-1] == ["original", "compact", "original", "removed", "converted", "original"]
    with pytest.raises(ValueError, match="edits layer 4, but the teacher has 3 layers"):
        layer_states([stage(1, edits=[{"op": "remove", "layer": 4}])], 3)


def test_tables_have_one_row_per_stage() -> None:
    lines = plain_table(STAGES).splitlines()
    assert len(lines) == len(STAGES) + 2
    assert {line.count("|") for line in lines} == {len(COLUMNS) + 1}
    first = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert first == [
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
    assert "rolled back" in lines[4]


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
    assert page.count("<svg") == 5
    assert "Not in this report" not in parsed.text
    assert "script" not in parsed.tags
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert all(target.startswith("#") for target in parsed.targets), "nothing is loaded"
    assert len(set(parsed.ids)) == len(parsed.ids), "figures must not share ids"
    assert {target[1:] for target in parsed.targets} <= set(parsed.ids)
    assert "DejaVu" not in page, "figures use the page's font"
    assert len(page) < 400_000


def test_same_files_same_bytes(run_dir: Path, tmp_path: Path) -> None:
    assert write_report(run_dir).read_bytes() == write_report(run_dir).read_bytes()
    picture(run_dir, tmp_path / "a.png")
    picture(run_dir, tmp_path / "b.png")
    image = (tmp_path / "a.png").read_bytes()
    assert image == (tmp_path / "b.png").read_bytes()
    assert [int.from_bytes(image[i : i + 4], "big") for i in (16, 20)] == [1200, 600]


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
    plain_table([hostile])
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
        [stage(i, edits=[{"op": "convert", "layer": j, "mixer": "m.M"} for j in range(48)]) for i in range(60)],
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
