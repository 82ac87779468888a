"""The README.md of an exported student: what it is, what it came from, what was measured, how it loads.

It says what the export and the run's own files say. What neither knows is left out, or called not known.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData, try_to_load_from_cache
from huggingface_hub.repocard import metadata_load

from iskd.export.lineage import licence_keys, lineage
from iskd.export.storage import Rounding
from iskd.export.student_files import CARD, installing
from iskd.plan import Convert, Record, Replace, Spec, StageResult
from iskd.plan.edits import REMOVALS, Merge
from iskd.plan.metric_names import METRICS
from iskd.plan.results import read_stages
from iskd.plan.run_files import CONFIG_FILE, DATA_FILE, ENVIRONMENT_FILE, STAGES_FILE
from iskd.plan.saved_config import read_config
from iskd.system import Json, read_json, write_whole
from iskd.system.files import expanded
from iskd.system.reading import is_integer
from iskd.system.text import layers_text

UNKNOWN = "not known"
# Teachers whose licence stands in this repository's own README; any other is read off the card beside its weights.
_LICENCES = {"HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0"}
_NUMBERS = (("perplexity", "ppl"), ("KL from the teacher", "kl"), ("top-1 agreement", "top1"), ("retention",) * 2)
_SETTINGS = ("schedule", "edit", "importance", "refit", "loss", "optim", "seed")
# An absolute path but for its last name: a card is published, the folders of a machine are not.
_FOLDERS = re.compile(r"(?<![\w.~:/-])(?:[A-Za-z]:)?(?:[/\\][^/\\\s'\",)]+)+[/\\](?=[^/\\\s'\",)])")
_NATIVE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")
```

Plain transformers loads it: its config says everything about it, iskd is not needed.
"""
_OWN = """No config of the teacher's architecture describes this student, so it needs the package iskd: INSTALLING.

One of:

```python
import iskd

model = iskd.load("DIR")
```

```python
import iskd  # noqa: F401 (tells transformers' Auto classes about students)
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("DIR")
```

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True)  # runs modeling_iskd.py, which imports iskd
```
"""
_BUNDLED = """No config of the teacher's architecture describes this student. The code beside its weights does:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True)  # runs modeling_iskd.py
tokenizer = AutoTokenizer.from_pretrained("DIR")
```

`modeling_iskd.py` needs torch and transformers and nothing else. Where iskd is installed, `iskd.load("DIR")` opens the
student without running code of this folder.
"""


def write_card(
    folder: Path,
    record: Record,
    *,
    native: bool,
    bundle: bool = False,
    model_type: str,
    parameters: int,
    versions: Mapping[str, str],
    teacher: Mapping[str, Any] | None = None,
    run_dir: Path | None = None,
    rounding: Rounding | None = None,
    why: str = "",
) -> Path:
    """Write the model card into `folder` and return its path.

    Args:
        folder: the exported student's.
        record: the edits.
        native: whether plain transformers loads it.
        bundle: whether the code beside it opens it where iskd is not installed.
        model_type: architecture of the teacher.
        parameters: of the student.
        versions: of the packages that made it.
        teacher: `iskd.teacher.load.Loaded.source`; None reads it from the run.
        run_dir: the run's, for stages.json, data.json, environment.json, config.yaml, evaluation.json and
            efficiency.json; each may be missing. `iskd.export.card_measured.refresh_card` renews what the last two say.
        rounding: the type of the weights and what it cost; None says nothing of it.
        why: why plain transformers does not load it.
    """
    # at the call: it brings evaluation and with it Lightning, for which nobody who opens a student should wait
    from iskd.export.card_measured import eval_results, measured_section

    stages = read_stages(run_dir) if run_dir and (run_dir / STAGES_FILE).is_file() else []
    known = teacher or _mapping(_json(run_dir, ENVIRONMENT_FILE).get("teacher"))
    licence = licence_of(known)
    name = _public(str(known.get("name", "an unnamed teacher")))
    title = f"{name.rpartition('/')[2]}, compressed by iskd"
    sections = [
        _header(known, _json(run_dir, DATA_FILE), licence, title, eval_results(run_dir), native=native),
        f"# {title}",
        _opening(record, name, model_type, parameters),
        "## Teacher",
        *_teacher(known, licence),
        "## Edits",
        "Layers are numbered as in the teacher, from 0.",
        _list(edits_in_words(record)),
        "## How to load it",
        _NATIVE if native else _BUNDLED if bundle else _OWN.replace("INSTALLING", installing()),
        *([f"Why: {why}."] if why else []),
        *([] if rounding is None else [_stored(rounding)]),
        "`iskd verify DIR` opens it in a clean process and compares what it says with what it said when it was made.",
        "## Numbers",
        *_numbers(stages),
        measured_section(run_dir),
        "## Data",
        *_data(_json(run_dir, DATA_FILE)),
        "## How it was made",
        *_made(stages, run_dir, versions),
    ]
    return write_whole(folder / CARD, "\n\n".join(section.strip("\n") for section in sections) + "\n")


