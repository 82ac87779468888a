"""Surviving blocks trained one by one towards the teacher's states, without the model around them.

A step costs one block forward and backward and no head, and each block hears of its own error alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, replace

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from iskd.blocks.ridge import row_weights
from iskd.models import Stack
from iskd.models.capture import state_of
from iskd.models.sharding import is_sharded
from iskd.refits.base import RefitTask
from iskd.refits.walk import BlockRefit, Site, attention_end, walk
from iskd.system import Ranks

STUDENT, TEACHER = INPUTS = ("student", "teacher")
_Trained = tuple[float, float, int]


@dataclass(frozen=True)
class Local(BlockRefit):
    """AdamW on all weights of one block at a time: mean over tokens of |h - h_teacher|^2 / |h_teacher|^2.

    The student's own stream goes in, the teacher's state, past the gap where one follows, is the target. The rate falls
    linearly to 0; after every epoch the error on held-out windows is read, and the best weights stay (those from before
    the first step among them).

    On the student's own stream a block waits for those below it, and processes share out the windows of a step, a
    window for each process or more. On the teacher's no block waits: processes share out the layers, each trains
    its own on all windows, and the weights are what one process gives, to the last bit.

    Attributes:
        lr: the first rate.
        lr_new: that of what mixers have beside copied projections; None = `lr`.
        step_tokens: calibration tokens of a step, over all processes; a window at least.
        epochs: passes over the text at most; an epoch that is no better on held-out text is the last.
        sublayers: attention and its norms first, towards the teacher's state between the two, then the rest;
            false = the whole block at once.
        inputs: what goes into a block, student = the student's own stream, teacher = the teacher's.

    Source: sub-module reconstruction of arXiv 2510.14444 (section 3); XMerge (arXiv 2609.02083) for whole blocks
    Needs: calibration tokens (`refit.local.tokens`)
    Costs: a pass of the teacher's blocks, and of the student's forward and backward for every epoch; no head
    Measured: not measured
    """

    _: KW_ONLY
    lr: PositiveFloat = 2e-4
    lr_new: PositiveFloat | None = None
    epochs: PositiveInt = 4
    sublayers: bool = False
    inputs: str = "student"
    step_tokens: PositiveInt = 512  # type: ignore[misc]

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if not 0 < self.lr < math.inf or self.epochs < 1:
            raise ValueError(
                f"refit.local.lr={self.lr} and epochs={self.epochs}: give a positive rate and an epoch or more"
            )
        if self.inputs not in INPUTS:
            raise ValueError(f"refit.local.inputs={self.inputs!r}: choose {' or '.join(INPUTS)}")

    @property
    def passes(self) -> float:
        """One of each model, and forward and backward of the student for every epoch; one forward for each half."""
        return 2.0 + (4.0 if self.sublayers else 3.0) * self.epochs

    def between(self, stack: Stack) -> bool:
        """Where attention and MLP are trained apart."""
        return self.sublayers and stack.sequential

    @property
    def by_layers(self) -> bool:
        """On the teacher's stream."""
        return self.inputs == TEACHER

    def refit(self, task: RefitTask) -> list[str]:
        """Train; see the class."""
        if not self.by_layers:
            return super().refit(task)
        chosen, ranks = self.chosen(task), task.ranks
        apart, shared = self.between(Stack(task.student)), not is_sharded(task.student)
        # layers of a round are trained at a time, so that only between rounds do processes agree whether to stop
        walking = replace(
            task,
            ranks=Ranks() if shared else ranks,
            check_stop=lambda: None,
            states=task.states if ranks.rank == 0 else None,  # one writes
        )
        trained: dict[int, _Trained | None] = {}
        sites = walk(walking, self.streams, attention=apart, independent=True)
        for number, site in enumerate(site for site in sites if site.layer in chosen):
            if not shared or number % ranks.size == 0:
                task.check_stop()
            if not shared or number % ranks.size == ranks.rank:
                trained[site.layer] = self._block(walking, site, apart)
        if shared:
            trained = {layer: told for rank in ranks.gather(trained) for layer, told in rank.items()}
            for number, layer in enumerate(chosen):
                _hand_on(Stack(task.student).layers[task.record.layers.index(layer)], number % ranks.size, ranks)
        return [*_told({layer: trained[layer] for layer in chosen}), *self._whole(task)]

    def over(self, task: RefitTask, sites: Iterable[Site]) -> list[str]:
        """Train; see the class."""
        apart = self.between(Stack(task.student))
        return [*_told({site.layer: self._block(task, site, apart) for site in sites}), *self._whole(task)]

    def _whole(self, task: RefitTask) -> list[str]:
        """A sentence where there is no state between attention and MLP."""
        if not self.sublayers or self.between(Stack(task.student)):
            return []
        return ["attention and MLP of this model read the same state, so that blocks were trained whole (sublayers)"]

    def _block(self, task: RefitTask, site: Site, apart: bool) -> _Trained | None:
        """One block: held-out error of its output before and after, and the epochs that it took; None = no weights."""
        if next(site.block.parameters(), None) is None:
            return None
        shares = list(_shares(site, apart))
        before = _held_error(task, site, None) if len(shares) > 1 else None  # the first error is the attention's
        found = [self._train(task, site, *share) for share in shares]
        return found[0][0] if before is None else before, found[-1][1], sum(count for *_, count in found)

    def _train(
        self, task: RefitTask, site: Site, parameters: Sequence[nn.Parameter], attention: nn.Module | None
    ) -> tuple[float, float, int]:
        """Held-out error before and after, and the epochs that it took."""
        tokens = torch.tensor([batch.numel() for batch in task.fit])  # of each step, on all ranks
        task.ranks.add(tokens)
        steps = len(tokens)
        generator = torch.Generator().manual_seed(site.layer)
        drawn = torch.Generator().manual_seed(site.layer)
        first = best = _held_error(task, site, attention)
        kept = [parameter.detach().clone() for parameter in parameters]
        fresh = _fresh(site)
        shares = [
            ([p for p in parameters if (id(p) in fresh) == new], rate)
            for new, rate in ((False, self.lr), (True, self.lr_new or self.lr))
        ]
        rates = [rate for share, rate in shares if share]
        optimizer = torch.optim.AdamW(
            [{"params": share, "lr": rate} for share, rate in shares if share], weight_decay=0.0, betas=(0.9, 0.95)
        )
        done = 0
        with _training(parameters):
            for epoch in range(self.epochs):
                for step, index in enumerate(torch.randperm(steps, generator=generator).tolist()):
                    done_share = (epoch * steps + step) / (self.epochs * steps)
                    for group, rate in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate * (1 - done_share)
                    with _dropping(site, drawn):
                        loss = _errors(site, index, attention).sum() / tokens[index].item()
                    gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
                    _share(task, parameters, gradients)
                    optimizer.step()
                error = _held_error(task, site, attention)
                done += 1
                if not error < best:
                    break
                best = error
                for copy, parameter in zip(kept, parameters, strict=True):
                    copy.copy_(parameter.detach())
        for copy, parameter in zip(kept, parameters, strict=True):
            parameter.detach().copy_(copy)
        return first, best, done


