"""A budget's plan for people: on the terminal before anything is trained, and a section of the run's page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from iskd.plan.budget_plan import KEEP, BudgetPlan, amount, choice_map
from iskd.report import html
from iskd.report.figures import choice
from iskd.report.terminal import caption
from iskd.system import number
from iskd.system.text import ABSENT, kl_text, layers_text

_NAMES = {
    "params": "parameters",
    "bytes": "weights",
    "cache_bytes": "cache",
    "prefill_ms": "prefill",
    "decode_ms": "a token",
}
_TIMES = ("prefill_ms", "decode_ms")


def choice_table(plan: BudgetPlan) -> Table:
    """What every layer becomes, what that costs, and what it is predicted to lose."""
    table = Table(title="budget: what every layer becomes")
    for head, side in (("option", "left"), ("layers", "left"), ("number", "right"), ("KL alone, mean", "right")):
        table.add_column(head, justify=side)  # type: ignore[arg-type]
    for name, layers in choice_map(plan):
        table.add_row(Text(name), layers_text(layers), str(len(layers)), _alone(plan, name, layers))
    table.caption = caption("\n".join(_told(plan)))
    return table


def _alone(plan: BudgetPlan, name: str, layers: list[int]) -> str:
    known = [plan.scores[at][name] for at in layers if at < len(plan.scores) and name in plan.scores[at]]
    return kl_text(sum(known) / len(known)) if known else ABSENT


def _told(plan: BudgetPlan) -> Iterator[str]:
    for key, cost in plan.costs.items():
        if key == "bytes" and key not in plan.limits:  # parameters say the same
            continue
        whole, limit = plan.teacher_costs.get(key, math.nan), plan.limits.get(key)
        share = f" ({100 * cost / whole:.1f} % of the teacher)" if whole else ""
        asked = "" if limit is None else f", asked for {amount(key, limit)}"
        yield f"{_NAMES.get(key, key)} {amount(key, cost)}{share}{asked}" + (
            f", measured {amount(key, plan.measured[key])}" if key in plan.measured else ""
        )
    added = "" if plan.added_kl is None else f" (by added scores {kl_text(plan.added_kl)})"
    measured = f"measured {kl_text(plan.measured_kl)} with the blocks of the library"
    if plan.refitted_kl is not None:
        measured += f", {kl_text(plan.refitted_kl)} refitted as a whole"
    yield f"KL predicted {kl_text(plan.predicted_kl)}{added}, {measured}"
    if plan.rank_correlation is not None:
        yield _ranked(plan)
    if plan.found:
        yield f"found by {plan.found}"
    if plan.seconds:
        yield ", ".join(f"{name} {seconds:.0f} s" for name, seconds in plan.seconds.items())


def _ranked(plan: BudgetPlan) -> str:
    ranked = "" if plan.rank_correlation is None else number(plan.rank_correlation)
    return f"rank correlation of predicted and measured KL {ranked} over {plan.compared} plans (each by the others)"


def budget_section(plan: BudgetPlan | None, measured: Mapping[str, float]) -> str:
    """The section of a run's page; empty without a plan.

    Args:
        plan: of the run.
        measured: what became of it: `params` and `kl` of the finished student, as far as they are known.
    """
    if plan is None:
        return ""
    names = [name for name, _ in choice_map(plan)]
    taken = next((at for at, tried in enumerate(plan.tried) if tried.choice == plan.choice), -1)
    points = [(tried.predicted, tried.measured) for tried in plan.tried]
    key = next(iter(plan.limits), "params")
    drawn = [
        (choice.choice_map(names, plan.choice, KEEP), "What every layer became."),
        (
            choice.predicted_measured(points, taken),
            "Plans that were built from the library, whose blocks are fitted one by one: predicted KL, and measured, "
            "both before the run fits and trains them anew."
            f"{'' if plan.rank_correlation is None else f' {_ranked(plan).capitalize()}.'}",
        ),
        (choice.front(plan.front, _here(plan, key), _NAMES.get(key, key)), "What other budgets would lose, predicted."),
    ]
    finished = dict(measured) | _finished(plan, measured.get("params"))
    rows = [_row(key, plan, finished) for key in plan.costs]
    if plan.added_kl is not None:
        rows.append(["KL by added scores", "0", kl_text(plan.added_kl), ABSENT, ABSENT])
    rows.append(["KL", "0", kl_text(plan.predicted_kl), kl_text(plan.measured_kl), _known("kl", measured, kl_text)])
    if plan.refitted_kl is not None:
        rows.append(["KL, refitted as a whole", "0", ABSENT, kl_text(plan.refitted_kl), ABSENT])
    heads = ("", "teacher", "predicted", "measured, of blocks of the library", "of the finished student")
    table = html.table("Predicted and measured", heads, rows, kind="named")
    return html.section("Budget", f"{table}{html.figures(drawn)}")


def _here(plan: BudgetPlan, key: str) -> tuple[float, float] | None:
    """Where a plan is among other budgets: its share of the teacher's blocks, and its predicted KL."""
    if not {key} <= plan.costs.keys() & plan.others.keys() & plan.teacher_costs.keys():
        return None
    outside = plan.others[key]
    blocks = plan.teacher_costs[key] - outside
    return ((plan.costs[key] - outside) / blocks, plan.predicted_kl) if blocks else None


def _finished(plan: BudgetPlan, params: float | None) -> dict[str, float]:
    """What the finished student costs beside its parameters, as far as it is known.

    Weights and cache are the plan's where the student is the one that was planned; otherwise weights follow from the
    parameters. Times are there where the budget limits them.
    """
    found: dict[str, float] = {}
    if params is not None and plan.teacher_costs.get("params") and "bytes" in plan.teacher_costs:
        found["bytes"] = params * plan.teacher_costs["bytes"] / plan.teacher_costs["params"]
    if params is not None and params == plan.costs.get("params"):  # some weights stay float32 in half precision
        found |= {key: plan.costs[key] for key in ("bytes", "cache_bytes") if key in plan.costs}
    return found | plan.finished


def _row(key: str, plan: BudgetPlan, measured: Mapping[str, Any]) -> list[str]:
    teacher, cost, found = plan.teacher_costs.get(key), plan.costs[key], plan.measured.get(key)
    return [
        _NAMES.get(key, key),
        ABSENT if teacher is None else amount(key, teacher),
        amount(key, cost),
        "exact" if key not in _TIMES else ABSENT if found is None else amount(key, found),
        _known(key, measured, lambda value: amount(key, value)),
    ]


def _known(key: str, measured: Mapping[str, Any], text: Any) -> str:
    value = measured.get(key)
    return ABSENT if not isinstance(value, int | float) or not math.isfinite(value) else text(value)
