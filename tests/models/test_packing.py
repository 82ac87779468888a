"""Packed documents kept apart: what a model makes of each is what it makes of it alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from iskd.data import TextData, TextFiles
from iskd.evaluation import measure_quality
from iskd.losses.ce import CrossEntropy
from iskd.losses.kl import KL
from iskd.models import surgery
from iskd.models.hosting import HostedMixer
from iskd.models.packing import Separator, positions_in, with_successor, within
from iskd.models.signals import IGNORE, next_tokens
from iskd.models.stack import Stack
from iskd.models.tokenizers import byte_tokenizer
from iskd.models.weights import model_sha256
from iskd.plan import Convert, Edit, Record, Remove, Replace, Stage
from iskd.training.step import DistillModule, OptimSpec
from tests.factories import FAMILIES, block_specs, louder, mixer_specs, tiny, windows
from tests.runs import MIXER, SLIM, write_text

SEPARATOR, LENGTHS = Separator(2), (7, 1, 12, 4)
TERMS = {"kl": (KL(), 1.0), "ce": (CrossEntropy(), 0.5)}
EDITS: dict[str, Edit] = {
    **{f"block {name}": Replace(1, spec) for name, spec in block_specs().items()},
    **{f"mixer {name}": Convert(1, spec) for name, spec in mixer_specs().items()},
}


def documents() -> list[Tensor]:
    """Documents [1, n], each but the last with the separator at its end."""
    found = [windows(1, length, seed=length) for length in LENGTHS]
    for document in found[:-1]:
        document[:, -1] = SEPARATOR.token
    return found


PACKED = torch.cat(documents(), dim=1)


@torch.no_grad()
def differences(model: PreTrainedModel) -> list[float]:
    """By how much the last hidden states of every document in the packed window differ from those of it alone."""
    stack = Stack(model)
    pieces = stack.last_hidden(PACKED).split(LENGTHS, dim=1)
    return [float((a - stack.last_hidden(b)).abs().max()) for a, b in zip(pieces, documents(), strict=True)]


@pytest.mark.parametrize("separator", [None, SEPARATOR, Separator(2, begins=True)])
def test_the_tokens_with_a_successor_are_those_with_a_label(separator: Separator | None) -> None:
    ids = torch.cat([PACKED, windows(1, PACKED.shape[1])])
    labelled = (within(next_tokens(ids), ids, separator) != IGNORE).flatten().nonzero().squeeze(1)
    assert torch.equal(with_successor(ids, separator), labelled)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_that_is_known_to_be_one_text_is_that_of_the_model(family: str) -> None:
    model = louder(tiny(family))
    ids = windows()
    with torch.no_grad():
        # Granite's head is read a number of times smaller
        expected = Stack(model).base(input_ids=ids).last_hidden_state / getattr(model.config, "logits_scaling", 1)
        assert torch.equal(Stack(model).last_hidden(ids), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixer_looks_at_positions_only_where_they_may_restart(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is called with in a pass of one text, of documents, and of padded texts."""
    model, seen = tiny(family), list[list[int] | None]()
    surgery.apply(model, Record(4), (Convert(1, MIXER),))
    stack, ids = Stack(model), windows()
    hosted = stack.layers[1].get_submodule(stack.family.attn)
    assert isinstance(hosted, HostedMixer)
    forward = hosted.mixer.forward

    def noted(x_BTD: Tensor, *, positions: Tensor | None, **rest: Any) -> Tensor:
        seen.append(None if positions is None else list(positions.shape))
        return forward(x_BTD, positions=positions, **rest)

    monkeypatch.setattr(hosted.mixer, "forward", noted)
    with torch.no_grad():
        stack.last_hidden(ids)
        stack.keep_apart(SEPARATOR, check=False)
        stack.last_hidden(ids)
        stack.last_hidden(ids, torch.ones_like(ids))
    assert seen[:2] == [None, [2, 16]]
    assert seen[2] in ([1, 16], [2, 16])


