"""Held-out KL against wall time, SmolLM2-135M with 7 of 30 layers removed: other loops and trainers, ours, a refit.

    python -m benchmarks.time_to_quality --out time.json

All ways (`benchmarks.step_ways`) remove the same layers, get the same batches in the same order and train at the same
constant rate (but `recipe`), each alone in a fresh process, in an order that moves on by one from repeat to repeat.
After some of the steps the KL to the teacher is measured on text that nobody trains on; the clock stands still
meanwhile. Time counts from the first step, models loaded and layers removed; all that a refit does, its own
measurements too, counts.

    plain, trl, modelopt, ours    as in `benchmarks.step`
    refit                         ours with refit=[output] before the first step, on little text
    recipe                        the same at a third of the rate, which is all that a refitted student takes

Reported: the time to reach the KL that the plain loop has at its end, as a share of the plain loop's own, and the KL at
the time that the plain loop takes (of a way that is done earlier: its last). Between two measurements KL is taken to
fall in a straight line. With --out every finished process is kept, and what is in the file is not run again; a way that
cannot run says why in its line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from benchmarks.common import low, rotated, spread
from benchmarks.step import Rows, in_a_process
from benchmarks.step_setup import DEVICE, Outcome, Recorder, Task, configured
from benchmarks.step_tables import Row
from benchmarks.step_ways import run_modelopt, run_ours, run_plain, run_trl
from iskd.evaluation import measure_quality
from iskd.system import write_whole

TASKS = {
    "smollm2": Task(
        ("model=smollm2", "data=docstrings"),
        (3, 12, 13, 14, 17, 25, 26),
        rows=2,
        length=512,
        lr=3e-4,
        val_tokens=8192,
    ),
    # random weights, to see that everything runs
    "tiny": Task(("model=tiny", "data=sample"), (1,), rows=2, length=64, bf16=False, lr=1e-3, val_tokens=256),
}
SMALL = ("refit.output.tokens=512", "refit.output.held_tokens=128", "refit.output.folds=1")
LITTLE = ("refit.output.tokens=4096", "refit.output.held_tokens=1024")
REFITS = {TASKS["smollm2"]: ("refit=[output]", *LITTLE), TASKS["tiny"]: ("refit=[output]", *SMALL)}
WAYS: dict[str, Callable[[Task, int], Outcome]] = {
    "plain": run_plain,
    "trl": run_trl,
    "modelopt": run_modelopt,
    "ours": run_ours,
    "refit": lambda task, steps: run_ours(task, steps, *REFITS[task]),
    "recipe": lambda task, steps: run_ours(replace(task, lr=task.lr / 3), steps, *REFITS[task]),
}
MARKS = 8
"""Measurements of a way, besides the one before its first step."""


def measure(name: str, model: str, steps: int) -> dict[str, Any]:
    """One way in this process: what it tells, and its held-out KL by the number of steps."""
    task, kl = TASKS[model], dict[int, float]()
    marks, known = {round(steps * part / MARKS) for part in range(MARKS + 1)}, dict[int, torch.Tensor]()
    with configured(task, 1) as parts:
        teacher, data = parts.teacher.model.eval().requires_grad_(False), parts.data
        nn.Module.to(teacher, DEVICE)
        data.set_stage(0, 1)
        batches = data.validation()

    def probe(step: int, student: Any) -> None:
        if step in marks:
            with torch.no_grad(), low(DEVICE, task.mixed):
                kl[step] = measure_quality(student, teacher, batches, known)["kl"]

    torch.manual_seed(0)
    Recorder.probe = staticmethod(probe)
    try:
        outcome = WAYS[name](task, steps)
    finally:
        Recorder.probe = None
    return {**asdict(outcome), "kl": [[step, value] for step, value in sorted(kl.items())]}


def curve(row: Row) -> list[tuple[float, float]]:
    """Seconds since the start and KL, measurement by measurement."""
    times = [row["before"], *accumulate(row["seconds"], initial=row["before"])][1:]
    return [(times[step], kl) for step, kl in row["kl"]]


def time_to(points: Sequence[tuple[float, float]], goal: float) -> float | None:
    """Seconds until the KL of a curve is first at `goal` or below; None = never."""
    if points[0][1] <= goal:
        return points[0][0]
    for (start, above), (end, below) in pairwise(points):
        if below <= goal:
            return start + (end - start) * (above - goal) / (above - below)
    return None


def kl_at(points: Sequence[tuple[float, float]], seconds: float) -> float:
    """KL of a curve at a time: the first before its first point, and the last behind its last."""
    if seconds <= points[0][0]:
        return points[0][1]
    for (start, before), (end, after) in pairwise(points):
        if seconds <= end:
            return before + (after - before) * (seconds - start) / max(end - start, 1e-9)
    return points[-1][1]


def table(rows: Sequence[Row], ways: Sequence[str]) -> list[str]:
    """A line for every way; ratios to the plain loop of the same repeat."""
    found = {(row["way"], row["repeat"]): row for row in rows if "error" not in row}
    plain = {repeat: curve(row) for (way, repeat), row in found.items() if way == "plain"}
    lines = [
        "| way | KL at the start | at the end | time to plain's KL | KL at plain's time | refit / plain's time |",
        "|---|---|---|---|---|---|",
    ]
    for way in ways:
        pairs = [(found[way, repeat], base) for repeat, base in sorted(plain.items()) if (way, repeat) in found]
        if not pairs:
            why = next((row["error"] for row in rows if row["way"] == way and "error" in row), "not measured")
            lines.append(f"| {way} | {why} | | | | |")
            continue
        curves = [(curve(row), base) for row, base in pairs]
        whole = [base[-1][0] for _, base in curves]
        reached = [time_to(points, base[-1][1]) for points, base in curves]
        times = [seconds for seconds in reached if seconds is not None]
        told = spread(times, whole) if len(times) == len(reached) else f"not reached in {len(reached) - len(times)}"
        ends = [mean(points[at][1] for points, _ in curves) for at in (0, -1)]
        equal = mean(kl_at(points, base[-1][0]) for points, base in curves)
        spent = mean(row["before"] / seconds for (row, _), seconds in zip(pairs, whole, strict=True))
        lines.append(f"| {way} | {ends[0]:.3f} | {ends[1]:.3f} | {told} | {equal:.3f} | {spent:.2f} |")
    batches = {tuple(row["batches"]) for row in found.values()}
    lines += ["", "Batches: " + ("the same for all." if len(batches) <= 1 else "NOT the same for all.")]
    return lines


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--timed", type=int, default=28, help="optimizer steps of every way")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="plain is always among them")
    parser.add_argument("--model", choices=TASKS, default="smollm2")
    parser.add_argument(
        "--tiny", dest="model", action="store_const", const="tiny", help="random weights, to try it out"
    )
    parser.add_argument("--out", type=Path, help="file that keeps what is measured; what it holds is not run again")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.only:
        write_whole(options.out, json.dumps(measure(options.only, options.model, options.timed)))
        return
    rows = Rows(options.out, {"model": options.model, "timed": options.timed, "device": DEVICE.type})
    ways = ["plain", *(way for way in options.ways if way != "plain")]
    for repeat in range(options.repeats):
        for name in rotated(ways, repeat):
            if not rows.has(name, repeat):
                done = in_a_process(name, options.model, options.timed, "benchmarks.time_to_quality")
                rows.add(name, repeat, done)
                print(f"repeat {repeat + 1}  {name}: {done.get('error', 'done')}", file=sys.stderr, flush=True)
    task = TASKS[options.model]
    size = f"{task.rows} x {task.length} tokens a step, {options.timed} steps, rate {task.lr:g}"
    print(f"{options.model}, layers {list(task.removed)} removed, {size}, {options.repeats} repeats\n")
    print("\n".join(table(rows.rows, ways)))


if __name__ == "__main__":
    main()
