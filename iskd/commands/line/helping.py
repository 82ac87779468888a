"""Help: the commands with a line each; a command with its choices and main keys, a line each from conf/ itself."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from iskd.commands.line.commands import COMMANDS, Command
from iskd.commands.line.keys import Key, about, choices, keys_of, known, root_keys, unknown_key
from iskd.system.text import perhaps
from iskd.system.version import options

_OPTIONS = (
    ("-m, --multirun", "a run for every combination of values that commas part (docs/tutorials/sweeps.md)"),
    ("--cfg job", "print the config that this command line composes, and stop; --resolve with all values filled in"),
    ("-cd DIR", "look for choices in a folder of your own too: DIR/GROUP/NAME.yaml is GROUP=NAME"),
    ("--hydra-help", "everything else of the library that reads these arguments"),
)
_FIRST = 24  # columns of what a line is about


def top_help() -> str:
    """All commands."""
    lines = ["usage: iskd COMMAND ...", "", "Compress causal language models while they train.", "", "commands:"]
    lines += _rows((name, command.what) for name, command in COMMANDS.items())
    lines += [
        "",
        "options:",
        *_rows([("-h, --help", "this; iskd COMMAND --help says what it takes"), ("--version", "")]),
    ]
    return "\n".join([*lines, "", "An error is one sentence; HYDRA_FULL_ERROR=1 shows where it came from."])


def command_help(name: str, usage: str, arguments: Sequence[argparse.Action], asked: Sequence[str] = ()) -> str:
    """What a command does and takes; of groups and choices that are `asked` (`schedule`, `schedule=align`) all keys.

    Raises ValueError for one that there is not.
    """
    command = COMMANDS[name]
    if command.composes and (wanted := [word.partition("=")[::2] for word in asked if word[:1] not in ("-", "+", "~")]):
        return "\n\n".join(_of_group(group, option) for group, option in wanted)
    head = [f"usage: iskd {name} [GROUP=CHOICE ...] [KEY=VALUE ...] [-m]"] if command.composes else []
    head = head or [usage.rstrip()]
    text = f"{command.what[0].upper()}{command.what[1:]}. {command.more}".rstrip()
    lines = [*head, "", *textwrap.wrap(text, _width()), ""]
    lines += _composed(name, command) if command.composes else _listed(arguments)
    return "\n".join([*lines, "", "examples:", *(f"  {example}" for example in command.examples)])


def _composed(name: str, command: Command) -> list[str]:
    """Groups, keys and options of a command that composes a config."""
    lines = ["groups, with the choice where nothing is said:"]
    for group in command.groups:
        chosen = command.chosen.get(group, choices()[group].value)
        others = ", ".join(option for option in options(group) if option != chosen)
        lines += _rows([(f"{group}={chosen}", choices()[group].about + (f" ({others})" if others else ""))])
    head = f"keys, with their values; all choices and keys of a group: iskd {name} --help GROUP, or GROUP=CHOICE"
    lines += ["", *textwrap.wrap(head, _width())]
    lines += _rows(_told(main_key(key, command.chosen)) for key in command.keys)
    return [*lines, "", "options:", *_rows(_OPTIONS)]


def main_key(name: str, chosen: Mapping[str, str] = MappingProxyType({})) -> Key:
    """A key as the choice of its group has it, else as any choice does. Raises ValueError where none has it."""
    group = name.split(".")[0]
    default = chosen.get(group, choices()[group].value) if group in choices() else ""
    found = {**known(group), **(keys_of(group, default) if default else {}), **root_keys()}.get(name)
    if found is None:
        raise ValueError(unknown_key(name))
    return found


def _of_group(group: str, option: str) -> str:
    """The choices of a group, or all keys of one choice."""
    if "." in group and group.split(".")[0] in choices():
        return "\n".join(_rows([_told(main_key(group))]))
    if group not in choices():
        keys = [key for name, key in root_keys().items() if group in (name, name.split(".")[0])]
        if not keys:
            raise ValueError(unknown_key(group))
        return "\n".join(_rows(map(_told, keys)))
    if option and option not in options(group):
        near = perhaps(option, options(group))
        raise ValueError(f"{group} has no choice {option!r}{near}; choose {', '.join(options(group))}")
    if not option:
        key = choices()[group]
        head = f"{group}: {key.about}" if key.about else group
        return "\n".join([head, *_rows((name, about(group, name)) for name in options(group))])
    head = f"{group}={option}: {about(group, option)}"
    told = [_told(key) for key in keys_of(group, option).values() if key.value or key.about]
    return "\n".join([*textwrap.wrap(head, _width()), *_rows(told)])


def _told(key: Key) -> tuple[str, str]:
    return f"{key.name}={key.value}", key.about


def _listed(arguments: Sequence[argparse.Action]) -> list[str]:
    """Arguments of a command that reads folders."""
    shown = [action for action in arguments if action.help != argparse.SUPPRESS]
    return _rows(
        (" ".join(action.option_strings) or str(action.metavar or action.dest), action.help) for action in shown
    )


def _rows(rows: Iterable[tuple[str, str | None]]) -> list[str]:
    """Two columns, the second wrapped in what is left of the terminal."""
    lines = []
    for name, text in rows:
        told = textwrap.wrap(text or "", max(20, _width() - _FIRST - 4)) or [""]
        if len(name) > _FIRST:
            lines.append(f"  {name}")
            name = ""
            told = told if any(told) else []
        for part in told:
            lines.append(f"  {name:<{_FIRST}}  {part}".rstrip())
            name = ""
    return lines


def _width() -> int:
    """Columns of the terminal; `COLUMNS` decides where it is set."""
    return min(120, shutil.get_terminal_size((100, 24)).columns)