def test_positions_restart_behind_each_separator() -> None:
    ids = torch.tensor([[5, 2, 2, 6, 7, 2], [2, 5, 6, 7, 8, 9]])
    assert positions_in(ids, SEPARATOR).tolist() == [[0, 1, 0, 0, 1, 2], [0, 0, 1, 2, 3, 4]]
    labels = within(next_tokens(ids), ids, SEPARATOR)
    assert labels.tolist() == [[2, IGNORE, IGNORE, 7, 2, IGNORE], [IGNORE, 6, 7, 8, 9, IGNORE]]
    assert within(labels, ids, None) is labels
    assert positions_in(ids, None).tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_keeps_documents_apart_or_says_that_it_cannot(family: str) -> None:
    model = louder(tiny(family))
    assert max(differences(model)[1:]) > 1e-2
    if family == "opt":  # its masks are made without positions
        with pytest.raises(ValueError, match=r"data\.boundaries=true: opt with attn_implementation='sdpa' attends"):
            Stack(model).keep_apart(SEPARATOR)
        assert Stack(model).separator is None
        return
    Stack(model).keep_apart(SEPARATOR)
    assert max(differences(model)) < 1e-4
    model.config._attn_implementation = "eager"
    assert max(differences(model)) < 1e-4


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_so_does_every_student(family: str, name: str) -> None:
    model = louder(tiny(family))
    try:
        surgery.apply(model, Record(4), (EDITS[name],))
    except ValueError:
        pytest.skip("not for this family")
    Stack(model).keep_apart(SEPARATOR)
    assert max(differences(model)) < 1e-4


def module_of(separator: Separator | None) -> DistillModule:
    teacher = louder(tiny("llama"))
    student, edits = copy.deepcopy(teacher), (Replace(0, SLIM), Convert(1, MIXER), Remove(3))
    record = surgery.apply(student, Record(4), edits)
    module = DistillModule(student, teacher, TERMS, OptimSpec(), record, separator=separator)
    module.enter(Stage("heal", edits))
    return module


def weighted(module: DistillModule, values: Any) -> float:
    """Mean of a value of each document alone, weighted by the tokens that it predicts."""
    found = [(values(module, document), length - 1) for document, length in zip(documents(), LENGTHS, strict=True)
             if length > 1]  # fmt: skip
    return sum(value * count for value, count in found) / sum(count for _, count in found)


def test_the_loss_of_a_packed_window_is_that_of_its_documents() -> None:
    def loss(module: DistillModule, ids: Tensor) -> float:
        return float(module.step(ids).loss.detach())

    def nll(module: DistillModule, ids: Tensor) -> float:
        return measure_quality(module.student, module.teacher, [{"input_ids": ids}])["nll"]

    for value in (loss, nll):
        packed, alone = value(module_of(SEPARATOR), PACKED), weighted(module_of(None), value)
        assert packed == pytest.approx(alone, rel=1e-5)
        assert value(module_of(None), PACKED) != pytest.approx(alone, rel=1e-3)


def test_what_the_models_are_told_goes_to_copies_and_ends_with_the_fit() -> None:
    module = module_of(SEPARATOR)
    rolled_back = surgery.rebuild(module.teacher, module.record)
    for model in (rolled_back, copy.deepcopy(module.student)):
        assert Stack(model).separator == SEPARATOR
        assert model.config.to_dict() == module_of(None).student.config.to_dict()
    apart = model_sha256(module.teacher)  # what a teacher cache is bound to
    module.teardown("fit")
    for model in (module.student, module.teacher):
        assert Stack(model).separator is None
        assert not any("iskd" in key for key in model.config.to_dict())
    assert model_sha256(module.teacher) != apart
    assert model_sha256(module.teacher) == model_sha256(module_of(None).teacher)


def test_the_data_names_the_token_between_documents(tmp_path: Path) -> None:
    text, tokenizer = TextFiles(str(write_text(tmp_path))), byte_tokenizer()

    def data(**options: Any) -> TextData:
        return TextData(text, tokenizer, cache_dir=tmp_path / "cache", **options)

    assert data().separator is None
    assert data(boundaries=True).separator == Separator(256)
    assert data(boundaries=True, bos="document").separator == Separator(256, begins=True)
    tokenizer.eos_token = tokenizer.bos_token = None
    with pytest.raises(ValueError, match=r"data\.boundaries=true needs a token between documents"):
        _ = data(boundaries=True).separator
