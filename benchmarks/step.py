"""One distillation step of SmolLM2-135M, 30 -> 26 layers, 4 x 512 tokens: ours against other loops and trainers.

    python -m benchmarks.step --out step.json

Every way (`benchmarks.step_ways`) runs alone in a fresh process, all with the same memory settings
(`iskd.system.allocator`; but `stock`, which is there to be compared with them), one after the other within each repeat,
in an order that moves on by one from repeat to repeat; the matrix peak is measured as one of them. Same teacher, same
student (layers 12-15 gone), the same batches in the same order (padded: one document per row), forward KL, AdamW 1e-5
without weight decay, gradients clipped at 1, no activation checkpointing (but `selective` and `checkpointing`), no
key-value cache. Figures are medians over the repeats, ratios are taken within a repeat. Speed counts the tokens that
are no padding; memory is the most that a process had until its last step ended; the KL is what each way itself computed
on the first batch, in nats per token.

With --out every finished process is kept in that file at once, and what is in it is not run again. A way that fails
does not stop the others: its line says why.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import rotated
from benchmarks.step_setup import DEVICE, TASKS
from benchmarks.step_tables import WARM_UP, Row, notes, profile_tables, step_table
from benchmarks.step_ways import COMPARED, ENVIRONMENTS, WAYS
from iskd.system import write_whole

EXTRAS = ("flops", "peak", "profile")
TIMEOUT = 1200  # seconds of one process


def measure(name: str, model: str, timed: int) -> dict[str, Any]:
    """One way, or one of the extras, in this process."""
    import torch

    from benchmarks import step_machine

    task = TASKS[model]
    torch.manual_seed(0)
    if name == "peak":
        return step_machine.peak(task)
    if name == "flops":
        return step_machine.flops(task)
    if name == "profile":
        return step_machine.profile(task, min(timed, 3))
    return asdict(WAYS[name](task, WARM_UP + (half(timed) if name == "padded" else timed)))


def half(timed: int) -> int:
    """Timed steps of `padded`: they take about three times as long as those of others."""
    return max(1, timed // 2)


def in_a_process(name: str, model: str, timed: int, module: str = "benchmarks.step") -> dict[str, Any]:
    """What `measure` of a module returns in a fresh process, or {"error": why there is nothing}."""
    environment = {
        "WANDB_MODE": "disabled",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        **os.environ,
        **ENVIRONMENTS.get(name, {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", module, "--only", name, "--model", model, "--timed", str(timed)]
        try:
            done = subprocess.run(
                [*command, "--out", str(result)], env=environment, capture_output=True, text=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            return {"error": f"took longer than {TIMEOUT} s"}
        if done.returncode == 0 and result.is_file():
            return json.loads(result.read_text())
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    killed = f"ended by signal {-done.returncode}, as when memory runs out" if done.returncode < 0 else ""
    return {"error": killed or (lines or ["no message"])[-1][:300], "stderr": done.stderr[-4000:]}


class Rows:
    """What was measured, kept in a file after every row."""

    def __init__(self, file: Path | None, settings: dict[str, Any]) -> None:
        self.file, self.settings, self.rows = file, settings, list[Row]()
        if file is not None and file.is_file():
            kept = json.loads(file.read_text())
            if kept["settings"] != settings:
                raise SystemExit(
                    f"{file} holds rows of other settings ({kept['settings']}, now {settings}): give another --out"
                )
            self.rows = kept["rows"]

    def has(self, way: str, repeat: int) -> bool:
        return any((row["way"], row["repeat"]) == (way, repeat) and "error" not in row for row in self.rows)

    def add(self, way: str, repeat: int, found: dict[str, Any]) -> None:
        self.rows = [row for row in self.rows if (row["way"], row["repeat"]) != (way, repeat)]
        self.rows.append({"way": way, "repeat": repeat, **found})
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.file, json.dumps({"settings": self.settings, "rows": self.rows}, indent=1))


def fill(rows: Rows, ways: Sequence[str], options: argparse.Namespace) -> None:
    """Measure whatever is not there yet."""
    jobs = [("flops", 0)]
    jobs += [(name, repeat) for repeat in range(options.repeats) for name in rotated(["peak", *ways], repeat)]
    jobs += [("profile", 0)] if options.profile else []
    for number, (name, repeat) in enumerate(jobs, 1):
        if rows.has(name, repeat):
            continue
        start = time.perf_counter()
        found = in_a_process(name, options.model, options.timed)
        rows.add(name, repeat, found)
        told = f"FAILED: {found['error']}" if "error" in found else "done"
        took = time.perf_counter() - start
        print(f"{number}/{len(jobs)}  repeat {repeat + 1}  {name}: {told}, {took:.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timed", type=int, default=5, help=f"steps of a way, after {WARM_UP} that warm up")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(COMPARED), help="ours is always among them")
    parser.add_argument("--model", choices=TASKS, default="smollm2", help="tiny: random weights, to try it out")
    parser.add_argument("--out", type=Path, help="file that keeps what is measured; what it holds is not run again")
    parser.add_argument("--profile", action=argparse.BooleanOptionalAction, default=True, help="our step, by span")
    parser.add_argument("--only", choices=[*WAYS, *EXTRAS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        write_whole(options.out, json.dumps(measure(options.only, options.model, options.timed)))
        return
    task, ways = TASKS[options.model], [*(way for way in options.ways if way != "ours"), "ours"]
    allocator = os.environ.get("ISKD_ALLOCATOR", "tuned")
    settings = {"model": options.model, "timed": options.timed, "device": DEVICE.type, "allocator": allocator}
    rows = Rows(options.out, settings)
    fill(rows, ways, options)
    found = rows.rows
    where = next((row["setting"] for row in found if row["way"] == "peak" and "error" not in row), DEVICE.type)
    size = f"{options.model}, layers {list(task.removed)} removed, {task.rows} x {task.length} tokens"
    print(
        f"{where}\n\n{size}, {options.repeats} repeats of {options.timed} timed steps (padded: {half(options.timed)})\n"
    )
    print("\n".join(step_table(found, ways, task.rows * task.length, DEVICE.type)) + "\n")
    print("\n".join(notes(found, ways, DEVICE.type)))
    for row in found:
        if row["way"] == "profile" and "error" not in row:
            print("\n" + "\n".join(profile_tables(row)))


if __name__ == "__main__":
    main()
