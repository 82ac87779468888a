"""A student on a model hub: which files go up, whether the head of its card is one that a hub takes, and sending it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

from iskd.export.lineage import LICENCES
from iskd.export.loading import describe
from iskd.export.student_files import CARD, belongs, read_facts, student_folder
from iskd.export.verification import changed
from iskd.system.files import leads_out

_RELATIONS = ("finetune", "quantized", "adapter", "merge")


@dataclass(frozen=True)
class Upload:
    """What would go up.

    Attributes:
        folder: of the student.
        repo: where to, OWNER/NAME.
        files: their sizes in bytes by name.
        notes: what the reader of the card will miss.
    """

    folder: Path
    repo: str
    files: Mapping[str, int]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """For a terminal: a file a line."""
        found = [f"{self.folder} -> {self.repo}"]
        found += [f"  {size:>15,} bytes  {name}" for name, size in self.files.items()]
        found.append(f"  {sum(self.files.values()):>15,} bytes in {len(self.files)} files")
        return [*found, *(f"  note: {note}" for note in self.notes)]


def upload_of(folder: str | os.PathLike[str], repo: str, include: Sequence[str] = ()) -> Upload:
    """What pushing an export, or the run that holds it, would send; nothing is sent.

    Args:
        folder: of the export or the run.
        repo: OWNER/NAME.
        include: names of files there that go up too, beside the student's own.

    Raises:
        ValueError: `repo` is no OWNER/NAME; the folder is no student, or not as it was exported; its card's head is one
            that a hub refuses; a file of it, or one of `include`, is missing or a link out of the folder.
    """
    path = student_folder(Path(folder))
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{repo!r:.120} names no place on a hub, which is OWNER/NAME: {error!s:.200}") from None
    if repo.count("/") != 1:
        raise ValueError(f"{repo!r:.120} names no place on a hub: give OWNER/NAME")
    described = describe(path)
    if wrong := changed(path, read_facts(path)):
        raise ValueError(f"{path}: {wrong[0]}: export the student again before others load it")
    notes = card_notes(path / CARD)
    if not described.native and described.code != "bundle":
        notes.append(
            "readers need iskd installed to load it; resume=RUN_DIR export.code=bundle writes it with code of its own"
        )
    there = sorted(file.name for file in path.iterdir() if file.is_file())
    if missing := sorted(set(include) - set(there)):
        raise ValueError(f"{path} has no file {missing[0]!r:.120}: give the name of one that lies in it")
    files = [path / name for name in there if belongs(name) or name in include]
    for file in files:
        if leads_out(file):
            raise ValueError(f"{file} is a link out of its folder: put the file itself in its place")
    # hidden files are those of editors and of systems: nobody expects them to go up
    left = [name for name in there if not (path / name in files or name.startswith("."))]
    notes += [f"{name} stays here, as it is none of a student's files; --include {name} sends it" for name in left]
    return Upload(path, repo, {file.name: file.stat().st_size for file in files}, tuple(notes))


def card_notes(card: Path) -> list[str]:
    """What is missing in the head of a model card.

    Raises:
        ValueError: it is no YAML, or holds what a hub refuses.
    """
    try:
        head = metadata_load(card) if card.is_file() else None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{card}: its head is no YAML ({error!s:.200}): mend it, or export the student again"
        ) from None
    if head is None:
        return [f"there is no {CARD} with a head, so the hub will not list it as a text-generation model"]
    for key, wrong in _refused(head).items():
        raise ValueError(f"{card}: {key} in its head is {head[key]!r:.80}, and must be {wrong}: a hub refuses the card")
    return [f"the card names no {key}" for key in ("license", "base_model") if not head.get(key)]


def _refused(head: Mapping[str, Any]) -> dict[str, str]:
    """Keys of a card's head that a hub would refuse, each with what its value must be."""
    found = {
        "license": "one of the hub's names of licences, or a list of such; any other is `other` with a license_name"
        if not all(isinstance(name, str) and name in LICENCES for name in _many(head.get("license")))
        else "",
        "license_name": "a word of small letters, digits, dots and hyphens"
        if head.get("license_name") is not None and not re.fullmatch(r"[a-z0-9.-]+", str(head["license_name"]))
        else "",
        "base_model": "OWNER/NAME, or a list of such"
        if not all(_is_repo(name) for name in _many(head.get("base_model")))
        else "",
        "base_model_relation": f"one of {', '.join(_RELATIONS)}"
        if head.get("base_model_relation") is not None and head["base_model_relation"] not in _RELATIONS
        else "",
        "tags": "a list of words" if not all(isinstance(tag, str) for tag in _listed(head.get("tags"))) else "",
        "datasets": "a list of names on the hub" if not all(map(_is_repo, _many(head.get("datasets")))) else "",
        "language": "a code of two or three letters, or a list of such"
        if not all(re.fullmatch(r"[a-z]{2,3}([-_]\w+)?", str(code)) for code in _many(head.get("language")))
        else "",
        "model-index": "what the hub's library reads results from" if not _are_results(head.get("model-index")) else "",
    }
    return {key: wrong for key, wrong in found.items() if wrong}


