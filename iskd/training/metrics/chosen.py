"""The loggers that `logger` names, made for a run; of W&B, whether it is online and what it calls the run."""

from __future__ import annotations

import configparser
import importlib
import inspect
import logging
import netrc
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from iskd.plan.run_files import HYDRA
from iskd.system import Json, global_rank
from iskd.system.files import read_plain
from iskd.system.text import perhaps
from iskd.training.metrics.loggers import tracked_as

log = logging.getLogger(__name__)
_HOST = "https://api.wandb.ai"
_MODES = {"online": False, "offline": True, "dryrun": True, "disabled": True}
# what a logger hands on to: its arguments are keys too
_HANDS_ON = {"WandbLogger": "wandb.init", "TensorBoardLogger": "torch.utils.tensorboard.SummaryWriter"}
# packages of which a logger needs one, and the extra that brings the first
_PACKAGES = {"TensorBoardLogger": (("tensorboard", "tensorboardX"), "tensorboard")}
_OURS = ("model",)
"""Keys that are read at the end of a run (`iskd.training.metrics.loggers`)."""


def loggers_of(node: Json, run_dir: Path, make: Callable[..., Any]) -> list[Any]:
    """The chosen loggers beside metrics.csv, writing inside the run directory.

    Args:
        node: of the config: the keys of one logger, and below it mappings of others (`logger=[wandb,tensorboard]`).
        run_dir: the run's.
        make: what builds the object that a mapping with `_target_` describes.

    Raises:
        ValueError: a logger has no such key, or its package is not installed.
    """
    others = [value for value in node.values() if isinstance(value, dict) and "_target_" in value]
    own = {key: value for key, value in node.items() if value not in others}
    chosen = [own, *others] if "_target_" in own else others
    return [_made(dict(values), run_dir, make) for values in chosen]


def _made(values: Json, run_dir: Path, make: Callable[..., Any]) -> Any:
    target = str(values["_target_"])
    packages, extra = _PACKAGES.get(target.rpartition(".")[2], ((), ""))
    if packages and not any(map(find_spec, packages)):
        raise ValueError(f"{target} needs {packages[0]}, which is not installed here: pip install 'iskd[{extra}]'")
    _refuse_unknown(target, values)
    values = {key: value for key, value in values.items() if key not in _OURS}
    if target.endswith(".WandbLogger"):
        if values.get("offline") == "auto":
            values["offline"] = not online(os.environ)
        values["name"] = values.get("name") or os.environ.get("WANDB_NAME") or run_dir.name
        values["group"] = values.get("group") or os.environ.get("WANDB_RUN_GROUP") or sweep_of(run_dir)
        if global_rank() == 0:
            values["id"] = tracked_as(run_dir, values.get("id") or os.environ.get("WANDB_RUN_ID"))
    return make({**values, "save_dir": str(run_dir)})


def _refuse_unknown(target: str, values: Json) -> None:
    """A key that neither the logger nor what it hands its keys on to takes."""
    handed_on = _HANDS_ON.get(target.rpartition(".")[2])
    if handed_on is None:
        return
    with suppress(ImportError):  # the logger itself says what is to be installed
        taken = {*_arguments(target), *_OURS, *_arguments(handed_on)}
        for key in values:
            if key not in taken and key[:1] != "_":
                known = ", ".join(sorted(taken - {"self", "kwargs", "save_dir"}))
                raise ValueError(f"logger.{key} is no key of {target}{perhaps(key, taken)}; use one of {known}")


def _arguments(dotted: str) -> set[str]:
    module, _, name = dotted.rpartition(".")
    return {*inspect.signature(getattr(importlib.import_module(module), name)).parameters}


def online(environment: Mapping[str, str]) -> bool:
    """Whether W&B has a key for the server it is to talk to; where it has none, the log says so.

    The server is `WANDB_BASE_URL`, else what `wandb login --host` noted; the key `WANDB_API_KEY`, or a line of the
    netrc file (`NETRC`, else ~/.netrc). `WANDB_MODE` decides alone where it is set.
    """
    if (mode := environment.get("WANDB_MODE")) in _MODES:
        return not _MODES[mode]
    host = environment.get("WANDB_BASE_URL") or _noted_host(environment) or _HOST
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    files = [environment["NETRC"]] if environment.get("NETRC") else ["~/.netrc", "~/_netrc"]
    machine = urlsplit(host).netloc or host
    for file in files:
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(os.path.expanduser(file)).authenticators(machine) is not None:
                return True
    log.warning(
        "W&B has no key for %s (WANDB_API_KEY, or a line for it in %s): the run is offline; later: wandb sync",
        *(machine, files[0]),
    )
    return False


def _noted_host(environment: Mapping[str, str]) -> str | None:
    """`base_url` of W&B's own settings: those of the working directory before those of the user."""
    folders = [environment.get("WANDB_DIR", "."), environment.get("WANDB_CONFIG_DIR", "~/.config/wandb")]
    for place in (Path(folders[0]) / "wandb" / "settings", Path(folders[1]).expanduser() / "settings"):
        read = configparser.ConfigParser(interpolation=None)
        with suppress(OSError, configparser.Error, UnicodeDecodeError):
            read.read(place)
            if found := read.get("default", "base_url", fallback=None):
                return found
    return None


def sweep_of(run_dir: Path) -> str | None:
    """Name of the sweep that a run belongs to, the folder above it, or None.

    Hydra writes multirun.yaml there, Optuna's sweeper does not; but a job's own .hydra/hydra.yaml tells its mode.
    """
    folder = Path(run_dir).resolve()
    several = False
    with suppress(OSError, ValueError):  # none there, or nothing that Hydra wrote
        note = read_plain(folder / HYDRA / "hydra.yaml", max_bytes=1 << 20, within=folder)
        several = re.search(rb"^  mode: MULTIRUN\r?$", note, re.MULTILINE) is not None
    return folder.parent.name if several or (folder.parent / "multirun.yaml").is_file() else None
