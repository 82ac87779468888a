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

from tests.factories import sampled, tiny_teacher

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


FOR_EVERY_FAMILY = (
    "models/test_stack.py",
    "models/test_surgery.py",
    "models/test_conversion.py",
    "refits/test_refits.py",
)
LIKE_OTHERS = {"gemma2", "olmo2", "smollm3", "granite"}
"""Families that are tried in the files above, and elsewhere among the slow tests: others made alike are tried there."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put whole files in the order in which processes take them up: the longest first, as far as one can tell."""
    tests = Counter(item.path for item in items)
    ranks = {Path(__file__).parent / name: len(FIRST) - rank for rank, name in enumerate(FIRST)}
    always = {Path(__file__).parent / name for name in FOR_EVERY_FAMILY}
    for item in items:
        if item.path not in always and LIKE_OTHERS & {value for value in _parameters(item) if isinstance(value, str)}:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: (-ranks.get(item.path, 0), -tests[item.path], item.path))


def _parameters(item: pytest.Item) -> list[object]:
    called = getattr(item, "callspec", None)
    return [] if called is None else list(called.params.values())


def pytest_configure() -> None:
    """Use one thread: on tiny tensors a second one costs more than it gives, tenfold on a busy machine."""
    torch.set_num_threads(1)


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
