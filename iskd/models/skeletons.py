"""Models that anybody's config files describe: bounded by the weights beside them, and no code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from iskd.models.families import FAMILIES
from iskd.models.weights import WEIGHTS, present_weights, refuse_pointer
from iskd.plan.edits import MAX_LAYERS
from iskd.system import read_json

GENERATION = "generation_config.json"
_COPY = "copy the config.json that came with the weights"
_HEADS = "num_attention_heads"
_CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx")
_ROTARY = (
    *("factor", "rope_theta", "low_freq_factor", "high_freq_factor", "attention_factor", "partial_rotary_factor"),
    *("original_max_position_embeddings", "beta_fast", "beta_slow"),
)
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# A skeleton may have this many times the numbers of the weights file, and this many more: removed blocks are not in the
# file, masks and tables of position neither. What a config can cost is so bounded by what comes with it.
_TIMES, _SPARE, _SPARE_TENSORS = 64, 1 << 24, 100


def check_numbers(values: Mapping[str, Any], what: str | Path) -> None:
    """Raise ValueError where a config's depth, context or rotary angles are none.

    Making the config alone costs memory by the layer; of the others no weight tells, and transformers computes with
    whatever stands there.
    """
    for key in _DEPTHS:
        depth = values.get(key)
        if depth is not None and (not isinstance(depth, int) or not 1 <= depth <= MAX_LAYERS):
            raise ValueError(f"{what}: {key} must be an integer in 1..{MAX_LAYERS}, got {depth!r:.80}")
    for key in _CONTEXTS:
        if (length := values.get(key)) is not None and (type(length) is not int or length < 1):
            raise ValueError(f"{what}: {key} must be a number of tokens, 1 or more, got {length!r:.80}: {_COPY}")
    inside = [values.get(key) for key in ("rope_scaling", "rope_parameters")]
    ropes = [values, *(rope for rope in inside if isinstance(rope, dict))]
    ropes += [rope for outer in ropes[1:] for rope in outer.values() if isinstance(rope, dict)]  # one by kind of layer
    for rope in ropes:
        for key in _ROTARY if rope is not values else ("rope_theta", "rotary_emb_base"):
            number = rope.get(key)
            if number is not None and not (type(number) in (int, float) and 0 < number < math.inf):
                raise ValueError(f"{what}: {key} must be a number above 0, got {number!r:.80}: {_COPY}")


def check_heads(values: Mapping[str, Any], what: str | Path) -> None:
    """Raise ValueError where a config of a known family does not say how many heads its attention has.

    Weights of one shape fit any number of heads, and transformers takes the one that its class has for a default.
    """
    if values.get("model_type") not in FAMILIES:
        return
    name = AutoConfig.for_model(values["model_type"]).attribute_map.get(_HEADS, _HEADS)
    if values.get(name) is None and values.get(_HEADS) is None:
        raise ValueError(f"{what} has no {name}, which no weight tells: {_COPY}")


def refuse_kernels(config: Mapping[str, Any], what: str) -> None:
    """Raise ValueError where a config names a kernel on the hub: code, that would be fetched and run."""
    for key, value in config.items():
        if key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            raise ValueError(
                f"{what}: {key} {str(value)!r:.80} names code on the hub, which is not run: remove the key"
            )


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """What a model's folder says on generating; None where it says nothing.

    Raises:
        ValueError: it cannot be used; with the file and the fix.
    """
    file = folder / GENERATION
    refuse_pointer(file)
    if not file.is_file():
        return None
    values = read_json(file, links=True)
    try:
        if not isinstance(values, dict):
            raise TypeError(f"it must hold an object, got {type(values).__name__}")
        found = GenerationConfig.from_dict(values)
        found.validate()
    except Exception as error:  # transformers fails in any way it likes on values that nobody meant
        raise ValueError(f"{file} says nothing that can be used ({error!s:.300}): mend or remove it") from error
    return found


def check_config(folder: Path) -> None:
    """Check a model's folder: its config.json asks for no more than the weights beside it account for.

    Raises:
        ValueError: it asks for a far larger model, cannot be read, or is of a kind that transformers does not have.
    """
    file = folder / "config.json"
    values = read_json(file, links=True)
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold an object, got {type(values).__name__}")
    check_numbers(values, file)
    check_heads(values, file)
    with within_weights(present_weights(folder), file) as check:
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except (ValueError, OSError):
            raise
        except Exception as error:  # transformers fails in any way it likes on values that nobody meant
            raise ValueError(
                f"{file} describes no {values.get('model_type')!s:.40} that can be built ({error!r:.200}): {_COPY}"
            ) from error
        check(model)


@contextmanager
def within_weights(files: Sequence[Path], what: str | Path) -> Iterator[Callable[[nn.Module], None]]:
    """Inside the context models are built without memory; what is given compares one with the weights in `files`.

    Args:
        files: safetensors, of that model or of one that was made from it.
        what: where the model is described, for errors.

    Raises:
        ValueError: the weights cannot be read, or a model is built that they do not account for.
    """
    shapes = []
    for file in files:
        try:
            with safe_open(file, "pt") as weights:
                shapes += [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
    if not shapes:
        raise ValueError(f"{what} describes a model without weights: {WEIGHTS} is missing beside it, or holds nothing")
    most = _TIMES * sum(map(math.prod, shapes)) + _SPARE

    def check(model: nn.Module) -> None:
        found = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        if found > most:
            raise ValueError(f"{what} describes {found:,} numbers, far more than its weights hold")

    with torch.device("meta"), _registering_at_most(_TIMES * (len(shapes) + _SPARE_TENSORS), what):
        yield check


@contextmanager
def _registering_at_most(count: int, what: str | Path) -> Iterator[None]:
    """Stop the building of a model that would never end, such as one with a billion inner layers."""
    left = count

    def registered(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"{what} describes far more parameters than its weights hold")

    handle = nn.modules.module.register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()
