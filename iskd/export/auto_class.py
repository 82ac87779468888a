"""The class that transformers' Auto classes call for a student, whoever then opens it.

`iskd.export.loading` opens one as a stranger's file, `iskd.export.bundled` where iskd is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from iskd.export.load_options import HUB, NOTHING_WRONG, asked_by_config, changes_nothing, dtype_of, one_device, refusal
from iskd.export.student import IskdConfig


class StudentClass(PreTrainedModel):
    """Stands in transformers' registry; loading returns the teacher's own class with the record applied."""

    config_class = IskdConfig

    def __init__(self, *_: Any, **__: Any) -> None:
        """Refuse to be made without weights: the record alone makes no student."""
        raise ValueError(
            "a student is loaded with its weights: iskd.load(DIR) or from_pretrained(DIR), not from_config"
        )

    @classmethod
    def folder_of(cls, name: Any, revision: str | None, hub: Mapping[str, Any]) -> Path:
        """A folder as it is, or the snapshot of a student that somebody put on the hub."""
        raise NotImplementedError

    @classmethod
    def opened(cls, folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
        """The student in a folder, in evaluation mode; None = in the type that its weights are stored in."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a student; options that change nothing are taken, and those refused that would be ignored."""
        dtype = dtype_of(*(kwargs.pop(key, None) for key in ("dtype", "torch_dtype")))
        revision, attention = (kwargs.pop(key, None) for key in ("revision", "attn_implementation"))
        place, told = one_device(kwargs.pop("device_map", None)), bool(kwargs.pop("output_loading_info", False))
        hub = {key: kwargs.pop(key) for key in HUB if kwargs.get(key) is not None}
        unknown = {key: value for key, value in kwargs.items() if value is not None and not changes_nothing(key, value)}
        unknown |= {"args": args} if args else {}
        if unknown:
            raise ValueError(refusal(*next(iter(unknown.items()))))
        folder = cls.folder_of(pretrained_model_name_or_path, revision, hub)
        other, keys = asked_by_config(kwargs.get("config"), folder / "config.json")
        model: Any = cls.opened(folder, dtype)
        if (attention := attention or other) is not None:
            model.set_attn_implementation(attention)
        for key, value in keys.items():
            setattr(model.config, key, value)
        model.config.use_cache = kwargs.get("use_cache", model.config.use_cache)
        nn.Module.to(model, place)
        return (model, dict(NOTHING_WRONG)) if told else model
