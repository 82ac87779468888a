"""Steps of `schedule=mixed` as people write them, and with every part that they name in full.

    {edit: remove, count: 4, importance: ablation}
    {edit: replace, block: {name: slim, ratio: 0.3}, count: 4, refit: [output]}
    {edit: convert, mixer: gated_deltanet, layers: every_second, tokens: 1e6}

A part is named as on the command line, alone or with keys of its own; all other keys are those of the step's schedule,
which is `align` for conversions and else `iterative`. A group that is not named is the run's; what trains and how fast
(`SHARED`) may be said once for all steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import NonNegativeInt

from iskd.system.text import one_of, perhaps
from iskd.system.typed_values import read_value
from iskd.system.version import CONF, options

GROUPS = ("edit", "block", "mixer", "importance", "refit")
"""Groups that a step may choose from."""
SHARED = ("train", "lora", "lr", "lr_new")
"""Keys of the mixed schedule that stand for the same keys of all steps that do not give their own."""
TARGETS = ("count", "target_layers", "target_params", "attention_share")
"""How many layers are edited, or left: a schedule has one of them, and none of its own beside layers that are named."""
_TARGET = "_target_"


def steps_as_meant(schedule: dict[str, Any]) -> None:
    """Put the parts that steps name, and their schedules, in the place of the names.

    Raises:
        ValueError: a step is no mapping, names no edit, or a part that there is not.
    """
    steps = schedule.get("steps")
    if not isinstance(steps, list):
        raise ValueError(f"schedule.steps={steps!r:.80}: give a list of steps, such as [{{edit: remove, count: 4}}]")
    shared = {key: schedule[key] for key in SHARED if schedule.get(key) is not None}
    made = [_step(step, f"schedule.steps[{number}]", shared) for number, step in enumerate(steps)]
    _share(made, schedule.get("tokens"))
    schedule["steps"] = made


def restarts_at_edit(schedule: Any) -> bool:
    """Whether a schedule or one of its steps, as written or in full, makes its edits in fresh processes."""
    if not isinstance(schedule, Mapping):
        return False
    steps = schedule.get("steps")
    inner = [each for each in steps if isinstance(each, Mapping)] if isinstance(steps, list) else []
    return bool(schedule.get("restart_at_edit")) or any(
        restarts_at_edit(each) or restarts_at_edit(each.get("schedule")) for each in inner
    )


def _step(step: Any, place: str, shared: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(step, Mapping):
        raise ValueError(f"{place}={step!r:.80}: give keys, such as {{edit: remove, count: 4}}")
    if "edit" not in step:
        raise ValueError(f"{place} names no edit: set its edit to one of {', '.join(options('edit'))}")
    own: dict[str, Any] = {
        group: part_named(group, step[group], place) for group in GROUPS if group in step and group != "refit"
    }
    if "refit" in step:
        names = step["refit"]
        own["refit"] = names if isinstance(names, Mapping) and "name" not in names else _refits(names, place)
    asked = step.get("schedule")
    if isinstance(asked, Mapping) and _TARGET in asked:
        return {**own, "schedule": dict(asked)}
    converts = str(own["edit"].get(_TARGET)).endswith("ConvertTo")
    usual = part_named("schedule", asked or ("align" if converts else "iterative"), place)
    if str(usual[_TARGET]).endswith(".Mixed"):
        raise ValueError(f"{place}.schedule=mixed: a step has no steps; write them one after the other")
    given = {key: value for key, value in step.items() if key not in (*GROUPS, "schedule")}
    if unknown := [key for key in given if key not in usual]:
        known = [key for key in usual if key != _TARGET]
        near = perhaps(unknown[0], known)
        raise ValueError(f"{place}.{unknown[0]} is no key{near}: {one_of((*GROUPS, *known))}")
    said = {key for key, value in given.items() if value is not None}
    if {"tokens", "epochs"} <= said:
        raise ValueError(
            f"{place}: tokens={given['tokens']} and epochs={given['epochs']} both say how long the step trains: drop "
            "one of them"
        )
    if said & {"layers", *TARGETS}:
        usual |= {key: None for key in TARGETS if key in usual and key not in said}
    usual |= {key: value for key, value in shared.items() if key in usual}
    return {**own, "schedule": {**usual, **given, "_tokens": "tokens" in given or given.get("epochs") is not None}}


def _refits(names: Any, place: str) -> dict[str, Any]:
    chosen = [names] if isinstance(names, str | Mapping) else list(names or ())
    return {key: node for name in chosen for key, node in part_named("refit", name, place).items()}


def part_named(group: str, chosen: Any, place: str) -> dict[str, Any]:
    """The yaml of a choice of a group, with keys of its own in it; one in full is taken as it is.

    Raises ValueError where there is no such choice, or a key that it has not.
    """
    if isinstance(chosen, Mapping) and _TARGET in chosen:
        return dict(chosen)
    keys = dict(chosen) if isinstance(chosen, Mapping) else {}
    name = keys.pop("name", None) if isinstance(chosen, Mapping) else chosen
    if not isinstance(name, str) or name not in options(group):
        near = perhaps(str(name), options(group))
        raise ValueError(
            f"{place}.{group}={name or chosen!r:.80} is no choice{near}: use one of {', '.join(options(group))}, or "
            "{name: ONE OF THEM, KEY: VALUE}"
        )
    node = written(group, name)
    listed = _TARGET not in node  # one of several may be chosen of this group, and its yaml has its name above its keys
    values = node.get(name, {}) if listed else node
    if unknown := [key for key in keys if key not in values]:
        known = [key for key in values if key != _TARGET]
        near = perhaps(unknown[0], known)
        raise ValueError(f"{place}.{group}.{unknown[0]} is no key{near}: {one_of(known)}")
    return {name: {**values, **keys}} if listed and keys else {**node, **keys}


def written(group: str, option: str) -> dict[str, Any]:
    """What the yaml of a choice says, and the files that it includes below it; interpolations as they stand there."""
    values: dict[str, Any] = yaml.safe_load((CONF / group / f"{option}.yaml").read_text(encoding="utf-8")) or {}
    found: dict[str, Any] = {}
    for name in values.pop("defaults", []):
        found = _merged(found, values if name == "_self_" else written(group, name))
    return found or values


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both, with the values of the second where both have some, as Hydra merges them."""
    both = [key for key in below.keys() & above.keys() if isinstance(below[key], dict) and isinstance(above[key], dict)]
    return {**below, **above, **{key: _merged(below[key], above[key]) for key in both}}


