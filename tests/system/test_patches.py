"""What is patched in foreign libraries: only what was named, as long as it was, and nothing where the name is gone."""

from __future__ import annotations

import signal
import threading
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop as TrainingEpochLoop
from torch import Tensor
from transformers import masking_utils

from iskd.system.patches import before_scoring, one_text, without_signal_handlers, without_sigterm_broadcast


def asked(positions: Tensor) -> Tensor | None:
    return masking_utils.find_packed_sequence_indices(positions)  # type: ignore[no-any-return]


def test_one_text_is_known_in_its_own_thread_and_nowhere_else() -> None:
    """Contexts that overlap and end out of order; outside, transformers looks as ever."""
    packed, entered, leave = torch.tensor([[0, 1, 0, 1]]), threading.Barrier(2), threading.Event()

    def elsewhere() -> None:
        with one_text():
            entered.wait(10)
            leave.wait(10)

    other = threading.Thread(target=elsewhere)
    other.start()
    entered.wait(10)
    numbers = asked(packed)
    assert numbers is not None
    assert numbers.tolist() == [[0, 0, 1, 1]]
    with one_text(), one_text():
        assert asked(packed) is None
        leave.set()
        other.join(10)
        assert asked(packed) is None
    assert asked(packed) is not None


def test_one_text_is_over_with_an_error_too() -> None:
    with pytest.raises(RuntimeError), one_text():
        raise RuntimeError
    assert asked(torch.tensor([[0, 1, 0, 1]])) is not None


def test_one_text_stands_before_the_question_once_and_changes_nothing_else_of_it() -> None:
    with one_text():
        first = masking_utils.find_packed_sequence_indices
    with one_text():
        assert masking_utils.find_packed_sequence_indices is first
    assert not hasattr(first.__wrapped__, "__wrapped__")
    packed = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    assert torch.equal(first(packed), first.__wrapped__(packed))
    assert first(packed[1:]) is None


def test_one_text_does_nothing_when_transformers_asks_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(masking_utils, "find_packed_sequence_indices")
    with one_text():
        assert not hasattr(masking_utils, "find_packed_sequence_indices")


def test_lightning_asks_nobody_for_a_sigterm_in_this_trainer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for: list[TrainingEpochLoop] = []
    monkeypatch.setattr(TrainingEpochLoop, "_broadcast_sigterm_tensor", lambda loop: asked_for.append(loop))
    ours, other = (L.Trainer(logger=False, accelerator="cpu", barebones=True) for _ in range(2))
    without_sigterm_broadcast(ours)
    for trainer in (ours, other):
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    assert asked_for == [other.fit_loop.epoch_loop]
    del vars(ours.fit_loop.epoch_loop)["_broadcast_sigterm_tensor"]  # all that there is to undo
    ours.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    assert len(asked_for) == 2
    monkeypatch.delattr(TrainingEpochLoop, "_broadcast_sigterm_tensor")
    without_sigterm_broadcast(ours)  # leaves an attribute that nobody asks for


def test_lightning_has_no_handlers_of_its_own_in_this_trainer_alone() -> None:
    ours, other = (L.Trainer(logger=False, accelerator="cpu", barebones=True) for _ in range(2))
    without_signal_handlers(ours)
    before = signal.getsignal(signal.SIGTERM)
    ours._signal_connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) is before
    ours._signal_connector.teardown()
    other._signal_connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) is not before
    other._signal_connector.teardown()
    assert signal.getsignal(signal.SIGTERM) is before


class Adapter:
    """Stands for lm-eval's, of which this is all that is read."""

    def _loglikelihood_tokens(self, requests: list[int], *, override_bs: int) -> list[int]:
        return [request * override_bs for request in requests]


def test_requests_are_seen_before_they_are_scored_by_this_adapter_alone() -> None:
    seen: list[Any] = []
    ours, other = Adapter(), Adapter()
    before_scoring(ours, seen.append)
    for adapter in (ours, other):
        assert adapter._loglikelihood_tokens([1, 2], override_bs=3) == [3, 6]
    assert seen == [[1, 2]]
    with pytest.raises(AttributeError, match="_loglikelihood_tokens"):
        before_scoring(object(), seen.append)
