"""Hostile files against every path that reads one, in a process that notices what it must not do.

    python -m tests.fuzz --cases 10000 --seed 0

Each case is a valid document that was changed: values of other types and sizes, keys gone, doubled or foreign, paths
that climb out, bytes flipped, lengths that lie. A reader must take it or refuse it with ValueError or OSError. Every
other exception fails, as do five seconds of work, a minute of waiting, two more GiB of memory, and whatever the audit
hook sees: code made or imported, a process or a socket, a file changed outside of the run directory. A case depends on
the seed, its kind and its number alone; `--kind state --first 17 --cases 1` runs one again.
"""

from __future__ import annotations

import argparse
import codecs
import copy
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Of work, of work and waiting together (other programs want the machine too), bytes, and characters of a document.
SECONDS, PATIENCE, MORE_MEMORY, LARGEST = 5.0, 60.0, 2 << 30, 1 << 18
# Written into a document, these stand for text that json.dumps does not write.
TEXTS = {"@deep": "[" * 100_000, "@nested": '{"a":' * 60 + "1" + "}" * 60, "@long": "9" * 5_000, "@inf": "1e999"}
NUMBERS = (0, 1, -1, 2, 0.5, -0.0, 1e308, 10**6, 10**9, 10**12, 2**31, 2**63, -(2**63) - 1, 10**400)
NASTY: tuple[Any, ...] = (
    *NUMBERS,
    *(None, True, False, float("nan"), float("inf"), "@inf", "@deep", "@nested", "@long"),
    *("", "0", "NaN", "O", "|O", "<u8", "<u4", "F64", "C64", "BOOL", "U8", "\ud800", "\0", "x" * 20_000, "__class__"),
    *("../../x", "/etc/passwd", "~/.ssh/id", "file:///etc/passwd", "(a+)+$", "(.|.)" * 40, "all", "\u0663"),
    *("os.system", "builtins.exec", "subprocess.Popen", "iskd.blocks.slim.torch.hub.load", "iskd.blocks.ridge.Ridge"),
    *("iskd.blocks.slim.cut", "iskd.blocks.bottleneck.Bottleneck", "__import__('os').system('touch owned')"),
    *(
        [],
        {},
        [[]],
        {"": {}},
        [None],
        {"a": 1},
        {"op": "remove", "layer": 1},
        {"layers": 10**6},
        [[0] * 50 for _ in range(50)],
    ),
)
# Python imports a codec where it is first used. These are what json.loads takes bytes for.
OF_JSON = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a document with every key or index in it."""
    found, level = [], [value]
    while level:
        item = level.pop()
        if isinstance(item, (dict, list)):
            keys = list(item) if isinstance(item, dict) else list(range(len(item)))
            found += [(item, key) for key in keys]
            level += [item[key] for key in keys]
    return found


def large(document: Any) -> bool:
    """Whether a document has more than `LARGEST` characters and values: repeated once more it might fill the memory."""
    found = places(document)
    return len(found) + sum(len(item[key]) for item, key in found if isinstance(item[key], str)) > LARGEST


def turned(rng: random.Random, value: Any) -> Any:
    """A value that is close to `value` and wrong."""
    if isinstance(value, (int, float)):
        return rng.choice(
            (
                value + 1,
                -value,
                value * 10**9,
                value // 3,
                str(value),
                bool(value),
                [value],
                value + 0.5 if abs(value) < 1e9 else 0.0,
            )
        )
    if isinstance(value, str):
        return rng.choice(
            (f"../{value}", f"/{value}", value * 30, value.upper(), value[:-1], f"{value}.x", value + "\0")
        )
    if isinstance(value, list):
        # none of them twice in it: a later change to one would be one to all, and the whole in each of its own parts
        again = [copy.deepcopy(item) for item in rng.choice((value * 39, value[:1]))]
        return rng.choice((value + again, value[::-1], value[1:], [value], dict(enumerate(value))))
    if isinstance(value, dict):
        return rng.choice((list(value.values()), {**value, "code": "x"}, {"a": value}, {}, [value], list(value)))
    return rng.choice(NASTY)


def changed(rng: random.Random, document: Any) -> bytes:
    """The JSON text of a document with one to four changes."""
    document = {"root": copy.deepcopy(document)}
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if large(document):
            break
        container, key = rng.choice(places(document))
        kind = rng.randrange(6)
        if kind == 0 and container is not document:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice((*map(str, NASTY[:40]), key, "layer", "kwargs"))] = rng.choice(NASTY)
        elif kind == 2:
            other, at = rng.choice(places(document))
            container[key] = copy.deepcopy(other[at])
        elif kind == 3:
            container[key] = turned(rng, container[key])
        else:
            container[key] = copy.deepcopy(rng.choice(NASTY))
    text = json.dumps(document.get("root"))
    for mark, written in TEXTS.items():
        text = text.replace(f'"{mark}"', written)
    keys = list(re.finditer(r'"\w+": ', text))
    if keys and rng.random() < 0.05:
        at = rng.choice(keys)
        text = text[: at.start()] + at[0] + "0, " + text[at.start() :]
    return text.encode()


def torn(rng: random.Random, data: bytes) -> bytes:
    """Bytes with one to four changes."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(raw) + 1)
        end = min(len(raw), at + rng.choice((1, 1, 1, 4, 50)))
        some = rng.choice(
            (bytes([rng.randrange(256)]), b"\0" * 8, b"\xff" * 8, b"[" * 2_000, b'"', b"}", raw[at:end] * 2, b"")
        )
        raw[at : at if rng.random() < 0.3 else end] = some
    return bytes(raw[: rng.randrange(len(raw) + 1)] if rng.random() < 0.1 else raw)


