"""How many tokens a run trains on where nobody says, and in which steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from omegaconf import DictConfig, OmegaConf

from iskd.data import TextData
from iskd.plan.token_budget import ON_CPU, cpu_token_budget, gpu_token_budget
from iskd.system.machine import called
from iskd.system.precision import device_of

_LEAST_STEPS = 64  # of a run, where its micro-batches may be smaller (experiments/refit-smollm2: the size of a step)


def streamed(config: DictConfig) -> int:
    """Training tokens that a run takes of a text without an end. Raises ValueError where nobody says how many."""
    schedules = _schedules(config)
    passes = next((schedule.epochs for schedule in schedules if schedule.get("epochs")), None)
    if passes is not None:
        raise ValueError(
            f"schedule.epochs={passes:g} takes all of the text, and data.source.streaming=true reads as much as a run "
            "takes: set schedule.epochs=null and schedule.tokens, or data.max_train_tokens=N (the tokens of a pass), "
            "or data.source.streaming=false"
        )
    tokens = sum(schedule.get("tokens") or 0 for schedule in schedules)
    if any(schedule.get("tokens", 0) is None for schedule in schedules):
        device = _device(config)
        if device.type == "cuda":
            raise ValueError(
                "schedule.tokens=null goes by how long the text is, and data.source.streaming=true reads as much as a "
                "run takes: set schedule.tokens, or data.max_train_tokens"
            )
        tokens += cpu_token_budget(called(device)).tokens
    return tokens


def batch_of(config: DictConfig) -> int:
    """Windows per micro-batch where nobody says: small budgets are short of updates more than of tokens."""
    step = config.data.seq_len * (config.trainer.get("accumulate_grad_batches") or 1)
    schedules = _schedules(config)
    open_ = any(schedule.get("tokens", 0) is None for schedule in schedules)
    tokens = sum(schedule.get("tokens") or 0 for schedule in schedules) + ON_CPU * open_
    # passes are as much as there is text, many steps; where nothing is trained nothing is short, nor is it on a GPU
    passes = any(schedule.get("epochs") for schedule in schedules)
    if passes or not tokens or (open_ and _device(config).type == "cuda"):
        return TextData.BATCH
    return max(1, min(TextData.BATCH, tokens // (_LEAST_STEPS * step)))


def settled_as(config: DictConfig, saved: DictConfig) -> None:
    """Put the tokens that a run has settled for itself in their places in a config of as many steps that names none.

    Args:
        config: of the command line that continues it, with values as meant.
        saved: of the run.
    """
    steps = saved.schedule.get("steps") or ()
    if not all(OmegaConf.is_dict(step) and OmegaConf.is_dict(step.get("schedule")) for step in steps):
        return  # the file is anybody's, and damaged: whoever reads its steps says so
    mine, theirs = _schedules(config), _schedules(saved)
    for schedule, before in zip(mine, theirs, strict=True) if len(mine) == len(theirs) else ():
        if schedule.get("tokens", 0) is None and isinstance(before.get("tokens"), int):
            schedule.tokens = before.tokens


def _schedules(config: DictConfig) -> list[DictConfig]:
    """Those of the steps, or the only one."""
    return [step.schedule for step in config.schedule.get("steps") or ()] or [config.schedule]


def default_tokens(config: DictConfig, text_tokens: Callable[[], int]) -> str:
    """Put the machine's own number of tokens into a config that names none, and return what the plan says of it.

    It becomes part of the run's config: a run that is continued elsewhere keeps it.

    Args:
        config: of the run, with values as meant.
        text_tokens: counts those of the training text, where that matters.
    """
    schedules = _schedules(config)
    unsaid = [schedule for schedule in schedules if schedule.get("tokens", 0) is None]
    for schedule in unsaid:
        if schedule.get("epochs"):
            schedule.tokens = ON_CPU  # the default of the code, which passes over the text take the place of
    unsaid = [schedule for schedule in unsaid if schedule.tokens is None]
    if not unsaid:
        return ""
    device = _device(config)
    chosen = (
        gpu_token_budget(called(device), text_tokens()) if device.type == "cuda" else cpu_token_budget(called(device))
    )
    for number, schedule in enumerate(unsaid):
        schedule.tokens = chosen.tokens // len(unsaid) + (number < chosen.tokens % len(unsaid))
    return chosen.told


def _device(config: DictConfig) -> torch.device:
    """Where the run trains; what Lightning says of an accelerator that there is not, it says itself."""
    return device_of("cpu" if config.trainer.get("accelerator") == "cpu" else "auto")
