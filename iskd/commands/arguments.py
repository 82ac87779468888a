"""What the command line may say beyond Hydra's overrides, and how an error is told there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from iskd.commands.config import options
from iskd.models.names import refuse_missing_folder
from iskd.plan.run_files import refuse_links

AUTO = "auto"
"""`resume=auto`: continue the run in Hydra's directory if there is one (`iskd.commands.train.resume_folder`)."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SWEEP = re.compile(r"[,()\[\]{}*]")  # several values at once, which Hydra reads


def arguments(argv: Sequence[str]) -> list[str]:
    """Command-line overrides; a resumed run gets its own folder as Hydra's run directory (`auto` stays in Hydra's)."""
    with told():
        argv = [other for argument in argv for other in _named(argument)]
    folders = [argument.partition("=")[2] for argument in argv if argument.startswith("resume=")]
    if not folders or folders[-1] in ("", "null", AUTO):
        return list(argv)
    with told():
        refuse_links(Path(folders[-1]))  # Hydra adds to the log in there, before anything else is looked at
    return [*argv, f"hydra.run.dir={folders[-1]}", "hydra.output_subdir=null"]


def _named(argument: str) -> list[str]:
    """`model=` takes a folder and a hub id too: what they stand for; any other argument as it is."""
    key, _, value = argument.partition("=")
    return (named_model(value) if key == "model" else []) or [argument]


def named_model(name: str) -> list[str]:
    """The overrides that a name stands for: `model=PRESET`, or `model=local` or `model=hub` with the name beside it.

    A preset of conf/model goes before a folder of that name; ./name is the folder. Empty for what is none of the three.

    Raises:
        ValueError: it can only be meant as a folder, and there is none.
    """
    if not name:
        return []
    if name in options("model"):
        return [f"model={name}"]
    quoted = "'" + name.replace("'", "\\'") + "'"  # a folder's name may hold what means something to Hydra
    if Path(name).expanduser().is_dir():
        return ["model=local", f"model.path={quoted}"]
    if _SWEEP.search(name):
        return []
    refuse_missing_folder("model", name)
    return ["model=hub", f"model.name={quoted}"] if _HUB_ID.fullmatch(name) else []


@contextmanager
def told() -> Iterator[None]:
    """What a user can mend is said in a line, without a traceback; the exit code is 2."""
    try:
        yield
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
