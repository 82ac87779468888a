"""A run configuration composed in Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from iskd.commands import build
from iskd.commands.arguments import literal_paths, sentence
from iskd.commands.line.steps import restarts_at_edit
from iskd.commands.resume import resumed
from iskd.commands.values import plain
from iskd.commands.values.asked import as_asked
from iskd.commands.values.config import forget_folders, new_folder
from iskd.commands.values.unread import refuse_unknown_of_hydra
from iskd.data import Source
from iskd.system.version import CONF
from iskd.teacher import Loaded
from iskd.training import Parts


def compose_config(overrides: Sequence[str], run_dir: Path | None = None) -> tuple[DictConfig, Path]:
    """The config that `python train.py OVERRIDES` would compose, and the run directory: Hydra's where none is given.

    Raises:
        ValueError: an override names a group, an option or a key that does not exist, or cannot be read.
    """
    overrides = literal_paths(overrides)
    with _alone(), initialize_config_dir(str(CONF), job_name="iskd", version_base="1.3"):
        try:
            config = compose("config", overrides=list(overrides), return_hydra_config=True)
            HydraConfig.instance().set_config(config)  # what `${hydra:...}` reads
            forget_folders()  # another run of this process, perhaps in the same second
            name, folder = str(config.name), run_dir or Path(new_folder(str(config.hydra.run.dir)))
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(f"overrides {list(overrides)}: {sentence(error)}") from error
    refuse_unknown_of_hydra(config, config.hydra)
    with open_dict(config):
        config.name = name
        del config["hydra"]
    as_asked(config, overrides)
    return config, folder


def parts(
    overrides: Sequence[str],
    run_dir: Path | None = None,
    *,
    teacher: Loaded | None = None,
    source: Source | None = None,
    resume: bool = False,
) -> Parts:
    """All objects of a run.

    Args:
        overrides: as on the command line of `train.py`.
        run_dir: None takes Hydra's, with a number behind it when that exists.
        teacher: in the place of what `model` names.
        source: in the place of where `data` reads.
        resume: continue the run in `run_dir`.

    Raises:
        ValueError: the config cannot be composed, or a part refuses its values.
    """
    config, folder = compose_config(overrides, run_dir)
    try:
        if resume:
            config.resume = str(folder)
            config = resumed(config, overrides)
        if restarts_at_edit(plain(config.schedule)):
            raise ValueError(
                "schedule.restart_at_edit=true replaces the process at every edit, and with it whatever else lives in "
                "it; leave it out here, or use train.py"
            )
        return build.parts(config, folder, teacher=teacher, source=source)
    except BaseException:
        for empty in (folder, folder.parent) if run_dir is None else ():
            with suppress(OSError):  # it was made for this run, and has something in it
                empty.rmdir()
        raise


@contextmanager
def _alone() -> Iterator[None]:
    """Hydra's two singletons are empty inside and as they were afterwards: the caller may be a Hydra application."""
    found = HydraConfig.instance().cfg
    hydra = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        HydraConfig.instance().cfg = found
        GlobalHydra.instance().hydra = hydra
