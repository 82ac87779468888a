"""Options that loaders of the ecosystem pass to `from_pretrained`, and what they mean for a student that needs iskd."""

from __future__ import annotations

from typing import Any

import torch

from iskd.system.precision import device_of

HUB = ("cache_dir", "token", "force_download", "local_files_only")  # how a snapshot of a hub is had
# What `output_loading_info` tells: loading a student raises where anything does not fit.
NOTHING_WRONG: dict[str, Any] = {"missing_keys": (), "unexpected_keys": (), "mismatched_keys": (), "error_msgs": ()}
# Options that say nothing about the model itself, whatever their value.
_TAKEN = {
    *("config", "trust_remote_code", "_from_auto", "adapter_kwargs", "_commit_hash", "use_cache", "low_cpu_mem_usage"),
    *("code_revision", "proxies", "resume_download"),
}
# Options of which these values change nothing.
_IDLE = {
    "subfolder": ("",), "use_safetensors": (True,), "ignore_mismatched_sizes": (False,), "load_in_8bit": (False,),
    "load_in_4bit": (False,), "from_tf": (False,), "from_flax": (False,), "weights_only": (True,),
}  # fmt: skip


def changes_nothing(key: str, value: Any) -> bool:
    """Whether a loading option of this value is the same as none."""
    return key in _TAKEN or value in _IDLE.get(key, ())


def dtype_of(value: Any, other: Any = None) -> torch.dtype | None:
    """A dtype by its object or name; None for "auto", which is that of loading."""
    value = other if value is None else value
    if value is None or isinstance(value, torch.dtype) or value == "auto":
        return value if isinstance(value, torch.dtype) else None
    found = getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={value!r} is none that weights have: choose float32, bfloat16 or float16")
    return found


def one_device(value: Any) -> torch.device | None:
    """The device of a `device_map` that puts everything on one; None where nothing was asked."""
    if isinstance(value, dict) and len({str(place) for place in value.values()}) == 1:
        value = next(iter(value.values()))
    if value is None:
        return None
    if isinstance(value, str) and value in ("auto", "balanced", "balanced_low_0", "sequential"):
        return device_of("auto")
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_map={value!r}: a student is loaded to one device ('auto', 'cpu', 'cuda:0'): load it first, then "
            "spread it"
        ) from error
