"""The profile of a training step: what it holds, as a table and as JSON. `step_profile` measures it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from iskd.plan.run_files import PROFILE_FILE
from iskd.report.terminal import caption, title
from iskd.system import write_whole
from iskd.training.step.flops import mfu
from iskd.training.step.spans import StepSpan

SPANS = (*(span.value for span in StepSpan), "rest")
_NAMES = {"teacher": "teacher forward", "student": "student forward", "backward": "backward of the trunk"}


@dataclass(frozen=True)
class Profile:
    """What one optimizer step costs.

    Attributes:
        stage: name of the stage it belongs to.
        tokens: input tokens of the step.
        seconds: by span, of the median step with timers; with `rest` they add up to that step.
        step_seconds: of the median step without timers.
        flops: of matrix products, by span (`iskd.training.step.flops`).
        peak_flops: FLOP/s of the fastest matmul, measured in the same process.
        dtype: of the matrix products.
        memory_bytes: the most in use during a step: on a GPU by tensors, on a CPU by the whole process.
        operators: seconds of one step by kind of operator (`group_of`), under torch's profiler; may be empty.
        machine: see `iskd.system.machine.describe`.
        recomputed: whether FLOPs hold blocks that gradient checkpointing ran a second time.
    """

    stage: str
    tokens: int
    seconds: Mapping[str, float]
    step_seconds: float
    flops: Mapping[str, int]
    peak_flops: float
    dtype: str
    memory_bytes: int
    operators: Mapping[str, float] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    recomputed: bool = False

    @property
    def watched_seconds(self) -> float:
        """The step with timers: the sum of its spans and the rest."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Of a step without timers."""
        return self.tokens / self.step_seconds

    @property
    def mfu(self) -> float:
        """Share of the matrix peak, of a step without timers."""
        return mfu(sum(self.flops.values()), self.step_seconds, self.peak_flops)

    def to_json(self) -> dict[str, Any]:
        """Plain values, the derived ones too."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second, "mfu": self.mfu}


def write_profile(folder: Path, profile: Profile) -> Path:
    """Put a profile into `folder` as profile.json."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_whole(folder / PROFILE_FILE, json.dumps(profile.to_json(), indent=1))


def profile_table(profile: Profile) -> Table:
    """Seconds, share, FLOPs and MFU by span, then the operators by kind; tokens per second and memory below."""
    table = Table(title=title(f"one optimizer step of {profile.tokens:,} tokens: {profile.stage}"))
    for head in ("", "ms", "% of the step", "TFLOP", "% of the peak"):
        table.add_column(head, justify="right" if head else "left")

    def add(name: str, seconds: float, whole: float, flops: int | None) -> None:
        work = "" if not flops else f"{flops / 1e12:.3g}"
        speed = "" if not flops or seconds <= 0 else f"{100 * mfu(flops, seconds, profile.peak_flops):.1f}"
        table.add_row(name, f"{1e3 * seconds:,.2f}", f"{100 * seconds / whole:.1f}", work, speed)

    for name, seconds in profile.seconds.items():
        add(_NAMES.get(name, name), seconds, profile.watched_seconds, profile.flops.get(name))
    table.add_section()
    add("with timers", profile.watched_seconds, profile.watched_seconds, None)
    add("without", profile.step_seconds, profile.watched_seconds, sum(profile.flops.values()))
    if profile.operators:
        table.add_section()
        whole = sum(profile.operators.values())
        for group, seconds in profile.operators.items():
            add(f"operators: {group}", seconds, whole, None)
    facts, share = profile.machine, "HFU (with what is recomputed)" if profile.recomputed else "MFU"
    table.caption = caption(
        f"{profile.tokens_per_second:,.0f} tokens/s, {share} {100 * profile.mfu:.1f} % of "
        f"{profile.peak_flops / 1e12:.3g} TFLOP/s ({profile.dtype} matmul in this run), "
        f"peak memory {profile.memory_bytes / 2**30:.2f} GiB; {facts.get('device', 'unnamed machine')}, "
        f"{facts.get('threads', '?')} threads, allocator {facts.get('allocator', '?')}, load {facts.get('load', '?')}"
    )
    return table
