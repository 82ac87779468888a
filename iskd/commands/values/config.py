"""Where conf/ lies, what its keys take, and how one of its nodes becomes plain values or an object."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import yaml
from hydra.errors import HydraException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from iskd.commands.line.offered import options_as_meant
from iskd.commands.line.sources import describe_sources
from iskd.commands.line.steps import steps_as_meant
from iskd.commands.values.paths import at_home
from iskd.commands.values.unread import refuse_unknown_roots
from iskd.losses import Terms
from iskd.plan import Spec
from iskd.plan.run_files import CONFIG_FILE, STAGES_FILE
from iskd.plan.saved_config import OPTIONAL, literal, no_mappings
from iskd.system.files import expanded
from iskd.system.ranks import one_of_several
from iskd.system.text import one_of, perhaps
from iskd.system.typed_values import read_value, shown, takes
from iskd.system.version import CONF, options

RUN_HOLDS = f"a run's folder (hydra.run.dir) holds {CONFIG_FILE} and, from its first stage on, {STAGES_FILE}"
"""What an error about a folder says."""


_MISSING = "???"
_made: dict[str, str] = {}


def new_folder(path: str) -> str:
    """A folder that nobody else has: made by this call, in one step, with a number behind its name where it was there.

    Hydra's names go by the second. A process gets the same folder for the same path again, and one of several that
    belong together the name itself: they have to be told a folder (`hydra.run.dir`).

    Raises ValueError where none can be made there.
    """
    path = expanded(path)
    if path in _made.values() or (path not in _made and one_of_several(os.environ)):
        return path
    number = 1
    while path not in _made:
        tried = Path(path if number == 1 else f"{path}-{number}")
        try:
            tried.parent.mkdir(parents=True, exist_ok=True)
            tried.mkdir()
            _made[path] = str(tried)
        except FileExistsError as error:
            if not tried.parent.is_dir():
                raise _no_place(path, error) from error
            number += 1
        except OSError as error:
            raise _no_place(path, error) from error
    return _made[path]


def _no_place(path: str, error: OSError) -> ValueError:
    return ValueError(
        f"no folder can be made at {path} ({error.strerror}): set hydra.run.dir=DIR, or of a sweep hydra.sweep.dir=DIR"
    )


def forget_folders() -> None:
    """The next path of `new_folder` is that of another run, although it may have been asked for before."""
    _made.clear()


OmegaConf.register_new_resolver("new_folder", new_folder, use_cache=True, replace=True)
# what an interpolation leads to may begin with ~ as well, and Hydra makes its folders before a config is read
OmegaConf.register_new_resolver("at_home", expanded, replace=True)


def plain(config: Any) -> Any:
    """Containers of a config as dicts and lists, interpolations resolved."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def class_of(config: Any) -> Any:
    """What the `_target_` of a node names. Raises ValueError where it has none."""
    if not OmegaConf.is_dict(config) or config.get("_target_") is None:
        raise ValueError(f"{shown(plain(config))} stands where a part has to be named: give it a _target_")
    return get_object(config["_target_"])


def object_of(config: DictConfig, **runtime: Any) -> Any:
    """Build the object of a node with `_target_`.

    Runtime objects are passed by a call of our own: Hydra would turn dataclasses among its arguments into configs.
    Raises ValueError for a key that the target does not take, and as `class_of`.
    """
    takes = inspect.signature(class_of(config)).parameters
    unknown = [key for key in config if key not in takes and not str(key).startswith("_")]
    if unknown and not any(taken.kind is inspect.Parameter.VAR_KEYWORD for taken in takes.values()):
        keys = [key for key in takes if key not in runtime]
        near = perhaps(str(unknown[0]), keys)
        raise ValueError(f"{config['_target_']} has no key {unknown[0]!r}{near}: {one_of(keys)}")
    return instantiate(config, _partial_=True, _convert_="all")(**runtime)


def spec(config: DictConfig) -> Spec:
    """A part that is stamped once per layer, as data."""
    class_of(config)
    values = plain(config)
    return Spec(values.pop("_target_"), values)


def terms(losses: Mapping[str, Mapping[str, Any]]) -> Terms:
    """Loss and weight by name, from the multi-select group `loss`."""
    built = {}
    for name, values in losses.items():
        kwargs = dict(values)
        weight = kwargs.pop("weight", 1.0)
        class_of(OmegaConf.create(kwargs))
        # called here and not by Hydra, which would tell a ValueError its own way
        built[name] = (instantiate(kwargs, _partial_=True, _convert_="all")(), weight)
    return built


