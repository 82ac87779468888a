"""A teacher that the caller gives as a model with its tokenizer, instead of naming one on disk or a hub.

It is known by the hash of its content, as files are, so that a resumed run notices when it is given something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iskd.models.head import say_untied
from iskd.models.weights import check_finite, parameters_sha256
from iskd.teacher.load import Loaded


def given_teacher(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Loaded:
    """Take a model in memory as the teacher, as it is.

    Raises:
        ValueError: the tokenizer has ids that the embedding has no row for, or weights are nan or infinite.
    """
    rows = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, the embedding of {type(model).__name__} only {rows} rows: pass "
            "the tokenizer that belongs to the model, or call model.resize_token_embeddings(len(tokenizer)) first"
        )
    check_finite(model, f"the {type(model).__name__} given")
    source: dict[str, str | int] = {
        "name": model.config.name_or_path or type(model).__name__,
        "kind": "memory",
        "sha256": parameters_sha256(model),
        "tokenizer": "given",
        "dtype": str(model.dtype).removeprefix("torch."),
        "stored": str(model.dtype).removeprefix("torch."),
        "padding_rows": rows - 1 - largest,
    }
    return Loaded(model, tokenizer, source)


@contextmanager
def lent(model: PreTrainedModel) -> Iterator[None]:
    """A model that belongs to somebody else: its modes, gradient flags and device are afterwards what they were.

    Meanwhile all of its parameters ask for gradients, as those of a model that was loaded for the run do: the student
    starts as its copy.
    """
    device = model.device
    modes = [(module, module.training) for module in model.modules()]
    tied = getattr(model.config, "tie_word_embeddings", False)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(True)
    say_untied(model)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        nn.Module.to(model, device)
        model.config.tie_word_embeddings = tied
