"""How a student is opened where iskd is not installed: the root of the file that `iskd.export.bundle` writes.

The reader has said trust_remote_code=True: what `iskd.load` checks of a stranger's folder is not checked here. Weights
are read and written, and files of a hub fetched, by transformers itself, so that nothing else has to be there.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file

from iskd.export.auto_class import StudentClass
from iskd.export.edited import Edited, OneAttention, build, edited_class
from iskd.export.student import IskdConfig
from iskd.models.skeletons import GENERATION
from iskd.models.weights import INDEX, WEIGHTS, cast_parameters, load_model_tensors
from iskd.plan import Convert, Record, Remove, Replace, Spec
from iskd.plan.edits import Merge

PARTS: dict[str, type] = {}
"""The classes that the record of this student names; the last lines of the file that is written fill it."""
_EDITS: dict[str, Any] = {kind.op: kind for kind in (Replace, Remove, Merge, Convert)}


class Part(Spec):
    """A part whose class stands in this file."""

    def resolve(self) -> type:
        """The class. Raises ValueError for one that is not in this file."""
        if self.target not in PARTS:
            raise ValueError(f"this code opens students of {', '.join(PARTS)}, not of {self.target}: export it again")
        return PARTS[self.target]


class Opened(OneAttention, Edited):
    """A student that writes itself as it was: weights, config with its record, and this file."""

    iskd_config: IskdConfig

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write the student, as its teacher's class writes weights. Raises ValueError for `push_to_hub`."""
        if options.get("push_to_hub"):
            raise ValueError("save the student to a folder, then upload that: hf upload OWNER/NAME DIR")
        super().save_pretrained(save_directory, **options)  # type: ignore[misc]
        if not options.get("is_main_process", True):
            return
        config, own = copy.deepcopy(self.iskd_config), cast(PreTrainedModel, self)
        for key in ("vocab_size", "tie_word_embeddings"):  # of resize_token_embeddings, of a head of its own
            config.teacher[key] = getattr(own.config, key)
        config.dtype = own.dtype
        config.save_pretrained(save_directory)
        shutil.copyfile(__file__, Path(save_directory) / Path(__file__).name)


class BundledForCausalLM(StudentClass):
    """Opens students of the classes in this file."""

    @classmethod
    def folder_of(cls, name: Any, revision: str | None, hub: Mapping[str, Any]) -> Path:
        """A folder as it is, or the snapshot of a student that somebody put on the hub."""
        if Path(name).is_dir():
            return Path(name)
        folder = Path(cast(str, cached_file(name, "config.json", revision=revision, **hub))).parent
        hub = {**hub, "revision": folder.name}  # of the very same commit
        if not _fetched(name, WEIGHTS, hub):
            index = json.loads(Path(cast(str, cached_file(name, INDEX, **hub))).read_text(encoding="utf-8"))
            for shard in sorted(set(index["weight_map"].values())):
                cached_file(name, shard, **hub)
        _fetched(name, GENERATION, hub)
        return folder

    @classmethod
    def opened(cls, folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
        """The student in a folder, in evaluation mode; None = in the type that its weights are stored in."""
        config = IskdConfig.from_pretrained(folder)
        record, values = _record(config.record), dict(config.teacher)
        teacher = AutoConfig.for_model(values.pop("model_type"), **values)
        model: Any = build(teacher, record)
        load_model_tensors(model, _tensors(folder))
        if (folder / GENERATION).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        model.__class__ = edited_class(cast(Any, Opened), cast(Any, type(model)))
        model.iskd_record, model.iskd_teacher_config, model.iskd_config = record, teacher, config
        cast_parameters(model, dtype or cast(Any, config.dtype) or torch.float32)
        model.config.dtype = model.dtype
        return cast(PreTrainedModel, model.eval())


def _fetched(name: str, file: str, hub: Mapping[str, Any]) -> bool:
    try:
        return cached_file(name, file, **hub) is not None
    except OSError:  # there is no such file
        return False


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All weights by name, from one file or from shards."""
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    return {key: value for name in names for key, value in load_state_dict(str(folder / name)).items()}


def _record(data: Mapping[str, Any]) -> Record:
    edits = []
    for values in data["edits"]:
        given = {key: Part(**value) if isinstance(value, dict) else value for key, value in values.items()}
        edits.append(_EDITS[str(values["op"])](**given))
    return Record(data["num_layers"], tuple(edits))
