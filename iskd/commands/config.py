"""Where conf/ lies, and how one of its nodes becomes plain values or an object."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from iskd.losses import Terms
from iskd.plan import Spec
from iskd.plan.run_files import CONFIG_FILE, STAGES_FILE

PACKAGE = Path(__file__).resolve().parents[1]
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
"""In a wheel inside the package, in a checkout beside it."""
RUN_HOLDS = f"a run's folder (hydra.run.dir) holds {CONFIG_FILE} and, from its first stage on, {STAGES_FILE}"
"""What an error about a folder says."""


def options(group: str) -> list[str]:
    """What can be chosen of a config group, e.g. of `data`, sorted; a file `_name.yaml` is only included by others."""
    return sorted(file.stem for file in (CONF / group).glob("[!_]*.yaml"))


def plain(config: Any) -> Any:
    """Containers of a config as dicts and lists, interpolations resolved."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def object_of(config: DictConfig, **runtime: Any) -> Any:
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
