"""Settings of a run that belong to no part; group `run` of the config."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import PositiveInt

# what huggingface_hub, which cuts the files, reads and is no nonsense: no sign, no word
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*[KMGT]B", re.IGNORECASE)
MOST_SAMPLES = 5
PLACES = ("device", "host", "disk")
"""Where the states of many windows can lie."""
UPKEEP = frozenset(
    {
        "checkpoint_every",
        "keep",
        "keep_students",
        "max_skipped",
        "on_oom",
        "checkpoints",
        "mfu",
        "efficiency_seconds",
        "share_prefix",
    }
    | {"gradient_checkpointing", "compile", "max_shard_bytes", "samples", "fit_streams"}
)
"""Options that a resumed run may change: upkeep, which changes no number of it."""


@dataclass(frozen=True)
class RunOptions:
    """Settings of a run that belong to no part.

    Attributes:
        checkpoint_every: optimizer steps between checkpoints inside a stage; stage ends always write one.
        keep: how many checkpoints are kept.
        keep_students: write the student of every kept stage as a model directory, RUN/students/NNN; a number: so many,
            the newest. False = only the last one, where it is exported.
        fit_tokens: calibration tokens for fitting compact blocks and merging, beside a quarter as many that choose; 0 =
            no fit.
        fit_streams: where their states lie between two blocks: device, host or disk (below `cache_dir`).
        score_tokens: calibration tokens for importance scores.
        measure_before: measure quality between edit and healing as well.
        movement_steps: optimizer steps after which every new parameter must have got a gradient and moved.
        max_skipped: optimizer steps in a row that may be skipped because the loss or a gradient is not finite; one more
            and the run stops.
        on_oom: what to do when memory runs out: `stop` with advice, or `halve` the micro-batch, double the accumulation
            and go on from the newest checkpoint (one process only).
        checkpoints: `full`, gathered on rank 0, or `sharded`, every process its own shards (trainer=fsdp).
        mfu: measure the machine's matrix peak at the start and log every stage's share of it; a step per stage.
        efficiency_seconds: how long latency, memory and cache of student and teacher may be measured at the end of the
            run; 0 = they are not.
        samples: prompts that teacher and student continue at the end of the run, for the report; 0 = none, at most 5.
        share_prefix: compute leading layers once that are frozen and still the teacher's.
        gradient_checkpointing: keep only each block's input for the backward pass and run the student's blocks twice:
            the least memory, about a sixth more time. "selective" keeps what linear maps return as well, and fused
            attention without dropout, and runs only the rest again: most of that memory for little time.
        compile: `torch.compile` for each block of student and teacher in training steps, or the name of its backend;
            False = off.
        max_shard_bytes: of one weights file of the export, as a number or as text such as "5GB".
        plan_only: print the plan and stop.
    """

    checkpoint_every: int = 50
    keep: int = 2
    keep_students: bool | int = False
    fit_tokens: int = 8192
    fit_streams: str = PLACES[0]
    score_tokens: int = 2048
    measure_before: bool = True
    movement_steps: int = 4
    max_skipped: int = 3
    on_oom: str = "stop"
    checkpoints: str = "full"
    mfu: bool = True
    efficiency_seconds: float = 60.0
    samples: int = 3
    share_prefix: bool = True
    gradient_checkpointing: bool | Literal["selective"] = False
    compile: bool | str = False
    max_shard_bytes: PositiveInt | str = "50GB"
    plan_only: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        for key in ("checkpoint_every", "keep", "movement_steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"run.{key} must be at least 1, got {getattr(self, key)}")
        for key in ("keep_students", "fit_tokens", "score_tokens", "max_skipped", "efficiency_seconds", "samples"):
            if getattr(self, key) < 0:
                raise ValueError(f"run.{key} must not be negative, got {getattr(self, key)}")
        if self.samples > MOST_SAMPLES:
            raise ValueError(f"run.samples={self.samples}: there are {MOST_SAMPLES} prompts, choose at most as many")
        options = {"on_oom": ("stop", "halve"), "checkpoints": ("full", "sharded"), "fit_streams": PLACES}
        for key, choices in options.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"run.{key}={getattr(self, key)!r}: choose {' or '.join(choices)}")
        if not isinstance(self.gradient_checkpointing, bool) and self.gradient_checkpointing != "selective":
            raise ValueError(
                f"run.gradient_checkpointing={self.gradient_checkpointing!r}: choose true, selective or false"
            )
        size = self.max_shard_bytes
        text = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
        if isinstance(size, bool) or not (float(text[1]) > 0 if text else isinstance(size, int) and size > 0):
            raise ValueError(
                f"run.max_shard_bytes={size!r:.80}: give bytes, or a number with KB, MB, GB or TB behind it, e.g. 5GB"
            )
        if isinstance(self.compile, bool):
            return
        if not self.compile or not isinstance(self.compile, str):
            raise ValueError(f"run.compile={self.compile!r}: choose true, false or the name of a backend of torch")
