"""The format of an exported student: its class, its config and the code beside the weights."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from iskd.blocks import inputs_of
from iskd.export.bundle import bundled
from iskd.export.edited import Edited, OneAttention, Sizes, edited_class, stock_class
from iskd.export.student_files import CODE, installing
from iskd.models import Stack
from iskd.models.head import say_untied
from iskd.models.weights import INDEX, load_model_tensors, model_tensors
from iskd.plan import Record, to_json
from iskd.plan.run_files import FACTS, write_record
from iskd.system import Json, read_json, write_whole
from iskd.system.files import readable_as_umask

CODES = ("iskd", "bundle")
MAX_SHARD_BYTES = 50 * 10**9  # what save_pretrained of transformers 5 takes
# What an attention computes with besides its weights, derived from the config and its place when it is built.
_KINDS = ("full_attention", "sliding_attention")
_DERIVED = ("scaling", "head_dim", "sliding_window", "use_rope")


class IskdConfig(Sizes, PreTrainedConfig):
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


class Student(OneAttention, Edited):
    """Mixed into a loaded student's class, so that `save_pretrained` writes what loading needs.

    Plain transformers would write the teacher's config, and loading that would fill the compact blocks' places with
    random full-size ones and only warn.
    """

    iskd_code = "iskd"

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = MAX_SHARD_BYTES,
        **options: Any,
    ) -> None:
        """Write the student with its record, always as safetensors.

        Args:
            save_directory: the folder.
            is_main_process: whether this process writes, of several that call.
            state_dict: in the place of the student's own weights, where those are held elsewhere (shards).
            max_shard_size: of a file: bytes, or text as "5GB".
            options: of transformers; those that would change what is written are refused.

        Raises:
            ValueError: such an option, or weights that are not the student's.
        """
        if refused := [key for key in ("push_to_hub", "variant", "save_original_format") if options.get(key)]:
            raise ValueError(
                f"iskd students do not take {refused[0]}={options[refused[0]]!r} when they are saved: save to a "
                "folder, then rename or upload it (hf upload OWNER/NAME DIR)"
            )
        if not is_main_process:
            return
        student, teacher_config = cast(PreTrainedModel, self), copy.deepcopy(self.iskd_teacher_config)
        teacher_config.vocab_size = student.config.vocab_size  # of resize_token_embeddings
        if state_dict is not None:
            student = copy.deepcopy(student)
            load_model_tensors(
                student, {name: state_dict[name] for name in model_tensors(student) if name in state_dict}
            )
        options = {"max_shard_bytes": max_shard_size, "code": self.iskd_code}
        write(Path(save_directory), student, self.iskd_record, teacher_config, **options)


def student_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The teacher's own class with `Student` mixed in."""
    return edited_class(cast(Any, Student), cast(Any, cls))


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
        heads = _heads(stack, block)
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
            stock = stock_class(model)(config)
    except (AttributeError, ValueError, StrictDataclassError):
        return None  # the block has no such modules, or the family no such sizes
    return config if _build_of(stock) == _build_of(model) else None


def why_not_native(model: PreTrainedModel) -> str:
    """Why `native_config` has found nothing, in a clause for people."""
    stack = Stack(model)
    dims, family, kind = stack.dims, stack.family, model.config.model_type
    try:
        sizes = {(_heads(stack, block), inputs_of(block.get_submodule(family.down))) for block in stack.layers}
    except AttributeError:
        return "it has compact blocks or mixers of iskd's own"
    if len(sizes) > 1:
        return f"its layers have different sizes, {len(sizes)} kinds of (heads, MLP channels); slim every layer alike"
    heads = sizes.pop()[0]
    if heads != dims.heads:
        return (
            f"a config of {kind} cannot say {heads} heads of width {dims.head_dim} in a stream of {dims.hidden}; keep "
            f"all heads (block.ratio=null block.kv_groups={dims.kv_heads} block.channels=...)"
        )
    return f"its attention depends on a layer's number in a way that a config of {kind} cannot say once layers are gone"


