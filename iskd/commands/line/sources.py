"""`data.sources`: what each source of a mix is, from the few keys that somebody wrote to those that its class takes."""

from __future__ import annotations

import logging
from typing import Any

from iskd.commands.line.steps import written
from iskd.system import Json
from iskd.system.text import perhaps
from iskd.system.typed_values import shown
from iskd.system.version import options

_FILES, _HUB, _MIX = "iskd.data.sources.TextFiles", "iskd.data.sources.HubDataset", "iskd.data.mix.Mix"
_READING = ("fmt", "field", "detokenize")
"""What files at hand keep of the data set that they are a copy of."""
_SHARED = ("bos", "boundaries", "validation_fraction", "calibration_fraction", "test_fraction")
"""Keys of `data` beside its source that say what the text of a preset is cut and framed like: a mix has one of each."""
PRESETS = tuple(option for option in options("data") if option not in ("mix", "chat", "text", "hf"))
"""What `data.sources.NAME.data` takes: the choices of `data` that name a text."""

_log = logging.getLogger(__name__)


def describe_sources(data: Json, *, resuming: bool) -> None:
    """Give every entry of `data.sources` its class and all that its preset says, in place.

    Args:
        data: the node `data` of a config, as plain values.
        resuming: a saved config says what the sources are, and this one may repeat some of its keys.

    Raises:
        ValueError: an entry names no text or several, its preset is none, or `data` is no mix.
    """
    sources = data.get("sources")
    if not isinstance(sources, dict) or not sources:
        return
    source = data.get("source")
    if not resuming and (not isinstance(source, dict) or source.get("_target_") != _MIX):
        raise ValueError(f"data.sources.{next(iter(sources))} is a source of a mix: add data=mix")
    for name, entry in sources.items():
        if not isinstance(entry, dict):
            raise ValueError(
                f"data.sources.{name}={shown(entry)} takes keys: set "
                f"data.sources.{name}.path=FILE (or .name=OWNER/NAME "
                f"or .data=PRESET) and data.sources.{name}.weight=SHARE"
            )
        if "_target_" not in entry and not (resuming and not _names(entry)):
            sources[name] = _described(name, entry)
            _tell_unshared(data, name, entry)


def _tell_unshared(data: Json, name: str, entry: Json) -> None:
    """Warn of what a preset says of all of `data`, where the mix that takes its source from it says something else."""
    if entry.get("data") is None:
        return
    usual, own = _shared("mix"), _shared(entry["data"])
    lost = [key for key in _SHARED if own[key] != usual[key] and data.get(key, usual[key]) != own[key]]
    if lost:
        _log.warning(
            "data.sources.%s.data=%s: a mix takes the text of a preset alone, and has one framing and one share of "
            "each split for all its sources; as the preset has them: %s",
            *(name, entry["data"], " ".join(f"data.{key}={shown(own[key])}" for key in lost)),
        )


def _shared(option: str) -> Json:
    """What a choice of `data` says of `_SHARED`."""
    values = written("data", option)
    return {key: values[key] for key in _SHARED}


def _names(entry: Json) -> list[str]:
    return [key for key in ("path", "name", "data") if entry.get(key) is not None]


def _described(name: str, entry: Json) -> Json:
    place, names = f"data.sources.{name}", _names(entry)
    if not names or {"path", "name"} <= {*names} or {"name", "data"} <= {*names}:
        have = f"{' and '.join(names)} both name its text" if names else "nothing names its text"
        raise ValueError(
            f"{place}: {have}; set one of {place}.path=FILE (a file, a folder or a glob), {place}.name=OWNER/NAME (of "
            f"the hub) or {place}.data=PRESET (as data=PRESET), where a path beside a preset is a local copy of it"
        )
    keys = {key: value for key, value in entry.items() if key != "data"}
    preset = _preset(place, entry["data"]) if "data" in names else {}
    if "path" in names:
        preset = {"_target_": _FILES, **{key: preset[key] for key in _READING if key in preset}}
    elif "name" in names:
        preset = {"_target_": _HUB}
    return {"_target_": preset["_target_"], "weight": 1.0, **preset, **keys}


def _preset(place: str, name: Any) -> Json:
    """What conf/data/NAME.yaml says of its source, without what other keys of `data` would fill in."""
    if name not in PRESETS:
        near = perhaps(str(name), PRESETS)
        raise ValueError(f"{place}.data={shown(name)} is no preset{near}; use one of {', '.join(PRESETS)}")
    return {key: value for key, value in written("data", name)["source"].items() if not str(value).startswith("${")}
