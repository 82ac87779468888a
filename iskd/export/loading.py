"""Loading an exported student, as a stranger's file: nothing in it runs code or costs more than its weights do.

A native export is opened by transformers, any other is built from its teacher's config and its record. `register` makes
`AutoModelForCausalLM.from_pretrained` do the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from iskd.export.auto_class import StudentClass
from iskd.export.edited import build
from iskd.export.load_options import dtype_of
from iskd.export.storage import STORED
from iskd.export.student import CODES, IskdConfig, student_class
from iskd.models import surgery
from iskd.models.families import FAMILIES
from iskd.models.model_folder import check_model_folder, read_model_config, refuse_other_class
from iskd.models.skeletons import check_numbers, read_generation_config, within_weights
from iskd.models.weights import (
    cast_parameters,
    check_whole,
    load_model_tensors,
    present_weights,
    refuse_pointer,
    stored_dtype,
)
from iskd.plan import Record
from iskd.plan.reading import record_from_json
from iskd.plan.run_files import RECORD_FILE
from iskd.system import Json, read_json

# Keys by which a config reaches beyond its architecture: kernels from a hub, other formats of the weights, sizes that
# differ from layer to layer, a table as long as a number says. No student is written with a value for any of them.
_FOREIGN = (
    "attn_implementation",
    "experts_implementation",
    "_attn_implementation",
    "_experts_implementation",
    "quantization_config",
    "per_layer_config",
    "num_labels",
)


class IskdForCausalLM(StudentClass):
    """Opens students as strangers' files."""

    @classmethod
    def folder_of(cls, name: Any, revision: str | None, hub: Mapping[str, Any]) -> Path:
        """A folder as it is, or the snapshot of a student that somebody put on the hub."""
        if Path(name).is_dir():
            return Path(name)
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"], **hub))

    @classmethod
    def opened(cls, folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
        """`load`."""
        return load(folder, dtype="auto" if dtype is None else dtype)


def register() -> None:
    """Tell transformers' Auto classes about students; `import iskd` calls it once."""
    AutoConfig.register("iskd", IskdConfig, exist_ok=True)
    AutoModelForCausalLM.register(IskdConfig, IskdForCausalLM, exist_ok=True)


@dataclass(frozen=True)
class Described:
    """What an exported student's files say, checked against each other without reading its weights.

    Attributes:
        folder: where it lies.
        native: whether plain transformers loads it.
        config: its own where native, else its teacher's.
        record: the edits that are left to apply; none where native.
        code: what lies beside its weights: "iskd" imports the package, "bundle" opens it without.
    """

    folder: Path
    native: bool
    config: PreTrainedConfig
    record: Record
    code: str = CODES[0]


def load(directory: str | os.PathLike[str], *, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """Load an exported student, in evaluation mode.

    No code that comes with the folder is run, and nothing is built that its weights do not account for.

    Args:
        directory: the export.
        dtype: of the parameters. float32, whatever is stored, is what training and comparisons want; "auto" is the
            type that is stored, as `from_pretrained` of transformers has it. What a mixer keeps in float32 stays so.

    Raises:
        ValueError: `dtype` is no type that weights have; the folder is not a student, a weights file is missing or cut
            short, its record names a class outside the allow-list, or its weights do not fit its record.
    """
    found = describe(directory)
    asked = dtype_of(dtype)
    with _only_value_errors(found.folder):
        model = (_load_native if found.native else _load_edited)(found).eval()
        cast_parameters(model, STORED[stored_dtype(found.folder)] if asked is None else asked)
        model.config.dtype = model.dtype
    return model


def describe(directory: str | os.PathLike[str]) -> Described:
    """Check an exported student's files, without loading its weights.

    Raises:
        ValueError: as `load`, except for what only the weights themselves can tell.
    """
    folder = Path(directory)
    config_file = folder / "config.json"
    refuse_pointer(config_file)
    if not config_file.is_file():
        read_model_config(folder)  # says what is there in its place
    data = read_json(config_file, links=True)
    if not isinstance(data, dict):
        raise ValueError(f"{config_file} must hold an object, got {type(data).__name__}")
    native = data.get("model_type") != "iskd"
    with _only_value_errors(folder):
        if native and data.get("model_type") in FAMILIES:
            check_model_folder(folder)
        for file in present_weights(folder):
            check_whole(file)
        try:
            config, record = (_describe_native if native else _describe_edited)(folder, data)
            _check_size(folder, config, record)
        except ValueError as error:
            raise ValueError(f"{error}{_other_versions(data)}") from error
    code = data.get("iskd_code") if not native else None
    return Described(folder, native, config, record, code if code in CODES else CODES[0])


def _other_versions(data: Json) -> str:
    """What to tell a reader whose file was written by other versions than those that fail to read it."""
    from iskd.system.version import __version__  # at the first call: iskd itself imports this module

    here = {"iskd": __version__, "transformers": transformers.__version__}
    there = {name: data.get(f"{name}_version") for name in here}
    other = [
        f"{name} {str(there[name])[:40]} (here {own})" for name, own in here.items() if there[name] not in (None, own)
    ]
    return (
        f"; config.json was written by {' and '.join(other)}: read it with those, or export it again" if other else ""
    )


@contextmanager
def _only_value_errors(folder: Path) -> Iterator[None]:
    """Libraries fail in any way they like on values that nobody meant; for the caller it is one thing: a bad folder."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error!s:.300}"
        raise ValueError(
            f"{folder} cannot be loaded, as its config.json says nothing that can be built: {what}"
        ) from error


def record_of(folder: Path, layers: int) -> Record:
    """The edits that made an exported student of its teacher, native or not.

    Args:
        folder: the export.
        layers: of the teacher that is there.

    Raises:
        ValueError: the folder has no record, or it is of a teacher of another depth.
    """
    described = describe(folder)
    if not described.native:
        record = described.record
    else:
        file = folder / RECORD_FILE
        if not file.is_file():
            raise ValueError(f"{folder} has no {RECORD_FILE}, which says what was edited: export the student again")
        record = record_from_json(read_json(file, links=True))
    if record.num_layers != layers:
        raise ValueError(
            f"{folder} is the student of a teacher with {record.num_layers} layers, and the teacher here has {layers}: "
            "name its own with reference=DIR_OR_NAME"
        )
    return record


def _describe_native(folder: Path, data: Mapping[str, Any]) -> tuple[PreTrainedConfig, Record]:
    config = _host_config(data, folder / "config.json")
    return config, Record(config.num_hidden_layers)


def _describe_edited(folder: Path, data: Mapping[str, Any]) -> tuple[PreTrainedConfig, Record]:
    record = record_from_json(data.get("record", {}))
    config = _host_config(data.get("teacher"), folder / "config.json")
    if config.num_hidden_layers != record.num_layers:
        raise ValueError(
            f"{folder / 'config.json'}: the record is about {record.num_layers} layers, "
            f"its teacher has {config.num_hidden_layers}"
        )
    return config, record


def _load_native(found: Described) -> PreTrainedModel:
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        found.folder, dtype=torch.float32, trust_remote_code=False, **options
    )
    model, report = loaded
    # transformers would fill these with random numbers and only warn
    if unset := sorted(report["missing_keys"]):
        raise ValueError(
            f"{found.folder}: the weights do not fit config.json: {unset[0]!r} is missing ({len(unset)} such)"
        )
    return cast(PreTrainedModel, model)


def _load_edited(found: Described) -> PreTrainedModel:
    folder, record, config = found.folder, found.record, found.config
    model: Any = build(config, record)
    load_model_tensors(model, _tensors(folder))
    generation = read_generation_config(folder)
    if generation is not None and model.generation_config is not None:
        model.generation_config = generation
    model.__class__ = student_class(cast(Any, type(model)))
    model.iskd_code = found.code
    model.iskd_record, model.iskd_teacher_config = record, config
    return model


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All weights by name, from one file or from shards."""
    found: dict[str, Tensor] = {}
    for file in present_weights(folder):
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        if twice := sorted(found.keys() & tensors.keys()):
            raise ValueError(f"{file}: {twice[0]!r} stands in another shard too: export the student again")
        found |= tensors
    return found


def _host_config(values: Any, file: Path) -> PreTrainedConfig:
    """The config of a supported family from a file's values, which reach for nothing outside of that family."""
    kind = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{file}: model_type is missing or unknown, got {kind!r:.80}; known are {sorted(FAMILIES)}")
    foreign = [key for key in _FOREIGN if values.get(key) is not None]
    if foreign:
        raise ValueError(f"{file}: a student has no {foreign[0]}; remove the key if you trust the rest of the file")
    check_numbers(values, file)
    refuse_other_class(values, file)
    # the family's own class is used, whatever modelling code the hub has for it as well
    plain = {key: value for key, value in values.items() if key not in ("model_type", "auto_map")}
    return AutoConfig.for_model(kind, **plain)


def _check_size(folder: Path, config: PreTrainedConfig, record: Record) -> None:
    """Build the student without memory first, and compare its size with that of the weights."""
    with within_weights(present_weights(folder), folder / "config.json") as check:
        model = build(config, Record(record.num_layers))
        check(model)
        surgery.apply(model, Record(record.num_layers), record.edits)
        check(model)
