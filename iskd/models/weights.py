"""Weights of a model as named tensors, on disk, as digests, and in the types that they are stored in."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.models.sharding import like
from iskd.models.stack import SEPARATOR
from iskd.system import file_sha256, read_json
from iskd.system.files import MAX_NUMBER

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_POINTER = b"version https://git-lfs"
_HEADER = 100_000_000  # bytes of a header at most, the limit of safetensors itself


def weight_files(directory: Path) -> list[Path]:
    """The safetensors of a model directory in name order: one file, or the shards its index names (present or not)."""
    single, index = directory / WEIGHTS, directory / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    data = read_json(index, links=True)
    shards = (
        list(data["weight_map"].values()) if isinstance(data, dict) and isinstance(data.get("weight_map"), dict) else []
    )
    if not shards or not all(isinstance(name, str) and _SHARD.fullmatch(name) for name in shards):
        raise ValueError(f"{index} must map tensors to files beside it that end in .safetensors: save the model again")
    return [directory / name for name in sorted(set(shards))]


def weights_sha256(directory: Path) -> str:
    """Hex sha256 of the weights: of the one file, or of the lines `<sha256>  <name>` of all shards in name order."""
    sums = {path.name: file_sha256(path) for path in weight_files(directory)}
    if len(sums) == 1:
        return next(iter(sums.values()))
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode()).hexdigest()


def present_weights(directory: Path) -> list[Path]:
    """`weight_files`, every one of which is there. Raises ValueError naming those that are not."""
    files = weight_files(directory)
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ValueError(f"{directory} lacks {len(missing)} of {len(files)} weight files: {', '.join(missing)}")
    return files


_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def stored_dtype(directory: Path) -> str:
    """The type that most numbers of a model's weights are stored in; float32 where it is none of the three.

    Raises:
        ValueError: a weights file is missing, or is no safetensors file.
    """
    numbers = Counter[str]()
    for file in present_weights(directory):
        check_whole(file)
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                part = opened.get_slice(name)
                numbers[_FLOATS.get(part.get_dtype(), "")] += math.prod(part.get_shape())
    del numbers[""]
    return max(numbers, key=lambda kind: (numbers[kind], kind), default="float32")


def refuse_pointer(file: Path) -> None:
    """Raise ValueError for a file that only says where Git LFS keeps the content."""
    if not file.is_file():
        return
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                f"{file} is a Git LFS pointer and not the file itself: run git lfs pull in {file.parent}, or download "
                "the file again"
            )


def check_whole(file: Path) -> None:
    """Check that a safetensors file is whole: opening it reads its header and holds its size against it.

    Raises:
        ValueError: it is cut short, a pointer, or no safetensors file; with its bytes, and those
            that its header describes where that is left.
    """
    refuse_pointer(file)
    try:
        with safe_open(file, "pt"):
            return
    except SafetensorError as error:
        actual, expected = file.stat().st_size, _described_bytes(file)
        if actual < expected <= MAX_NUMBER:
            raise ValueError(
                f"{file} cannot be read: it is cut short, {actual:,} bytes where its header describes {expected:,}: "
                "copy it again"
            ) from None
        raise ValueError(
            f"{file} cannot be read: it has {actual:,} bytes and is no safetensors file ({error!s:.100})"
        ) from None


def _described_bytes(file: Path) -> int:
    """How long a safetensors file that cannot be opened was, as its header says; 0 where nothing says it."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(length) if length <= _HEADER else b""
    try:
        entries = json.loads(header.decode())
        return 8 + length + max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
        return 8 + length if len(header) < length <= _HEADER else 0


def check_finite(model: nn.Module, whose: str) -> None:
    """Refuse weights that are no numbers. One pass without a copy: extremes hand on nan.

    Raises:
        ValueError: a tensor holds nan or an infinity; the message names it.
    """
    for name, tensor in model.state_dict().items():
        if tensor.numel() and tensor.is_floating_point() and not torch.stack(tensor.aminmax()).isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise ValueError(
                f"{whose}: {count} of {tensor.numel()} values of {name} are nan or infinite, so nothing can be learned "
                "from it: get the weights again, or load them in the type they were saved in (model.dtype)"
            )


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights by name, tied ones once, contiguous: what safetensors takes."""
    names = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    return {name: value.detach().contiguous() for name, value in model.state_dict().items() if name in names}


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights into `model`; every parameter and persistent buffer must be there with its shape.

    Raises ValueError naming the first tensor that is missing, unknown or of another shape.
    """
    own = model_tensors(model)
    shapes = {name: list(tensors[name].shape) for name in tensors}
    problems = [f"{n!r} is missing" for n in own if n not in tensors] + [
        f"{n!r} is unknown" for n in tensors if n not in own
    ]
    problems += [
        f"{n!r} is {tensors[n].dtype}"
        for n in own
        if n in tensors and not tensors[n].is_floating_point() and own[n].is_floating_point()
    ]
    problems += [
        f"{n!r} has shape {shapes[n]} instead of {list(own[n].shape)}"
        for n in own
        if n in shapes and shapes[n] != list(own[n].shape)
    ]
    if problems:
        raise ValueError(
            f"the weights do not fit the student that the record describes: {problems[0]} ({len(problems)} such)"
        )
    with torch.no_grad():
        state = model.state_dict()
        for name, value in tensors.items():
            state[name].copy_(like(value, state[name]))


_VARIABLE = ("_name_or_path", "transformers_version")  # of a config: not what the model computes


def model_sha256(model: PreTrainedModel) -> str:
    """Hex SHA-256 of a model's parameters, of what its config says they compute, and of documents kept apart."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _VARIABLE}
    if hasattr(model, SEPARATOR):
        config[SEPARATOR] = getattr(model, SEPARATOR)
    return parameters_sha256(model, json.dumps(config, sort_keys=True, default=str))


def parameters_sha256(model: nn.Module, config: str | None = None) -> str:
    """Hex SHA-256 of names and bytes of all parameters: of a teacher in memory, or of one with random weights.

    Given a `config`, it is the digest of that text and of names, types, shapes and bytes. Both stand in users' files
    (`environment.json`, `meta.json` of a teacher cache): neither may change.
    """
    digest = hashlib.sha256((config or "").encode())
    for name, parameter in model.named_parameters():
        digest.update((name if config is None else f"{name} {parameter.dtype} {list(parameter.shape)}").encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stored_as(parameters: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, nn.Parameter, torch.dtype]]:
    """Every parameter once, with its name and the type that it has in a model stored as `dtype`."""
    kept = {
        id(value)
        for module in parameters.modules()
        for name, value in module.named_parameters(recurse=False)
        if name in getattr(module, "keep_float32", ())
    }
    for name, value in parameters.named_parameters():
        as_it_is = not value.is_floating_point()
        yield name, value, value.dtype if as_it_is else torch.float32 if id(value) in kept else dtype


@torch.no_grad()
def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the parameters of a loaded student their types; buffers, rotary frequencies among them, keep theirs."""
    for _, value, wanted in list(stored_as(model, dtype)):
        value.data = value.data.to(wanted)


def served(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model itself, or a copy whose parameters have the types of a model stored as `dtype`; buffers as they are."""
    if dtype is None or all(value.dtype == wanted for _, value, wanted in stored_as(model, dtype)):
        return model
    other = copy.deepcopy(model)
    cast_parameters(other, dtype)
    return other
