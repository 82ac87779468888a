"""The few numbers that stand for a whole run, under one naming wherever runs are compared.

They are the summary of a W&B run, the hyperparameter table of TensorBoard and, without their prefix, what a sweep can
be told of a run (`objectives=[retention,params]`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from iskd.plan.results import StageResult
from iskd.system.faults import RunError

#: The numbers that stand for a whole run, with their units; `final` is the last stage that was kept.
SUMMARY: Mapping[str, str] = {
    "final/retention": "student's score / teacher's score",
    "final/params": "parameters of the student",
    "final/block_params": "parameters of its layers' blocks",
    "final/ppl": "perplexity of the student",
    "final/kl": "nats per token from teacher to student",
    "final/top1": "share of positions where both prefer the same token, 0 to 1",
    "final/tokens": "training tokens of the whole run, those of stages that were rolled back among them",
    "final/seconds": "wall time of all stages",
    "teacher/params": "parameters of the teacher",
    "teacher/ppl": "perplexity of the teacher",
}

#: What a sweep can be told of a run, by the names that follow `final/`.
OBJECTIVES = tuple(name.removeprefix("final/") for name in SUMMARY if name.startswith("final/"))


def summary(results: Sequence[StageResult]) -> dict[str, float]:
    """The values of `SUMMARY`; those of the teacher are missing where the list lacks its row.

    Raises:
        ValueError: no stage was kept.
    """
    kept = [result for result in results if result.status == "kept"]
    if not kept:
        raise ValueError("no stage was kept, so there is no student to sum up: pass all results of a run, stage 0 too")
    measured = ("retention", "params", "block_params", "ppl", "kl", "top1")
    found = {f"final/{key}": float(getattr(kept[-1], key)) for key in measured}
    found |= {"final/tokens": float(results[-1].tokens), "final/seconds": math.fsum(r.seconds for r in results)}
    for teacher in [result for result in results if result.index == 0][:1]:
        found |= {"teacher/params": float(teacher.params), "teacher/ppl": float(teacher.ppl)}
    return found


def objectives(names: str | Sequence[str]) -> Callable[[Sequence[StageResult]], float | list[float]]:
    """What tells a sweep how a run went: names are checked now, before anything runs, values are read at its end.

    Args:
        names: among `OBJECTIVES`: one, or several in the order of the sweeper's directions.

    Returns:
        From a run's results to one number for one name, to a list of numbers for several. It raises RunError for one
        that is not finite: a sweep would take nan for a value, or end with words that name no run.

    Raises:
        ValueError: a name is unknown, or there is none.
    """
    asked = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in asked if name not in OBJECTIVES]
    if unknown or not asked:
        raise ValueError(f"objectives={asked}: choose among {', '.join(OBJECTIVES)}, e.g. [retention,params]")

    def read(results: Sequence[StageResult]) -> float | list[float]:
        values = summary(results)
        found = [values[f"final/{name}"] for name in asked]
        if bad := [f"{name}={value}" for name, value in zip(asked, found, strict=True) if not math.isfinite(value)]:
            raise RunError(
                f"objectives: the run ended with {', '.join(bad)}, which a sweep cannot compare; narrow what it tries, "
                "or have it go on without such runs (hydra.sweeper.max_failure_rate of Optuna's)"
            )
        return found[0] if len(found) == 1 else found

    return read