@contextmanager
def _dropping(site: Site, drawn: torch.Generator) -> Iterator[None]:
    """What a mixer does in training alone (`mixer.window_dropout`): alike on all ranks, whatever else was drawn."""
    mixer = site.submodule(f"{site.stack.family.attn}.mixer")
    if mixer is None or not any(isinstance(module, nn.Dropout) and module.p for module in mixer.modules()):
        yield
        return
    with torch.random.fork_rng(devices=[]):  # the draw is the host's
        torch.manual_seed(int(torch.randint(2**31, (), generator=drawn)))
        mixer.train()
        try:
            yield
        finally:
            mixer.eval()


def _told(blocks: Mapping[int, _Trained | None]) -> list[str]:
    trained = [found for found in blocks.values() if found is not None]
    skipped = [layer for layer, found in blocks.items() if found is None]
    left = [f"nothing to train in layers {skipped}"] * bool(skipped)
    if not trained:
        return ["no block to train", *left]
    before, after, epochs = (sum(values) / len(trained) for values in zip(*trained, strict=True))
    told = f"{len(trained)} blocks trained, {epochs:.1f} epochs each: relative squared error on held-out text "
    return [f"{told}{before:.4f} -> {after:.4f}", *left]


@torch.no_grad()
def _hand_on(block: nn.Module, owner: int, ranks: Ranks) -> None:
    """Give every process the weights of a block that one of them has trained, as they are there."""
    for parameter in block.parameters():
        sent = parameter.detach().clone() if ranks.rank == owner else torch.zeros_like(parameter)
        ranks.add(sent)  # one number and zeros
        parameter.copy_(sent)


