"""Rows of a data set of the Hugging Face hub by the library `datasets`, and which commit of the set they are of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from iskd.system.faults import UnavailableError
from iskd.system.files import read_object

OFFLINE = "data=text data.path=FILE (local .txt, .jsonl or .parquet) or data=docstrings (needs no file)"
"""Other text."""
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SECONDS = 10.0


def hub_rows(
    name: str,
    config: str | None,
    split: str,
    *,
    revision: str | None,
    limit: int | None,
    streaming: bool,
    files: str | None = None,
) -> Iterator[Any]:
    """Yield the rows of one split, in their order.

    Args:
        name: on the hub, or a local folder in the same layout.
        config: name of the configuration; None where the data set has one.
        split: name of the split.
        revision: commit, branch or tag; None = the main branch.
        limit: stop after so many rows; None = all.
        streaming: read rows off the network as they are asked for, and keep none; else all go through the local cache.
        files: glob of the files in the set that hold the split; None = as the set says, by a script of its own not.

    Raises:
        ValueError: `datasets` is missing, or the data set cannot be reached or read to the end.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        fix = f"pip install datasets, or use {OFFLINE}"
        raise ValueError(f"data.source={name} needs the package datasets; {fix}") from error
    if any(Path(name, file).is_file() for file in ("dataset_dict.json", "state.json")):
        raise ValueError(f"{name} was written by save_to_disk: set data=text data.path={name}")
    count = 0
    try:
        # Streaming spares the download of the rest; reading whole goes through the cache, which works offline.
        # Where nothing is said, datasets before version 4 asks on the terminal whether to run a data set's script.
        where: dict[str, Any] = {"split": split, "streaming": streaming}
        if files is None:
            rows = load_dataset(name, config, revision=revision, trust_remote_code=False, **where)
        else:
            root = name if Path(name).exists() else f"hf://datasets/{name}{f'@{revision}' if revision else ''}"
            named = {split: f"{root}/{files}"}
            rows = load_dataset(_reader_of(files), data_files=named, trust_remote_code=False, **where)
        iterator = iter(rows if limit is None else rows.take(limit))
        row = next(iterator, None)
        while row is not None:
            count += 1
            yield row
            row = next(iterator, None)
    except GeneratorExit:
        raise
    except Exception as error:
        what = f"data set {name!r} (config {config!r}, split {split!r}) could not be loaded: {error}"
        if count:
            again = "run the same command again, it reads from the beginning"
            raise ValueError(f"{what} (after {count} rows); {again}") from error
        raise UnavailableError(f"{what}. Without a network {offline(name, files)}") from error


def offline(name: str, files: str | None = None) -> str:
    """What to do where a data set of the hub cannot be had: fetch it elsewhere, or take other text."""
    path = "FOLDER" if files is None else f"'FOLDER/{files}'"
    return (
        f"fetch its files elsewhere (hf download --repo-type dataset {name}) and add data.path={path}, which keeps how "
        f"many documents are read, how they are framed and split; or, for other text, use {OFFLINE}"
    )


def _reader_of(files: str) -> str:
    """What `datasets` calls the reader of such files. Raises ValueError where it has none."""
    endings = Path(files).suffixes
    found = next((reader for ending, reader in _READERS.items() if ending in endings), None)
    if found is None:
        raise ValueError(f"data.source.files={files}: name files that end in {', '.join(_READERS)}")
    return found


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit, which never moves, and no branch or tag."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a revision of a data set is at now, of the main branch where none is named; None = not known.

    Without a network, and of local folders, nothing is known.
    """
    if is_commit(revision) or Path(name).exists():
        return revision
    try:
        from huggingface_hub import HfApi

        sha = HfApi().dataset_info(name, revision=revision, timeout=_SECONDS).sha
    except Exception:  # no network, no such set, no access: what reads it says so in its own words
        return None
    return sha if is_commit(sha) else None


def kept_commit(before: str, behind: str, shards: Path) -> str | None:
    """The commit that the newest shards of a source were made of, None without any.

    Args:
        before: what stands before the commit where shards name their source.
        behind: what stands behind it.
        shards: folder of all shards.
    """
    named = re.compile(f"{re.escape(before)}'({_COMMIT.pattern})'{re.escape(behind)}")
    files = [file for file in shards.glob("*/meta.json") if file.is_file()]
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        try:
            match = named.search(str(read_object(file).get("source")))
        except (OSError, ValueError):  # of another kind, or damaged: whoever opens it says so
            continue
        if match:
            return match[1]
    return None
