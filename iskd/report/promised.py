"""What the plan of a run promised, beside what its stages took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from iskd.plan import StageResult
from iskd.plan.run_files import ENDED, PLAN_FILE
from iskd.report import html
from iskd.system.reading import is_number

_MOST = 10_000


@dataclass(frozen=True)
class Promise:
    """A row of the plan.

    Attributes:
        stage: its name.
        tokens, params: of the student.
        seconds: that the stage was to take; of the teacher's row, the start of the run.
        end: seconds that the end of the run was to take, in the last row. ended: and that it took, nan = not told.
    """

    stage: str
    tokens: float
    params: float
    seconds: float
    end: float = 0.0
    ended: float = math.nan


def promises_of(value: Any) -> list[Promise]:
    """Rows of plan.json, the teacher's first.

    Raises:
        ValueError: It is no list of objects.
    """
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError(f"{PLAN_FILE} must hold a list of objects: it is written anew by a run")
    found = []
    for row in value[:_MOST]:
        known = {str(key): float(number) for key, number in row.items() if is_number(number)}
        end = known.get("end_seconds", 0.0)  # is none of a stage's
        seconds = sum(number for key, number in known.items() if key.endswith("_seconds")) - end
        sizes = (known.get("tokens", math.nan), known.get("params", math.nan))
        name, ended = str(row.get("stage", ""))[:200], known.get(ENDED, math.nan)
        found.append(Promise(name, *sizes, seconds, end, ended))
    return found


def promised_section(plan: Sequence[Promise], stages: Sequence[StageResult]) -> str:
    """Promised against measured: the start, every stage, the end; "" where there is no plan, or no stage of it."""
    given = [stage for stage in stages if not stage.index or stage.name == "as given"]
    ran = [stage for stage in stages if stage not in given]
    pairs = [(stage.name, promise.seconds, stage.seconds) for promise, stage in zip(plan[1:], ran, strict=False)]
    if not pairs:
        return ""
    start = sum(stage.seconds for stage in given)
    if start > 0:  # earlier versions did not write it down
        pairs.insert(0, ("start", plan[0].seconds, start))
    if math.isfinite(plan[-1].ended):
        pairs.append(("end", plan[-1].end, plan[-1].ended))
    pairs.append(("together", sum(pair[1] for pair in pairs), sum(pair[2] for pair in pairs)))
    rows = [[name, _time(promise), _time(took), _grade(promise, took)] for name, promise, took in pairs]
    table = html.table("Promised", ("stage", "promised", "took", "times the promise"), rows, kind="plan")
    hint = (
        "Time as the plan told it before the first step, and as it was: the start (the teacher, and tasks and text), "
        "every stage with the scores that chose its layers, its trials, edits, fits, refits, training, measurements, "
        "checkpoints and the student that is kept of it, and the end (export, tasks, efficiency, samples). Reading the "
        "teacher and the text comes before the plan, and is in neither. Layers that were scored anew may differ from "
        "those of the plan."
    )
    fewer = len(plan) - 1 - len(ran)
    if fewer > 0:
        hint += f" {fewer} of the plan's stages did not run and are not counted."
    return html.section("Promised and measured", f'{table}<p class="hint">{hint}</p>')


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if math.isfinite(seconds) else "-"


def _grade(promised: float, took: float) -> str:
    return f"{took / promised:.2f}" if promised > 0 and math.isfinite(took) else "-"