def _shares(site: Site, apart: bool) -> Iterator[tuple[list[nn.Parameter], nn.Module | None]]:
    """What is trained at a time, and the module whose output it is trained for; None = the block's own."""
    every = list(site.block.parameters())
    attention = site.submodule(site.stack.family.attn) if apart else None
    reached = set() if attention is None else _before(site, attention)
    first = [parameter for parameter in every if id(parameter) in reached]
    if first:  # none where nothing stands in the attention's place
        yield first, attention
    if len(first) < len(every):
        yield [parameter for parameter in every if id(parameter) not in reached], None


@torch.enable_grad()
def _before(site: Site, attention: nn.Module) -> set[int]:
    """Parameters, by identity, that the state between attention and MLP depends on: norms before and behind it too."""
    every = list(site.block.parameters())
    with _training(every):
        error = _errors(site, 0, attention).mean()
        if not error.requires_grad:
            return set()
        gradients = torch.autograd.grad(error, every, allow_unused=True)
    own = {id(parameter) for parameter in attention.parameters()}
    return own | {id(parameter) for parameter, found in zip(every, gradients, strict=True) if found is not None}


def _fresh(site: Site) -> set[int]:
    """Parameters, by identity, that a mixer in the block has beside its copied projections."""
    mixer = site.submodule(f"{site.stack.family.attn}.mixer")
    named = [] if mixer is None else mixer.named_parameters()
    return {id(parameter) for name, parameter in named if not name.startswith("projections.")}


def _errors(site: Site, index: int, attention: nn.Module | None) -> Tensor:
    """|h - h_teacher|^2 / |h_teacher|^2 for every token of a batch [B, T], after the block or after its attention."""
    goals = site.targets
    if attention is None:
        state = site.run(index)
    else:
        assert site.middle is not None
        goals, added = site.middle, []
        end = site.submodule(attention_end(site.stack)) or attention
        handle = end.register_forward_hook(lambda _module, _args, output: added.append(state_of(output)))
        try:
            site.run(index)
        finally:
            handle.remove()
        state = site.inputs[index] + site.stack.residual_scale * added[0]
    goal = goals[index]
    with torch.autocast(state.device.type, enabled=False):
        return ((state.float() - goal.float()) * row_weights(goal)).square().sum(-1)


@torch.no_grad()
def _held_error(task: RefitTask, site: Site, attention: nn.Module | None) -> float:
    sums = torch.zeros(2, dtype=torch.float64, device=task.device)
    for index in range(len(task.fit), len(task.fit) + len(task.held)):
        errors = _errors(site, index, attention)
        sums += torch.stack([errors.sum(), errors.new_tensor(errors.numel())])
    task.ranks.add(sums)
    return float((sums[0] / sums[1]).item())


def _share(task: RefitTask, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Give the parameters the sum of the ranks' gradients."""
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    if task.ranks.size > 1:
        flat = torch.cat([gradient.flatten().float() for gradient in found])
        task.ranks.add(flat)
        pieces = flat.split([gradient.numel() for gradient in found])
        found = [piece.view_as(gradient) for piece, gradient in zip(pieces, found, strict=True)]
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient


@contextmanager
def _training(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for some parameters; afterwards they are as they were, and hold none."""
    flags = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None
