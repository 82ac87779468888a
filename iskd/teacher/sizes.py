"""Sizes of a model config under seven names: `num_layers=4` works for GPT-2 (n_layer) and Llama alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from iskd.models.skeletons import check_numbers, refuse_kernels

# Our name of a size: transformers' name. A config class may translate further (GPT-2: num_hidden_layers -> n_layer).
SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
}
# Values a config derives from a size, wrong once the size is overridden.
DERIVED = {"num_layers": ["layer_types"], "hidden_size": ["head_dim"], "num_heads": ["head_dim"]}


def sized_config(values: Mapping[str, Any], sizes: Mapping[str, int], what: str = "model.config") -> PreTrainedConfig:
    """A transformers config from its own values, with sizes overridden.

    Args:
        values: a whole config, `model_type` included.
        sizes: keys of `SIZES`.
        what: where the values are from, for errors.

    Raises:
        ValueError: no or an unknown model type, a size the type does not have, heads that do not divide the width, or
            a value that the config class refuses.
    """
    values = dict(values)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise ValueError(f"{what} has no model_type among {sorted(values)}: add e.g. model_type: llama")
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError:  # which lists all that there are
        raise ValueError(
            f"{what}: model_type={model_type!s:.80} is no model type of transformers: give e.g. llama or gpt2"
        ) from None
    names: dict[str, str] = default.attribute_map or {}
    values = {names.get(key, key): value for key, value in values.items()}
    for key, value in sizes.items():
        values[_native_name(key, value, default)] = value
        for stale in DERIVED.get(key, []):
            values.pop(stale, None)
    _check_heads(lambda key: values.get(names.get(SIZES[key], SIZES[key])), what)
    refuse_kernels(values, what)
    check_numbers(values, what)
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as error:  # transformers fails in any way it likes on values that nobody meant
        said = " ".join(str(error).split())
        raise ValueError(f"{what} is no valid {model_type} config ({said:.400}): mend the value") from error


def _native_name(key: str, value: int, default: PreTrainedConfig) -> str:
    name = (default.attribute_map or {}).get(SIZES[key], SIZES[key])
    if name == "intermediate_size" and not hasattr(default, name):
        name = "n_inner"  # GPT-2's name, missing from its attribute_map
    if not hasattr(default, name):
        raise ValueError(f"model.{key}={value}: a model of type {default.model_type} has no {name}; drop model.{key}")
    return name


def _check_heads(size: Callable[[str], int | None], what: str) -> None:
    """Before the config is built: some config classes refuse such sizes too, without our names in the message."""
    width, heads, groups = size("hidden_size"), size("num_heads"), size("num_kv_heads")
    if not all(isinstance(value, int | None) for value in (width, heads, groups)):
        return  # the config class says so
    if width and heads and width % heads:
        raise ValueError(
            f"{what}: model.hidden_size={width} is not a multiple of model.num_heads={heads}: change one of them"
        )
    if heads and groups and heads % groups:
        raise ValueError(f"{what}: model.num_heads={heads} is not a multiple of model.num_kv_heads={groups}: set both")