# ---- values as their keys mean them ----------------------------------------------------------------------------------


class _Root(TypedDict, total=False):
    name: str
    seed: NonNegativeInt
    resume: str | None
    plan_only: bool
    export: bool | str | dict[str, Any]
    chunk: PositiveInt | Literal["auto"] | None
    objectives: str | list[str]
    reference: str | None
    cache_dir: str | None


class _Export(TypedDict, total=False):
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    code: Literal["iskd", "bundle"]


class _Logger(TypedDict, total=False):
    project: str
    entity: str | None
    name: str | None
    group: str | None
    job_type: str | None
    notes: str | None
    tags: list[str] | None
    version: int | str | None
    offline: bool | Literal["auto"]
    model: bool
    default_hp_metric: bool


class _Term(TypedDict, total=False):
    weight: NonNegativeFloat


class _Teacher(TypedDict, total=False):
    cache: str | None


class _Chat(TypedDict, total=False):
    loss: Literal["all", "assistant"] | None


class _Source(TypedDict, total=False):
    weight: PositiveFloat


class _Data(TypedDict, total=False):
    sources: dict[str, Any] | None
    path: str | None
    val_path: str | None
    test_path: str | None


class _Schedule(TypedDict, total=False):
    tokens: NonNegativeInt | None


class _Mixer(TypedDict, total=False):
    layers: Any


class _Option(TypedDict, total=False):
    edit: Literal["replace", "remove", "merge", "convert"]


# by name, as a `_target_` is: who reads a folder pays for none of them
_GROUPS: Mapping[str, tuple[Any, ...]] = {
    "data": (_Data, "iskd.data.TextData"),
    "data.chat": (_Chat,),
    "data.sources": (),
    "export": (_Export,),
    "run": ("iskd.plan.options.RunOptions",),
    "schedule": (_Schedule,),
    "teacher": (_Teacher, "iskd.teacher.TeacherCacheSpec"),
    "profile": ("iskd.training.profile.profile_parts",),
    "trainer": ("iskd.plan.trainer_settings.TrainerKeys",),
    "logger": (_Logger,),
}
_IN_STEP = re.compile(r"^schedule\.steps\[\d+\]\.")
_OWN_WORD = ("trainer.", "logger.")
"""They take any key of their library's class, and say themselves which there is not."""
NEEDED = (
    "model",
    "data",
    "edit",
    "block",
    "mixer",
    "importance",
    "schedule",
    "loss",
    "optim",
    "trainer",
    "run",
    "logger",
)
"""Groups of which a run takes one choice, of `loss` one or more."""


def as_meant(config: DictConfig) -> DictConfig:
    """The config, interpolations resolved, each value of the type that its key takes.

    Raises:
        ValueError: a value that is not; it names the key, the value and what would do.
    """
    try:
        values = plain(config)
    except OmegaConfBaseException as error:  # an interpolation that names nothing
        raise ValueError(str(error)) from None
    if values.get("resume") is None:
        refuse_unknown_roots(config)
    literal(values, "this run")  # what one look left to resolve would be resolved at the next
    for group in no_mappings(values):
        takes_keys = group in OPTIONAL and group != "refit"
        fix = "it takes keys" if takes_keys else f"use one of {', '.join(options(group))}"
        raise ValueError(f"{group}={shown(values[group])} is no choice: {fix}")
    if "loss" in config and not values["loss"]:
        raise ValueError(f"loss=[] leaves nothing to learn from: choose one or more of {', '.join(options('loss'))}")
    if isinstance(values.get("data"), dict):
        describe_sources(values["data"], resuming=values.get("resume") is not None)
    scheduled = values.get("schedule")
    steps = isinstance(scheduled, dict) and str(scheduled.get("_target_", "")).endswith(".Mixed")
    if steps:
        steps_as_meant(scheduled)
    _read_node(values, "", (_Root,))
    in_steps = list(enumerate(scheduled["steps"] if steps else ()))
    for number, step in in_steps:
        for group, node in step.items():
            _read_node({group: node}, f"schedule.steps[{number}].", ())
    edits = {"": values.get("edit")} | {f"schedule.steps[{at}].": each.get("edit") for at, each in in_steps}
    for place, edit in edits.items():
        for name, own, kind in _own_mixers(edit):
            _read_node(own, f"{place}edit.mixers.{name}.", (_Mixer, kind))
    budget = values.get("budget")
    for name, option in options_as_meant(budget.get("options") if isinstance(budget, dict) else None).items():
        _read_node(option, f"budget.options.{name}.", _option_kinds(option["edit"]))
    at_home(values)
    final = OmegaConf.create(values)
    assert isinstance(final, DictConfig)
    return final