def _share(steps: list[dict[str, Any]], tokens: Any) -> None:
    """Steps without a budget of their own share what is left of the run's.

    Raises ValueError where nothing is, or where no step would take it.
    """
    fresh = any("_tokens" in step["schedule"] for step in steps)  # else they are a run's, in full
    told = dict[int, bool]()
    for number, step in enumerate(steps):
        said = any(step["schedule"].get(key) is not None for key in ("tokens", "epochs"))
        told[number] = step["schedule"].pop("_tokens", said)
    without = [step["schedule"] for number, step in enumerate(steps) if not told[number]]
    if tokens is None or not steps:
        return
    tokens = read_value("schedule.tokens", tokens, NonNegativeInt)
    # passes over the text, which are counted in no tokens here, may leave some in a step that a run has settled
    spent = sum(
        read_value(f"schedule.steps[{number}].tokens", step["schedule"].get("tokens") or 0, NonNegativeInt)
        for number, step in enumerate(steps)
        if told[number] and not step["schedule"].get("epochs")
    )
    if fresh and (spent > tokens or (not without and spent != tokens)):
        end = "; give more, or null" if spent > tokens else ", and none trains on the rest: give as much, or null"
        raise ValueError(f"schedule.tokens={tokens}: the steps that name theirs take {spent:,}{end}")
    for number, schedule in enumerate(without):
        left = int(tokens) - spent
        schedule["tokens"] = left // len(without) + (number < left % len(without))
