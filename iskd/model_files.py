"""A model directory on disk: what it must hold, and the hash that names its weights.

Only safetensors count as weights: a pickle can run code while it is read.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from iskd.plan import read_json

_SHARD = re.compile(r"[\w.-]+\.safetensors", re.ASCII)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces of 4 MiB (about a gigabyte a second)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(4 << 20):
            digest.update(piece)
    return digest.hexdigest()


def weight_files(directory: Path) -> list[Path]:
    """The safetensors of a model directory in name order: one file, or the shards its index names (present or not)."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    data = read_json(index)
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


def check_model_directory(directory: Path) -> None:
    """Check that a directory holds config.json and complete safetensors weights.

    Raises:
        ValueError: what is missing, by name.
    """
    if not directory.is_dir():
        raise ValueError(f"model.path={directory} is not a directory: give the one that holds config.json")
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} is not a model directory: config.json is missing")
    files = weight_files(directory)
    if not files:
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        hint = f" ({pickles[0]} is a pickle and never loaded: save the model as safetensors)" if pickles else ""
        raise ValueError(f"{directory} has no weights: model.safetensors is missing{hint}")
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ValueError(f"{directory} lacks {len(missing)} of {len(files)} weight files: {', '.join(missing)}")
