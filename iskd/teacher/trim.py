"""Rows of embedding and head that no token has, dropped on request."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def trim(name: str, model: PreTrainedModel, needed: int) -> int:
    """Drop rows of embedding and head above the `needed` ones, but for a multiple of 8; returns how many went."""
    rows = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    kept = min(rows, -(-needed // 8) * 8)
    if kept == rows:
        return 0
    configs: tuple[Any, ...] = (model.config, model.generation_config)
    for key, value in (item for config in configs if config is not None for item in config.to_dict().items()):
        used = value if isinstance(value, list) else [value]
        beyond = [i for i in used if isinstance(i, int) and kept <= i < rows]
        if key.endswith(("_token_id", "suppress_tokens")) and beyond:
            raise ValueError(
                f"model.trim_vocab=true: {name} uses row {beyond[0]} ({key}), which its tokenizer of {needed} ids "
                "does not have: leave model.trim_vocab=false"
            )
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(kept)
    log.info("%s: trimmed %d of %d embedding rows, which no token has", name, rows - kept, rows)
    return rows - kept
