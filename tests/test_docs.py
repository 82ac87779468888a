"""Every command in README.md and docs/ is one that works.

A comment above a code block says what is done with it:

    <!-- test: fast ARGS -->     run in the fast tests, ARGS appended to every command
    <!-- test: slow ARGS -->     run by `make test-slow`
    <!-- test: skip REASON -->   not run

Whatever it says, the configuration of every `python train.py` and `iskd train|score` line is composed, and a `make`
target, a script, a command of iskd and an extra of the package must exist. In python blocks, which share one namespace
per file, ARGS are keyword arguments that take the place of what is written there: `tokens=1_024`. RUN_DIR stands for a
finished run, DIR for a model directory, my.txt for text. A fenced block without a comment fails, and so does any in
README.md.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from iskd import arch, cli
from iskd.api import compress
from iskd.build import part
from iskd.build_compose import compose_config
from iskd.teachers import load_teacher
from tests.factories import CONF

ROOT = CONF.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"bash": "shell", "python": "python", "text": "", "yaml": "", "html": ""}
COMMENT = re.compile(r"<!-- test: (fast|slow|skip)\b ?(.*?) -->")
OUTSIDE = ("wandb", "tensorboard")  # programs of others: shown, never run
UNMEASURED = ("run.efficiency_seconds=0", "run.mfu=false")
FIRST_WORDS = re.compile(r"(?:[A-Z]+=\S+ )?(?:python |iskd \w|make |pip |experiments/\S+\.sh|wandb |tensorboard )")


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
        split = [part for words in found for part in _split(words)]
        return [list(itertools.dropwhile(lambda word: re.match(r"[A-Z]+=", word), words)) for words in split]


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


BLOCKS = {file: blocks_of(file) for file in DOCUMENTS}
ALL = [block for blocks in BLOCKS.values() for block in blocks]


def test_every_block_says_how_it_is_tested() -> None:
    wrong = [
        block.place
        for block in ALL
        if block.language and not block.how and (block.fenced or block.file.name == "README.md")
    ]
    wrong += [f"{block.place} skips without a reason" for block in ALL if block.how == "skip" and not block.rest]
    assert not wrong, "no <!-- test: ... --> above the code in " + ", ".join(wrong)
    assert sum(block.how == "fast" for block in ALL) >= 8


def test_every_link_leads_somewhere() -> None:
    wrong = []
    for file in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#\s]+)", file.read_text(encoding="utf-8")):
            if not target.startswith(("https://", "http://", "mailto:")) and not (file.parent / target).exists():
                wrong.append(f"{file.relative_to(ROOT)} -> {target}")
    assert not wrong, "links to nowhere: " + ", ".join(wrong)


def iskd_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    monkeypatch.setattr(sys, "argv", ["iskd"])
    monkeypatch.delenv("ISKD_COMMAND", raising=False)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return set(re.findall(r"\w+", str(stop.value).partition("commands:")[2]))


def test_every_program_exists(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    known = iskd_commands(capsys, monkeypatch)
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    wrong = []
    for block in ALL:
        for words in block.commands:
            program, first = words[0], next((word for word in words[1:] if not word.startswith("-")), "")
            fine = program in OUTSIDE and block.how == "skip"
            fine |= program == "python" and (first == "train.py" or (ROOT / f"{first.replace('.', '/')}.py").is_file())
            fine |= program == "python" and first in ("iskd", "pip")
            fine |= program == "iskd" and first in known
            fine |= program == "make" and re.search(rf"^{re.escape(first)}:", makefile, re.MULTILINE) is not None
            fine |= program.startswith("experiments/") and os.access(ROOT / program, os.X_OK)
            extras = re.findall(r"iskd\[(\w+)\]", " ".join(words))
            fine |= program == "pip" and all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)
            if not fine:
                wrong.append(f"{block.place}: {' '.join(words)}")
    assert not wrong, "\n".join(wrong)


def overrides_of(words: list[str]) -> list[str] | None:
    """Overrides of a command that composes conf/config.yaml, else None."""
    if words[:2] in (["python", "train.py"], ["iskd", "train"], ["iskd", "score"]):
        return cli.arguments([word for word in words[2:] if word != "-m"])
    return None


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_every_configuration_composes(file: Path) -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for block in BLOCKS[file]:
            for words in block.commands:
                overrides = overrides_of(words)
                if overrides is not None:
                    extra = shlex.split(block.rest) if block.how in ("fast", "slow") else []
                    for given in {tuple(overrides), (*overrides, *extra)}:  # what the reader types, and what is run
                        check_composition(block, list(given))
    GlobalHydra.instance().clear()


def check_composition(block: Block, overrides: list[str]) -> None:
    """Every run of a command composes; the keys that a sweeper's own file searches exist."""
    before = HydraConfig.instance().cfg
    try:
        for one in expanded(overrides):
            config = compose("config", overrides=one, return_hydra_config=True)
            HydraConfig.instance().set_config(config)
            OmegaConf.to_container(config, resolve=False)
            for key in config.hydra.sweeper.get("params") or {}:
                choice = key in config.hydra.runtime.choices
                assert choice or OmegaConf.select(config, key, default=...) is not ..., f"the sweeper's {key}"
    except Exception as error:
        raise AssertionError(f"{block.place}: {overrides}: {error}") from error
    finally:
        HydraConfig.instance().cfg = before