def _many(value: Any) -> list[Any]:
    """Values of a key that takes one or a list."""
    return value if isinstance(value, list) else [] if value in (None, "") else [value]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [None]


def _are_results(given: Any) -> bool:
    try:
        return given is None or bool(model_index_to_eval_results(given))
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):  # whatever a wrong shape comes to
        return False


def _is_repo(name: Any) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def push(upload: Upload, *, private: bool = False, revision: str | None = None, message: str = "") -> str:
    """Send a student in one commit and return where it is; the place is made where there is none.

    In the card's own words on loading, DIR becomes the name that readers load.

    Args:
        upload: what is sent.
        private: nobody else may see it; False = as the hub makes places for this owner.
        revision: a branch instead of main.
        message: of the commit.

    Raises:
        ValueError: the place is there and public, and `private` was asked; it could not be sent, with what the hub or
            the network said.
    """
    api = HfApi()
    operations = []
    for name in upload.files:
        content: Any = upload.folder / name
        if name == CARD:
            content = _for_readers(content.read_text(encoding="utf-8"), upload.repo).encode()
        operations.append(CommitOperationAdd(name, content))
    try:
        api.create_repo(upload.repo, private=private or None, exist_ok=True)
        # of a place that is there already the hub leaves as it is who may see it
        public = private and not api.repo_info(upload.repo).private
    except Exception as error:
        raise _unsent(upload, error) from error
    if public:
        raise ValueError(f"{upload.repo} is there and public: make it private on the hub, or push without --private")
    try:
        if revision is not None:
            api.create_branch(upload.repo, branch=revision, exist_ok=True)
        told = message or "A student, written by iskd"
        found = api.create_commit(upload.repo, operations, commit_message=told, revision=revision)
    except Exception as error:
        raise _unsent(upload, error) from error
    return str(found.commit_url)


def _unsent(upload: Upload, error: Exception) -> ValueError:
    """The hub's library and the network fail in any way they like."""
    return ValueError(
        f"{upload.folder} could not be sent to {upload.repo} ({type(error).__name__}: {error!s:.300}): "
        "sign in with `hf auth login` or set HF_TOKEN, and see that the place is yours"
    )


def _for_readers(card: str, repo: str) -> str:
    """A card whose lines on loading work for whoever reads it on the hub; `iskd.load` takes folders."""
    load = f'iskd.load(snapshot_download("{repo}"))'
    fetching = "import iskd\nfrom huggingface_hub import snapshot_download\n\n"
    changes = {
        'from_pretrained("DIR"': f'from_pretrained("{repo}"',
        'import iskd\n\nmodel = iskd.load("DIR")': f"{fetching}model = {load}",
        '`iskd.load("DIR")`': f"`{load}` (of `huggingface_hub`)",
        "`iskd verify DIR`": f"`hf download {repo} --local-dir DIR` and then `iskd verify DIR`",
    }
    for written, read in changes.items():
        card = card.replace(written, read)
    return card
