"""The schedule of a config, its edits, and the importance that chooses layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from iskd.commands.line.steps import GROUPS, SHARED
from iskd.commands.values import class_of, object_of, plain, spec
from iskd.data import framing_of
from iskd.plan import Spec
from iskd.schedules import ConvertTo, EditKind, Schedule
from iskd.schedules.edits import EVERY
from iskd.schedules.mixed import Mixed, Step
from iskd.system.version import CONF, options


def schedule_of(config: DictConfig, *, scored: bool = True) -> Schedule:
    """The schedule, with what its class takes beside its keys: the edit of a layer and the run's seed.

    Its steps have the importances that they name, but where nothing is going to be `scored`.
    """
    takes = getattr(class_of(config.schedule), "takes", ("edit", "seed"))
    values: dict[str, Any] = {"edit": edit_of(config), "seed": config.seed} if takes else {}
    if "parts" in takes:
        steps = config.schedule.steps or ()  # by a call of our own: Hydra would make objects of the parts in them
        made = [_step(number, step, config, scored) for number, step in enumerate(steps)]
        written = plain(config.schedule)
        shared = {key: written.get(key) for key in SHARED}
        return Mixed(made, written["steps"] or (), written["tokens"], **shared)
    schedule: Schedule = object_of(config.schedule, **{name: values[name] for name in takes})
    if getattr(schedule, "local_share", 0) and not config.get("refit"):
        raise ValueError(
            f"schedule.local_share={config.schedule.local_share} is for refits of the conversions, and there are none: "
            "set refit=[calibrate,output,local], or schedule.local_share=0"
        )
    return schedule


def _step(number: int, step: DictConfig, config: DictConfig, scored: bool) -> Step:
    """A step of `schedule=mixed`, whose parts `steps_as_meant` has named; others are the run's."""
    values, groups = plain(config), (*GROUPS, "schedule")
    own = OmegaConf.create({**values, **{group: plain(step[group]) for group in step if group in groups}})
    try:
        refits = [object_of(own.refit[name]) for name in own.get("refit") or ()]
        return Step(schedule_of(own), importance_of(own) if scored and "importance" in step else None, refits)
    except ValueError as error:
        error.args = (f"schedule.steps[{number}]: {error}", *error.args[1:])  # of whatever class it is
        raise


def edit_of(config: DictConfig) -> EditKind:
    """What is done to a layer, with the block or mixer that its class takes as data."""
    takes = getattr(class_of(config.edit), "takes", ())
    values: dict[str, Any] = {group: spec(config[group]) for group in takes}
    if config.edit.get("mixers") is not None:
        values["mixers"] = _mixers(plain(config.edit.mixers))
    edit: EditKind = object_of(config.edit, **values)
    return edit


def _mixers(named: Any) -> dict[str, tuple[Spec, Any]]:
    """Mixers of conf/mixer by name, each with the layers that get it.

    A value is the layers, or a mapping of them (`layers`) and of keys of the mixer that are not as in its file.
    """
    if not isinstance(named, dict):
        raise ValueError(f"edit.mixers={named}: give mixers by name with their layers, as in {{mlstm: odd}}")
    found = {}
    for name, value in named.items():
        if name not in (known := options("mixer")):
            raise ValueError(f"edit.mixers has no mixer {name!r}: choose among {', '.join(known)}")
        keys = dict(value) if isinstance(value, dict) else {"layers": value}
        layers = keys.pop("layers", None)
        if not isinstance(layers, str | list):
            raise ValueError(f"edit.mixers={{{name}: {value}}}: say which layers, as a list or as {' or '.join(EVERY)}")
        config = OmegaConf.load(CONF / "mixer" / f"{name}.yaml")
        known = [str(key) for key in config if not str(key).startswith("_")]
        if unknown := [key for key in keys if key not in known]:
            raise ValueError(f"edit.mixers: {name} has no key {unknown[0]!r}; it has {', '.join(known)}")
        found[name] = spec(OmegaConf.merge(config, keys)), layers  # type: ignore[arg-type]
    return found


def read_with(tokenizer: Any, importances: Iterable[Any], bos: str | None) -> None:
    """Give the run's tokenizer to importances that read texts and were given none of their own.

    Those that make windows of their own are told what stands at the head of every one (`data.bos`).
    """
    for importance in importances:
        if hasattr(importance, "begin"):
            importance.begin = framing_of(tokenizer, bos).window
        if getattr(importance, "tokenizer", tokenizer) is None:
            importance.tokenizer = tokenizer


def importance_of(config: DictConfig) -> Any:
    """The importance, with what its class takes beside its keys."""
    takes = getattr(class_of(config.importance), "takes", ())
    values: dict[str, Any] = {"bos": config.data.get("bos"), "seed": config.seed}
    if "convert" in takes:
        # scores of a teacher alone are asked for without a word about what is done to layers
        values["convert"] = edit_of(config) if class_of(config.edit) is ConvertTo else ConvertTo(spec(config.mixer))
    return object_of(config.importance, **{name: values[name] for name in takes})
