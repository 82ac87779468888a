"""Keys that were forced in (`+KEY=VALUE`) and that nothing would read: Hydra takes any, so they are refused here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from iskd.commands.line import roots_known, unknown_key
from iskd.system.typed_values import shown

_UNCHOSEN = ("budget", "eval", "logger", "refit", "loss")
"""Groups of which nothing need be chosen."""
_NAMED = ("logger", "refit", "loss")
"""Those that hold parts, each by its name."""


def refuse_unknown_roots(config: DictConfig) -> None:
    """Hydra takes `+KEY=VALUE` for any key, and nothing would read it; one that another value refers to is used."""
    known = {*roots_known(), "hydra"} - {"experiment", "debug"}  # whose files have no place of their own
    unknown = [str(key) for key in config if str(key) not in known]
    said = OmegaConf.to_yaml(config) if unknown else ""
    for key in unknown:
        if f"${{{key}}}" not in said and f"${{{key}." not in said:
            raise ValueError(unknown_key(key))
    refuse_unread_keys(config)


def refuse_unread_keys(config: DictConfig, groups: Sequence[str] = _UNCHOSEN) -> None:
    """Of a group without a choice, a key that was forced in is all that there is of it, and nothing reads it.

    Args:
        config: of the command line.
        groups: those of `_UNCHOSEN` that are looked at.

    Raises:
        ValueError: there is such a key.
    """
    for group in groups:
        node = config.get(group)
        if not OmegaConf.is_dict(node) or "_target_" in node:
            continue
        for key, value in node.items():
            part = OmegaConf.is_dict(value) and "_target_" in value
            if part and group in _NAMED:
                continue
            if group == "loss" and not OmegaConf.is_dict(value):  # which says so itself
                continue
            raise _unread(group, str(key), value)


def _unread(group: str, key: str, value: Any) -> ValueError:
    """What a key that nothing reads should have been."""
    if group not in ("refit", "loss"):
        return ValueError(unknown_key(f"{group}.{key}"))
    if OmegaConf.is_dict(value) and value:  # a key of a part that was not chosen
        return ValueError(unknown_key(f"{group}.{key}.{next(iter(value))}"))
    said = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return ValueError(f"{group}.{key}={shown(said)} is no part: choose {group}=[{key}], or leave the key out")


def refuse_unknown_of_hydra(config: DictConfig, node: Any, place: str = "hydra") -> None:
    """Hydra takes `+hydra.KEY=VALUE` for any key too; what its own classes have no field for, nothing reads.

    Args:
        config: of the task, whose values may refer to such a key.
        node: Hydra's own config, or a part of it.
        place: its dotted name.

    Raises:
        ValueError: there is such a key, and no value refers to it.
    """
    kind = OmegaConf.get_type(node)
    # keys beside a _target_ are arguments, which Hydra looks at when it makes it
    fields = None
    if dataclasses.is_dataclass(kind) and "_target_" not in node:
        fields = {field.name for field in dataclasses.fields(kind)}
    for key in map(str, node):
        # a folder would be made by looking at its name
        unread = OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key)
        value = None if unread else node[key]
        name, below = f"{place}.{key}", OmegaConf.is_dict(value)
        if fields is None or key in fields or (below and not value):  # hydra.env, which has no field, is empty
            if below:
                refuse_unknown_of_hydra(config, value, name)
            continue
        used = rf"\$\{{(hydra:|hydra\.){re.escape(name.removeprefix('hydra.'))}[.}}]"
        if not re.search(used, OmegaConf.to_yaml(config)):
            raise ValueError(unknown_key(name))
