"""Options that loaders of the ecosystem pass to `from_pretrained`, and what they mean for a student that needs iskd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from iskd.system import read_json
from iskd.system.precision import device_of, is_here

HUB = ("cache_dir", "token", "force_download", "local_files_only")  # how a snapshot of a hub is had
# What `output_loading_info` tells: loading a student raises where anything does not fit.
NOTHING_WRONG: dict[str, Any] = {"missing_keys": (), "unexpected_keys": (), "mismatched_keys": (), "error_msgs": ()}
# Options that say nothing about the model itself, whatever their value.
_TAKEN = {
    *("config", "trust_remote_code", "_from_auto", "adapter_kwargs", "_commit_hash", "use_cache", "low_cpu_mem_usage"),
    *("code_revision", "proxies", "resume_download"),
    *("offload_folder", "offload_state_dict", "offload_buffers"),  # nothing is: all goes to one device
}
# Options of which these values change nothing.
_IDLE = {
    "subfolder": ("",), "use_safetensors": (True,), "ignore_mismatched_sizes": (False,), "load_in_8bit": (False,),
    "load_in_4bit": (False,), "from_tf": (False,), "from_flax": (False,), "weights_only": (True,),
    "use_auth_token": (False,), "use_kernels": (False,), "_fast_init": (True,), "disable_mmap": (False,),
    "key_mapping": ({},), "use_flash_attention_2": (False,), "max_memory": ({},),
}  # fmt: skip


def refusal(key: str, value: Any) -> str:
    """Sentence on an option that would be ignored."""
    fix = _INSTEAD.get(key, "load first, then move, wrap or quantise the model")
    return f"iskd students do not take the loading option {key}={value!r:.80}; {fix}"


def changes_nothing(key: str, value: Any) -> bool:
    """Whether a loading option of this value is the same as none."""
    return key in _TAKEN or value in _IDLE.get(key, ())


_OF_CONFIG = ("use_cache", "return_dict", "output_attentions", "output_hidden_states")
_OF_FILES = ("name_or_path", "transformers_version", "dtype", "torch_dtype")
_INSTEAD = {
    "subfolder": "give the folder itself, DIR/SUBFOLDER",
    "max_memory": "all of it goes to one device: device_map='cpu' or 'cuda:0'",
    "config": "load first, then set it in model.config",
}


def asked_by_config(given: Any, file: Path) -> tuple[Any, dict[str, Any]]:
    """What a caller's config asks for beyond that of the folder: Auto classes put options of loading into it.

    Args:
        given: what the caller passed, if anything.
        file: the config.json of the student.

    Returns:
        The attention and the keys of the model's config that are set.

    Raises:
        ValueError: it differs in anything else, which would be ignored.
    """
    if not isinstance(given, PreTrainedConfig) or not file.is_file():
        return None, {}
    mine = type(given).from_dict(read_json(file, links=True)).to_dict()
    changed = {key.removeprefix("_"): value for key, value in given.to_dict().items() if mine.get(key) != value}
    if other := sorted(changed.keys() - {*_OF_CONFIG, *_OF_FILES}):
        raise ValueError(refusal("config", {other[0]: changed[other[0]]}))
    return given._attn_implementation, {key: changed[key] for key in _OF_CONFIG if key in changed}


def dtype_of(value: Any, other: Any = None) -> torch.dtype | None:
    """A dtype by its object or name; None for "auto", which is that of loading."""
    value = other if value is None else value
    if value is None or value == "auto":
        return None
    found = value if isinstance(value, torch.dtype) else getattr(torch, str(value).removeprefix("torch."), None)
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
        place = torch.device(value)
    except (RuntimeError, TypeError):
        place = None
    if place is None or not (place.type == "meta" or is_here(place)):
        raise ValueError(
            f"device_map={value!r}: a student is loaded to one device that is here ('auto', 'cpu', 'cuda:0'): load it "
            "first, then spread it"
        )
    return place
