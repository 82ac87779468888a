"""`data.sources`: what each source of a mix is, from the few keys that somebody wrote to those that its class takes."""

from __future__ import annotations

from typing import Any

import yaml

from iskd.system import Json
from iskd.system.text import perhaps
from iskd.system.typed_values import shown
from iskd.system.version import CONF, options

_FILES, _HUB, _MIX = "iskd.data.sources.TextFiles", "iskd.data.sources.HubDataset", "iskd.data.mix.Mix"
_READING = ("fmt", "field", "detokenize")
"""What files at hand keep of the data set that they are a copy of."""


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
    known = [option for option in options("data") if option not in ("mix", "chat", "text", "hf")]
    if name not in known:
        near = perhaps(str(name), known)
        raise ValueError(f"{place}.data={shown(name)} is no preset{near}; use one of {', '.join(known)}")
    values = yaml.safe_load((CONF / "data" / f"{name}.yaml").read_text(encoding="utf-8"))
    return {key: value for key, value in values["source"].items() if not str(value).startswith("${")}
