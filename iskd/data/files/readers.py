"""Paths to documents: which files a path means, and the texts of each; every error names the file.

What kind a file is says `kinds`, how its bytes become lines `decoding`, how its rows become texts `rows`.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from iskd.data.files.chat import ROWS
from iskd.data.files.decoding import lines_of
from iskd.data.files.kinds import FORMATS, kind_of, read_otherwise, suffix_of
from iskd.data.files.rows import rows_of, text_of
from iskd.system import read_json
from iskd.system.files import expanded

Placed = tuple[str | None, Path]
"""A file and the split of its documents."""
_GROUP_CHARS = 1_000
_GROUP_CHARS_MAX = 10_000
_BESIDE = re.compile(
    r"_success|(readme|licen[cs]e|notice|copying|changelog|authors|citation)(\.(md|rst|txt|cff))?", re.I
)
_SPLITS = {"train": None, "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}
_SPLITS |= {"training": None, "test": "test", "testing": "test", "eval": "test", "evaluation": "test"}
_SPLIT_NAME = re.compile(rf"({'|'.join(_SPLITS)})(?![^\W\d_])", re.I)
_log = logging.getLogger(__name__)


def find_files(path: str, key: str) -> list[Path]:
    """Files that a path names: itself, all files inside a folder, or the matches of a glob.

    Of a folder, hidden files, readmes and licences are left out, and told. It holds files of known suffixes, or files
    without any such (code, notes), which are read as text: of a mixture what is meant has to be said.

    Args:
        path: file, folder or glob; `~` is the home folder.
        key: the option that holds it, for errors.

    Raises:
        ValueError: there is no such file, or the folder holds others.
    """
    splits = find_splits(path, key)
    if len(splits) > 1:
        names = [_name_of(files) for _, files in reversed(splits)]
        raise ValueError(f"{key}={path} holds several splits; name one: {key}={names[0]} (or {names[1:]})")
    return splits[0][1]


def find_splits(path: str, key: str) -> list[tuple[str | None, list[Path]]]:
    """As `find_files`, by the split that the files are of; of a folder of splits those held out come first.

    A folder by `datasets.DatasetDict.save_to_disk` has splits, and so have files of a folder or glob whose names begin
    with one (`train-0.jsonl`, `test/a.csv`), where one of them is for training; what else there is has the split None.
    """
    target = Path(expanded(path))
    if target.is_file():
        return [(None, [target])]
    if target.is_dir():
        if (target / "dataset_dict.json").is_file():
            return _saved_splits(target, key)
        return _by_name(_in_folder(target, key), target, key)
    matches = [Path(name) for name in sorted(glob.glob(_pattern(target), recursive=True))]
    found = [match for match in matches if match.is_file()]
    folders = [match for match in matches if match.is_dir() and "**" not in path]
    if found and folders:
        what = f"{len(folders)} folders ({folders[0].name}) are left out"
        _log.warning("%s=%s matches files, and %s: ** goes into folders too", key, path, what)
    if not found:
        found = [file for match in folders for file in find_files(str(match), key)]
    if not found and os.path.lexists(target):
        what = f"a link to {os.readlink(target)}, where nothing is" if target.is_symlink() else "no plain file"
        raise ValueError(f"{key}={path} is {what}; give a file, a folder or a glob")
    if not found:
        raise ValueError(f"{key}={path} does not exist (from folder {Path.cwd()}); give a file, a folder or a glob")
    return _by_name(found, _there(target), key)


def _by_name(files: list[Path], folder: Path, key: str) -> list[tuple[str | None, list[Path]]]:
    """Files by the splits that their names, or those of their folders inside `folder`, begin with.

    Raises:
        ValueError: some files are of splits and some of none.
    """
    found: dict[str | None, list[Path]] = {}
    others = []
    for file in files:
        *folders, name = file.relative_to(folder).parts
        said = next((part.lower() for part in folders if part.lower() in _SPLITS), None)
        said = said or ((match := _SPLIT_NAME.match(name)) and match[1].lower())
        if said:
            found.setdefault(_SPLITS[said], []).append(file)
        else:
            others.append(file)
    # without text to train on, or of code, these are names like any other
    if len(found) < 2 or None not in found or any(suffix_of(file) not in FORMATS for file in files):
        return [(None, files)]
    splits = sorted(found.items(), key=lambda entry: entry[0] is None)
    if others:
        keys = {None: key, "validation": "data.val_path", "test": "data.test_path"}
        named = " ".join(f"{keys[split]}={_name_of(of)}" for split, of in reversed(splits))
        what = f"{len(others)} of none (the first is {others[0].name})"
        raise ValueError(f"{folder} has files of splits, and {what}: name what is meant, as {named}")
    told = ", ".join(
        f"{split or 'train'} {len(of)} files (the first is {of[0].name})" for split, of in reversed(splits)
    )
    _log.info("%s: splits by the names of files: %s", folder, told)
    return splits


def _name_of(files: list[Path]) -> str:
    """What names the files of a split: itself, their folder, or a glob of those that begin as the first does."""
    first = files[0]
    match = _SPLIT_NAME.match(first.name)
    return str(first if len(files) == 1 and match else first.parent / f"{match[1]}*" if match else first.parent)


def _there(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _pattern(path: Path) -> str:
    """The path as a glob, of which the folders that are there mean themselves."""
    there = _there(path)
    return str(Path(glob.escape(str(there)), path.relative_to(there)))


def placed_files(path: str, val_path: str | None, test_path: str | None) -> dict[str, list[Placed]]:
    """Files of the three keys of a source, each with the split of its documents.

    Raises:
        ValueError: as `find_files`; a split is given by its key and by a folder of splits in `path`.
    """
    splits = find_splits(path, "data.path")
    given = {"validation": ("val_path", val_path), "test": ("test_path", test_path)}
    for split, _ in splits:
        if split and given[split][1]:
            raise ValueError(
                f"data.path={path} has a split {split} of its own beside data.{given[split][0]}; set "
                f"data.path={_name_of(splits[-1][1])}, or leave the other out"
            )
    found: dict[str, list[Placed]] = {"path": [(split, file) for split, files in splits for file in files]}
    for split, (key, value) in given.items():
        found[key] = [] if value is None else [(split, file) for file in find_files(value, f"data.{key}")]
    return found


def _in_folder(folder: Path, key: str) -> list[Path]:
    if _is_saved(folder):
        return _saved(folder, key)
    # a link to a folder is not followed (it may lead around in a circle) and named instead
    entries = sorted(entry for entry in folder.rglob("*") if entry.is_symlink() or not entry.is_dir())
    beside = [entry for entry in entries if _is_beside(entry.relative_to(folder))]
    entries = sorted({*entries} - {*beside})
    saved = sorted({entry.parent for entry in entries if entry.name == "state.json" and _is_saved(entry.parent)})
    if saved:
        raise ValueError(f"{key}={folder} holds {len(saved)} saved data sets; name one, as {key}={saved[0]}")
    known = [entry for entry in entries if entry.is_file() and suffix_of(entry) in FORMATS]
    others = sorted({*entries} - {*known})
    if not entries:
        raise ValueError(f"{key}={folder}: the folder has no file of text; name a file or a glob")
    if (known and others) or any(not entry.is_file() for entry in others):
        counts = Counter(entry.suffix or entry.name for entry in others)
        kinds = ", ".join(f"{count} x {suffix}" for suffix, count in counts.most_common(8))
        suffix = Counter(entry.suffix for entry in known or entries).most_common(1)[0][0]
        raise ValueError(
            f"{key}={folder}: {len(others)} of its {len(entries)} files are of kinds that are not read in a folder "
            f"({kinds}; the first is {others[0]}); say which are meant by a glob, as {key}='{folder}/**/*{suffix}'"
        )
    if beside:
        _log.info("%s: %d files beside the text are left out (%s)", folder, len(beside), beside[0].name)
    return entries


def _is_beside(path: Path) -> bool:
    """Whether a file says something on a folder instead of being in it."""
    hidden = any(part.startswith(".") or part == "__pycache__" for part in path.parts)
    return hidden or _BESIDE.fullmatch(path.name) is not None


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _saved(folder: Path, key: str) -> list[Path]:
    """The files of a folder by `datasets.Dataset.save_to_disk`, in its order; others there are caches of its user."""
    files = sorted(folder.glob("data-*-of-*.arrow")) or sorted(folder.glob("dataset.arrow"))
    wanted = int(files[0].stem.rpartition("-")[2]) if files and files[0].stem[-5:].isdecimal() else 1
    if len(files) != wanted:
        what = f"it has {len(files)} of {wanted} files data-*.arrow"
        raise ValueError(f"{key}={folder} is no whole saved data set: {what}; copy or save it again")
    return files


def _saved_splits(folder: Path, key: str) -> list[tuple[str | None, list[Path]]]:
    try:
        names: list[str] = [str(name) for name in read_json(folder / "dataset_dict.json")["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{key}={folder}: dataset_dict.json is damaged ({error}); save the data set again") from error
    strange = [name for name in names if name not in _SPLITS and len(names) > 1]
    if not names or len({_SPLITS.get(name, name) for name in names}) < len(names):
        raise ValueError(f"{key}={folder} has the splits {names}, not one of each kind; name one: {key}={folder}/SPLIT")
    if strange:
        raise ValueError(
            f"{key}={folder} has splits of other names than {sorted(_SPLITS)}: {strange}; name one, as "
            f"{key}={folder / strange[0]}"
        )
    if len(names) == 1:
        return [(None, _saved(folder / names[0], key))]
    found = [(_SPLITS[name], _saved(folder / name, key)) for name in names]
    return sorted(found, key=lambda entry: entry[0] is None)


def read_file(file: Path, fmt: str, field: str, key: str = "data.source") -> Iterator[str]:
    """Yield the documents of one file, without blank ones.

    Args:
        file: the file; gzip, bz2, xz and zstd are unpacked on the way.
        fmt: one of `iskd.data.files.kinds.KINDS`, or `auto`: by suffix and content.
        field: where a row keeps its text; `iskd.data.files.chat.ROWS` = the row is a conversation.
        key: the option that holds `fmt` and `field`, or `eval.text`, which has none; for errors.

    Raises:
        ValueError: the content is not of this format, or lacks the field.
    """
    kind = kind_of(file, fmt, key)
    if kind == "text":
        if field == ROWS:
            raise ValueError(
                f"{file} is read as plain text, and chats are rows: give .jsonl or .parquet (data.source.fmt)"
            )
        yield from group_lines(lines_of(file))
        return
    for where, row in rows_of(file, kind, field, key):
        yield from _nonblank(text_of(row, field, where, key))


def read_as(files: Iterable[Placed], fmt: str) -> str:
    """Give a part of a fingerprint: how files are read, where iskd 0.1 read them otherwise; else empty."""
    kinds = [(split, kind_of(file, fmt, "data.source"), file) for split, file in files]
    if not any(split or read_otherwise(file, fmt, kind) for split, kind, file in kinds):
        return ""
    return "-" + hashlib.sha256(repr([(split, kind) for split, kind, _ in kinds]).encode()).hexdigest()[:16]


def group_lines(lines: Iterable[str]) -> Iterator[str]:
    """Join lines up to a blank one once the group is large enough; a long run without blank lines is cut at a line."""
    group: list[str] = []
    size = 0
    for line in lines:
        group.append(line)
        size += len(line)
        if size >= (_GROUP_CHARS_MAX if line.strip() else _GROUP_CHARS):
            yield from _nonblank("".join(group))
            group, size = [], 0
    yield from _nonblank("".join(group))


def _nonblank(text: str) -> Iterator[str]:
    if text.strip():
        yield text.strip()


def detokenize_wikitext(text: str) -> str:
    """Undo the word-level spacing of WikiText (Merity et al. 2016): ` @-@ `, spaced punctuation, brackets, quotes."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?%)\]}])", r"\1", text)
    text = re.sub(r"([(\[{]) ", r"\1", text)
    text = re.sub(r'" ([^"\n]*?) "', r'"\1"', text)
    text = re.sub(r"(?<=\S) '(s|t|re|ve|ll|d|m)\b", r"'\1", text)
    text = re.sub(r"(?<= )' ([^'\n]*?) '(?=[ ,.;:!?])", r"'\1'", text)
    text = re.sub(r"([$\u00a3\u20ac]) (?=\d)", r"\1", text)
    while "= =" in text:
        text = text.replace("= =", "==")
    return "\n".join(line.strip() for line in text.split("\n"))
