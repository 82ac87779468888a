"""What a plan promised beside what the run took: the same parts on both sides."""

from __future__ import annotations

import re
from typing import Any

from iskd.report.promised import promised_section, promises_of
from tests.run_folders import stage

PLAN: list[dict[str, Any]] = [
    {"stage": "teacher", "params": 10, "tokens": 0, "measure_seconds": 8.0},
    {"stage": "remove 2", "params": 9, "tokens": 50, "train_seconds": 10.0, "score_seconds": 4.0, "fit_seconds": 6.0},
    {"stage": "remove 1", "params": 8, "tokens": 50, "train_seconds": 30.0, "end_seconds": 40.0, "ended_after": 10.0},
]


def rows(plan: Any, seconds: list[float], names: tuple[str, ...] = ("teacher", "remove 2", "remove 3")) -> list[Any]:
    stages = [stage(n, name=names[n], seconds=took) for n, took in enumerate(seconds)]
    page = promised_section(promises_of(plan), stages)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)]
    return [row for row in cells if row]


def test_start_stages_and_end_are_graded() -> None:
    assert rows(PLAN, [8.0, 40.0, 15.0]) == [
        ["start", "8.0 s", "8.0 s", "1.00"],
        ["remove 2", "20.0 s", "40.0 s", "2.00"],
        ["remove 3", "30.0 s", "15.0 s", "0.50"],
        ["end", "40.0 s", "10.0 s", "0.25"],
        ["together", "98.0 s", "73.0 s", "0.74"],
    ]


def test_what_did_not_run_is_not_counted_and_said() -> None:
    assert [row[0] for row in rows(PLAN, [8.0, 40.0])] == ["start", "remove 2", "end", "together"]
    stages = [stage(0, seconds=8.0), stage(1, seconds=40.0)]
    assert "1 of the plan's stages did not run" in promised_section(promises_of(PLAN), stages)
    given = rows(PLAN, [8.0, 2.0, 15.0], ("teacher", "as given", "remove 2"))
    assert given[0] == ["start", "8.0 s", "10.0 s", "1.25"]


def test_a_run_of_an_earlier_version_has_its_stages_alone() -> None:
    before = [{key: value for key, value in row.items() if key != "ended_after"} for row in PLAN]
    assert [row[0] for row in rows(before, [0.0, 40.0, 15.0])] == ["remove 2", "remove 3", "together"]
    assert promised_section([], []) == ""