def hostile(rng: random.Random, document: Any) -> bytes:
    """A JSON file: now and then the valid one, else one with changed values or changed bytes."""
    chance = rng.random()
    valid = json.dumps(document).encode()
    return valid if chance < 0.02 else torn(rng, valid) if chance < 0.2 else changed(rng, document)


def hostile_tensors(rng: random.Random, valid: bytes) -> bytes:
    """A safetensors file (8 bytes of length, a JSON header, data) with a header, a length or data that lies."""
    size = int.from_bytes(valid[:8], "little")
    header, data = valid[8 : 8 + size], valid[8 + size :]
    kind = rng.randrange(6)
    if kind == 0:
        header = torn(rng, header)
    elif kind in (1, 2):
        header = changed(rng, json.loads(header))
    elif kind == 3:
        values = json.loads(header)
        names = [name for name in values if name != "__metadata__"]
        one, two = rng.choice(names), rng.choice(names)
        values[one], values[two] = values[two], values[one]
        values[rng.choice(("x", "exp_avg/x", "numpy/0", "exp_avg/" + one))] = values.pop(rng.choice(names))
        header = json.dumps(values).encode()
    elif kind == 4:
        data = torn(rng, data)
    size = len(header)
    lies = (0, 1, size - 1, size + 1, size + len(data), 10**8 + 1, 2**40, 2**63, 2**64 - 1)
    size = rng.choice(lies) if kind == 5 else size
    return size.to_bytes(8, "little") + header + data


