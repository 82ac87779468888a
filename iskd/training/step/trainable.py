"""What trains in a stage, decided in one place by parameter identity: `regroup`.

It is what the stage asks for (`trainable`), as far as its objective can reach it (`reachable`) and some term of the
loss reads it (`within_reach`). Anything else that trained would get no gradient: DDP would wait for it, and decay would
move it all the same.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from iskd.losses import Terms
from iskd.models import Stack
from iskd.models.capture import Call
from iskd.models.hosting import HostedMixer
from iskd.plan import Convert, Record, Replace, Stage
from iskd.plan.stage import TRAIN
from iskd.training.step import adapters
from iskd.training.step.alignment import check_whole, matrix_of, mixers_of
from iskd.training.step.muon import matrices
from iskd.training.step.passes import Wanted, wanted
from iskd.training.step.shared_prefix import entrance


def regroup(
    optimizer: torch.optim.Optimizer, student: PreTrainedModel, record: Record, stage: Stage, terms: Terms
) -> list[str]:
    """Give the groups what the stage trains and the losses reach: what its edits put in is `new`, the rest `base`.

    Sets `requires_grad` on every parameter, drops gradients, and forgets the state of parameters that left; beside
    adapters, that of all that are frozen, since memory is what they are for. To be called whenever structure, stage or
    losses change, and before DDP wraps the student, which waits for the gradient of every parameter that trains.

    Args:
        optimizer: the running one, with the standing groups of `make_optimizer`; rewritten in place.
        student: the model that is trained.
        record: its edits.
        stage: the one in progress; matrices decay in all of its groups.
        terms: loss and weight by name.

    Returns:
        Sentences for the log: what the stage would train and no term reads, which stays frozen with its state kept.

    Raises:
        ValueError: the stage matches no parameter, or a new one, or all, are out of every term's reach.
        RuntimeError: the groups do not partition what trains.
    """
    chosen = trainable(student, record, stage)
    new = {id(p) for p in new_parameters(student, record, stage)}
    lost, said = _unread(student, record, stage, terms, chosen, new)
    held = {id(p) for p in chosen} - lost
    # the state of what is frozen is kept, as a later stage may train it again
    alive = {id(p) for p in (chosen if stage.train == "lora" else student.parameters())}
    decaying = {id(p) for p in maps(student)}
    orthogonal = matrices(student) if any(group["orthogonal"] for group in optimizer.param_groups) else set()
    groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = defaultdict(list)
    for parameter in student.parameters():
        parameter.grad = None
        parameter.requires_grad_(id(parameter) in held)
        if id(parameter) in held:
            name, key = "new" if id(parameter) in new else "base", id(parameter)
            groups[name, key in decaying, key in orthogonal].append(parameter)
    for group in optimizer.param_groups:
        group["params"] = groups[group["name"], group["decays"], group["orthogonal"]]
    for gone in [p for p in optimizer.state if id(p) not in alive]:
        del optimizer.state[gone]
    check_partition(optimizer, student)
    return said


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


def trainable(model: PreTrainedModel, record: Record, stage: Stage) -> list[nn.Parameter]:
    """What the stage trains, by identity and never by name prefix, in the module's order.

    What its objective cannot reach stays frozen: it would get no gradient, and decay all the same.
    Raises ValueError when the choice matches nothing.
    """
    reached = reachable(model, record, stage.objective)
    everything = [p for p in model.parameters() if id(p) in reached]
    if stage.train == "all":
        return everything
    touched = {edit.layer for edit in stage.fresh(record)}
    if stage.train == "edited":
        chosen = _of_layers(model, record, record.edited)
    elif stage.train == "new":
        chosen = new_parameters(model, record, stage)
    elif stage.train == "adjacent":
        chosen = _of_layers(model, record, touched | _neighbours(record, touched))
    elif stage.train == "lora":
        chosen = [*adapters.adapters(model), *new_parameters(model, record, stage)]
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


def new_parameters(model: PreTrainedModel, record: Record, stage: Stage) -> list[nn.Parameter]:
    """Parameters of the blocks and mixers that are new to the stage's training (`Stage.fresh`) and still stand.

    Of a converted block only the mixer is new: norms and MLP are still the teacher's.
    """
    fresh = stage.fresh(record)
    replaced = {edit.layer for edit in fresh if isinstance(edit, Replace)}
    converted = {edit.layer for edit in fresh if isinstance(edit, Convert)} - replaced
    mixers = [block.get_submodule(Stack(model).family.attn) for block in _blocks(model, record, converted)]
    return [p for module in (*_blocks(model, record, replaced), *mixers) for p in module.parameters()]


def watched_parameters(model: PreTrainedModel, record: Record, stage: Stage) -> list[nn.Parameter]:
    """What must move in the first steps after this stage's edits: the new parameters, and adapters."""
    return [*new_parameters(model, record, stage), *(adapters.adapters(model) if stage.edits else ())]


