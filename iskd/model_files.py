"""A model directory on disk: what it must hold, and the hash that names its weights.

Only safetensors count as weights: a pickle can run code while it is read.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from iskd.plan import MAX_NUMBER, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_HEADER = 100_000_000  # bytes of a header at most, the limit of safetensors itself


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces of 4 MiB (about a gigabyte a second)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(4 << 20):
            digest.update(piece)
    return digest.hexdigest()


def weight_files(directory: Path) -> list[Path]:
    """The safetensors of a model directory in name order: one file, or the shards its index names (present or not)."""
    single, index = directory / WEIGHTS, directory / INDEX
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


def present_weights(directory: Path) -> list[Path]:
    """`weight_files`, every one of which is there. Raises ValueError naming those that are not."""
    files = weight_files(directory)
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ValueError(f"{directory} lacks {len(missing)} of {len(files)} weight files: {', '.join(missing)}")
    return files


def check_whole(file: Path) -> None:
    """Check that a safetensors file has as many bytes as its own header describes.

    Raises:
        ValueError: it is cut short, or no safetensors file; with both numbers of bytes.
    """
    actual = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(length) if length <= min(_HEADER, actual) else b""
    expected = 8 + length
    try:
        if header and 8 + length <= actual:
            entries = json.loads(header)
            spans = [int(entry["data_offsets"][1]) for name, entry in entries.items() if name != "__metadata__"]
            expected += max(spans, default=0)
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: it is no safetensors file ({error!r:.100})") from None
    if actual < 8 or length > _HEADER or expected > MAX_NUMBER:
        raise ValueError(f"{file} cannot be read: it has {actual:,} bytes and is no safetensors file")
    if actual < expected:
        raise ValueError(
            f"{file} cannot be read: it is cut short, {actual:,} bytes where its header describes {expected:,}: "
            "copy it again"
        )


def check_model_directory(directory: Path) -> None:
    """Check that a directory holds config.json and complete safetensors weights.

    Raises:
        ValueError: what is missing or cut short, by name.
    """
    if not directory.is_dir():
        raise ValueError(f"model.path={directory} is not a directory: give the one that holds config.json")
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} is not a model directory: config.json is missing")
    weights = present_weights(directory)
    for file in weights:
        check_whole(file)
    if not weights:
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        hint = f" ({pickles[0]} is a pickle and never loaded: save the model as safetensors)" if pickles else ""
        raise ValueError(f"{directory} has no weights: {WEIGHTS} is missing{hint}")
