"""The only code that changes a model's structure: `apply` edits to a stack, keep its config true."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from iskd.models.hosting import HostedBlock, HostedMixer
from iskd.models.projections import with_submodule
from iskd.models.stack import Stack, class_of
from iskd.plan import Convert, Edit, Record, Replace, Spec
from iskd.plan.edits import REMOVALS


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Make modules on `device` under a seed of their own and leave the process's random numbers as they were."""
    # manual_seed also seeds the GPU's generator, which is where a module on a GPU draws from
    drawn_on = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=drawn_on), torch.device(device):
        torch.manual_seed(seed)
        yield


def _made(edit: Replace | Convert, spec: Spec, method: str, old: nn.Module, stack: Stack) -> nn.Module:
    """What a part's class makes of `old`. Raises ValueError when the class is no such part or its arguments do not fit.

    A record may come from anywhere, and a class fails in its own way on arguments that nobody meant for it.
    """
    make = getattr(spec.resolve(), method, None)
    if make is None:
        kind = "block" if method == "from_block" else "mixer"
        raise ValueError(f"{edit.op} {edit.layer}: {spec.target} is no {kind}; it has no {method}")
    try:
        new: nn.Module = make(old, stack, **spec.kwargs)
    except (ValueError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"{edit.op} {edit.layer}: {spec.target} cannot be made with {spec.kwargs!r:.200}: {error!s:.300}"
        ) from error
    return new


def build_block(stack: Stack, old: nn.Module, edit: Replace) -> nn.Module:
    """The compact block of an edit, on the old block's device and dtype, ready to stand in the stack.

    Fresh weights are drawn under the edit's own seed, so every rank and every replay builds the same block.
    """
    weight = next(old.parameters())
    with _seeded(edit.seed, weight.device):
        new = _made(edit, edit.block, "from_block", old, stack)
    new = new.to(device=weight.device, dtype=weight.dtype)
    # a slimmed block is still one of the host's own; anything else needs the host's call translated
    hosted = new if isinstance(new, class_of(old)) else HostedBlock(new, stack.family)
    return hosted.train(old.training)


def build_converted(stack: Stack, old: nn.Module, edit: Convert) -> nn.Module:
    """The block `old` with the mixer of an edit where its attention stood.

    A new module around the very norms and MLP of `old`, which itself stays as it was. Fresh weights are drawn under
    the edit's own seed. Raises ValueError when the class is no mixer or the block has no attention any more.
    """
    if isinstance(old, HostedBlock):
        raise ValueError(
            f"convert {edit.layer}: a compact block without an attention of its own stands there; convert another layer"
        )
    attention = old.get_submodule(stack.family.attn)
    weight = next(attention.parameters())
    with _seeded(edit.seed, weight.device):
        mixer = _made(edit, edit.mixer, "from_attention", attention, stack)
    mixer = mixer.to(device=weight.device, dtype=weight.dtype)
    return with_submodule(old, stack.family.attn, HostedMixer(mixer, stack.family).train(old.training))


def apply(model: PreTrainedModel, record: Record, edits: Iterable[Edit]) -> Record:
    """Carry out `edits` in order on `model` and return the extended record.

    Only the named layers change, and of a converted one only the mixer; every other parameter stays the same object.
    Raises ValueError before anything is changed when an edit cannot be applied.
    """
    edits = tuple(edits)
    result = record.extended(edits)
    stack = Stack(model)
    if len(stack.layers) != len(record.layers):
        raise ValueError(f"the model has {len(stack.layers)} blocks but its record says {len(record.layers)}")
    new: dict[int, nn.Module] = {}
    for edit in edits:
        if isinstance(edit, REMOVALS):
            continue
        # a block may be replaced and then converted: the second edit starts from what the first one built
        old = new[edit.layer] if edit.layer in new else stack.layers[record.layers.index(edit.layer)]
        new[edit.layer] = (
            build_block(stack, old, edit) if isinstance(edit, Replace) else build_converted(stack, old, edit)
        )
    for edit in edits:
        position = record.layers.index(edit.layer)
        blocks = list(stack.layers)
        if not isinstance(edit, REMOVALS):
            blocks[position] = new[edit.layer]
            stack.set_layers(blocks)
        else:
            kept = [i for i in range(len(blocks)) if i != position]
            stack.set_layers([blocks[i] for i in kept], kept)
        record = record.extended([edit])
    return result


def rebuild(teacher: PreTrainedModel, record: Record, device: str | None = None) -> PreTrainedModel:
    """A student of the record's structure with fresh weights; `device="meta"` gives shapes only.

    Raises ValueError when the record asks for far more parameters than the teacher has: it may come from anywhere.
    """
    if device is None and record.edits:
        size, most = block_parameters(rebuild(teacher, record, "meta")), 4 * block_parameters(teacher)
        if size > most:
            raise ValueError(
                f"the record describes blocks with {size:,} parameters, more parameters than {most:,}, four times the "
                "teacher's: it was changed after it was written"
            )
    skeleton = class_of(teacher)
    config = copy.deepcopy(teacher.config)
    with torch.device(device) if device else nullcontext(), torch.random.fork_rng(devices=[]):
        model = cast(PreTrainedModel, skeleton(config))
        nn.Module.to(model, torch.float32)
        apply(model, Record(record.num_layers), record.edits)
    model.generation_config = copy.deepcopy(teacher.generation_config)
    Stack(model).keep_apart(Stack(teacher).separator, check=False)
    return model


def block_parameters(model: PreTrainedModel) -> int:
    """Parameters of the stack of blocks (embedding, final norm and head left out)."""
    return sum(p.numel() for p in Stack(model).layers.parameters())


def sizes(model: PreTrainedModel, record: Record) -> tuple[dict[int, int], int]:
    """Parameters of the block at every surviving layer, and of everything outside the blocks."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in Stack(model).layers]
    return dict(zip(record.layers, blocks, strict=True)), parameters(model) - sum(blocks)


def parameters(model: PreTrainedModel) -> int:
    """All parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters())
