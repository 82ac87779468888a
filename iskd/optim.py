"""Optimizer groups that survive edits, and the learning rate as a pure function.

Two standing kinds of groups: `base` and `new`, each once with weight decay and once without; any may be empty. An edit
rewrites the groups' lists in place and keeps the AdamW state of every surviving parameter; the optimizer object never
changes. Groups are always in the module's own order, so that a resumed process builds the same lists.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from iskd import lora
from iskd.align import reachable
from iskd.arch import Stack
from iskd.plan import SHAPES, TRAIN, Convert, Record, Replace, Stage
from iskd.sharding import like


@dataclass(frozen=True)
class OptimSpec:
    """AdamW and its schedule.

    Attributes:
        betas, weight_decay, eps: of AdamW (decoupled decay; see `maps` for what decays).
        clip: largest gradient norm; None = no clipping.
        warmup: share of a stage in which its rates rise from their first step to full, in [0, 1).
        decay: `constant`, `linear`, `cosine`, or `wsd`: constant, and linear in the last tenth.
        decay_over: `run` decays once over all tokens, `stage` in every stage anew.
        end: share of the rate that is left at the end, in [0, 1].
        fused: update all parameters in one kernel; False = torch's loop over them, for comparison.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    eps: float = 1e-8
    clip: float | None = 1.0
    warmup: float = 0.05
    decay: str = "cosine"
    decay_over: str = "run"
    end: float = 0.0
    fused: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        if self.decay not in SHAPES[1:]:
            raise ValueError(f"optim.decay={self.decay!r}: choose constant, linear, cosine or wsd")
        if self.decay_over not in ("run", "stage"):
            raise ValueError(f"optim.decay_over={self.decay_over!r}: choose run or stage")
        if not 0 <= self.warmup < 1 or not 0 <= self.end <= 1:
            raise ValueError(
                f"optim.warmup must be in [0, 1) and optim.end in [0, 1], got {self.warmup} and {self.end}"
            )
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"optim.clip must be positive or null, got {self.clip}")

    def scale(self, step: int, stage_steps: int, before: int, total: int, shape: str = "") -> float:
        """Factor on a stage's learning rates, in (0, 1].

        Args:
            step: optimizer steps done in this stage.
            stage_steps: optimizer steps of this stage.
            before: optimizer steps of earlier stages.
            total: optimizer steps of the whole run as planned.
            shape: falls over this stage, in the place of `decay` and `decay_over`; "" = as they say.
        """
        ramp = min(1.0, (step + 1) / (math.ceil(self.warmup * stage_steps) + 1))
        done, length = (
            (step, stage_steps)
            if shape or self.decay_over == "stage"
            else (before + step, max(total, before + stage_steps))
        )
        x = done / max(length, 1)
        falls = {"constant": 1.0, "linear": 1 - x, "cosine": 0.5 * (1 + math.cos(math.pi * x))}
        falls["wsd"] = min(1.0, 10 * (1 - x))
        fall = falls[shape or self.decay]
        return ramp * (self.end + (1 - self.end) * fall)


def new_parameters(model: PreTrainedModel, record: Record, stage: Stage) -> list[nn.Parameter]:
    """Parameters of the blocks and mixers that this stage's edits put in and that still stand.

    Of a converted block only the mixer is new: norms and MLP are still the teacher's.
    """
    replaced = {edit.layer for edit in stage.edits if isinstance(edit, Replace)}
    converted = {edit.layer for edit in stage.edits if isinstance(edit, Convert)} - replaced
    mixers = [block.get_submodule(Stack(model).family.attn) for block in _blocks(model, record, converted)]
    return [p for part in (*_blocks(model, record, replaced), *mixers) for p in part.parameters()]


def watched_parameters(model: PreTrainedModel, record: Record, stage: Stage) -> list[nn.Parameter]:
    """What must move in the first steps after this stage's edits: the new parameters, and adapters."""
    return [*new_parameters(model, record, stage), *(lora.adapters(model) if stage.edits else ())]


def _blocks(model: PreTrainedModel, record: Record, layers: Iterable[int]) -> list[nn.Module]:
    wanted = set(layers)
    return [block for layer, block in zip(record.layers, Stack(model).layers, strict=True) if layer in wanted]


def _of_layers(model: PreTrainedModel, record: Record, layers: Iterable[int]) -> list[nn.Parameter]:
    return [p for block in _blocks(model, record, layers) for p in block.parameters()]


def trainable(model: PreTrainedModel, record: Record, stage: Stage) -> list[nn.Parameter]:
    """What the stage trains, by identity and never by name prefix, in the module's order.

    What its objective cannot reach stays frozen: it would get no gradient, and decay all the same.
    Raises ValueError when the choice matches nothing.
    """
    reached = reachable(model, record, stage.objective)
    everything = [p for p in model.parameters() if id(p) in reached]
    if stage.train == "all":
        return everything
    touched = {edit.layer for edit in stage.edits}
    if stage.train == "edited":
        chosen = _of_layers(model, record, record.edited)
    elif stage.train == "new":
        chosen = new_parameters(model, record, stage)
    elif stage.train == "adjacent":
        chosen = _of_layers(model, record, touched | _neighbours(record, touched))
    elif stage.train == "lora":
        chosen = [*lora.adapters(model), *new_parameters(model, record, stage)]
    else:
        try:
            pattern = re.compile(stage.train)
        except re.error as error:
            raise ValueError(
                f"schedule.train={stage.train!r} is neither {'/'.join(TRAIN)} nor a regular expression: {error}"
            ) from None
        chosen = [p for name, p in model.named_parameters() if pattern.search(name)]
    ids = {id(p) for p in chosen}
    found = [p for p in everything if id(p) in ids]
    if not found:
        raise ValueError(
            f"schedule.train={stage.train!r} matches no parameter of stage {stage.name!r} that its objective "
            f"({stage.objective}) can train; nothing would train"
        )
    return found


