"""Memory settings: what is reported is what glibc took, and one variable switches it all off."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import iskd
from iskd.system import allocator, machine

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")


class Library:
    """Stands for the C library."""

    def __init__(self, answer: Callable[[int], int]) -> None:
        self.asked: list[int] = []
        self.answer = answer

    def mallopt(self, option: int, _value: int) -> int:
        self.asked.append(option)
        return self.answer(option)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """A C library that takes everything, and a process that was never tuned."""
    found = Library(lambda _: 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: found)
    monkeypatch.setattr(allocator, "_state", "stock")
    monkeypatch.delenv("ISKD_ALLOCATOR", raising=False)
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    return found


def reported() -> Any:
    return machine.describe("cpu")["allocator"]


def test_a_process_that_imported_torch_gets_all_but_huge_pages(library: Library) -> None:
    assert allocator.tune()
    assert sorted(library.asked) == [-4, -2, -1]
    assert reported() == allocator.state() == "tuned, no huge pages"
    assert "THP_MEM_ALLOC_ENABLE" not in os.environ, "torch would not read it any more"
    assert allocator.tune()
    assert len(library.asked) == 3


@pytest.mark.parametrize(("before", "state"), [(None, "tuned"), ("1", "tuned"), ("0", "tuned, no huge pages")])
def test_before_torch_huge_pages_are_asked_for_unless_the_user_said_no(
    before: str | None, state: str, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "set so that it is taken back")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    monkeypatch.setattr(sys, "modules", {name: module for name, module in sys.modules.items() if name != "torch"})
    if before is not None:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", before)
    assert allocator.tune()
    assert allocator.state() == state
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == (before or "1")


def test_what_did_not_happen_is_not_reported(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    library.answer = lambda option: int(option != -1)
    assert not allocator.tune()
    assert reported() == "stock"
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: object())  # another C library
    assert not allocator.tune()
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: library)
    library.answer, library.asked = lambda _: 1, []
    monkeypatch.setenv("ISKD_ALLOCATOR", "stock")
    assert not allocator.tune()
    assert (library.asked, reported()) == ([], "stock")


def test_compress_tunes_and_importing_does_not(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    assert iskd.compress is not None  # imports everything
    assert library.asked == []
    with pytest.raises(ValueError, match="is no directory, no model config"):
        iskd.compress("no such model")
    assert len(library.asked) == 3


def test_importing_iskd_is_early_enough_for_huge_pages() -> None:
    """Torch reads its variable when it allocates first, which its import does."""
    code = "import iskd, os; print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    unset = ("THP_MEM_ALLOC_ENABLE", "ISKD_ALLOCATOR")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
