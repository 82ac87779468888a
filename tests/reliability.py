"""The tables of docs/reliability.md: two processes against one, and runs that are killed and resumed.

    python -m tests.reliability --equality
    python -m tests.reliability --trials 25
    python -m tests.reliability --trials 25 --strategy ddp
    python -m tests.reliability --trials 25 --strategy fsdp
    python -m tests.reliability --trials 6 --kind candidates
    python -m tests.reliability --trials 4 --kind sweep

The first runs one process, DDP and FSDP2 through every kind of edit and compares losses and final weights. The others
kill a run with SIGKILL at random places, resume it, and compare its end with that of an uninterrupted one: a process
dies at any moment, or inside a step, an edit, a fit, a save or a validation; places and their numbers are drawn from
those that the uninterrupted run passes.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from iskd.losses.kl import KL
from iskd.schedules.align import Align
from iskd.schedules.edits import ConvertTo, RemoveLayers, ReplaceWith
from iskd.schedules.iterative import Iterative
from iskd.teacher import TeacherCacheSpec
from iskd.training.state import checkpoint, checkpoint_files
from tests import programs, sweep_kills
from tests.runs import BOTTLENECK, MIXER, TOKENS, largest_difference, metric_rows, write_text
from tests.worlds import World, run_world

TIMED = "any moment"
_SHORT: dict[str, Any] = {"tokens": 6 * TOKENS, "lr": 1e-3, "lr_new": 3e-3}
KINDS: dict[str, dict[str, Any]] = {
    "candidates": {
        "schedule": Iterative(RemoveLayers(), count=1, rescore=True, candidates=2, trial_tokens=2 * TOKENS, **_SHORT)
    },
    "alignment": {"schedule": Align(ConvertTo(MIXER), tokens=12 * TOKENS, mixers="mixer_output")},
    "adapters": {
        "schedule": Iterative(ReplaceWith(BOTTLENECK), layers=[2, 1], train="lora", lora={"rank": 4}, **_SHORT)
    },
    "cache": {"teacher_cache": TeacherCacheSpec(), "dropout": 0.0, "terms": {"kl": (KL(), 1.0)}},
    "sharded": {"options": {"checkpoints": "sharded"}},
}
"""What a kind of run changes in that of the other tables; sharded checkpoints are of --strategy fsdp."""


@dataclass(frozen=True)
class Trial:
    """Where a run was killed and how it ended: `seconds` until the other processes stopped, tokens trained twice."""

    place: str
    call: float
    victim: int
    seconds: float
    again: int
    weights: float
    optimizer: float
    results: bool
    rows: bool


class Bench:
    """An uninterrupted run, and trials against it."""

    def __init__(self, folder: Path, size: int, strategy: str | None, seed: int, **changes: Any) -> None:
        self.folder, self.size, self.strategy, self.changes = folder, size, strategy, {"dropout": 0.1, **changes}
        self.random = random.Random(seed)
        write_text(folder)
        arguments = (folder, "whole", size, strategy, self.changes)
        run_world(size, programs.counted, *arguments, folder=folder / "logs" / "whole")
        self.counts = [json.loads((folder / f"whole-{rank}.counts.json").read_text()) for rank in range(size)]

    @cached_property
    def seconds(self) -> float:
        """Length of a run; not of the first one, which also started the server that processes are forked from."""
        started, size = time.monotonic(), self.size
        arguments = (self.folder, "timed", size, self.strategy, self.changes)
        run_world(size, programs.train, *arguments, folder=self.folder / "logs" / "timed")
        return time.monotonic() - started

    def places(self) -> Iterator[tuple[str, float, int]]:
        """Places to be killed at, without end: every kind in turn, the call and the process at random."""
        kinds = [place for place, count in self.counts[0].items() if count] + [TIMED]
        while True:
            self.random.shuffle(kinds)
            for place in kinds:
                victim = self.random.randrange(self.size)
                if place == TIMED:
                    yield place, self.random.uniform(0.2, 0.9) * self.seconds, victim
                    continue
                if not self.counts[victim][place]:
                    victim = 0
                yield place, self.random.randrange(self.counts[victim][place]), victim

    def trial(self, number: int, place: str, call: float, victim: int) -> Trial:
        """Kill, resume, compare."""
        name, size, logs = f"trial{number}", self.size, self.folder / "logs"
        arguments = (self.folder, name, size, self.strategy, self.changes)
        world = World(size, programs.killed, (*arguments, victim, place, call), logs / name)
        if place == TIMED:
            world.processes[victim].join(call)
            if not world.processes[victim].is_alive():  # it was faster than the one that was timed
                world.wait()
                shutil.rmtree(self.folder / name)
                return self.trial(number, place, 0.7 * call, victim)
            world.processes[victim].kill()
        world.processes[victim].join(120)
        died = time.monotonic()
        codes = world.wait(60)
        seconds = time.monotonic() - died
        assert codes[victim] == -signal.SIGKILL, f"{place} {call}: exit codes {codes}\n{world.said()}"
        place_left = self.folder / name / "tokens.txt"
        reached = int(place_left.read_text() or 0) if place_left.is_file() else 0
        newest = checkpoint_files.newest(self.folder / name / "checkpoints")
        kept = 0 if newest is None else checkpoint.read_state(newest).tokens
        resumed = {**self.changes, "resume": True}
        run_world(size, programs.train, *arguments[:4], resumed, folder=logs / f"{name}-resumed")
        weights, optimizer = self._differences(name)
        rows = metric_rows(self.folder / name) == metric_rows(self.folder / "whole")
        shutil.rmtree(self.folder / name)
        ends = [json.loads((self.folder / f"{run}-0.json").read_text())["stages"] for run in ("whole", name)]
        return Trial(place, call, victim, seconds, max(0, reached - kept), weights, optimizer, ends[0] == ends[1], rows)

    def _differences(self, name: str) -> tuple[float, float]:
        """Largest difference of any weight and of any optimizer state from the uninterrupted run."""
        ends = [checkpoint_files.newest(self.folder / run / "checkpoints") for run in ("whole", name)]
        assert all(end is not None for end in ends)
        parts = ("student", "optimizer")
        found = [[dict(checkpoint.Stored(end, part)) for end in ends if end is not None] for part in parts]
        return largest_difference(*found[0]), largest_difference(*found[1])


def table(trials: list[Trial]) -> str:
    """One row per place."""
    heads = (
        "killed in",
        "trials",
        "same results",
        "same metrics",
        "others stopped after",
        "trained twice",
        "weights",
        "optimizer",
    )
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for place in dict.fromkeys(trial.place for trial in trials):
        of = [trial for trial in trials if trial.place == place]
        same, rows_same = (sum(getattr(trial, key) for trial in of) for key in ("results", "rows"))
        waits = max(trial.seconds for trial in of)
        again = max(trial.again for trial in of)
        differ = [max(getattr(trial, key) for trial in of) for key in ("weights", "optimizer")]
        cells = (place, len(of), same, rows_same, f"{waits:.2f} s", f"{again} tokens", *(f"{d:g}" for d in differ))
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def equality(folder: Path) -> str:
    """Two processes against one, through a fitted block, a removal, a mixer and a bottleneck."""
    write_text(folder)
    seen, ends = {}, {}
    for name, size, strategy in (("one process", 1, None), ("DDP", 2, "ddp"), ("FSDP2", 2, "fsdp")):
        run_world(size, programs.train, folder, name, size, strategy, {}, folder=folder / "logs" / name)
        seen[name] = json.loads((folder / f"{name}-0.json").read_text())
        ends[name] = load_file(folder / f"{name}.safetensors")
    one, weights = seen.pop("one process"), ends.pop("one process")
    heads = ("two processes", "steps", "losses differ by", "weights differ by", "steps after which ranks differ")
    heads += ("new parameters", "of them moved", "removed blocks in memory", "FSDP roots")
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, mine in seen.items():
        loss = max(abs(a - b) for a, b in zip(mine["losses"], one["losses"], strict=True))
        differ = sum(len(set(step)) > 1 for step in mine["digests"])
        values = (name, len(mine["digests"]), f"{loss:.1e}", f"{largest_difference(ends[name], weights):.1e}", differ)
        values += (len(mine["moved"]), sum(mine["moved"].values()), mine["leaked"], mine["roots"])
        rows.append(f"| {' | '.join(map(str, values))} |")
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=25)
    parser.add_argument("--strategy", choices=["ddp", "fsdp"], help="two processes")
    parser.add_argument("--kind", choices=[*sorted(KINDS), "sweep"], help="another kind of run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--equality", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if asked.equality:
            print(equality(Path(folder)))
            return
        if asked.kind == "sweep":
            print(sweep_kills.table(Path(folder), asked.trials, asked.seed))
            return
        strategy = "fsdp" if asked.kind == "sharded" else asked.strategy
        changes = KINDS.get(asked.kind, {})
        bench = Bench(Path(folder), 2 if strategy else 1, strategy, asked.seed, **changes)
        trials = []
        for number, (place, call, victim) in zip(range(asked.trials), bench.places(), strict=False):
            trials.append(bench.trial(number, place, call, victim))
            print(trials[-1], flush=True)
        print(table(trials))


if __name__ == "__main__":
    main()