def expanded(overrides: list[str]) -> Iterator[list[str]]:
    """Overrides of runs of a sweep in which every value comes up; of a continuous range the lower end."""
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    choices: dict[str, list[str]] = {}
    for override in parser.parse_overrides(overrides):
        key = override.get_key_element()
        if override.is_interval_sweep():
            values = [str(override.value().start)]  # type: ignore[union-attr]
        elif override.is_sweep_override():
            values = list(override.sweep_string_iterator())
        else:
            values = [override.get_value_element_as_str()]
        choices[key] = [f"{key}={value}" for value in values]
    runs = max(len(values) for values in choices.values()) if choices else 1
    return ([values[min(run, len(values) - 1)] for values in choices.values()] for run in range(runs))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the placeholders stand for: `model`, a tiny model directory; `text`, a file; `run`, a finished run."""
    folder = tmp_path_factory.mktemp("docs")
    lines = (f"Sentence number {n} says that {n} plus {n % 7} is {n + n % 7}. " * 8 for n in range(400))
    (folder / "text").write_text("\n\n".join(lines))
    config, _ = compose_config(["model=tiny"])
    teacher = load_teacher(part(config.model))
    teacher.model.save_pretrained(folder / "model")
    teacher.tokenizer.save_pretrained(folder / "model")
    keys = keys_of_shelf(folder)
    compress("tiny", texts="sample", tokens=1024, export=False, run_dir=folder / "run", overrides=keys)
    return folder


def keys_of_shelf(folder: Path) -> list[str]:
    sizes = ["data.seq_len=64", "data.val_tokens=1024", "run.fit_tokens=256", "run.score_tokens=256"]
    return [*sizes, *UNMEASURED, "schedule.count=1", "trainer.progress=false", f"cache_dir={folder}/cache"]


@pytest.fixture
def desk(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory with my.txt in it; everything global is afterwards what it was."""
    families, before = dict(arch.FAMILIES), HydraConfig.instance().cfg
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text((shelf / "text").read_text())
    monkeypatch.setenv("ISKD_CACHE", str(shelf / "cache"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # the error itself instead of an exit
    monkeypatch.setenv("ISKD_COMMAND", "")  # set by the commands; undone with the rest
    GlobalHydra.instance().clear()
    yield tmp_path
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = before
    arch.FAMILIES.clear()
    arch.FAMILIES.update(families)


def filled(text: str, shelf: Path) -> str:
    """Placeholders replaced."""
    for word, folder in (("RUN_DIR", "run"), ("DIR", "model"), (r"runs/\.\.\./model", "run/model")):
        text = re.sub(rf"(?<![A-Z_]){word}(?![A-Z_])", str(shelf / folder), text)
    return text


def shortened(block: Block) -> str:
    """Python with the arguments that the comment gives in the place of its own, and no timing of the machine."""
    text = block.text
    for argument in shlex.split(block.rest):
        key, _, value = argument.partition("=")
        text, count = re.subn(rf"(?<![\w.]){key}=[^,)\n]+", f"{key}={value}", text)
        assert count, f"{block.place} has no argument {key}"
    unmeasured = ", ".join(f'"{key}"' for key in UNMEASURED)
    return text.replace("overrides=[", f"overrides=[{unmeasured}, ")


def run_here(words: list[str], extra: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of iskd in this process."""
    arguments = ["iskd", "train", *words[2:]] if words[0] == "python" else list(words)
    if overrides_of(words) is not None:
        arguments += [
            *extra,
            *UNMEASURED,
            "trainer.progress=false",
            "hydra/job_logging=none",
            "hydra/hydra_logging=none",
        ]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setenv("ISKD_COMMAND", "")
    try:
        cli.main()
    except SystemExit as stop:  # of the commands that end with a code
        if stop.code:
            raise AssertionError(f"{shlex.join(arguments)} ended with {stop.code}") from stop
    GlobalHydra.instance().clear()


def run_blocks(file: Path, hows: set[str], shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a document from top to bottom, python ones in one namespace."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in BLOCKS[file]:
        if block.how in hows and block.language == "python":
            exec(compile(filled(shortened(block), shelf), block.place, "exec"), names)
        elif block.how in hows:
            for words in block.commands:
                extra = shlex.split(filled(block.rest, shelf))
                run_here([filled(word, shelf) for word in words], extra, monkeypatch)


FAST = [file for file in DOCUMENTS if any(block.how == "fast" for block in BLOCKS[file])]
SLOW = [file for file in DOCUMENTS if any(block.how == "slow" for block in BLOCKS[file])]


@pytest.mark.parametrize("file", FAST, ids=lambda file: file.name)
def test_fast_blocks_run(file: Path, shelf: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_blocks(file, {"fast"}, shelf, monkeypatch)


@pytest.fixture(scope="module")
def exported(shelf: Path) -> Path:
    """The shelf, with a student in the finished run's folder."""
    result = compress("tiny", texts="sample", tokens=1024, run_dir=shelf / "other", overrides=keys_of_shelf(shelf))
    assert result.model_dir is not None
    result.model_dir.rename(shelf / "run" / "model")
    return shelf


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore:The ``declarative_base\\(\\)`` function")  # Optuna calling SQLAlchemy
@pytest.mark.parametrize("file", SLOW, ids=lambda file: file.name)
def test_slow_blocks_run(file: Path, exported: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(name, value)
    run_blocks(file, {"fast", "slow"}, exported, monkeypatch)
