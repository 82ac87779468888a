"""The fitted options on disk: one file for every layer and option, checked when it is read, made again where it is not.

    meta.json                            the recipe: teacher, text, code, precision, epochs; whose library this is
    007-slim_50-0123456789abcdef.safetensors   tensors of one block; errors of its fit and a digest in its header
    scores-4.safetensors, students.safetensors   what was measured of single options, and of whole students (`Kept`)

A file is written whole or not at all, so a library may be killed at any point and filled further by as many processes
as there are. What an option is called does not bind it: two budgets share what is the same option.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.models import Stack
from iskd.models.weights import load_model_tensors, model_tensors
from iskd.schedules.budget.fitting import Fit
from iskd.schedules.budget.options import Option, layers_of, module_of
from iskd.schedules.budget.settings import Budget
from iskd.system import read_json, write_whole
from iskd.system.files import hash_files, is_draft, read_plain, sweep
from iskd.system.version import PACKAGE

META = "meta.json"
_VERSION = 1
_TOLD = "iskd"
_LENGTH = 8  # bytes of the length of a safetensors header
_HERE = "schedules/budget"
_BLOCKS = ("models", "blocks", "mixers", "schedules/edits.py", f"{_HERE}/options.py", f"{_HERE}/students.py")
# what a fitted option and its scores depend on
_CODE = (*_BLOCKS, "refits", "importance/sweep.py", f"{_HERE}/fitting.py", f"{_HERE}/scores.py")
TIMED = (*_BLOCKS, "evaluation/efficiency.py", f"{_HERE}/costs.py")
"""The source that decides what an option takes."""
_WORDS = {
    "teacher": "of another teacher",
    "text": "of other calibration text",
    "code": "by another version of iskd",
    "precision": "in another precision or on another kind of device",
    "fit": "with other settings of its fits (budget.epochs, budget.lr, seed)",
    "version": "by another version of iskd",
}
_log = logging.getLogger(__name__)


def code_digest(names: Sequence[str] = _CODE) -> str:
    """Of source files and folders of iskd; by default what decides what a fitted option is, and what its scores are."""
    files: list[Path] = []
    for name in names:
        place = PACKAGE / name
        files += [place] if place.is_file() else sorted(place.rglob("*.py"))
    return hash_files(files)


def recipe_of(budget: Budget, answering: Mapping[str, Any], text: str, seed: int) -> dict[str, Any]:
    """What a library is bound to.

    Args:
        budget: settings of the fits.
        answering: what decides what the teacher says (`iskd.teacher.cache.answering`).
        text: digest of the calibration text.
        seed: of fresh weights.
    """
    others = {key: str(value) for key, value in answering.items() if key != "teacher"}
    return {
        "version": _VERSION,
        "teacher": answering["teacher"],
        "text": text,
        "code": code_digest(),
        "precision": others,
        "fit": {"epochs": budget.epochs, "lr": budget.lr, "seed": seed},
    }


class Library:
    """The fitted options of one teacher on one text.

    Args:
        folder: of this library.
        recipe: what it is bound to.
        teacher: whose blocks the options stand for.
        seed: of fresh weights.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any], teacher: PreTrainedModel, seed: int) -> None:
        self.folder, self.recipe, self.stack, self._seed = folder, dict(recipe), Stack(teacher), seed

    @classmethod
    def open(
        cls, budget: Budget, below: Path, recipe: Mapping[str, Any], teacher: PreTrainedModel, seed: int
    ) -> Library:
        """The library of a recipe: `budget.library`, or one below a folder that is named after the recipe.

        Raises:
            ValueError: the folder holds another library, or something else.
        """
        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
        folder = below / digest if budget.library is None else Path(budget.library)
        library = cls(folder, recipe, teacher, seed)
        library._claim()
        return library

    def _claim(self) -> None:
        path = self.folder / META
        if not path.exists():
            # other processes that start now may have come further: their drafts are none of anybody else's files
            strange = self.folder.is_dir() and not all(map(is_draft, self.folder.iterdir()))
            if strange and not path.exists():
                raise ValueError(f"budget.library={self.folder} holds other files and no library: give another folder")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(self.recipe, indent=1))
        sweep(self.folder)
        try:
            found = read_json(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error!s:.200}): delete the folder {self.folder}") from error
        if found == self.recipe:
            return
        keys = [key for key in _WORDS if not isinstance(found, dict) or found.get(key) != self.recipe.get(key)]
        raise ValueError(
            f"budget.library={self.folder} was made {_WORDS[keys[0]] if keys else 'otherwise'}: give another folder, "
            "or leave budget.library out"
        )

    # ---- what is there ----------------------------------------------------------------------------------------------

    def file(self, layer: int, option: Option) -> Path:
        """Where an option of a layer lies."""
        name = re.sub(r"[^\w.-]", "_", option.name)[:40]
        same = sorted(self.folder.glob(f"{layer:03d}-*-{option.digest}.safetensors"))
        return same[0] if same else self.folder / f"{layer:03d}-{name}-{option.digest}.safetensors"

    def missing(self, options: Sequence[Option]) -> dict[int, list[Option]]:
        """By layer the options that are not there, or not what was written; removals have no file."""
        where = [(option, layers_of(option, self.stack)) for option in options if option.fitted]
        return {
            layer: [option for option, layers in where if layer in layers and self._read(layer, option) is None]
            for layer in range(len(self.stack.layers))
        }

    def keep(self, layer: int, option: Option, fit: Fit) -> None:
        """Write a fitted option down."""
        tensors = {name: tensor.cpu() for name, tensor in model_tensors(fit.module).items()}
        facts = {"layer": layer, "option": option.described(), "before": fit.before, "after": fit.after}
        write_whole(self.file(layer, option), packed(tensors, facts))

    def block(self, layer: int, option: Option) -> nn.Module | None:
        """The fitted block, on the teacher's device; None of a removal.

        Raises:
            ValueError: it is not there.
        """
        if not option.fitted:
            return None
        found = self._read(layer, option)
        if found is None:
            raise ValueError(f"{self.file(layer, option)} is missing or damaged: start again, and it is fitted anew")
        module = module_of(option, self.stack, layer, self._seed)
        assert module is not None
        load_model_tensors(module, found[0])
        return module.eval().requires_grad_(False)

    def errors(self, layer: int, option: Option) -> tuple[float, float] | None:
        """Relative squared error on held-out text before and after the fit; None of a removal."""
        found = self._read(layer, option) if option.fitted else None
        return None if found is None else found[1]

    def _read(self, layer: int, option: Option) -> tuple[dict[str, Tensor], tuple[float, float]] | None:
        """Tensors and errors of a file; None where it is not there, or not what was written."""
        path = self.file(layer, option)
        try:
            content = read_plain(path, max_bytes=path.lstat().st_size)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _log.warning("%s cannot be read (%s): it is fitted anew", path, error)
            return None
        try:
            tensors, facts = unpacked(content)
            errors = float(facts["before"]), float(facts["after"])
            whole = facts["layer"] == layer
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            _log.warning("%s is damaged: it is fitted anew", path)
            return None
        return tensors, errors


