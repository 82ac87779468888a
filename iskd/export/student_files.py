"""The folder of an exported student: the names of its files and what they say."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from iskd.models.tokenizers import TOKENIZER_FILES, has_tokenizer, load_tokenizer
from iskd.models.weights import INDEX
from iskd.plan.run_files import FACTS, MODEL, RECORD_FILE, STAGES_FILE
from iskd.system import Json
from iskd.system.files import read_object
from iskd.system.text import argument

CODE, CARD = "modeling_iskd.py", "README.md"


_OWN = {
    *("config.json", "generation_config.json", FACTS, RECORD_FILE, CARD, CODE, INDEX, *TOKENIZER_FILES),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt"),
}


def belongs(name: str) -> bool:
    """Whether a file of this name in a student's folder is one of its own, or a licence that goes with it."""
    return name in _OWN or re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name) is not None


def installing() -> str:
    """What installs iskd where it is not, in words: from its home where the package was built with one (`ISKD_URL`)."""
    from iskd.system.version import __version__  # at the first call: iskd itself imports this module

    try:
        urls = metadata("iskd").get_all("Project-URL") or []
    except PackageNotFoundError:  # a checkout on the path
        urls = []
    home = next((url.partition(", ")[2] for url in urls if url.startswith("Repository, ")), "")
    if home:
        return f"pip install 'iskd @ git+{home}'"
    return f"pip install iskd-{__version__}-py3-none-any.whl, its wheel, or the folder of its repository"


def student_folder(folder: Path) -> Path:
    """`folder`, or where it is the directory of a run the student in it. Raises ValueError when there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the one that holds config.json, such as RUN_DIR/{MODEL}")
    inner = folder / MODEL
    found = inner if (inner / "config.json").is_file() and not (folder / "config.json").is_file() else folder
    if not (found / "config.json").is_file() and (folder / STAGES_FILE).is_file():
        raise ValueError(
            f"{folder} is a run that wrote no student (export=false): {argument('resume', folder)} export=true "
            "writes it"
        )
    if not (found / "config.json").is_file():
        raise ValueError(f"{folder} is not a model directory: config.json is missing")
    return found


def read_facts(folder: Path) -> Json:
    """The `export.json` of a folder; {} where there is none. Raises ValueError when it is not an object."""
    return read_object(folder / FACTS, links=True)


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a model's folder, None where there is none. Raises ValueError where it cannot be loaded."""
    return load_tokenizer(folder) if has_tokenizer(folder) else None
