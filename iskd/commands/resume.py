"""A saved run taken up: which keys may differ, which targets are allowed, which were renamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from iskd.commands.config import plain
from iskd.plan.edits import allowed
from iskd.plan.options import UPKEEP
from iskd.plan.renamed import renamed
from iskd.plan.run_folder import CONFIG_FILE
from iskd.plan.trainer_settings import FREE

_OURS = ("iskd.", "lightning.pytorch.loggers.")
# what may differ when a run is continued: nothing that changes its numbers
_FREE = ("resume", "logger", "trainer.progress", "cache_dir", "hydra", "eval", "objectives", "reference", "profile")
# what a resumed run may change: how its batches lie over processes (`RunState.take_up` says where), and its upkeep
_LAYOUT = ("devices", "num_nodes", "strategy", "accumulate_grad_batches")
_CHANGES = (
    *(f"trainer.{key}" for key in _LAYOUT),
    *(f"run.{key}" for key in sorted(UPKEEP)),
    *(f"trainer.{key}" for key in FREE),
    *("data.batch_size", "schedule.restart_at_edit", "export"),
)


def resumed(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config of a run to continue. Raises ValueError when the command line changes a key of it."""
    run_dir = Path(config.resume)
    saved_file = run_dir / CONFIG_FILE
    if not saved_file.is_file():
        raise ValueError(f"resume={run_dir}: no {CONFIG_FILE} in there, so it is not the folder of a run")
    saved = OmegaConf.create(renamed(OmegaConf.to_container(OmegaConf.load(saved_file))))
    assert isinstance(saved, DictConfig)
    _refuse_foreign(saved, config, saved_file)
    saved.trainer.progress = config.trainer.progress
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key.split(".")[0] in _FREE or key in _FREE:
            continue
        if key == "trainer":  # another preset: its layout counts, its precision must be the same
            for name in _LAYOUT:
                saved.trainer.pop(name, None)
            saved.trainer.update({name: config.trainer[name] for name in _LAYOUT if name in config.trainer})
        if key in _CHANGES:
            OmegaConf.update(saved, key, OmegaConf.select(config, key), force_add=True)
            continue
        before, now = OmegaConf.select(saved, key), OmegaConf.select(config, key)
        if plain(before) != plain(now):
            raise ValueError(
                f"resume continues a run as it was, but {key} is {plain(before)!r} there and {plain(now)!r} here; "
                "drop it, or start a new run"
            )
    if any(override.partition("=")[0].lstrip("+~") in ("experiment", "debug") for override in overrides):
        _refuse_other_preset(saved, config)
    saved.resume = str(run_dir)
    for key in ("logger", "cache_dir", "eval", "objectives"):
        saved[key] = config.get(key)
    return saved


def _refuse_foreign(saved: DictConfig, config: DictConfig, file: Path) -> None:
    """The folder of a run may come from anywhere, and Hydra would import and call whatever its config names.

    Accepted are classes of this package and of packages allowed in code, and what this command line names itself.
    """
    own = set(_targets(plain(config)))
    for target in set(_targets(plain(saved))) - own:
        found = get_object(target) if str(target).startswith((*_OURS, *allowed())) else None
        if not isinstance(found, type) or not f"{found.__module__}.".startswith((*_OURS, *allowed())):
            raise ValueError(
                f"{file} names {target!r:.80}, which is no part of iskd; if you trust it, name it on the command line "
                "too, or call iskd.plan.allow('its.package.')"
            )
    if OmegaConf.select(saved, "model.trust_remote_code") and not OmegaConf.select(config, "model.trust_remote_code"):
        raise ValueError(
            f"{file} would run code that comes with the teacher; if you trust it, add model.trust_remote_code=true"
        )


def _targets(values: Any) -> Iterator[Any]:
    """Every `_target_` in nested containers."""
    if isinstance(values, dict):
        yield from (value for key, value in values.items() if key == "_target_")
    for item in values.values() if isinstance(values, dict) else values if isinstance(values, list) else ():
        yield from _targets(item)


def _refuse_other_preset(saved: DictConfig, config: DictConfig) -> None:
    """A preset is no key of the config: compare what it sets."""
    before, now = _flat(plain(saved)), _flat(plain(config))
    for key in sorted(before.keys() | now.keys()):
        free = key in _FREE or key.split(".")[0] in _FREE or key in _CHANGES
        if not free and before.get(key) != now.get(key):
            raise ValueError(
                f"resume continues a run as it was, but the preset sets {key} to {now.get(key)!r} and it is "
                f"{before.get(key)!r} there; drop the preset, or start a new run"
            )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by dotted key."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {k: v for name, item in values.items() for k, v in _flat(item, f"{prefix}.{name}".lstrip(".")).items()}