def _neighbours(record: Record, touched: set[int]) -> set[int]:
    """The nearest surviving layers on both sides of every touched one."""
    found = set()
    for layer in touched:
        below = [x for x in record.layers if x < layer]
        above = [x for x in record.layers if x > layer]
        found |= set(below[-1:]) | set(above[:1])
    return found


def make_optimizer(spec: OptimSpec) -> torch.optim.AdamW:
    """AdamW with empty standing groups; `regroup` fills them."""
    groups: list[dict[str, Any]] = [
        {"params": [], "name": name, "decays": decays, "weight_decay": spec.weight_decay if decays else 0.0}
        for name in ("base", "new")
        for decays in (True, False)
    ]
    return torch.optim.AdamW(
        groups, lr=0.0, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=spec.fused
    )


def maps(model: nn.Module) -> list[nn.Parameter]:
    """What weight decay is for: weights of linear maps, embeddings and adapters.

    Not by the number of dimensions: norms per head, decays per channel, short convolutions that start as the identity
    and learned feature maps are matrices too, and decay would pull them to a zero that means something else.
    """
    weights = [m.get_parameter("weight") for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding | Conv1D)]
    return [*weights, *lora.adapters(model)]


def regroup(optimizer: torch.optim.Optimizer, model: PreTrainedModel, record: Record, stage: Stage) -> None:
    """Give the groups what the stage trains: what this stage's edits put in is `new`, the rest `base`; matrices decay.

    Sets `requires_grad` on every parameter, drops gradients, and forgets the state of parameters that left; beside
    adapters, that of all that are frozen, since memory is what they are for.
    """
    chosen = {id(p) for p in trainable(model, record, stage)}
    fresh = {id(p) for p in new_parameters(model, record, stage)}
    decaying = {id(p) for p in maps(model)}
    alive = set()
    groups: dict[tuple[str, bool], list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        parameter.grad = None
        parameter.requires_grad_(id(parameter) in chosen)
        if id(parameter) in chosen or stage.train != "lora":
            alive.add(id(parameter))
        if id(parameter) in chosen:
            groups["new" if id(parameter) in fresh else "base", id(parameter) in decaying].append(parameter)
    for group in optimizer.param_groups:
        group["params"] = groups[group["name"], group["decays"]]
    for gone in [p for p in optimizer.state if id(p) not in alive]:
        del optimizer.state[gone]
    check_partition(optimizer, model)


def check_partition(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise RuntimeError when a trainable parameter is in no group or in two, or a group holds a foreign one."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in model.named_parameters()}
    trains = {id(p) for p in model.parameters() if p.requires_grad}
    ids = [id(p) for p in held]
    if len(ids) != len(set(ids)):
        raise RuntimeError("a parameter is in two optimizer groups")
    stray = [p for p in held if id(p) not in trains]
    if stray:
        name = names.get(id(stray[0]), "one that was removed")
        raise RuntimeError(f"the optimizer holds {len(stray)} parameters that do not train in the student, e.g. {name}")
    lost = trains - set(ids)
    if lost:
        raise RuntimeError(
            f"{len(lost)} trainable parameters are in no optimizer group, e.g. {names[next(iter(lost))]}"
        )


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Optimizer state by name, `exp_avg/<parameter>` -> tensor: names, not indices, so nothing can be misplaced."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{key}/{names[id(p)]}": value.detach().contiguous()
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


_SLOTS = ("step", "exp_avg", "exp_avg_sq")


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`. Raises ValueError when a name or a shape does not fit the student."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in tensors.items():
        slot, _, name = key.partition("/")
        if slot not in _SLOTS or not value.is_floating_point() or (value.dim() == 0) != (slot == "step"):
            raise ValueError(
                f"optimizer state {key!r:.80} is none of AdamW's; the checkpoint was changed after it was written"
            )
        if name not in parameters:
            raise ValueError(
                f"the optimizer state names {name!r}, which the student does not have; "
                "the checkpoint belongs to another student"
            )
        parameter = parameters[name]
        if value.dim() and value.shape != parameter.shape:
            raise ValueError(
                f"optimizer state {key!r} has shape {list(value.shape)}, the parameter {list(parameter.shape)}"
            )
        # the step count too: fused AdamW reads it on the parameter's device
        optimizer.state[parameter][slot] = (
            like(value, parameter) if value.dim() else value.to(parameter.device, torch.float32)
        )
    torn = [name for name, p in parameters.items() if p in optimizer.state and len(optimizer.state[p]) != len(_SLOTS)]
    if torn:
        raise ValueError(
            f"the optimizer state of {torn[0]!r} is not whole; the checkpoint was changed after it was written"
        )
