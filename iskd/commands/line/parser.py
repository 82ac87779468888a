"""The command line by argparse: one parser per command, those of Hydra's commands for its options alone."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from iskd.commands.line.commands import COMMANDS
from iskd.commands.line.helping import command_help, top_help
from iskd.system.files import expanded
from iskd.system.text import perhaps
from iskd.system.version import __version__

SHELLS = ("bash", "zsh", "fish")
_HELP = ("-h", "--help")
_VERSION = ("-V", "--version")
_FLAG: dict[str, Any] = {"action": "store_true"}
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
# Hydra's own, which it reads itself: names, and how argparse takes them
_HYDRAS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("-m", "--multirun"), _FLAG),
    (("-r", "--run"), _FLAG),
    (("-c", "--cfg"), {"choices": ("job", "hydra", "all")}),
    (("-p", "--package"), {}),
    (("--resolve",), _FLAG),
    (("-i", "--info"), {"nargs": "?", "const": _INFO[0], "choices": _INFO}),
    (("-cp", "--config-path"), {}),
    (("-cn", "--config-name"), {}),
    (("-cd", "--config-dir"), {}),
    (("-sc", "--shell-completion"), _FLAG),
    (("--experimental-rerun",), {}),
    (("--hydra-help",), _FLAG),
)


@dataclass(frozen=True)
class Asked:
    """What a command line asks for.

    Attributes:
        command: which one.
        words: what follows it; of a command that Hydra reads, the options first: it takes overrides at one place alone.
        values: the same read, of a command that reads folders.
    """

    command: str
    words: list[str]
    values: Any = field(default_factory=argparse.Namespace)


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is a ValueError, which is told as all others are."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"iskd {command}", add_help=False)
        self.known: list[argparse.Action] = []

    def add_argument(self, *names: str, **how: Any) -> argparse.Action:
        """As argparse's; remembered for help, and for options that look like a mistyped one."""
        self.known.append(super().add_argument(*names, **how))
        return self.known[-1]

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}; see {self.prog} --help")

    def read(self, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """As `parse_known_args`, in any order. Raises ValueError for an option that there is not."""
        values, rest = self.parse_known_args(words)
        words = [*rest, *getattr(values, "overrides", ())]  # these may stand behind a --
        if unknown := [word for word in words if word[:1] == "-" and word != "--"]:
            word, known = (
                unknown[0].partition("=")[0],
                [*(name for action in self.known for name in action.option_strings), *_HELP, *_VERSION],
            )
            self.error(f"there is no option {word}{perhaps(word, known)}")
        return values, rest

    def options_first(self, words: Sequence[str]) -> list[str]:
        """The same command line with all options in front of what is none. Raises ValueError as `read`."""
        values, rest = self.read(words)
        options = []
        for action in self.known:
            given = getattr(values, action.dest) if action.option_strings else action.default
            if given != action.default:
                names = action.option_strings
                options.append(names[0] if given is True else f"{names[-1]}={given}")
        return [*options, *values.overrides, *(word for word in rest if word != "--")]


def parse(words: Sequence[str], started_as: str = "") -> Asked:
    """Read a command line; help and the version are printed here, and end the process.

    Args:
        words: without the program's name.
        started_as: the command of a process that a multi-process run starts, which has only what follows it.

    Raises:
        ValueError: no such command, or it takes no such option.
    """
    if words and words[0] == "help":
        words = [*words[1:], _HELP[1]]
    command = started_as if started_as in COMMANDS else ""
    if words and words[0] in COMMANDS:
        command, words = words[0], words[1:]
    if any(word in _VERSION for word in words):
        _print_and_leave(f"iskd {__version__}")
    if not command:
        _without_command(words)
    asks = [word for word in words if word not in _HELP]
    parser = parser_of(command)
    if len(asks) < len(words):
        _print_and_leave(command_help(command, parser.format_usage(), parser.known, asks))
    if COMMANDS[command].composes:
        return Asked(command, parser.options_first(words))
    values, rest = parser.read(dashed(parser, words))
    if rest:
        parser.error(f"{rest[0]!r} is one too many")
    return Asked(command, list(words), values)


def _without_command(words: Sequence[str]) -> NoReturn:
    if not words or words[0] in _HELP:
        _print_and_leave(top_help())
    if words[0][:1] == "-":
        told = perhaps(words[0], (*_HELP, *_VERSION)) or f"; there are {', '.join((*_HELP, *_VERSION))}"
        raise ValueError(f"there is no option {words[0]}{told}")
    told = perhaps(words[0], COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
    told = f" (did you mean iskd train {words[0]}?)" if "=" in words[0] else told
    raise ValueError(f"there is no command {words[0]!r}{told}")


def _print_and_leave(text: str) -> NoReturn:
    print(text)
    sys.exit(0)


def parser_of(command: str) -> _Parser:
    """The parser of a command."""
    parser = _Parser(command)
    if COMMANDS[command].composes:
        parser.add_argument("overrides", nargs="*", metavar="GROUP=CHOICE|KEY=VALUE")
        for names, how in _HYDRAS:
            parser.add_argument(*names, **how, help=argparse.SUPPRESS)
    elif command == "report":
        parser.add_argument("folder", nargs="+", type=as_folder, help="of a run, or one that holds runs")
    elif command == "curve":
        parser.add_argument("out", type=as_folder, metavar="OUT.png", help="the picture to write")
        parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN_DIR", help="a run, and what the legend calls it")
    elif command == "verify":
        parser.add_argument("folder", nargs="+", type=as_folder, help="of a run or of an export")
        parser.add_argument(
            "--reference", metavar="DIR", type=as_folder, help="compare with the student in this folder instead"
        )
        parser.add_argument("--no-timing", action="store_true", help="leave prefill and decode unmeasured")
    elif command == "generate":
        parser.add_argument("folder", type=as_folder, help="of a run or of an export")
        parser.add_argument("prompt", nargs="?", help="text to continue")
        parser.add_argument(
            "--teacher", metavar="MODEL", help="folder or name; default: that of the run which holds the folder"
        )
        parser.add_argument("--tokens", metavar="N", type=int, default=64, help="new tokens at most (64)")
        parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 = greedy")
        parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the drawing above temperature 0")
        parser.add_argument("--device", metavar="DEVICE", default="auto", help="auto, cpu or cuda")
        parser.add_argument(
            "--bos",
            choices=("document", "window", "none", "bare"),
            metavar="WHERE",
            help="document, window, none or bare, as data.bos; default: what the tokenizer puts before a text",
        )
    elif command == "push":
        parser.add_argument("folder", type=as_folder, help="of a run or of an export")
        parser.add_argument("repo", metavar="OWNER/NAME", help="where to; made where it is not there yet")
        parser.add_argument("--dry-run", action="store_true", help="list what would go up, check it, and send nothing")
        parser.add_argument("--private", action="store_true", help="make a place that nobody else sees")
        parser.add_argument(
            "--include",
            metavar="FILE",
            action="append",
            default=[],
            help="of the folder, which goes up too; repeatable",
        )
        parser.add_argument("--revision", metavar="BRANCH", help="instead of main")
        parser.add_argument("--message", metavar="TEXT", default="", help="of the commit")
    else:
        parser.add_argument("shell", choices=SHELLS, help="bash, zsh or fish")
        parser.add_argument("--complete", metavar="LINE", help=argparse.SUPPRESS)
    return parser


def as_folder(given: str) -> Path:
    """A path among the arguments of a command that reads no overrides."""
    return Path(expanded(given))


def dashed(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Words of which a folder whose name begins with - is no option, unless the parser has one of that name."""
    options = parser.format_help().replace(",", " ").split()
    return [f"./{word}" if word[:1] == "-" and word not in options and os.path.isdir(word) else word for word in words]