def edits_in_words(record: Record) -> list[str]:
    """One sentence per kind of edit; of layers that were edited and then removed only the removal counts."""
    removed = [edit.layer for edit in record.edits if isinstance(edit, REMOVALS)]
    merged = [edit.layer for edit in record.edits if isinstance(edit, Merge)]
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for edit in record.edits:
        if isinstance(edit, Replace) and edit.layer not in removed:
            groups["Replaced the block of", _spec(edit.block)].append(edit.layer)
        elif isinstance(edit, Convert) and edit.layer not in removed:
            groups["Converted the attention of", _spec(edit.mixer)].append(edit.layer)
    found = []
    if removed:
        found.append(f"Removed {len(removed)} of {record.num_layers} layers: {layers_text(removed)}.")
    if merged:
        found.append(f"Merged into the block below where that was nearer to the teacher: {layers_text(merged)}.")
    for (verb, spec), layers in groups.items():
        noun = "layer" if len(layers) == 1 else "layers"
        by = "by" if verb.startswith("Replaced") else "to"
        found.append(f"{verb} {noun} {layers_text(layers)} {by} {spec}.")
    return found or ["No layer was edited: only weights were trained."]


def licence_of(teacher: Mapping[str, Any]) -> str | None:
    """The teacher's licence as its own card states it, None where nothing here says it."""
    if teacher.get("license"):
        return str(teacher["license"])
    name = str(teacher.get("name", ""))
    for place in _cards(teacher):
        found = _front_matter(place)
        licence = found.get("license")
        if licence == "other" and isinstance(found.get("license_name"), str):
            licence = found["license_name"]
        several = licence if isinstance(licence, list) else [licence]
        named = [each for each in several if isinstance(each, str) and each]
        if named and len(named) == len(several):
            return " or ".join(named)
    return _LICENCES.get(name) if teacher.get("kind") in ("hub", "bundled") else None


def _cards(teacher: Mapping[str, Any]) -> list[Path]:
    """Where the teacher's own card may be on this machine."""
    places = [Path(expanded(str(teacher["path"]))) / CARD] if teacher.get("path") else []
    name = str(teacher.get("name", ""))
    if teacher.get("kind") == "hub" and name.count("/") == 1:
        cached = try_to_load_from_cache(name, CARD, revision=teacher.get("revision"))
        places += [Path(cached)] if isinstance(cached, str) else []
    return places


def _front_matter(file: Path) -> Json:
    """The header of somebody's card; {} where there is none that can be read."""
    try:
        return _mapping(metadata_load(file)) if file.is_file() and file.stat().st_size <= 1 << 20 else {}
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}


def _header(
    teacher: Mapping[str, Any],
    data_of_run: Json,
    licence: str | None,
    title: str,
    results: list[EvalResult],
    *,
    native: bool,
) -> str:
    own = next((found for place in _cards(teacher) if (found := _front_matter(place))), {})
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        **licence_keys(licence),
        tags=["iskd", "compression", "distillation", *([] if native else ["custom_code"])],
        model_name=title if results else None,
        eval_results=results or None,
        **lineage(teacher, data_of_run, own),
    )
    return f"---\n{data.to_yaml()}\n---"


def _opening(record: Record, name: str, model_type: str, parameters: int) -> str:
    depth = f"{len(record.layers)} of {record.num_layers} layers"
    return f"A student of {name} ({model_type}): {depth}, {parameters:,} parameters, compressed while it trained."


def _teacher(teacher: Mapping[str, Any], licence: str | None) -> list[str]:
    rows = [("name", _public(str(teacher.get("name", UNKNOWN)))), ("where it came from", teacher.get("kind", UNKNOWN))]
    rows += [(key, teacher[key]) for key in ("revision", "seed") if key in teacher]
    rows.append(("sha256 of its weights", teacher.get("sha256", UNKNOWN)))
    facts = [f"{key}: {value}" for key, value in rows]
    return [_list([*facts, f"licence of the teacher: {licence or UNKNOWN}"])]


