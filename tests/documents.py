"""Code blocks of README.md and docs/, and the commands in them.

A comment above a code block says what is done with it:

    <!-- test: fast ARGS -->     run in the fast tests, ARGS appended to every command
    <!-- test: slow ARGS -->     run by `make test-slow`
    <!-- test: skip REASON -->   not run

WORD::ARG among ARGS is for the commands that hold WORD alone. In python blocks ARGS are keyword arguments that take the
place of what is written there: `tokens=1_024`. Commands are those of iskd, Python and make; of a make target the
lines count that call iskd. RUN_DIR stands for a finished run, DIR for a model directory, TASK_DIR for a folder of
tasks, my.txt for text.
"""

from __future__ import annotations

import functools
import itertools
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = {"bash": "shell", "python": "python", "text": "", "yaml": "", "html": ""}
COMMENT = re.compile(r"<!-- test: (fast|slow|skip)\b ?(.*?) -->")
FIRST_WORDS = re.compile(r"(?:[A-Z]+=\S+ )?(?:python |iskd \w|make |pip |experiments/\S+\.sh|wandb |tensorboard )")
_OURS = re.compile(r"python (?:train\.py|-m iskd )")


@dataclass(frozen=True)
class Block:
    """One code block: where, in which language, what the comment above it says."""

    file: Path
    line: int
    language: str
    text: str
    fenced: bool
    how: str = ""
    rest: str = ""

    @property
    def place(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """Words of every command of a shell block, `&&` split, continued lines joined, variables dropped."""
        if self.language != "shell":
            return []
        lines = self.text.replace("\\\n", " ").splitlines()
        found = [shlex.split(line, comments=True) for line in lines if FIRST_WORDS.match(line.strip())]
        split = [piece for words in found for piece in _split(words)]
        return [list(itertools.dropwhile(lambda word: re.match(r"[A-Z]+=", word), words)) for words in split]

    def extra(self, words: list[str]) -> list[str]:
        """What the comment appends to a command; nothing to a block that is not run."""
        given = [word.rpartition("::") for word in shlex.split(self.rest)] if self.how in ("fast", "slow") else []
        return [argument for word, found, argument in given if not found or word in words]


@functools.cache
def calls_of(target: str) -> list[list[str]]:
    """Our own commands behind a make target, as `make --dry-run` prints them; downloads are not among them."""
    command = ["make", "--dry-run", "--no-print-directory", target, "ISKD_PYTHON=python", "ARGS="]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    lines = text.replace("\\\n", " ").splitlines()
    found = [shlex.split(line) for line in lines if _OURS.match(line)]
    return [["iskd", *words[3:]] if words[1] == "-m" else words for words in found]


def _split(words: list[str]) -> list[list[str]]:
    groups = itertools.groupby(words, lambda word: word == "&&")
    return [list(group) for joined, group in groups if not joined]


def blocks_of(file: Path) -> list[Block]:
    """Fenced and indented code blocks with the comment on the last line that is not blank before them."""
    lines = file.read_text(encoding="utf-8").splitlines()
    found, above, at = [], "", 0
    while at < len(lines):
        start, line = at, lines[at]
        fence = re.match(r"```(\w*)\s*$", line)
        indented = line.startswith("    ") and (at == 0 or not lines[at - 1].strip())
        if fence or indented:
            at += 1
            while at < len(lines) and (not lines[at].startswith("```") if fence else lines[at].startswith("    ")):
                at += 1
            body = lines[start + 1 : at] if fence else [text[4:] for text in lines[start:at]]
            comment = COMMENT.search(above)
            how, rest = comment.groups() if comment else ("", "")
            language = LANGUAGES[fence.group(1)] if fence else _language(body)
            found.append(Block(file, start + 1, language, "\n".join(body), bool(fence), how, rest))
            at += bool(fence)
            above = ""
            continue
        above = line if line.strip() else above
        at += 1
    return found


def _language(body: list[str]) -> str:
    """Of an indented block, which cannot say it."""
    if any(line.startswith(("import ", "from ")) for line in body):
        return "python"
    return "shell" if any(FIRST_WORDS.match(line) for line in body) else ""
