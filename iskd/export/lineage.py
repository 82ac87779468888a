"""What a card's header says of where a student comes from: its base model, the data sets, the language."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iskd.system import Json
from iskd.system.files import expanded, read_object

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
# the representation of a source as data.json has it
_DATASET = re.compile(r"^HubDataset\((?:.*, )?name='([\w.-]+(?:/[\w.-]+)?)'")
_ENGLISH = ("Docstrings(", "HubDataset(name='roneneldan/TinyStories'", "HubDataset(name='Salesforce/wikitext'")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?|multilingual|code")


def lineage(teacher: Mapping[str, Any], data: Mapping[str, Any], card: Json) -> Json:
    """Keys of a card's header, those alone that something here says.

    Args:
        teacher: `iskd.teacher.load.Loaded.source`.
        data: data.json of the run.
        card: the header of the teacher's own card; {} where there is none.
    """
    base, source = base_model(teacher, card), str(data.get("source", ""))
    found: Json = {} if base is None else {"base_model": base, "base_model_relation": "finetune"}
    if named := _DATASET.search(source):
        found["datasets"] = [named[1]]
    languages = card.get("language")
    known = [languages] if isinstance(languages, str) else languages if isinstance(languages, list) else []
    told = [each for each in known if isinstance(each, str) and _LANGUAGE.fullmatch(each)]
    if told or source.startswith(_ENGLISH):
        found["language"] = told or ["en"]
    return found


def base_model(teacher: Mapping[str, Any], card: Json) -> str | None:
    """The hub's name of the teacher; of a local one by its place in the hub's cache, its config, or its own card."""
    name = str(teacher.get("name", ""))
    if teacher.get("kind") in ("hub", "bundled"):
        return name or None
    if not teacher.get("path"):
        return None
    folder = Path(expanded(str(teacher["path"])))
    if cached := next((match for part in folder.parts[::-1] if (match := _CACHED.fullmatch(part))), None):
        return f"{cached[1]}/{cached[2]}"
    try:
        written = read_object(folder / "config.json").get("_name_or_path")
    except (OSError, ValueError):
        written = None
    made_of = card.get("base_model")
    for found in (written, made_of[0] if isinstance(made_of, list) and made_of else made_of):
        if isinstance(found, str) and _ID.fullmatch(found) and not Path(expanded(found)).exists():
            return found
    return None
