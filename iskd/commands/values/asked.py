"""What the command line says where a preset says otherwise: the preset's keys that go with it are dropped."""

from __future__ import annotations

import re
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf, open_dict

from iskd.commands.line.steps import TARGETS, written
from iskd.system.version import options


def with_export_keys(override: str) -> str:
    """`export=true` and `export=hf` as the mapping that they stand for, whose keys other overrides may set."""
    return "export={}" if override.lower() in ("export=true", "export=hf") else override


def as_asked(config: DictConfig, overrides: Sequence[str]) -> None:
    """Take out of a composed config what a preset says of things in whose place the command line has others.

    Raises:
        ValueError: the command line names two of which one can be.
    """
    _one_budget(config, overrides)
    _one_target(config, overrides)
    _without_presets_keys(config, overrides)


def _one_budget(config: DictConfig, overrides: Sequence[str]) -> None:
    """Where a command line says `schedule.tokens`, passes over the text that a preset counts in are none of its run.

    Raises:
        ValueError: it names both.
    """
    asked, schedule = _schedule_asked(overrides), config.get("schedule")
    if "tokens" not in asked or schedule is None or not schedule.get("epochs"):
        return
    if "epochs" in asked:
        raise ValueError(
            f"schedule.tokens={asked['tokens']} and schedule.epochs={asked['epochs']} both say how long the run "
            "trains: drop one of them"
        )
    schedule.epochs = None


def _one_target(config: DictConfig, overrides: Sequence[str]) -> None:
    """Where a command line says which layers are edited, or how many, a preset's number of them is none of its run.

    A list of six would lose its last two to a preset's four. Where a command line says both, the list is an order.
    """
    asked, schedule = _schedule_asked(overrides), config.get("schedule")
    if schedule is not None and asked.keys() & {"layers", *TARGETS}:
        for key in TARGETS:
            if key in schedule and key not in asked:
                schedule[key] = None


def _schedule_asked(overrides: Sequence[str]) -> dict[str, str]:
    """The keys of the schedule that a command line gives a value."""
    values = {key.lstrip("+"): value for key, _, value in (given.partition("=") for given in overrides)}
    schedule = {key[len("schedule.") :]: value for key, value in values.items() if key.startswith("schedule.")}
    return {key: value for key, value in schedule.items() if value not in ("null", "None", "")}


def _without_presets_keys(config: DictConfig, overrides: Sequence[str]) -> None:
    """Drop what a preset says of refits and losses in whose place the command line has chosen others.

    Keys of parts that are not chosen, and parts of the preset's own, which it spells out.
    """
    typed = {name.lstrip("+"): value for name, _, value in (given.partition("=") for given in overrides)}
    for group in ("refit", "loss"):
        node = config.get(group)
        if not OmegaConf.is_dict(node) or "_target_" in node:
            continue
        others = [key for key, value in node.items() if OmegaConf.is_dict(value) and "_target_" not in value]
        if group in typed:
            chosen = [name for name in re.split(r"[\[\],\s'\"]+", typed[group]) if name]
            if all(name in options(group) for name in chosen):  # else some are of a folder of the user's own
                known = {key for name in chosen for key in written(group, name)}
                spelled = [key for key, value in node.items() if OmegaConf.is_dict(value) and key not in known]
                others += [key for key in spelled if key not in others]
        for key in others:
            if not any(f"{name}.".startswith(f"{group}.{key}.") for name in typed):
                with open_dict(node):
                    del node[key]