def reachable(model: PreTrainedModel, record: Record, objective: str) -> set[int]:
    """Ids of the parameters that an objective can train: values and output projections have no part in a matrix.

    Raises ValueError for a student in shards.
    """
    if objective == "loss":
        return {id(p) for p in model.parameters()}
    check_whole(model, objective)
    if objective == "hidden":
        return {id(p) for p in Stack(model).layers.parameters()}
    mixers = mixers_of(model, record).values()
    if objective == "mixer_output":
        return {id(p) for mixer in mixers for p in mixer.parameters()}
    return {id(p) for mixer in mixers for p in _behind_matrix(mixer, Stack(model).dims.hidden)}


def _behind_matrix(hosted: HostedMixer, width: int) -> list[nn.Parameter]:
    """The parameters that a mixing matrix is made of, as autograd finds them on two tokens."""
    parameters = list(hosted.parameters())
    if parameters[0].is_meta:  # a plan asks on shapes alone, which autocast knows nothing of
        real = copy.deepcopy(hosted).to_empty(device="cpu")
        for parameter in (*real.parameters(), *real.buffers()):
            parameter.detach().zero_()
        behind = {id(p) for p in _behind_matrix(real, width)}
        return [p for p, made in zip(parameters, real.parameters(), strict=True) if id(made) in behind]
    before = [p.requires_grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_()
        weight = parameters[0]
        with torch.enable_grad(), torch.autocast(weight.device.type, enabled=False):
            matrix = matrix_of(hosted, Call((weight.new_zeros(1, 2, width),), {}))
            found = torch.autograd.grad(matrix.sum(), parameters, allow_unused=True)
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)
    return [p for p, gradient in zip(parameters, found, strict=True) if gradient is not None]


def _unread(
    student: PreTrainedModel, record: Record, stage: Stage, terms: Terms, chosen: list[nn.Parameter], new: set[int]
) -> tuple[set[int], list[str]]:
    """Ids of the chosen parameters that no term can give a gradient, and the sentence on them.

    Nothing in a stage without training, or in one that aligns layers: what that reaches, `trainable` knows.
    """
    active = ", ".join(name for name, (_, weight) in terms.items() if weight > 0)
    if stage.objective != "loss" or not stage.tokens or not active:
        return set(), []
    reached, names = within_reach(student, terms, record, stage), {id(p): n for n, p in student.named_parameters()}
    lost = [p for p in chosen if id(p) not in reached]
    if not lost:
        return set(), []
    fresh = [p for p in lost if id(p) in new]
    if fresh or len(lost) == len(chosen):
        first = fresh[0] if fresh else lost[0]
        raise ValueError(
            f"loss=[{active}] reads nothing that {names[id(first)]} has a part in: it would not train in stage "
            f"{stage.name!r} (schedule.train={stage.train}); add a loss on logits, e.g. kl, or let the layers of a "
            "loss on hidden states reach up to it"
        )
    return {id(p) for p in lost}, [
        f"{len(lost)} parameters stay frozen in stage {stage.name!r}, loss=[{active}] reads nothing that they have a "
        f"part in; the first is {names[id(lost[0])]}"
    ]


def within_reach(student: PreTrainedModel, terms: Terms, record: Record, stage: Stage) -> set[int]:
    """Ids of the student's parameters that terms of weight > 0 can give a gradient.

    With a term on logits all of them. With none the head is out of reach, unless it is tied to the embedding; and where
    no term reads the last hidden state either, whatever lies above the last layer read.
    """
    read, stack = wanted(terms, record, stage) or Wanted(), Stack(student)
    everything, body = ({id(p) for p in model.parameters()} for model in (student, stack.base))
    if any(weight > 0 and "logits" in loss.needs for loss, weight in terms.values()):
        return everything
    if read.last:
        return everything - ({id(p) for p in student.get_output_embeddings().parameters()} - body)
    count = max((record.layers.index(layer) + 1 for layer in read.layers), default=0)
    reached = [*entrance(stack), *list(stack.layers)[:count]]
    return {id(p) for module in reached for p in module.parameters()} if count else set()


def maps(model: nn.Module) -> list[nn.Parameter]:
    """What weight decay is for: weights of linear maps, embeddings and adapters.

    Not by the number of dimensions: norms per head, decays per channel, short convolutions that start as the identity
    and learned feature maps are matrices too, and decay would pull them to a zero that means something else.
    """
    weights = [m.get_parameter("weight") for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding | Conv1D)]
    return [*weights, *adapters.adapters(model)]


def _neighbours(record: Record, touched: set[int]) -> set[int]:
    """The nearest surviving layers on both sides of every touched one."""
    found = set()
    for layer in touched:
        below = [x for x in record.layers if x < layer]
        above = [x for x in record.layers if x > layer]
        found |= set(below[-1:]) | set(above[:1])
    return found


def _blocks(model: PreTrainedModel, record: Record, layers: Iterable[int]) -> list[nn.Module]:
    wanted = set(layers)
    return [block for layer, block in zip(record.layers, Stack(model).layers, strict=True) if layer in wanted]


def _of_layers(model: PreTrainedModel, record: Record, layers: Iterable[int]) -> list[nn.Parameter]:
    return [p for block in _blocks(model, record, layers) for p in block.parameters()]
