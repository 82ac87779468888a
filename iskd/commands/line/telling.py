"""How an error is told: in one sentence, without a traceback, with exit code 2."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from iskd.commands.line.keys import unknown_key
from iskd.system.faults import mendable
from iskd.system.text import perhaps
from iskd.system.version import options

FULL_ERROR = "HYDRA_FULL_ERROR"
"""Hydra's variable: 1 = every error with its traceback, on all commands."""
_UNKNOWN = re.compile(r"Could not (?:load|find) '(\w+)/([^']+)'")
# of conf/hydra and of the packages themselves: what Hydra's plugins bring, and the extra that they come with
_PLUGINS = {"sweeper/optuna": "sweep", "launcher/submitit_slurm": "slurm", "launcher/submitit_local": "slurm"}
_NO_KEY = re.compile(r"Could not override '\+*([\w.]+)'")
# of Hydra's messages: where it looked, how a typo is forced into a config, the same key once more
_NOISE = re.compile(
    r"\n?(Config search path:(.|\n)*|To append to your config.*|\s+(full_key|object_type|reference_type).*)"
)

_OTHER_SHAPE = re.compile(
    r"Error merging override (\S.*?)[;\n\s]+Cannot merge (Dict|List)Config with (?:Dict|List)Config"
)


@contextmanager
def told() -> Iterator[None]:
    """What a user can mend is said in a sentence, without a traceback, unless `FULL_ERROR` asks for it; exit code 2."""
    try:
        yield
    except Exception as error:
        if not mendable(error) or os.environ.get(FULL_ERROR) == "1":
            raise
        print(f"error: {one_sentence(str(error)) or type(error).__name__}", file=sys.stderr)
        sys.exit(2)


def one_sentence(text: str) -> str:
    """A message of several lines as one; a line that ends without a sign is parted from the next by a semicolon."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (
        " ".join(re.sub(r"(?<=\w)$|(?<=['\")\]])$", ";", line) for line in lines[:-1])
        + " " * (len(lines) > 1)
        + (lines[-1] if lines else "")
    )


def in_own_words(said: str, reason: str = "") -> str:
    """What Hydra says, in one sentence: of a name that there is not, what it may have meant and what there is.

    Args:
        said: its message.
        reason: that of OmegaConf, if it was behind it.
    """
    if unknown := _UNKNOWN.search(said):
        group, name = unknown[1], unknown[2]
        if group == "hydra" and (extra := _PLUGINS.get(name)):
            kind, _, plugin = name.partition("/")
            return f"hydra/{kind}={plugin} comes with a package that is not installed here: pip install 'iskd[{extra}]'"
        if known := options(group):
            return f"{group} has no choice {name!r}{perhaps(name, known)}; choose {', '.join(known)}"
    if (key := _NO_KEY.search(said)) and "Multiple values" not in said:
        return unknown_key(key[1])
    if "override_grammar" in said:
        no_value = "missing EQUAL" in said
        return "that is no KEY=VALUE" if no_value else "that cannot be read; quote the value: \"KEY='VALUE'\""
    if (key := _OTHER_SHAPE.search(f"{said} {reason}")) is not None:
        takes, other = ("keys, as in {A: 1}", "list") if key[2] == "Dict" else ("a list, as in [A,B]", "mapping")
        return f"{key[1]} is a {other}, and that key takes {takes}"
    reason = f"\n{reason}" if reason not in said else ""
    return one_sentence(_NOISE.sub("", f"{said.strip()}{reason}"))


@contextmanager
def variable(name: str, value: str | None) -> Iterator[None]:
    """A variable of the environment, or none of that name, inside; as it was afterwards."""
    before = os.environ.get(name)
    _write(name, value)
    try:
        yield
    finally:
        _write(name, before)


def _write(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