class Kept:
    """Tensors by name in one file, which is written whole whenever there are more.

    Args:
        file: where they lie.
        what: they are, for people, where they have to be made anew.
    """

    def __init__(self, file: Path, what: str) -> None:
        self.file, self._what = file, what

    def read(self) -> dict[str, Tensor]:
        """All of them; none where there is no file, or not what was written."""
        try:
            found, _ = unpacked(read_plain(self.file, max_bytes=self.file.lstat().st_size))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            _log.warning("%s cannot be read (%s): %s anew", self.file, error, self._what)
            return {}
        return found

    def add(self, more: Mapping[str, Tensor]) -> None:
        """Keep more of them, or others in the place of some."""
        added = {name: tensor.cpu().contiguous() for name, tensor in more.items()}
        write_whole(self.file, packed({**self.read(), **added}, {}))


def packed(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    """A safetensors file of tensors and of facts in plain JSON, which says whether it is what was written."""
    # under one key: safetensors writes several in an order of its own, and equal fits are to be equal files
    told = json.dumps({**facts, "digest": _digest(tensors, facts)}, sort_keys=True)
    return save(dict(tensors), metadata={_TOLD: told})


def unpacked(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of such a file. Raises ValueError where it is not what was written."""
    try:
        tensors = load(content)
        length = int.from_bytes(content[:_LENGTH], "little")
        facts = json.loads(json.loads(content[_LENGTH : _LENGTH + length])["__metadata__"][_TOLD])
        digest = facts.pop("digest")
        whole = digest == _digest(tensors, facts)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is damaged: {error!s:.200}") from error
    if not whole:
        raise ValueError("it is not what was written")
    return tensors, facts


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """Hex SHA-256 of facts, names, types, shapes and bytes."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
