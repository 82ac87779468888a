"""A saved run taken up: which keys may differ, which targets are allowed, which were renamed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from iskd.commands.build.tokens import settled_as
from iskd.commands.values import as_meant, at_home, plain
from iskd.commands.values.asked import with_export_keys
from iskd.commands.values.unread import refuse_unread_keys
from iskd.data.hub_rows import is_commit
from iskd.plan.edits import allowed
from iskd.plan.options import UPKEEP
from iskd.plan.run_files import CONFIG_FILE
from iskd.plan.saved_config import literal, no_mappings, read_config
from iskd.plan.trainer_settings import FREE
from iskd.system import Json
from iskd.system.files import expanded
from iskd.system.text import argument
from iskd.system.typed_values import takes
from iskd.system.version import CONF, options

_log = logging.getLogger(__name__)

# what a command line that continues a run may say anew as a whole; what it does not name stays as it was
_OWN = ("logger", "cache_dir", "eval", "objectives")
_PLAIN = (str, int, float, bool)
# what may differ when a run is continued: nothing that changes its numbers
_FREE = (*_OWN, "resume", "trainer.progress", "hydra", "reference", "profile")
# what a resumed run may change: how its batches lie over processes (`RunState.take_up` says where), and its upkeep
_LAYOUT = ("devices", "num_nodes", "strategy", "accumulate_grad_batches")
_CHANGES = (
    *(f"trainer.{key}" for key in _LAYOUT),
    *(f"run.{key}" for key in sorted(UPKEEP)),
    *(f"trainer.{key}" for key in FREE),
    *("data.batch_size", "schedule.restart_at_edit", "export", "export.dtype", "export.code"),
)


def resumed(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config of a run to continue, all values resolved.

    Raises ValueError when the command line changes a key of it, when it asks for what its folder may not ask for, or
    when its file holds something else than a config.
    """
    refuse_unread_keys(config, ("eval", "logger"))  # named here, they would take the place of the run's own
    asked, config = OmegaConf.to_container(config, resolve=False), as_meant(config)
    assert isinstance(asked, dict)
    run_dir = Path(config.resume)
    saved_file = run_dir / CONFIG_FILE
    if not saved_file.is_file():
        raise ValueError(f"{argument('resume', run_dir)}: no {CONFIG_FILE} in there, so it is not the folder of a run")
    found = read_config(saved_file)
    for group in no_mappings(found):
        raise ValueError(
            f"{saved_file}: {group} must hold keys and values, got {found[group]!r:.80}: restore the file from a copy"
        )
    at_home(found)
    saved = OmegaConf.create(found)
    if OmegaConf.is_dict(saved.get("schedule")) and OmegaConf.is_dict(config.get("schedule")):
        settled_as(config, saved)
    keys = [override.partition("=")[0].lstrip("+~") for override in overrides]
    own = [key for key in _OWN if not _kept(key, found, config, keys)]
    for key in own:
        saved[key] = asked.get(key)  # as it was written: names in it are those of the run
    _refuse_foreign(plain(saved), plain(config), saved_file, own)
    if "trainer" in saved and ("trainer.progress" in keys or "progress" not in saved.trainer):
        saved.trainer.progress = config.trainer.progress  # that a trainer is needed is said where the run is made
    changed: dict[str, tuple[Any, Any]] = {}
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key.split(".")[0] in _FREE or key in _FREE:
            continue
        if key == "trainer":  # another preset: its layout counts, its precision must be the same
            for name in _LAYOUT:
                saved.trainer.pop(name, None)
            saved.trainer.update({name: config.trainer[name] for name in _LAYOUT if name in config.trainer})
        if key.split(".")[0] == "export":  # a truth value in the place of a mapping, or the other way round
            if with_export_keys(override) != "export={}" or not OmegaConf.is_config(saved.get("export")):
                saved.export = config.export
            continue
        if key in _CHANGES:
            OmegaConf.update(saved, key, OmegaConf.select(config, key), force_add=True)
            continue
        before, now = (_flat(_part(_whole(plain(values)), key), key) for values in (saved, config))
        # naming a part says nothing of keys that its version lacked: it goes on with what the code did without them
        unsaid = set[str]() if "." in key else _lacking(_part(plain(saved), key), _part(plain(config), key), key)
        changed |= _differences(before, now, unsaid)
    if any(override.partition("=")[0].lstrip("+~") in ("experiment", "debug") for override in overrides):
        # a preset is no key: what it sets
        before, now = (_flat(_whole(plain(values))) for values in (saved, config))
        changed |= _differences(before, now, _lacking(plain(saved), plain(config), ""))
    if changed:
        listed = ", ".join(f"{key}: {before!r} -> {now!r}" for key, (before, now) in sorted(changed.items()))
        raise ValueError(
            f"{argument('resume', run_dir)} continues the run as it was, but the command line changes {listed}; drop "
            "that, or start a new run"
        )
    if "data" in saved and "bos" not in saved.data:  # before there was the key, this is what was done
        saved.data.bos = "none"
    saved.resume = str(run_dir)
    # what the command line brought in is resolved once, here: nothing can change after the second look
    values = literal(plain(saved), f"resume={run_dir}")
    _refuse_foreign(values, plain(config), saved_file, own)
    final = OmegaConf.create(values)
    assert isinstance(final, DictConfig)
    return final


