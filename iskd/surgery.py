"""The only code that changes a model's structure: `apply` edits to a stack, keep its config true."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from iskd.arch import Stack
from iskd.hosting import HostedBlock
from iskd.plan import Convert, Edit, Record, Remove, Replace


def build_block(stack: Stack, old: nn.Module, edit: Replace) -> nn.Module:
    """The compact block of an edit, on the old block's device and dtype, ready to stand in the stack.

    Fresh weights are drawn under the edit's own seed, so every rank and every replay builds the same block.
    """
    cls = edit.block.resolve()
    weight = next(old.parameters())
    # manual_seed also seeds the GPU's generator, which is where a block on a GPU draws from
    drawn_on = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(devices=drawn_on), torch.device(weight.device):
        torch.manual_seed(edit.seed)
        new: nn.Module = cls.from_block(old, stack, **edit.block.kwargs)  # type: ignore[attr-defined]
    new = new.to(device=weight.device, dtype=weight.dtype)
    # a slimmed block is still one of the host's own; anything else needs the host's call translated
    hosted = new if isinstance(new, type(old)) else HostedBlock(new, stack.family)
    return hosted.train(old.training)


def apply(model: PreTrainedModel, record: Record, edits: Iterable[Edit]) -> Record:
    """Carry out `edits` in order on `model` and return the extended record.

    Only the named layers change; every other parameter stays the same object. Raises ValueError before anything is
    changed when an edit cannot be applied.
    """
    edits = tuple(edits)
    result = record.extended(edits)
    stack = Stack(model)
    if len(stack.layers) != len(record.layers):
        raise ValueError(f"the model has {len(stack.layers)} blocks but its record says {len(record.layers)}")
    new: dict[int, nn.Module] = {}
    for edit in edits:
        if isinstance(edit, Convert):
            raise ValueError(f"convert {edit.layer}: this version has no mixers to convert to")
        if isinstance(edit, Replace):
            new[edit.layer] = build_block(stack, stack.layers[record.layers.index(edit.layer)], edit)
    for edit in edits:
        position = record.layers.index(edit.layer)
        blocks = list(stack.layers)
        if isinstance(edit, Replace):
            blocks[position] = new[edit.layer]
            stack.set_layers(blocks)
        elif isinstance(edit, Remove):
            kept = [i for i in range(len(blocks)) if i != position]
            stack.set_layers([blocks[i] for i in kept], kept)
        record = record.extended([edit])
    return result


def rebuild(teacher: PreTrainedModel, record: Record, device: str | None = None) -> PreTrainedModel:
    """A student of the record's structure with fresh weights; `device="meta"` gives shapes only."""
    skeleton = type(teacher)
    config = copy.deepcopy(teacher.config)
    with torch.device(device) if device else nullcontext(), torch.random.fork_rng(devices=[]):
        model = skeleton(config)
        nn.Module.to(model, torch.float32)
        apply(model, Record(record.num_layers), record.edits)
    model.generation_config = copy.deepcopy(teacher.generation_config)
    return model


def block_parameters(model: PreTrainedModel) -> int:
    """Parameters of the stack of blocks (embedding, final norm and head left out)."""
    return sum(p.numel() for p in Stack(model).layers.parameters())


def parameters(model: PreTrainedModel) -> int:
    """All parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters())