def _stored(rounding: Rounding) -> str:
    said = f"The weights are stored in {rounding.dtype}."
    if not rounding.rounded:
        return said
    return (
        f"{said} They were trained in a wider type, in which the numbers below were measured; rounding changed "
        f"{rounding.rounded:,} of them: KL from the student before to the one here {rounding.kl:.3g} nats a token, on "
        f"{rounding.tokens} tokens ({rounding.text})."
    )


def _numbers(stages: Sequence[StageResult]) -> list[str]:
    kept = [stage for stage in stages if stage.status == "kept"]
    if not kept:
        return [f"Nothing was measured, or the run's {STAGES_FILE} is not there."]
    last, first = kept[-1], kept[0] if kept[0].index == 0 else None
    head = f"| | {'teacher | ' if first else ''}student |\n|---|{'---|' if first else ''}---|"
    rows = [("parameters", "params", "{:,}"), *((label, key, "{:.4g}") for label, key in _NUMBERS)]
    lines = [
        f"| {label} | {form.format(getattr(first, key)) + ' | ' if first else ''}{form.format(getattr(last, key))} |"
        for label, key, form in rows
    ]
    meaning = "; ".join(f"{label}: {METRICS[f'val/{key}']}" for label, key in _NUMBERS)
    return ["\n".join([head, *lines]), f"On the run's validation text after the last stage ({last.name}). {meaning}."]


def _data(data: Mapping[str, Any]) -> list[str]:
    if not data:
        return [f"The run's {DATA_FILE} is not there: which text it was trained on is not known here."]
    facts = [f"{key}: `{_public(str(data[key]))}`" for key in ("source", "content", "tokenizer") if key in data]
    for split, count in _mapping(data.get("tokens")).items():
        facts.append(f"tokens of the {split} split: {f'{count:,}' if is_integer(count) else UNKNOWN}")
    if "validation_sha256" in data:
        facts.append(f"validation windows, sha256: `{data['validation_sha256']}`")
    for tokens, digest in _mapping(data.get("calibration_sha256")).items():
        facts.append(f"calibration windows ({tokens} tokens), sha256: `{digest}`")
    for task, digests in _mapping(data.get("selection_sha256")).items():
        if not isinstance(digests, list):
            continue
        whole = hashlib.sha256("\n".join(map(str, digests)).encode()).hexdigest()
        facts.append(f"items of {task} that layers were chosen by: {len(digests)}, sha256 of their hashes: `{whole}`")
    return [_list(facts)]


def _made(stages: Sequence[StageResult], run_dir: Path | None, versions: Mapping[str, str]) -> list[str]:
    trained = [stage for stage in stages if stage.index]
    sections = [f"By {', '.join(f'{name} {version}' for name, version in versions.items())}."]
    if trained:
        table = ["| stage | tokens so far | perplexity | retention | |", "|---|---|---|---|---|"]
        for stage in trained:
            status = "" if stage.status == "kept" else "undone"
            table.append(f"| {stage.name} | {stage.tokens:,} | {stage.ppl:.4g} | {stage.retention:.4g} | {status} |")
        sections.append("\n".join(table))
    settings = _settings(run_dir)
    return [*sections, *([_list(settings)] if settings else [])]


def _settings(run_dir: Path | None) -> list[str]:
    """The settings of the run's config that a reader asks for; paths stay behind."""
    file = run_dir / CONFIG_FILE if run_dir else None
    if file is None or not file.is_file():
        return []
    config = read_config(file)
    return [f"{key}: {_public(_node(config[key]))}" for key in _SETTINGS if config.get(key) is not None]


def _node(node: Any) -> str:
    """A node of a config in one line: the class, and its values that are not nested."""
    if not isinstance(node, Mapping):
        return str(node)
    if "_target_" not in node:
        return "; ".join(f"{key}: {_node(value)}" for key, value in node.items())
    plain = {key: value for key, value in node.items() if isinstance(value, (str, int, float)) and key[:1] != "_"}
    values = ", ".join(f"{key}={value}" for key, value in plain.items())
    return f"{str(node['_target_']).rpartition('.')[2]} ({values})" if values else str(node["_target_"])


def _spec(spec: Spec) -> str:
    kwargs = ", ".join(f"{key}={value}" for key, value in spec.kwargs.items() if value is not None)
    return f"`{spec.target}`" + (f" ({kwargs})" if kwargs else "")


def _public(text: str) -> str:
    return _FOLDERS.sub("", text)


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _json(run_dir: Path | None, name: str) -> Json:
    file = run_dir / name if run_dir else None
    return _mapping(read_json(file)) if file and file.is_file() else {}


def _mapping(value: Any) -> Json:
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}
