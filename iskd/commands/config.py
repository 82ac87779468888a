"""Where conf/ lies, and how one of its nodes becomes plain values or an object."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from iskd.losses import Terms
from iskd.plan import Spec
from iskd.plan.run_folder import CONFIG_FILE, STAGES_FILE
from iskd.system.ranks import one_of_several

PACKAGE = Path(__file__).resolve().parents[1]
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
"""In a wheel inside the package, in a checkout beside it."""
RUN_HOLDS = f"a run's folder (hydra.run.dir) holds {CONFIG_FILE} and, from its first stage on, {STAGES_FILE}"
"""What an error about a folder says."""


_made: dict[str, str] = {}


def new_folder(path: str) -> str:
    """A folder that nobody else has: made by this call, in one step, with a number behind its name where it was there.

    Hydra's names go by the second. A process gets the same folder for the same path again, and one of several that
    belong together the name itself: they have to be told a folder (`hydra.run.dir`).
    """
    if path in _made.values() or (path not in _made and one_of_several(os.environ)):
        return path
    number = 1
    while path not in _made:
        tried = Path(path if number == 1 else f"{path}-{number}")
        tried.parent.mkdir(parents=True, exist_ok=True)
        try:
            tried.mkdir()
            _made[path] = str(tried)
        except FileExistsError:
            number += 1
    return _made[path]


def forget_folders() -> None:
    """The next path of `new_folder` is that of another run, although it may have been asked for before."""
    _made.clear()


OmegaConf.register_new_resolver("new_folder", new_folder, use_cache=True, replace=True)


def options(group: str) -> list[str]:
    """What can be chosen of a config group, e.g. of `data`, sorted; a file `_name.yaml` is only included by others."""
    return sorted(file.stem for file in (CONF / group).glob("[!_]*.yaml"))


def plain(config: Any) -> Any:
    """Containers of a config as dicts and lists, interpolations resolved."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def part(config: DictConfig, **runtime: Any) -> Any:
    """Build the object of a node with `_target_`.

    Runtime objects are passed by a call of our own: Hydra would turn dataclasses among its arguments into configs.
    Raises ValueError for a key that the target does not take.
    """
    takes = inspect.signature(get_object(config["_target_"])).parameters
    unknown = [key for key in config if key not in takes and not str(key).startswith("_")]
    if unknown and not any(taken.kind is inspect.Parameter.VAR_KEYWORD for taken in takes.values()):
        keys = ", ".join(key for key in takes if key not in runtime)
        raise ValueError(f"{config['_target_']} has no key {unknown[0]!r}: drop it, or use one of {keys or '(none)'}")
    return instantiate(config, _partial_=True, _convert_="all")(**runtime)


def spec(config: DictConfig) -> Spec:
    """A part that is stamped once per layer, as data."""
    values = plain(config)
    return Spec(values.pop("_target_"), values)


def terms(losses: Mapping[str, Mapping[str, Any]]) -> Terms:
    """Loss and weight by name, from the multi-select group `loss`."""
    built = {}
    for name, values in losses.items():
        kwargs = dict(values)
        weight = kwargs.pop("weight", 1.0)
        built[name] = (instantiate(kwargs, _convert_="all"), weight)
    return built