def _refuse_unknown(place: str, node: Mapping[str, Any], kinds: Sequence[Any]) -> None:
    """A key of a group that no argument of its kinds takes; where one of them takes any, it is for that to say."""
    taken: set[str] = set()
    shown: list[str] = []
    for kind in kinds:
        makes = kind.from_block if hasattr(kind, "from_block") else kind
        arguments = {} if hasattr(kind, "__total__") else inspect.signature(makes).parameters
        keywords = [each for each in arguments.values() if each.kind is inspect.Parameter.VAR_KEYWORD]
        if any(not str(each.annotation).startswith("Unpack[") for each in keywords):
            return
        taken |= {*takes(kind), *arguments}
        needed = [key for key, each in arguments.items() if each.default is inspect.Parameter.empty]
        shown += [key for key in takes(kind) if key not in needed]
    for key, value in node.items():
        nested = isinstance(value, dict) and ("_target_" in value or f"{place}{key}" in _GROUPS)
        if taken and key not in taken and not key.startswith("_") and not nested:
            raise ValueError(f"{place}{key} is no key{perhaps(key, shown)}: {one_of(shown)}")


def _read_node(node: dict[str, Any], place: str, kinds: Sequence[Any]) -> None:
    """Read the values of a mapping and of what lies below it, in place."""
    taken = {key: found for kind in reversed(kinds) for key, found in takes(kind).items()}
    if place and place not in _OWN_WORD:
        _refuse_unknown(place, node, kinds)
    for key, value in node.items():
        name = f"{place}{key}"
        if value == _MISSING:
            raise ValueError(f"{name} has to be given: set {name}=VALUE")
        if isinstance(value, dict) and ("_target_" in value or name in _GROUPS or (not place and key not in taken)):
            _read_node(value, f"{name}.", _kinds(name, value))
        elif key in taken:
            node[key] = read_value(name, value, *taken[key])
    if place == "loss.":
        for term in (each for each in node if not isinstance(node[each], dict)):
            raise ValueError(f"loss.{term}={shown(node[term])} is no loss: it takes keys, e.g. loss.{term}.weight=0.5")


def _own_mixers(edit: Any) -> list[tuple[str, dict[str, Any], Any]]:
    """Keys of `edit.mixers` by mixer, beside whose arguments they become."""
    named = edit.get("mixers") if isinstance(edit, dict) else None
    found = []
    for name, own in named.items() if isinstance(named, dict) else ():
        if isinstance(own, dict) and name in options("mixer"):  # else it is told when they are made
            values = yaml.safe_load((CONF / "mixer" / f"{name}.yaml").read_text(encoding="utf-8"))
            found.append((str(name), own, get_object(values["_target_"])))
    return found


def _option_kinds(edit: Any) -> tuple[Any, ...]:
    """Whose arguments the values of an option of `budget.options` become."""
    if not isinstance(edit, str) or edit not in options("edit"):
        return (_Option,)
    values = yaml.safe_load((CONF / "edit" / f"{edit}.yaml").read_text(encoding="utf-8"))
    return (_Option, get_object(values["_target_"]))


def _kinds(name: str, node: Mapping[str, Any]) -> tuple[Any, ...]:
    """Whose arguments the values of a mapping become."""
    group = _IN_STEP.sub("", name)  # a step has the keys that a run has
    own_keys = _GROUPS.get("logger" if group.startswith("logger.") else group, ())
    named = (get_object(kind) if isinstance(kind, str) else kind for kind in own_keys)
    own = (*named, *((_Term,) if name.startswith("loss.") else ()))
    own = (*own, *((_Source,) if name.startswith("data.sources.") else ()))
    target = node.get("_target_")
    if "_target_" not in node or (name.split(".")[0] == "logger" and isinstance(target, str)):
        return own
    try:
        found = get_object(target) if isinstance(target, str) else None
    except (ImportError, ValueError, AttributeError, HydraException):
        found = None
    if not callable(found):
        raise ValueError(f"{name}._target_={shown(target)} names no class: give its dotted path")
    return (*own, found)
