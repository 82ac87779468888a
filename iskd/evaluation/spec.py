"""What to evaluate, and when: one conf/eval/*.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from iskd.evaluation.task_items import check_task

STAGE = "stage"


@dataclass(frozen=True)
class EvalSpec:
    """What to evaluate; one conf/eval/*.yaml.

    Attributes:
        tasks: keys of `iskd.evaluation.task_items.TASKS`, `copy` (random words to be repeated, made here), and without
            a data_dir any other name that lm-evaluation-harness knows.
        limit: at most so many items of each task; None = all.
        data_dir: folder of NAME/eval.jsonl; None = the harness's own tasks, from the hub.
        seed: of the items drawn and of the bootstrap.
        batch_size: texts at a time in the harness.
        batch_tokens: tokens at a time in `copy` and in the text.
        text: file, folder or glob for perplexity and bits per byte; None = none, or what the caller passes.
        tokens: at most so many tokens of the text.
        window: tokens per window of the text; at most what the model with the longest limit takes, beside which the
            other one reads a window in pieces of its own.
        resamples: of the bootstrap.
        every: along a run, for its figures. `stage`: tasks and text are asked at the start and after every stage; a
            number: that too, and inside a stage the student is validated every so many training tokens, on the windows
            of `data.val_tokens`. None = at the end alone.
        efficiency_seconds: how long `iskd evaluate` may measure latency, memory and cache as well; 0 = not at all.
            At the end of a run it is `run.efficiency_seconds` that says so.

    Raises:
        ValueError: a value that cannot work.
    """

    tasks: Sequence[str] = ()
    limit: int | None = 100
    data_dir: str | None = None
    seed: NonNegativeInt = 0
    batch_size: int = 8
    batch_tokens: int = 4096
    text: str | None = None
    tokens: int = 16384
    window: int = 512
    resamples: int = 1000
    every: PositiveInt | Literal["stage"] | None = None
    efficiency_seconds: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if twice := sorted({name for name in self.tasks if self.tasks.count(name) > 1}):
            raise ValueError(f"eval.tasks lists {twice[0]!r} twice")
        if self.data_dir is not None:
            for name in self.tasks:
                check_task(name)
        least = {"limit": 1, "batch_size": 1, "batch_tokens": 1, "tokens": 2, "window": 2, "resamples": 1}
        for key, lowest in (least | {"efficiency_seconds": 0}).items():
            value = getattr(self, key)
            if value is not None and value < lowest:
                raise ValueError(f"eval.{key}={value} must be at least {lowest}")
        if not isinstance(self.every, int | str | None) or isinstance(self.every, bool):
            raise ValueError(f"eval.every={self.every!r}: choose stage, a number of training tokens, or null")
        if self.every != STAGE and (isinstance(self.every, str) or (self.every is not None and self.every < 1)):
            raise ValueError(f"eval.every={self.every}: choose stage, a number of training tokens, or null")

    @property
    def asks(self) -> bool:
        """Whether there is anything to ask."""
        return bool(self.tasks or self.text)

    @property
    def along(self) -> bool:
        """Whether tasks or text are asked after every stage."""
        return self.every is not None and self.asks

    @property
    def inside(self) -> int | None:
        """Training tokens after which a student is validated inside a stage; None = it is not."""
        return None if isinstance(self.every, str) else self.every
