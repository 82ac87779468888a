"""What a search has found: a plan file for every budget, their front as a table and a csv."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from iskd.plan.budget_plan import KEEP, BudgetPlan, choice_map
from iskd.report.terminal import caption
from iskd.system import number
from iskd.system.tables import write_csv
from iskd.system.text import ABSENT, kl_text, layers_text

FRONT = "front.csv"
_COSTS = ("params", "bytes", "cache_bytes", "prefill_ms", "decode_ms")


def name_of(plan: BudgetPlan) -> str:
    """The name of a plan's file, from what was asked for."""
    said = "-".join(f"{key}-{value}" for key, value in plan.asked.items())
    return f"plan-{''.join(sign if sign.isalnum() or sign in '._-' else '_' for sign in said)}.json"


def write_plans(folder: Path, plans: Sequence[BudgetPlan]) -> list[Path]:
    """`front.csv` and one plan file for each plan, in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [plan.write(folder / name_of(plan)) for plan in plans]
    heads: list[object] = [
        "plan",
        "predicted_kl",
        "added_kl",
        "measured_kl",
        "refitted_kl",
        "rank_correlation",
        "compared",
        *_COSTS,
        *(f"{key}_of_teacher" for key in _COSTS),
        "found",
        "choice",
    ]
    rows: list[list[object]] = [[*heads]]
    for plan, file in zip(plans, files, strict=True):
        costs = [plan.measured.get(key, plan.costs.get(key, "")) for key in _COSTS]
        shares = [_share(plan, key) for key in _COSTS]
        shares_told = ["" if math.isnan(share) else share for share in shares]
        choice = " ".join(plan.choice)
        added, refitted = ("" if kl is None else kl for kl in (plan.added_kl, plan.refitted_kl))
        kls = [plan.predicted_kl, added, plan.measured_kl, refitted]
        ranked = ["" if plan.rank_correlation is None else plan.rank_correlation, plan.compared]
        rows.append([file.name, *kls, *ranked, *costs, *shares_told, plan.found, choice])
    return [write_csv(folder / FRONT, rows), *files]


def front_table(plans: Sequence[BudgetPlan]) -> Table:
    """A row for every budget."""
    table = Table(title="plans by budget")
    for head in ("budget", "parameters", "of the teacher", "KL predicted", "measured", "refitted", "layers"):
        table.add_column(head, justify="left" if head in ("budget", "layers") else "right")
    for plan in plans:
        told = ", ".join(f"{key}={value}" for key, value in plan.asked.items())
        layers = "; ".join(f"{name} {layers_text(at)}" for name, at in choice_map(plan) if name != KEEP)
        share = _share(plan, "params")
        table.add_row(
            Text(told), f"{plan.costs.get('params', math.nan):,.0f}",
            ABSENT if math.isnan(share) else f"{100 * share:.1f} %",
            kl_text(plan.predicted_kl), kl_text(plan.measured_kl),
            ABSENT if plan.refitted_kl is None else kl_text(plan.refitted_kl), Text(layers),
        )  # fmt: skip
    seconds = plans[0].seconds if plans else {}
    spent = ", ".join(f"{name} {number(value)} s" for name, value in seconds.items() if name != "search")
    searched = sum(plan.seconds.get("search", 0.0) for plan in plans)
    table.caption = caption(f"{spent}, search {number(searched)} s" if spent else "")
    return table


def _share(plan: BudgetPlan, key: str) -> float:
    whole = plan.teacher_costs.get(key)
    return math.nan if not whole or key not in plan.costs else plan.measured.get(key, plan.costs[key]) / whole
