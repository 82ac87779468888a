"""What a card's header says of where a student comes from: its base model, the data sets, the language, the licence."""

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
_PLACE = r"(?:^|(?:^Mix\(|, )[\w-]+=)"  # a source alone, or one of a mix
_DATASET = re.compile(_PLACE + r"HubDataset\(name='([\w.-]+(?:/[\w.-]+)?)'")
_SOURCE = re.compile(_PLACE + r"(?=(?:Docstrings|HubDataset|TextFiles|GivenTexts)\()")
_ENGLISH = ("Docstrings(", "HubDataset(name='roneneldan/TinyStories'", "HubDataset(name='Salesforce/wikitext'")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?|multilingual|code")

# Short names of licences as the hub's own page had them in August 2026 (huggingface/hub-docs,
# docs/hub/repositories-licenses.md); another one becomes `other` with a name, which loses nothing.
LICENCES = frozenset({
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0",
    "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0",
    "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1",
    "lgpl-3.0", "isc", "h-research", "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0",
    "odc-by", "odbl", "openmdw-1.0", "openmdw-1.1", "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa",
    "unlicense", "zlib", "pddl", "lgpl-lr", "deepfloyd-if-license", "fair-noncommercial-research-license", "llama2",
    "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "grok2-community", "gemma", "unknown", "other",
})  # fmt: skip


def lineage(teacher: Mapping[str, Any], data: Mapping[str, Any], card: Json) -> Json:
    """Keys of a card's header, those alone that something here says.

    Args:
        teacher: `iskd.teacher.load.Loaded.source`.
        data: data.json of the run.
        card: the header of the teacher's own card; {} where there is none.
    """
    base, source = base_model(teacher, card), str(data.get("source", ""))
    found: Json = {} if base is None else {"base_model": base, "base_model_relation": "finetune"}
    if named := list(dict.fromkeys(_DATASET.findall(source))):
        found["datasets"] = named
    languages = card.get("language")
    known = [languages] if isinstance(languages, str) else languages if isinstance(languages, list) else []
    told = [each for each in known if isinstance(each, str) and _LANGUAGE.fullmatch(each)]
    # of a mix every source must be
    sources = [source[match.end() :] for match in _SOURCE.finditer(source)]
    if told or (sources and all(each.startswith(_ENGLISH) for each in sources)):
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


def licence_keys(licence: str | None) -> dict[str, Any]:
    """The keys of a card's head that say this licence: one that hubs do not know is `other`, with a name."""
    if not licence or licence.lower() in LICENCES:
        return {"license": licence.lower() if licence else None}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-") or "unnamed"}
