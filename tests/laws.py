"""Laws of a host that hold whatever stands in it: compact blocks and mixers are asked the same way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.factories import padded, windows


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    return model(input_ids=ids, **kwargs).logits


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def check_past(model: PreTrainedModel) -> None:
    """Tokens do not see those behind them, and those behind them see the tokens."""
    ids = windows()
    whole = logits(model, ids)
    for seen in (1, 6, 15):
        changed = logits(model, torch.cat([ids[:, :seen], windows(2, 16 - seen, seed=9)], dim=1))
        same(changed[:, :seen], whole[:, :seen])
        assert not torch.allclose(changed[:, seen:], whole[:, seen:])


def check_padding(model: PreTrainedModel, alone: PreTrainedModel | None = None) -> None:
    """A batch padded on the left is each sequence by itself (in the model `alone`); no mask hides nothing."""
    alone = alone or model
    ids, mask, positions = padded()
    batch = logits(model, ids, attention_mask=mask, position_ids=positions)
    same(batch[:1], logits(alone, ids[:1]))
    same(batch[1:, -9:], logits(alone, ids[1:, -9:]))
    same(logits(model, ids, attention_mask=torch.ones_like(ids)), logits(model, ids))


@torch.no_grad()
def check_cache(model: PreTrainedModel) -> None:
    """Reading a window in pieces, each with the cache of those before, gives what reading it at once gives."""
    ids = windows()
    whole, pieces, past = logits(model, ids), [], None
    for piece in ids.split((6, 1, 9), dim=1):
        output = model(piece, past_key_values=past, use_cache=True)
        past = output.past_key_values
        pieces.append(output.logits)
    assert past is not None
    assert past.get_seq_length() == 16
    same(torch.cat(pieces, dim=1), whole)


def generate(model: Any, *, cached: bool, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, **options}
    return model.generate(
        ids, attention_mask=mask, use_cache=cached, return_dict_in_generate=True, output_scores=True, **options
    )


def check_generation(model: PreTrainedModel, lengths: tuple[int, ...] = (6, 3), **options: Any) -> None:
    """Greedy text and scores of a left-padded batch: with a cache, without, and of each sequence alone."""
    ids, mask, _ = padded(lengths)
    with_cache, without = (generate(model, cached=cached, ids=ids, mask=mask, **options) for cached in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    for a, b in zip(with_cache.scores, without.scores, strict=True):
        same(a, b)
    for row, length in enumerate(lengths):
        one = ids[row : row + 1, -length:]
        alone = generate(model, cached=True, ids=one, mask=torch.ones_like(one), **options)
        assert torch.equal(alone.sequences[0, length:], with_cache.sequences[row, ids.shape[1] :])


def check_beams(model: PreTrainedModel) -> None:
    """Beams that change places take their caches with them."""
    ids, mask, _ = padded((6, 3))
    one, other = (generate(model, cached=cached, ids=ids, mask=mask, num_beams=3) for cached in (True, False))
    assert torch.equal(one.sequences, other.sequences)
    same(one.sequences_scores, other.sequences_scores)