def _kept(key: str, saved: Json, asked: DictConfig, named: Sequence[str]) -> bool:
    """Whether a run goes on with what it was started with for a key of `_OWN`, as this command line does not name it.

    The folder may come from anywhere: of loggers those of conf/logger are kept, of folders those that are there.
    """
    if key not in saved or any(name.split(".")[0].partition("@")[0] == key for name in named):
        return False
    if key == "eval":
        return True
    if key == "cache_dir":
        place = saved[key]
        return not asked.get(key) and isinstance(place, str) and Path(expanded(place)).is_dir()
    if key != "logger" or not saved[key]:
        return False
    if _ours(saved[key]):
        return True
    _log.warning("the run was logged by what is not of conf/logger and is not taken up again; name it: logger=...")
    return False


def _ours(loggers: Any) -> bool:
    """Whether loggers of a saved config are those of conf/logger, one or a main one with others below it."""
    files = [read_config(CONF / "logger" / f"{name}.yaml") for name in options("logger")]
    known = {each["_target_"]: each.keys() for each in files if "_target_" in each}
    if not isinstance(loggers, dict):
        return False
    others = [each for each in loggers.values() if isinstance(each, dict)]
    main = {name: each for name, each in loggers.items() if not isinstance(each, dict)}
    return all(
        isinstance(target := each.get("_target_"), str)
        and each.keys() <= known.get(target, set())
        and not list(_targets(each))
        for each in ([main] if main else []) + others
    )


def _refuse_foreign(saved: Json, config: Json, file: Path, asked: Sequence[str]) -> None:
    """The folder of a run may come from anywhere, and Hydra would import and call whatever its config names.

    Accepted are classes of this package and of packages allowed in code, and what this command line names itself, at
    the same place; the run's own loggers were looked at before (`_kept`). No list of Hydra's is relied on.

    Args:
        saved: the config that is continued.
        config: of this command line.
        file: whose config it is.
        asked: keys of `saved` that are those of the command line.
    """
    own = set(_targets(config))
    own |= {(key, target) for key, target in _targets(saved) if key == "logger" and key not in asked}
    for key, target in set(_targets(saved)) - own:
        found = _found(target) if str(target).startswith(("iskd.", *allowed())) else None
        if not isinstance(found, type) or not f"{found.__module__}.".startswith(("iskd.", *allowed())):
            raise ValueError(
                f"{file} names {target!r:.80} for {key}, which is no part of iskd; if you trust it, name it on the "
                "command line too, or call iskd.plan.allow('its.package.')"
            )
    if _trusts(saved) and not _trusts(config):
        raise ValueError(
            f"{file} would run code that comes with the teacher; if you trust it, add model.trust_remote_code=true"
        )
    tasks = None if "eval" in asked else _part(saved, "eval.task_dir")
    if tasks is not None:  # yaml of the harness names functions of files beside it
        raise ValueError(
            f"{file} asks the tasks in eval.task_dir={tasks!s:.80}, which may hold code; if you trust it, name all of "
            "eval on the command line too, as the run was started with it"
        )


def _targets(config: Json) -> Iterator[tuple[str, Any]]:
    """Every `_target_` of a config, behind the key at its root below which it stands."""
    for key, node in config.items():
        level = [node]
        while level:
            value = level.pop()
            if isinstance(value, dict) and "_target_" in value:
                yield key, value["_target_"]
            level += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _found(target: str) -> Any:
    """What a dotted path names, None where there is no such thing."""
    try:
        return get_object(target)
    except (ImportError, ValueError):
        return None


def _trusts(config: Json) -> bool:
    """Whether code that comes with the teacher may run."""
    model = config.get("model")
    return isinstance(model, dict) and bool(model.get("trust_remote_code"))


def _differences(before: Json, now: Json, unsaid: AbstractSet[str]) -> dict[str, tuple[Any, Any]]:
    """Old and new value of the leaves that differ and may not; a key that a version lacked is null in another.

    `unsaid`: keys that nobody has set, or mappings of such.
    """
    keys = [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]
    keys = [key for key in keys if not any(key == name or key.startswith(f"{name}.") for name in unsaid)]
    bound = [key for key in keys if not {key, key.split(".")[0]} & {*_FREE} and key not in _CHANGES]
    # the commit that a branch of the hub was at when the run began is kept, whoever asks for the branch again
    moved = {key for key in bound if key.startswith("data.") and key.endswith(".revision")}
    bound = [key for key in bound if key not in moved or is_commit(now.get(key))]
    return {key: (before.get(key), now.get(key)) for key in bound}


def _whole(values: Any) -> Any:
    """Values, and in those of parts the keys that their version lacked: what the code does where nobody says."""
    if not isinstance(values, dict):
        return values
    made = _found(values["_target_"]) if isinstance(values.get("_target_"), str) else None
    usual = {key: default for key, (_, default) in takes(made).items()} if isinstance(made, type) else {}
    lacking = {key: each for key, each in usual.items() if key not in values and isinstance(each, _PLAIN)}
    return {**{key: _whole(value) for key, value in values.items()}, **lacking}


def _lacking(saved: Any, now: Any, prefix: str) -> set[str]:
    """Dotted keys that a part of a saved config has not, where the same part has them now."""
    if not (isinstance(saved, dict) and isinstance(now, dict)):
        return set()
    same = "_target_" in saved and saved["_target_"] == now.get("_target_")
    found = {f"{prefix}.{key}".lstrip(".") for key in now.keys() - saved.keys()} if same else set()
    return found.union(*(_lacking(saved[key], now[key], f"{prefix}.{key}".lstrip(".")) for key in saved.keys() & now))


def _part(values: Json, key: str) -> Any:
    """What stands at a dotted key; None where nothing does."""
    found: Any = values
    for name in key.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by dotted key."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {k: v for name, item in values.items() for k, v in _flat(item, f"{prefix}.{name}".lstrip(".")).items()}
