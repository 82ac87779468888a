"""The Dockerfile's steps without a daemon: `python -m tests.image` (root, Linux; downloads what the image would).

    python -m tests.image                    # build, then ask the image for its version, a run and a compiled step
    python -m tests.image --arg TORCH_CPU_INDEX=URL

Every instruction is carried out, in order, in a root of its own: this machine's system, read-only, with a layer for
what is written on top (overlayfs, seen by nobody else), which is thrown away at the end. A fresh virtual environment
stands for the base image's Python. COPY obeys .dockerignore, RUN runs under /bin/sh with the ARGs and ENVs of that
line, and what is asked of the image in the end runs as its USER, with its ENTRYPOINT and ENV alone.

Not shown by this: whether the base image has what the steps call (apt-get, useradd: Debian's and Ubuntu's have), what
else another distribution lacks, layers and their caching, and anything about a GPU.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = "/image-python"  # the virtual environment, in the image's root
_KNOWN = ("ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "VOLUME", "USER", "ENTRYPOINT", "CMD")
_PASSED = ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CERT", "PIP_CONFIG_FILE", "SSL_CERT_FILE")


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Instruction and the rest of its line, lines that go on joined, comments dropped.

    Raises ValueError for an instruction that is not known here.
    """
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            if word not in _KNOWN:
                raise ValueError(f"{word} is no instruction that tests.image carries out: {line}")
            yield word, rest.strip()


def filled(text: str, values: Mapping[str, str]) -> str:
    """A text with `${NAME}`, `${NAME:-other}` and `${NAME:+other}` as Docker fills them, innermost first."""

    def value(found: re.Match[str]) -> str:
        name, kind, other = found.groups()
        known = values.get(name, "")
        return (known or other or "") if kind != "+" else (other or "") if known else ""

    before = ""
    while before != text:
        before, text = text, re.sub(r"\$\{(\w+)(?::([-+])([^{}$]*))?\}", value, text)
    return text


@dataclass
class Image:
    """What instructions so far say.

    Attributes:
        args, env: of the stage. workdir, user, entrypoint, command, volumes: as Docker has them.
    """

    args: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)

    @property
    def values(self) -> dict[str, str]:
        """What a line is filled with and a RUN sees."""
        return {**self.args, **self.env}

    def take(self, word: str, rest: str, given: Mapping[str, str]) -> None:
        """Carry out what runs nothing and copies nothing."""
        if word == "ARG":
            name, _, default = rest.partition("=")
            self.args[name] = given.get(name, filled(" ".join(shlex.split(default)), self.values))
        elif word == "ENV":
            self.env |= dict(pair.split("=", 1) for pair in shlex.split(filled(rest, self.values)))
        elif word == "WORKDIR":
            self.workdir = os.path.join(self.workdir, filled(rest, self.values))
        elif word == "USER":
            self.user = filled(rest, self.values)
        elif word in ("ENTRYPOINT", "CMD", "VOLUME"):
            setattr(self, {"ENTRYPOINT": "entrypoint", "CMD": "command", "VOLUME": "volumes"}[word], json.loads(rest))


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore leaves a path out: the last pattern decides that it, or a folder above it, matches."""
    found = False
    for pattern in patterns:
        keeps, plain = pattern.startswith("!"), pattern.lstrip("!").strip("/")
        parts = path.split("/")
        places = ["/".join(parts[: end + 1]) for end in range(len(parts))]
        forms = {plain, plain.removeprefix("**/"), plain.replace("**/", "*/"), plain.replace("/**/", "/*/")}
        if any(
            fnmatch.fnmatchcase(place, form) and (place.count("/") == form.count("/") or "**" in plain)
            for place in places
            for form in forms
        ):
            found = not keeps
    return found


def context() -> list[str]:
    """Files that a build is sent."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    return [path for path in listed if (ROOT / path).is_file() and not ignored(path, patterns)]


def copy(rest: str, image: Image, root: Path) -> None:
    """COPY of the whole context or of files by their names."""
    *sources, target = rest.split()
    for path in context():
        if "." in sources or path in sources:
            there = root / os.path.join(image.workdir, target, path).lstrip("/")
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, there)


def inside(root: Path, image: Image, command: list[str], *, built: bool) -> None:
    """Run in the image's root: a RUN as root with the machine's ways to reach a package index, else as its USER."""
    path = f"{PYTHON}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    passed = {} if built else {name: os.environ[name] for name in _PASSED if name in os.environ}
    values = {"PATH": path, "HOME": "/root", **passed, **(image.env if built else image.values)}
    user, _, group = image.user.partition(":")
    who = ["setpriv", f"--reuid={user}", f"--regid={group or user}", "--clear-groups"] if built else []
    enter = f"cd {shlex.quote(image.workdir)} && exec {shlex.join([*who, *command])}"
    subprocess.run(["chroot", str(root), "/bin/sh", "-c", enter], check=True, env=values)


def build(root: Path, given: Mapping[str, str]) -> Image:
    """All instructions of the Dockerfile, in the root."""
    image = Image()
    for word, rest in instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")):
        print(f"image: {word} {rest[:100]}", flush=True)
        if word == "FROM":
            image = Image()  # ARGs before it are of FROM alone
            subprocess.run(["chroot", str(root), sys.executable, "-m", "venv", PYTHON], check=True)
            for folder in Path(sys.base_prefix).parents:  # the machine's Python may lie where others may not look
                (root / str(folder).lstrip("/")).chmod(0o755)
        elif word == "RUN":
            inside(root, image, ["/bin/sh", "-c", rest], built=False)
        elif word == "COPY":
            copy(filled(rest, image.values), image, root)
        else:
            image.take(word, rest, given)
        if word == "WORKDIR":
            (root / image.workdir.lstrip("/")).mkdir(parents=True, exist_ok=True)
    return image


ASKED = (
    ["--version"],
    ["train", "debug=smoke", "trainer.progress=false", "hydra.run.dir=runs/smoke"],
    ["verify", "runs/smoke/model", "--no-timing"],
    [
        "train",
        "debug=smoke",
        "trainer.progress=false",
        "export=false",
        "run.compile=true",
        "hydra.run.dir=runs/compiled",
    ],
)
"""What is asked of the image: as its user, with volumes that a stranger may write into."""


def main() -> None:
    """Build, ask, throw away."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arg", action="append", default=[], help="NAME=VALUE, as docker build --build-arg")
    options = parser.parse_args()
    if os.environ.get("ISKD_IMAGE_INSIDE") is None:  # mounts of its own, gone with the process
        again = ["unshare", "--mount", sys.executable, "-m", "tests.image", *sys.argv[1:]]
        raise SystemExit(subprocess.run(again, env={**os.environ, "ISKD_IMAGE_INSIDE": "1"}).returncode)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        for name in ("written", "work", "root"):
            (Path(folder) / name).mkdir()
        layers = f"lowerdir=/,upperdir={folder}/written,workdir={folder}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(root)], check=True)
        for name in ("proc", "dev"):
            subprocess.run(["mount", "--rbind", f"/{name}", str(root / name)], check=True)
        try:
            image = build(root, dict(pair.split("=", 1) for pair in options.arg))
            for asked in ASKED:
                print(f"image: {shlex.join([*image.entrypoint, *asked])}", flush=True)
                inside(root, image, [*image.entrypoint, *asked], built=True)
            inside(root, image, ["python", "train.py", "--version"], built=True)
        finally:
            subprocess.run(["umount", "--recursive", "--lazy", str(root)], check=False)
    print("image: all steps ran, and the image answered")


if __name__ == "__main__":
    main()
