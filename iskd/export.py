"""A student on disk that others can load: written, then reopened in a fresh process before it counts.

A student that some config of the teacher's own architecture describes (nothing edited, layers removed, all layers
slimmed to the same sizes) is written with that config and loads with plain transformers. Any other is written with
`model_type: iskd`, its record and its teacher's config; it loads with `iskd.load(dir)`, or with
`AutoModelForCausalLM.from_pretrained(dir)` after `import iskd`, or with `trust_remote_code=True`, which runs the few
lines of `modeling_iskd.py` beside the weights that import iskd.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from iskd.arch import Stack
from iskd.blocks.slicing import inputs_of
from iskd.checkpoint import model_tensors
from iskd.model_card import write_card
from iskd.model_files import INDEX, file_sha256, weight_files
from iskd.plan import Json, Record, read_json, to_json
from iskd.probe import Probe, ask, differences, reopen

FACTS, CODE = "export.json", "modeling_iskd.py"
MAX_SHARD_BYTES = 50 * 10**9  # what save_pretrained of transformers 5 takes
# What an attention computes with besides its weights, derived from the config and its place when it is built.
_DERIVED = ("scaling", "head_dim", "sliding_window")


class IskdConfig(PreTrainedConfig):
    """What a student is: the teacher's config and the record of edits."""

    model_type = "iskd"

    def __init__(
        self, teacher: dict[str, Any] | None = None, record: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.teacher = teacher or {}
        self.record = record or {}
        super().__init__(**kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: transformers would copy this very module beside every student that is saved afterwards."""


class Student:
    """Mixed into a loaded student's class, so that `save_pretrained` writes what loading needs.

    Plain transformers would write the teacher's config, and loading that would fill the compact blocks' places with
    random full-size ones and only warn.
    """

    iskd_record: Record
    iskd_teacher_config: PreTrainedConfig

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *_: Any,
        max_shard_size: int | str = MAX_SHARD_BYTES,
        **__: Any,
    ) -> None:
        """Write the student with its record, in shards of at most `max_shard_size` (bytes, or text as "5GB")."""
        student = cast(PreTrainedModel, self)
        write(Path(save_directory), student, self.iskd_record, self.iskd_teacher_config, max_shard_bytes=max_shard_size)


@cache
def student_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The teacher's own class with `Student` mixed in."""
    return type(f"Iskd{cls.__name__}", (Student, cls), {})


def _stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    return next(cls for cls in type(model).__mro__ if issubclass(cls, PreTrainedModel) and not issubclass(cls, Student))


def native_config(model: PreTrainedModel) -> PreTrainedConfig | None:
    """The config from which the teacher's own class builds this very student, or None when no config can say it.

    Depth and per-layer lists are true since the edits. Sizes are read off the first block: heads that left need an
    explicit `head_dim`, which Llama, Mistral, Gemma, Qwen3 declare and Qwen2 and Phi take; GPT-2, GPT-NeoX and OPT
    derive it from their width, so that only their MLPs can be smaller. Whether the other blocks are alike is found by
    building the model without memory. Sizes that differ from layer to layer would need `per_layer_config`, on which
    stock Llama and its kin of transformers 5.23 raise `AmbiguousGlobalPerLayerAttributeError`.
    """
    stack = Stack(model)
    dims, family, block = stack.dims, stack.family, stack.layers[0]
    config = copy.deepcopy(model.config)
    try:
        heads = inputs_of(block.get_submodule(family.out)) // dims.head_dim
        channels = inputs_of(block.get_submodule(family.down))
        if channels != dims.mlp:
            setattr(config, family.mlp_size, channels)
        if heads != dims.heads:
            config.head_dim, config.num_attention_heads = dims.head_dim, heads
            if getattr(config, "num_key_value_heads", None) is not None:
                config.num_key_value_heads = heads * dims.kv_heads // dims.heads
        # as it will be read, checks of the family included
        config = type(config).from_dict(config.to_dict())
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            stock = _stock_class(model)(config)
    except (AttributeError, ValueError, StrictDataclassError):
        return None  # the block has no such parts, or the family no such sizes
    return config if _build_of(stock) == _build_of(model) else None


def _build_of(model: PreTrainedModel) -> tuple[dict[str, Any], ...]:
    """Everything about a model but the values of its weights."""
    modules = {name: module for name, module in model.named_modules() if name}
    return (
        {name: type(module) for name, module in modules.items()},
        {name: tensor.shape for name, tensor in chain(model.named_parameters(), model.named_buffers())},
        {f"{name}.{key}": vars(module).get(key) for name, module in modules.items() for key in _DERIVED},
    )


def write(
    target: Path,
    model: PreTrainedModel,
    record: Record,
    teacher_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_shard_bytes: int | str = MAX_SHARD_BYTES,
) -> bool:
    """Write config, weights, record, generation config and tokenizer into the folder `target`.

    Weights that lie there already go first: a shard too many, or a single file beside an index, would be read later.
    Returns whether plain transformers can load it, see `native_config`.
    """
    target.mkdir(parents=True, exist_ok=True)
    for stale in (*target.glob("model*.safetensors"), target / INDEX, target / FACTS, target / CODE):
        stale.unlink(missing_ok=True)
    native = native_config(model)
    if native is not None:
        PreTrainedModel.save_pretrained(model, target, max_shard_size=max_shard_bytes)
        native.architectures, native.dtype = [_stock_class(model).__name__], model.dtype
        native.save_pretrained(target)
        _say_it_as_others_ask(target / "config.json")
    else:
        _write_own(target, model, record, teacher_config, max_shard_bytes)
    (target / "record.json").write_text(json.dumps(to_json(record), indent=1))
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    return native is not None


def _write_own(
    target: Path,
    model: PreTrainedModel,
    record: Record,
    teacher_config: PreTrainedConfig,
    max_shard_bytes: int | str,
) -> None:
    teacher = {key: value for key, value in teacher_config.to_dict().items() if key != "_name_or_path"}
    module = CODE.removesuffix(".py")
    config = IskdConfig(
        teacher=teacher,
        record=to_json(record),
        iskd_version=_versions()["iskd"],
        architectures=["IskdForCausalLM"],
        auto_map={"AutoConfig": f"{module}.IskdConfig", "AutoModelForCausalLM": f"{module}.IskdForCausalLM"},
    )
    config.save_pretrained(target)
    (target / CODE).write_text(_MODELING)
    tensors = model_tensors(model)
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    for name, keys in split.filename_to_tensors.items():
        save_file({key: tensors[key] for key in keys}, target / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (target / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True))
    if model.generation_config is not None:
        model.generation_config.save_pretrained(target)


# Beside the weights of a student that no config of its teacher's architecture describes. transformers copies the file
# to its own cache and runs it there when the user says trust_remote_code=True. The import stands in a try, because
# transformers asks for the packages of every other import itself and knows no better than their names.
_MODELING = """# Written by iskd for AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).
try:
    from iskd.export import IskdConfig
    from iskd.loading import IskdForCausalLM
except ImportError as error:
    raise ImportError(
        "this student has compact blocks or converted mixers, whose code is in the package iskd: pip install iskd "
        f"({error})"
    ) from error

__all__ = ["IskdConfig", "IskdForCausalLM"]
"""


def _say_it_as_others_ask(file: Path) -> None:
    """Add keys that transformers 4, vLLM and llama.cpp read and transformers 5 does not write (docs/loading.md).

    transformers 5 reads them as what it writes itself: a base of the rotary angles in `rope_parameters` alone would be
    overlooked by others, who would go on with their default.
    """
    values: Json = read_json(file)
    kind, rope = values["model_type"], values.get("rope_parameters") or {}
    theta, share = ("rotary_emb_base", "rotary_pct") if kind == "gpt_neox" else ("rope_theta", "partial_rotary_factor")
    for key, name in (("rope_theta", theta), ("partial_rotary_factor", share)):
        if key in rope:
            values[name] = rope[key]
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if kind == "gpt2":
        values["n_ctx"] = values["n_positions"]
    elif kind == "phi":
        values["n_inner"] = values["intermediate_size"]
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def export(
    target: Path,
    model: PreTrainedModel,
    record: Record,
    teacher_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    verify: bool = True,
    teacher: Mapping[str, Any] | None = None,
    run_dir: Path | None = None,
    max_shard_bytes: int | str = MAX_SHARD_BYTES,
) -> Path:
    """Write a student to `target`, replacing an earlier export, and reopen it in a fresh process.

    Beside the student lie a model card and `export.json`: what the student says to a fixed input, the hashes of its
    weights, its teacher and the versions that made it. `iskd.verify` compares with it.

    Args:
        target: folder of the export.
        model: the student.
        record: its edits.
        teacher_config: config of its teacher.
        tokenizer: written beside it.
        verify: whether to reopen it now.
        teacher: where the teacher came from, `iskd.teachers.Loaded.source`.
        run_dir: folder of the run, from whose files the card is written.
        max_shard_bytes: of one weights file, as a number or as text such as "5GB".

    Raises:
        RuntimeError: the reopened student gives other logits or another greedy text; nothing is left at `target`.
    """
    was_training = model.training
    model.eval()
    draft = target.with_name(f".{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        native = write(draft, model, record, teacher_config, tokenizer, max_shard_bytes=max_shard_bytes)
        probe = ask(model)
        _write_facts(draft, probe, teacher or {}, native=native)
        write_card(
            draft,
            record,
            native=native,
            model_type=teacher_config.model_type,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            versions=_versions(),
            teacher=teacher,
            run_dir=run_dir,
        )
        if verify:
            _verify(draft, probe, native=native)
    except Exception:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    finally:
        model.train(was_training)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(draft, target)
    return target


def _write_facts(folder: Path, probe: Probe, teacher: Mapping[str, Any], *, native: bool) -> None:
    facts: Json = {
        "kind": "native" if native else "iskd",
        "versions": _versions(),
        # a folder of this machine says nothing elsewhere
        "teacher": {key: value for key, value in teacher.items() if key != "path"},
        "weights": {
            file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in weight_files(folder)
        },
        "probe": probe.to_json(),
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=1))


def _versions() -> dict[str, str]:
    from iskd import __version__  # at the first call: iskd itself imports this module

    return {"iskd": __version__, "transformers": transformers.__version__, "torch": torch.__version__}


def _verify(folder: Path, probe: Probe, *, native: bool) -> None:
    """Equal logits and equal greedy text in a process that knows nothing of this one."""
    found = reopen(folder, probe, native=native)
    problems = [*(f"the weights lack {name}" for name in found.missing), *differences(probe, found.probe)[0]]
    if problems:
        raise RuntimeError(f"the exported student cannot be trusted: {problems[0]}")
