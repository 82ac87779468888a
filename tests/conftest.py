"""Fixtures that several files share."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.clean import Server
from tests.factories import sampled, tiny_teacher
from tests.unrendered import leave_unrendered

FIRST = (
    "system/test_stop_signals.py",
    "training/test_ranks.py",
    "training/step/test_guard.py",
    "export/test_bundle.py",
    "project/test_docs.py",
    "project/test_security.py",
    "project/test_made_before.py",
    "refits/test_refit_runs.py",
    "training/test_align_runs.py",
    "commands/test_cli.py",
)
"""Files of few tests that take long: a process that is given one of them last works on when the others have ended."""


# Families and parts are many, and their products more. What follows is tried here, the rest among the slow tests alone.
EVERY_FAMILY = ("models/test_stack.py", "models/test_surgery.py", "models/test_conversion.py", "refits/test_refits.py")
LIKE_OTHERS = {"gemma2", "granite", "mistral", "olmo2", "smollm3"}
"""Families made like others: tried in the files above."""
PRODUCTS = ("blocks/test_blocks.py", "export/test_export.py", "importance/test_importance.py", "models/test_surgery.py")
DEEP = {"ablation", "block_influence", "bottleneck", "slim"}
"""Parts that read or take over a family's own modules: tried in every family; others, in these files, in three."""
MET = {"gpt2", "llama", "phi"}


WHOLE = ("project/test_made_before.py", "project/test_security.py", "project/test_smoke.py")
RENDERED = ("report", "project/test_attacked.py", *WHOLE)
"""Where figures are rendered: tests of what pages show, of old and hostile files, and whole runs."""

INTERPRETERS = ("export/test_verification.py", *WHOLE)
"""Where an export is opened again by an interpreter of its own, as users have it."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put whole files in the order in which processes take them up: the longest first, as far as one can tell."""
    tests = Counter(item.path for item in items)
    ranks = {Path(__file__).parent / name: len(FIRST) - rank for rank, name in enumerate(FIRST)}
    for item in items:
        if _for_patient_people(item):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: (-ranks.get(item.path, 0), -tests[item.path], item.path))


def _for_patient_people(item: pytest.Item) -> bool:
    """Whether it is one of many products that are much the same."""
    named = getattr(item, "callspec", None)
    given = {} if named is None else {key: value for key, value in named.params.items() if isinstance(value, str)}
    file = item.path.relative_to(Path(__file__).parent).as_posix()
    if file not in EVERY_FAMILY and LIKE_OTHERS & set(given.values()):
        return True
    part = given.get("name") or given.get("block")
    return file in PRODUCTS and part is not None and part not in DEEP and given.get("family", "llama") not in MET


def pytest_configure() -> None:
    """Use one thread: on tiny tensors a second one costs more than it gives, tenfold on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _clean_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of clean processes."""
    server = Server(tmp_path_factory.mktemp("clean"))
    yield server
    server.close()


@pytest.fixture(autouse=True, scope="module")
def _cheaper(request: pytest.FixtureRequest, _clean_processes: Server) -> Iterator[None]:
    """Render no figure where none is looked at; open exports again by way of a server."""
    file = request.path.relative_to(Path(__file__).parent).as_posix()
    with pytest.MonkeyPatch.context() as patch:
        if not file.startswith(RENDERED):
            leave_unrendered(patch.setattr)
        if not file.startswith(INTERPRETERS):
            _clean_processes.stand_in(patch.setattr)
        yield


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """Give the next test the logging this one found: a command called in this process sets level and handlers."""
    root = logging.getLogger()
    level, handlers, disabled = root.level, root.handlers[:], logging.root.manager.disable
    yield
    root.setLevel(level)
    for handler in root.handlers[:]:
        if handler not in handlers:
            handler.close()  # an open file would be a warning in whichever test collects it
    root.handlers[:] = handlers
    logging.disable(disabled)


@pytest.fixture(autouse=True)
def _command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is called in this process leaves its name in the environment, for processes that it starts."""
    monkeypatch.setenv("ISKD_COMMAND", "")
    monkeypatch.delenv("ISKD_COMMAND")


@pytest.fixture(scope="session")
def teacher() -> PreTrainedModel:
    """A model that has learnt something, made once; tests must not change it."""
    return tiny_teacher()


@pytest.fixture(scope="session")
def said(teacher: PreTrainedModel) -> list[Tensor]:
    """Four batches of windows [8, 64] that the teacher said."""
    return [sampled(teacher, seed=seed) for seed in range(4)]
