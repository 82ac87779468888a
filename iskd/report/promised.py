"""What the plan of a run promised, beside what its stages took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from iskd.plan import StageResult
from iskd.plan.run_files import PLAN_FILE
from iskd.report import html
from iskd.system.reading import is_number

_MOST = 10_000


@dataclass(frozen=True)
class Promise:
    """A row of the plan: its stage, tokens, parameters, and the seconds that it was to take."""

    stage: str
    tokens: float
    params: float
    seconds: float


def promises_of(value: Any) -> list[Promise]:
    """Rows of plan.json, the teacher's first.

    Raises:
        ValueError: It is no list of objects.
    """
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError(f"{PLAN_FILE} must hold a list of objects: it is written anew by a run")
    found = []
    for row in value[:_MOST]:
        parts = [number for key, number in row.items() if str(key).endswith("_seconds") and is_number(number)]
        tokens, params = (row.get(key) if is_number(row.get(key)) else math.nan for key in ("tokens", "params"))
        # the end of the run is none of a stage's
        end = row.get("end_seconds") if is_number(row.get("end_seconds")) else 0.0
        found.append(Promise(str(row.get("stage", ""))[:200], tokens or 0.0, params or 0.0, sum(parts) - (end or 0.0)))
    return found


def promised_section(plan: Sequence[Promise], stages: Sequence[StageResult]) -> str:
    """Promised against measured, stage by stage; "" where there is no plan, or no stage of it."""
    ran = [stage for stage in stages if stage.index and stage.name != "as given"]
    pairs = list(zip(plan[1:], ran, strict=False))
    if not pairs:
        return ""
    rows = [
        [stage.name, _time(promise.seconds), _time(stage.seconds), _grade(promise.seconds, stage.seconds)]
        for promise, stage in pairs
    ]
    promised, took = sum(promise.seconds for promise, _ in pairs), sum(stage.seconds for _, stage in pairs)
    rows.append(["together", _time(promised), _time(took), _grade(promised, took)])
    table = html.table("Promised", ("stage", "promised", "took", "times the promise"), rows, kind="plan")
    hint = (
        "Time as the plan told it before the first step (a measured step, scores, fits, refits, measuring), and as it "
        "was. Layers that were scored anew may differ from those of the plan."
    )
    return html.section("Promised and measured", f'{table}<p class="hint">{hint}</p>')


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if math.isfinite(seconds) else "-"


def _grade(promised: float, took: float) -> str:
    return f"{took / promised:.2f}" if promised > 0 and math.isfinite(took) else "-"
