"""The keys of `trainer:`, of which a run takes those that change no length and no measurement of it.

A schedule counts tokens, and one fit of Lightning's trainer is the whole run. Lightning's own limits would end that
fit in the middle of a stage, with everything behind it left out; they are refused with the key to use instead.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt


@dataclass(frozen=True)
class TrainerKeys:
    """Those of Lightning's keys that a run has a use for, and its own; they begin as a run of the command line does.

    Attributes:
        precision: `auto` is bf16 autocast where the machine is fast at it, else float32 (`iskd.system.precision`).
        max_time: see `seconds`. progress: whether a bar is shown.
    """

    accelerator: str = "auto"
    devices: PositiveInt | Literal[-1] | str | list[int] = 1
    num_nodes: PositiveInt = 1
    strategy: str = "auto"
    precision: str = "auto"
    accumulate_grad_batches: PositiveInt = 1
    log_every_n_steps: NonNegativeInt = 5
    max_time: str | dict[str, Any] | None = None
    progress: bool = True
    deterministic: bool | Literal["warn"] | None = None
    benchmark: bool | None = None
    detect_anomaly: bool = False
    sync_batchnorm: bool = False
    inference_mode: bool = True
    enable_model_summary: bool | None = False
    profiler: str | None = None


_LENGTH = "a schedule counts tokens: set schedule.tokens, or schedule.epochs"
_QUALITY = "quality is measured at the end of every stage: set data.val_tokens"
_INSIDE = "inside a stage a student is validated by tokens: set eval=validation eval.every=TOKENS"
_TESTED = "a run asks its student by eval=quick: set eval.limit"
_OFF: tuple[object, ...] = (None, False)
# key: values that ask for nothing, and what to say to all others
_REFUSED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "max_steps": ((None, -1), _LENGTH),
    "max_epochs": ((None, -1), _LENGTH),
    "min_steps": ((None, 0), _LENGTH),
    "min_epochs": ((None, 0), _LENGTH),
    "limit_train_batches": ((None, 1.0), _LENGTH),
    "overfit_batches": ((None, 0, 0.0), "for a run on little text, name the text with data.path"),
    "fast_dev_run": ((*_OFF, 0), "to try a run, use plan_only=true or debug=smoke"),
    "limit_val_batches": ((None, 0, 0.0), _QUALITY),
    "val_check_interval": ((None, 1.0), _INSIDE),
    "check_val_every_n_epoch": ((None, 1), _QUALITY),
    "num_sanity_val_steps": ((None, 0), _QUALITY),
    "limit_test_batches": ((None, 1.0), _TESTED),
    "limit_predict_batches": ((None, 1.0), _TESTED),
    "reload_dataloaders_every_n_epochs": ((None, 1), "every stage has its own share of the text: see data"),
    "use_distributed_sampler": (_OFF, "windows are shared out to the processes already: see data"),
    "enable_checkpointing": (_OFF, "a run writes its own checkpoints: set run.checkpoint_every and run.keep"),
    "default_root_dir": ((None,), "a run writes into its own folder: set hydra.run.dir"),
    "gradient_clip_val": ((None,), "gradients are clipped over all processes: set optim.clip"),
    "gradient_clip_algorithm": ((None, "norm"), "gradients are clipped by their norm: set optim.clip"),
    "enable_progress_bar": ((None,), "the bar of a run is trainer.progress: set it to true or false"),
    "barebones": (_OFF, "measurements are switched off by run.mfu=false and run.efficiency_seconds=0"),
    "logger": ((None,), "choose logger=csv, logger=wandb or logger=tensorboard"),
    "callbacks": ((None,), "callbacks are of Python code: iskd.training.Parts.callbacks"),
    "model_registry": ((None,), "a student is written by export=true"),
}
MAX_TIME = "max_time"
FREE = (MAX_TIME, *_REFUSED)
"""Keys that a resumed run may change: they say nothing of its numbers, and older runs may have saved any of them."""
_OWN = ("progress",)
_COUNTS = {"accumulate_grad_batches": 1, "num_nodes": 1, "log_every_n_steps": 0}
_TIME = re.compile(r"(\d+):(\d\d?):(\d\d?):(\d\d?)")


def with_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `trainer:` as given, and the others of `TrainerKeys`."""
    return {**asdict(TrainerKeys()), **given}


def trainer_settings(given: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """What a run passes on to the trainer: the given settings without those that ask for nothing.

    Args:
        given: the keys of `trainer:`.
        known: those that Lightning's trainer takes.

    Raises:
        ValueError: a key that no trainer has, a limit that would end a schedule early, something that a run does
            itself, or a value of the wrong kind; with the key to use.
    """
    settings = dict(given)
    for key, value in given.items():
        if key not in known and key not in _OWN:
            raise ValueError(f"trainer.{key}={value!r:.80}: lightning.Trainer has no setting of that name; drop it")
        if key in _REFUSED:
            nothing, instead = _REFUSED[key]
            if not any(type(value) is type(other) and value == other for other in nothing):
                raise ValueError(f"trainer.{key}={value!r:.80} is not for a run: {instead}, and drop trainer.{key}")
            del settings[key]
        if key in _COUNTS and (isinstance(value, bool) or not isinstance(value, int) or value < _COUNTS[key]):
            raise ValueError(f"trainer.{key} must be an integer, at least {_COUNTS[key]}, got {value!r:.80}")
    if not isinstance(settings.get("progress", True), bool):
        raise ValueError(f"trainer.progress must be true or false, got {settings['progress']!r:.80}")
    seconds(settings.pop(MAX_TIME, None))
    return settings


def seconds(max_time: Any) -> float | None:
    """How long a process may train by `trainer.max_time`: `DAYS:HOURS:MINUTES:SECONDS` or, as keys, `hours: 2`.

    Raises ValueError for anything else, and for no time at all.
    """
    if max_time is None:
        return None
    found = _TIME.fullmatch(max_time) if isinstance(max_time, str) else None
    try:
        if found:
            max_time = dict(zip(("days", "hours", "minutes", "seconds"), map(int, found.groups()), strict=True))
        span = timedelta(**max_time) if isinstance(max_time, Mapping) else max_time
        if isinstance(span, timedelta) and span > timedelta():
            return span.total_seconds()
    except (TypeError, OverflowError):
        pass
    raise ValueError(
        f"trainer.max_time={max_time!r:.80}: give the time after which a run saves and stops as "
        "DAYS:HOURS:MINUTES:SECONDS, e.g. 00:11:50:00"
    )