def _heads(stack: Stack, block: nn.Module) -> int:
    return inputs_of(block.get_submodule(stack.family.out)) // stack.dims.head_dim


def _build_of(model: PreTrainedModel) -> tuple[dict[str, Any], ...]:
    """Everything about a model but the values of its weights."""
    modules = {name: module for name, module in model.named_modules() if name}
    kinds = getattr(model.config, "layer_types", None) or _KINDS
    gone = tuple(f".{kind}_" for kind in _KINDS if kind not in kinds)  # Gemma 3's angles of layers that have left
    named = chain(model.named_parameters(), model.named_buffers())
    return (
        {name: type(module) for name, module in modules.items()},
        {name: tensor.shape for name, tensor in named if not any(kind in name for kind in gone)},
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
    code: str = "iskd",
) -> bool:
    """Write config, weights, record, generation config and tokenizer into the folder `target`.

    Weights that lie there already go first: a shard too many, or a single file beside an index, would be read later.
    Beside a student that plain transformers cannot load lies code: "iskd" imports the package, "bundle" is all that the
    student needs (`iskd.export.bundle`). Returns whether plain transformers can load it, see `native_config`.
    """
    target.mkdir(parents=True, exist_ok=True)
    for stale in (*target.glob("model*.safetensors"), target / INDEX, target / FACTS, target / CODE):
        stale.unlink(missing_ok=True)
    say_untied(model)  # a caller may have given it another head
    native = native_config(model)
    if native is not None:
        PreTrainedModel.save_pretrained(model, target, max_shard_size=max_shard_bytes)
        native.architectures, native.dtype = [stock_class(model).__name__], model.dtype
        native.save_pretrained(target)
        _say_it_as_others_ask(target / "config.json")
    else:
        _write_own(target, model, record, teacher_config, max_shard_bytes, code)
    write_record(target, record)
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    readable_as_umask(target)
    return native is not None


def _write_own(
    target: Path,
    model: PreTrainedModel,
    record: Record,
    teacher_config: PreTrainedConfig,
    max_shard_bytes: int | str,
    code: str,
) -> None:
    teacher = {key: value for key, value in teacher_config.to_dict().items() if key != "_name_or_path"}
    teacher["tie_word_embeddings"] = model.config.tie_word_embeddings
    module = CODE.removesuffix(".py")
    config = IskdConfig(
        teacher=teacher,
        record=to_json(record),
        iskd_version=_versions()["iskd"],
        iskd_code=code,
        architectures=["IskdForCausalLM"],
        dtype=model.dtype,
        auto_map={"AutoConfig": f"{module}.IskdConfig", "AutoModelForCausalLM": f"{module}.IskdForCausalLM"},
    )
    config.save_pretrained(target)
    own = _MODELING.replace("INSTALLING", installing())
    write_whole(target / CODE, bundled(record, _versions()["iskd"]) if code == "bundle" else own)
    tensors = model_tensors(model)
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    for name, keys in split.filename_to_tensors.items():
        save_file({key: tensors[key] for key in keys}, target / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_whole(target / INDEX, json.dumps(index, indent=1, sort_keys=True))
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
        f"this student has compact blocks or converted mixers, whose code is in the package iskd ({error}): INSTALLING"
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
    if isinstance(rope.get("full_attention"), dict):  # Gemma 3's angles, by the type of the layer
        values["rope_local_base_freq"] = (rope.get("sliding_attention") or {}).get("rope_theta", 10_000.0)
        rope = rope["full_attention"]
    for key, name in (("rope_theta", theta), ("partial_rotary_factor", share)):
        if key in rope:
            values[name] = rope[key]
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if kind == "gpt2":
        values["n_ctx"] = values["n_positions"]
    elif kind == "phi":
        values["n_inner"] = values["intermediate_size"]
    write_whole(file, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _versions() -> dict[str, str]:
    from iskd.system.version import __version__  # at the first call: iskd itself imports this module

    return {"iskd": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
