"""Fixtures that several files share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.factories import sampled, tiny_teacher


def pytest_configure() -> None:
    """Use one thread: on tiny tensors a second one costs more than it gives, tenfold on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def teacher() -> PreTrainedModel:
    """A model that has learnt something, made once; tests must not change it."""
    return tiny_teacher()


@pytest.fixture(scope="session")
def said(teacher: PreTrainedModel) -> list[Tensor]:
    """Four batches of windows [8, 64] that the teacher said."""
    return [sampled(teacher, seed=seed) for seed in range(4)]