class Guard:
    """Notes every event of the interpreter that reading a file has no business with. A hook cannot be taken away."""

    BANNED = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.", "pty.")
    BANNED += ("compile", "exec", "pickle.find_class", "ctypes.dlopen", "webbrowser.open", "urllib.", "os.putenv")
    CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
    CHANGES += ("os.chown", "shutil.rmtree", "shutil.move", "shutil.copyfile", "tempfile.mkstemp", "tempfile.mkdtemp")
    IMPORTS = ("iskd.blocks.", "iskd.mixers.")

    def __init__(self, root: Path) -> None:
        self.root, self.active = root.resolve(), False
        self.seen: list[str] = []
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, self._interrupt)
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        self.active = False  # what follows has events of its own
        try:
            # a lock says which machine holds it
            bad = event.startswith(self.BANNED) and event != "socket.gethostname"
            bad = bad or (event == "import" and not self._may_import(str(args[0])))
            bad = bad or (event == "open" and self._writes(args) and not self._inside(args[0], None))
            bad = bad or (event in self.CHANGES and not all(self._inside(*place) for place in self._changed(args)))
            if bad:
                self.seen.append(f"{event} {args!r:.200}")
                raise RuntimeError(f"{event} is not allowed while a file is read")
        finally:
            self.active = True

    def _may_import(self, name: str) -> bool:
        return f"{name}.".startswith(self.IMPORTS)

    @staticmethod
    def _writes(args: tuple[Any, ...]) -> bool:
        _, mode, flags = args
        return bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    @staticmethod
    def _changed(args: tuple[Any, ...]) -> Iterator[tuple[Any, Any]]:
        """Paths among an event's arguments, with the descriptor of the folder that a relative one starts from."""
        folder = args[-1] if isinstance(args[-1], int) and args[-1] > 2 else None
        yield from ((arg, folder) for arg in args if isinstance(arg, (str, bytes, os.PathLike)))

    def _inside(self, path: Any, folder: int | None) -> bool:
        if isinstance(path, int):
            return True
        opened = Path(f"/proc/self/fd/{folder}")
        start = Path(os.readlink(opened)) if folder is not None and opened.is_symlink() else Path()
        # the parent is resolved: a link may be removed, what it leads to may not
        target = start / os.fsdecode(path)
        return (target.parent.resolve() / target.name).is_relative_to(self.root)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch, and interrupt after `SECONDS` of work or `PATIENCE` seconds."""
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        self.active = True
        try:
            yield
        finally:
            self.active = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)

    @staticmethod
    def _interrupt(number: int, _: Any) -> None:
        working = number == signal.SIGPROF
        raise Slow(f"more than {SECONDS:g} s of work" if working else f"more than {PATIENCE:g} s")


class Slow(BaseException):
    """A case took longer than it may; no reader catches this."""


@dataclass
class Tally:
    """Outcomes of one kind."""

    cases: int = 0
    accepted: int = 0
    refused: int = 0


Place = Callable[[random.Random], None]


def run_case(guard: Guard, load: Callable[[], bool]) -> bool | str:
    """Whether the reader took the files, or what it did instead of taking or refusing them."""
    before = len(guard.seen)
    outcome: bool | str
    try:
        with guard.watching():
            outcome = load()
    except (ValueError, OSError):
        outcome = False
    except (Exception, Slow) as error:
        outcome = f"{type(error).__name__}: {error!s:.300}"
    return f"did {guard.seen[before]}" if len(guard.seen) > before else outcome


def limit_memory() -> None:
    """Allow `MORE_MEMORY` beyond what the process has mapped."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main(argv: list[str] | None = None) -> int:
    """Run the cases, print the table; the exit status is 0 when none of them failed."""
    from iskd.data.files.decoding import _MARKS, _OTHER_SCRIPTS  # with the whole stack: not before there is an argument
    from tests.fuzz_kinds import SHARES, kinds

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="hostile files against every reader")
    parser.add_argument("--cases", type=int, default=10_000, help="over all kinds, in fixed shares")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=SHARES, help="this kind alone")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind")
    asked = parser.parse_args(argv)
    warnings.simplefilter("ignore")

    tallies: dict[str, Tally] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="iskd-fuzz-") as folder:
        for codec in (*OF_JSON, *_OTHER_SCRIPTS, *(codec for _, codec in _MARKS)):
            codecs.lookup(codec)
        guard = Guard(Path(folder))
        readers = kinds(Path(folder))
        limit_memory()
        for name, (place, load) in readers.items():
            if asked.kind not in (None, name):
                continue
            count = asked.cases if asked.kind else round(asked.cases * SHARES[name])
            tally = tallies.setdefault(name, Tally())
            for number in range(asked.first, asked.first + count):
                place(random.Random(f"{asked.seed}/{name}/{number}"))
                outcome = run_case(guard, load)
                tally.cases += 1
                tally.accepted += outcome is True
                tally.refused += outcome is False
                if isinstance(outcome, str):
                    failures.append(f"{name} {number}: {outcome}")
    print(f"| {'kind':<12} | {'cases':>6} | {'accepted':>8} | {'refused':>7} |\n|---|---:|---:|---:|")
    total = Tally(*(sum(getattr(t, key) for t in tallies.values()) for key in ("cases", "accepted", "refused")))
    for name, tally in {**tallies, "all": total}.items():
        print(f"| {name:<12} | {tally.cases:>6} | {tally.accepted:>8} | {tally.refused:>7} |")
    print(*failures[:40], f"{len(failures)} failed", sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
