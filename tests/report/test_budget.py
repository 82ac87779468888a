"""The section about a budget: what was planned beside what the finished student is, and where it is among others."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from iskd.plan.budget_plan import KEEP, BudgetPlan, TriedPlan
from iskd.report.budget import _here, budget_section

CHOICE = (KEEP, "remove", KEEP, KEEP)
PLAN = BudgetPlan(
    "abc",
    CHOICE,
    {"remove": {"edit": "remove"}},
    asked={"decode_ms": 5},
    limits={"decode_ms": 5.0},
    teacher_costs={"params": 1400.0, "bytes": 2800.0, "cache_bytes": 4000.0, "prefill_ms": 60.0, "decode_ms": 6.0},
    costs={"params": 1100.0, "bytes": 2200.0, "cache_bytes": 3000.0, "prefill_ms": 50.0, "decode_ms": 5.0},
    others={"params": 200.0, "bytes": 400.0, "cache_bytes": 0.0, "prefill_ms": 20.0, "decode_ms": 2.0},
    measured={"prefill_ms": 51.0, "decode_ms": 5.1},
    predicted_kl=0.3,
    measured_kl=0.4,
    tried=(TriedPlan(CHOICE, 0.3, 0.4), TriedPlan(("remove", *CHOICE[1:]), 0.6, 0.7)),
    front=((0.9, 0.1), (0.5, 0.9)),
    context=512,
)
TOOK = {"prefill_ms": 52.0, "decode_ms": 5.3}


def rows(page: str) -> dict[str, list[str]]:
    found = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)]
    return {row[0]: row[1:] for row in found if row}


def test_every_cost_is_told_of_the_finished_student() -> None:
    found = rows(budget_section(replace(PLAN, finished=TOOK), {"params": 1100, "kl": 0.2}))
    assert found["parameters"] == ["1,400", "1,100", "exact", "1,100"]
    assert found["weights"] == ["2.800 kB", "2.200 kB", "exact", "2.200 kB"]
    assert found["cache"] == ["4.000 kB", "3.000 kB", "exact", "3.000 kB"]
    assert found["prefill"] == ["60.0 ms", "50.0 ms", "51.0 ms", "52.0 ms"]
    assert found["a token"] == ["6.00 ms", "5.00 ms", "5.10 ms", "5.30 ms"]
    assert found["KL"] == ["0", "0.300", "0.400", "0.200"]


def test_what_is_not_known_of_the_finished_student_is_not_guessed() -> None:
    found = rows(budget_section(PLAN, {"params": 1000}))
    assert [found[name][-1] for name in ("weights", "cache", "prefill", "a token")] == ["2.000 kB", "-", "-", "-"]
    assert rows(budget_section(PLAN, {}))["weights"][-1] == "-"


def test_a_diamond_that_is_spoken_of_is_drawn() -> None:
    assert _here(PLAN, "decode_ms") == (pytest.approx(0.75), 0.3)
    assert _here(PLAN, "params") == (pytest.approx(0.75), 0.3)
    without = replace(PLAN, others={})
    assert _here(without, "params") is None
    page, plain = (budget_section(plan, {}) for plan in (PLAN, without))
    assert "diamond: this plan" in page
    assert "diamond: this plan" not in plain
