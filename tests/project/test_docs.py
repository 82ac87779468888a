"""Every command in README.md and docs/ is one that works; `tests.documents` says how blocks are marked.

Whatever the mark, the configuration of every line that takes one is composed, and a make target, a script, a command
of iskd and an extra of the package must exist. A fenced block without a mark fails, and so does an indented one with a
command or Python in it.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from iskd.__main__ import main
from iskd.commands.arguments import arguments
from iskd.commands.compose import compose_config
from iskd.commands.compress import compress
from iskd.commands.values.config import object_of
from iskd.models.families import FAMILIES
from iskd.teacher import load_teacher
from tests.documents import ROOT, Block, blocks_of, calls_of
from tests.factories import CONF

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLE = ROOT / "docs" / "example-report"
RUN = ROOT / "tests" / "files" / "0.1" / "finished"
OUTSIDE = ("wandb", "tensorboard")  # programs of others: shown, never run
UNMEASURED = ("run.efficiency_seconds=0", "run.samples=0", "run.mfu=false")
CHOICES = ("block", "mixer", "importance", "experiment", "schedule", "edit", "trainer", "logger")
HYDRA = ("train", "score", "evaluate", "profile", "search")  # commands that compose conf/config.yaml


COMPOSED = set[tuple[str, ...]]()  # the same command stands on several pages

BLOCKS = {file: blocks_of(file) for file in DOCUMENTS}
ALL = [block for blocks in BLOCKS.values() for block in blocks]


def test_every_block_says_how_it_is_tested() -> None:
    wrong = [block.place for block in ALL if block.language and not block.how]
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


def test_the_readme_names_every_choice() -> None:
    words = set(re.findall(r"\w+", (ROOT / "README.md").read_text(encoding="utf-8")))
    missing = {file.stem for group in CHOICES for file in (CONF / group).glob("[!_]*.yaml")} - words
    assert not missing, f"README.md does not name {sorted(missing)}"


def test_the_example_report_is_small_and_of_no_machine() -> None:
    page = (EXAMPLE / "report.html").read_text(encoding="utf-8")
    assert len(page) < 200_000
    assert (EXAMPLE / "report.png").stat().st_size < 250_000
    assert not re.search(r"/(root|home|tmp|work|Users)\b", page)
    assert "src=" not in page, "the page loads nothing"
    assert "<script" not in page
    linked = set(re.findall(r'href="([^#"]+)"', page))
    assert linked <= {file.name for file in EXAMPLE.iterdir()}, "what it links lies beside it"
    assert not any(re.search(r"/(root|home|tmp|work|Users)\b", (EXAMPLE / name).read_text()) for name in linked)


def test_the_table_of_the_readme_is_that_of_the_example() -> None:
    with (EXAMPLE / "curve.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    ours, other = ([row for row in rows if (row["run"] == "ILD") == is_ours] for is_ours in (True, False))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for a, b in zip(ours, other, strict=True):
        kept = [f"{100 * float(row['retention']):.1f}" for row in (a, b)]
        perplexity = [f"{float(row['ppl']):.1f}" for row in (a, b)]
        line = " | ".join([a["layers"], f"{int(a['params']) / 1e6:.1f}", *kept, *perplexity])
        assert f"| {line} |" in readme


def iskd_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    monkeypatch.setattr(sys, "argv", ["iskd"])
    monkeypatch.delenv("ISKD_COMMAND", raising=False)
    with pytest.raises(SystemExit):
        main()
    return set(re.findall(r"\w+", capsys.readouterr().out.partition("commands:")[2].partition("options:")[0]))


def test_every_program_exists(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    known = iskd_commands(capsys, monkeypatch)
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    wrong = []
    for block in ALL:
        for words in block.commands:
            program, first = words[0], next((word for word in words[1:] if not word.startswith("-")), "")
            fine = program in OUTSIDE and block.how == "skip"
            fine |= program == "python" and (first == "train.py" or (ROOT / f"{first.replace('.', '/')}.py").is_file())
            fine |= program == "python" and (first in ("iskd", "pip", "venv") or (ROOT / first).is_file())
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
    added = {"evaluate": "eval=quick", "search": "budget=default"}.get(words[1], "") if words[0] == "iskd" else ""
    lacks = added and not any(word.startswith(f"{added.partition('=')[0]}=") for word in words)
    if words[:2] == ["python", "train.py"] or words[:2] in (["iskd", name] for name in HYDRA):
        return arguments([word for word in words[2:] if word != "-m"] + [added] * bool(lacks))
    return None


def calls(block: Block) -> Iterator[list[str]]:
    """A block's commands, with our own ones in the place of make's."""
    for words in block.commands:
        yield from calls_of(words[1]) if words[0] == "make" else [words]


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_every_configuration_composes(file: Path) -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for block in BLOCKS[file]:
            for words in calls(block):
                # a placeholder is a folder, and a folder is what stands for itself here
                stands = [re.sub(r"^model=(RUN_)?DIR$", "model=.", word) for word in words]
                overrides = overrides_of([re.sub(r"^resume=RUN_DIR$", f"resume={RUN}", word) for word in stands])
                if overrides is not None:
                    # what the reader types, and what is run
                    for given in {tuple(overrides), (*overrides, *block.extra(words))} - COMPOSED:
                        check_composition(block, list(given))
                        COMPOSED.add(given)
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
    teacher = load_teacher(object_of(config.model))
    teacher.model.save_pretrained(folder / "model")
    teacher.tokenizer.save_pretrained(folder / "model")
    keys = keys_of_shelf(folder)
    compress("tiny", texts="sample", tokens=1024, export=False, run_dir=folder / "run", overrides=keys)
    write_tasks(folder / "tasks")
    return folder


def write_tasks(folder: Path) -> None:
    """Six items each of two tasks: one with choices, one with a word to be found."""
    for name in ("piqa", "lambada"):
        (folder / name).mkdir(parents=True)
        items = [
            {"id": f"{name}-{i}", "text": f"Tell me {i}, he said, and I said {i}"}
            | {"goal": f"dry dish {i}", "sol1": f"with towel {i}", "sol2": "in a lake", "label": i % 2}
            for i in range(6)
        ]
        (folder / name / "eval.jsonl").write_text("\n".join(map(json.dumps, items)))


def keys_of_shelf(folder: Path) -> list[str]:
    sizes = ["data.seq_len=64", "data.val_tokens=1024", "run.fit_tokens=256", "run.score_tokens=256"]
    return [*sizes, *UNMEASURED, "schedule.count=1", "trainer.progress=false", f"cache_dir={folder}/cache"]


@pytest.fixture
def desk(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory with my.txt in it; everything global is afterwards what it was."""
    families, before = dict(FAMILIES), HydraConfig.instance().cfg
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text((shelf / "text").read_text())
    monkeypatch.setenv("ISKD_CACHE", str(shelf / "cache"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # the error itself instead of an exit
    monkeypatch.setenv("ISKD_COMMAND", "")  # set by the commands; undone with the rest
    GlobalHydra.instance().clear()
    yield tmp_path
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = before
    FAMILIES.clear()
    FAMILIES.update(families)


def filled(text: str, shelf: Path) -> str:
    """Placeholders replaced."""
    places = (("RUN_DIR", "run"), ("TASK_DIR", "tasks"), ("DIR", "model"), (r"runs/\.\.\./model", "run/model"))
    for word, folder in places:
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
        quiet = ("trainer.progress=false", "hydra/job_logging=none", "hydra/hydra_logging=none")
        arguments += [*extra, *UNMEASURED, *quiet]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setenv("ISKD_COMMAND", "")
    try:
        main()
    except SystemExit as stop:  # of the commands that end with a code
        if stop.code:
            raise AssertionError(f"{shlex.join(arguments)} ended with {stop.code}") from stop
    GlobalHydra.instance().clear()


def run_blocks(file: Path, hows: set[str], shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a document from top to bottom, python ones in one namespace."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in (block for block in BLOCKS[file] if block.how in hows):
        if block.language == "python":
            exec(compile(filled(shortened(block), shelf), block.place, "exec"), names)
        for words in calls(block):
            extra = [filled(argument, shelf) for argument in block.extra(words)]
            if words[:2] == ["python", "-m"]:  # tools of this checkout
                subprocess.run([sys.executable, *words[1:], *extra], cwd=ROOT, check=True)
            else:
                assert words[0] == "iskd" or words[:2] == ["python", "train.py"], f"{block.place}: not run: {words}"
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
