"""Device and precision: what `auto` means, in training and in passes outside the trainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from iskd.system.ranks import local_rank

_KNOWN = {"bf16-mixed": "bf16-mixed", "bf16": "bf16-mixed", "32-true": "32-true", "32": "32-true"}
_ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
ForwardContext = Callable[[], AbstractContextManager[Any]]
"""Opens what forward passes run in: autocast, or nothing."""


def place(settings: Mapping[str, Any]) -> tuple[torch.device, ForwardContext]:
    """Device and precision of a pass outside the trainer, chosen as the trainer chooses them.

    Processes that share a machine have a GPU each, as far as there are GPUs.

    Args:
        settings: keywords of the Trainer, of which `accelerator` and `precision` count.

    Raises:
        ValueError: there is no such accelerator, or not on this machine; or as `precision`.
    """
    accelerator = str(settings["accelerator"])
    if accelerator not in _ACCELERATORS:
        raise ValueError(f"trainer.accelerator={accelerator:.80}: choose {', '.join(_ACCELERATORS[:-1])} or tpu")
    device = _of_this_process(_accelerator(accelerator))
    if precision(settings["precision"], accelerator) == "bf16-mixed":
        return device, partial(torch.autocast, device.type, torch.bfloat16)
    return device, nullcontext


def device_of(asked: str) -> torch.device:
    """`auto`: a GPU if there is one, else the CPU; otherwise what is asked for.

    Raises ValueError for a word that names no device, and for one that is not on this machine.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ValueError(f"device={asked} is no device: choose auto, cpu or cuda") from None
    if not is_here(device):
        raise ValueError(f"device={asked} is not on this machine: choose auto or one of {', '.join(_here())}")
    return device


def is_here(device: torch.device) -> bool:
    """Whether this machine has a device that computes (`meta` does not)."""
    try:
        return torch.empty(0, device=device).device.type != "meta"
    except (AssertionError, RuntimeError, NotImplementedError):  # torch says it in any of these ways
        return False


def _here() -> list[str]:
    """Kinds of devices on this machine."""
    return ["cpu", *["cuda"] * torch.cuda.is_available(), *["mps"] * torch.backends.mps.is_available()]


def _accelerator(name: str) -> torch.device:
    """The device that an accelerator of the Trainer is; `gpu` is whichever kind there is."""
    if name in ("auto", "cpu"):
        return device_of(name)
    found = [kind for kind in _here() if kind in (("cuda", "mps") if name == "gpu" else (name,))]
    if not found:
        raise ValueError(
            f"trainer.accelerator={name}: there is none on this machine that a single pass can use: choose auto or cpu "
            "(trainer=cpu)"
        )
    return torch.device(found[0])


def _of_this_process(device: torch.device) -> torch.device:
    """The GPU of this one of the processes that share a machine; where each sees one alone, that."""
    own = local_rank(os.environ)
    if device.type != "cuda" or not own:
        return device
    return torch.device("cuda", own % max(1, torch.cuda.device_count()))


def serving_dtype(device: torch.device) -> torch.dtype | None:
    """What a finished model is measured in, as it will be served: bf16 on a GPU, elsewhere (None) what it has."""
    return torch.bfloat16 if device.type == "cuda" else None


def precision(asked: object, accelerator: str) -> str:
    """`auto`: bf16 autocast on a GPU that has it and on a CPU with bf16 matrix units, else float32.

    Raises ValueError for fp16, and for what is neither bf16 autocast nor float32: teacher and student have to compute
    in the same way, and the teacher keeps float32 weights.
    """
    if str(asked).startswith("16"):
        raise ValueError(f"trainer.precision={asked}: fp16 overflows in distillation losses; use bf16-mixed or 32-true")
    if asked != "auto":
        if str(asked) not in _KNOWN:
            raise ValueError(f"trainer.precision={asked}: choose auto, bf16-mixed or 32-true (weights stay float32)")
        return _KNOWN[str(asked)]
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    return "bf16-mixed" if fast_bf16() else "32-true"


def fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AMX tiles or AVX-512 BF16); elsewhere float32 is faster."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check is not None and check() for check in checks)
