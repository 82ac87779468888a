"""Gates of mixers started where the teacher's attention suggests, and their heads brought to the size of its heads.

    d_h = mean look-back of head h, in tokens        e_h = entropy of its rows, over that of uniform rows
    decay exp(-ln 2 / max(d_h, 1/2)), so that half is left after d_h tokens        beta = 0.3 + 0.4 (1 - e_h)
    s_h = <y_h, m_h> / <m_h, m_h>, from 0.1 to 10

with y_h what the teacher's head gives to its output projection, and m_h what the mixer's does on the teacher's own
inputs; s_h goes into the columns of the mixer's output projection. (Taylor-Calibrate, arXiv 2606.16429; its scale goes
into the values, which a norm behind the heads would undo.) The first token of a document takes no part in d and e:
what rests on it is a sink, no memory.

Such a start is said to pay only before the layers are trained one by one, as `refit=[calibrate,output,local]` does:
where it lowers no KL by itself it is judged together with the refit behind it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from iskd.models import Stack
from iskd.models.capture import Call, attention_weights, follow
from iskd.models.hosting import HostedMixer
from iskd.models.packing import positions_in
from iskd.models.sharding import is_sharded
from iskd.plan import Convert
from iskd.refits.base import Refit, RefitTask
from iskd.system.text import layers_text

LEAST_REACH, MOST_MEMORY = 0.5, 1e6
SCALES = (0.1, 10.0)
OUT = "projections.o_proj"


@dataclass(frozen=True)
class Calibrate(Refit):
    """Decays, delta strengths and head sizes of mixers just put in, from statistics of the teacher's attention.

    Attributes:
        tokens: calibration tokens that the statistics are taken of.
        scale: bring heads to size; else gates alone.

    Source: Taylor-Calibrate (arXiv 2606.16429)
    Needs: `edit=convert`; calibration tokens (`refit.calibrate.tokens`)
    Costs: two passes of the teacher, one with its attention written out, and one of the mixers; in shards the second
        pass once for each mixer
    Measured: not measured
    """

    for_mixers: ClassVar[bool] = True
    prepares: ClassVar[bool] = True
    _: KW_ONLY
    tokens: PositiveInt = 2048
    scale: bool = True

    @property
    def passes(self) -> float:
        """Two of the teacher's blocks, and of the mixers' half a block."""
        return 2.5

    def changes(self, task: RefitTask) -> list[nn.Module]:
        """The blocks of the mixers put in."""
        return task.blocks({edit.layer for edit in task.edits if isinstance(edit, Convert)})

    def refit(self, task: RefitTask) -> list[str]:
        """Calibrate; see the class."""
        stack = Stack(task.student)
        layers = sorted(
            edit.layer
            for edit in task.edits
            if isinstance(edit, Convert) and edit.layer in task.record.layers
            if hasattr(_mixer(stack, task, edit.layer), "calibrate")
        )
        if not layers:
            return ["no mixer was put in: nothing to calibrate"]
        dims = Stack(task.teacher).dims
        whole = [layer for layer in layers if outs_of(_mixer(stack, task, layer)) == dims.heads * dims.head_dim]
        told = [] if whole == layers else [_slimmed([layer for layer in layers if layer not in whole])]
        if whole:
            told += [self._gates(task, whole), *([self._scales(task, whole)] if self.scale else [])]
        return told

    def _gates(self, task: RefitTask, layers: Sequence[int]) -> str:
        """Set the gates of the mixers at some layers."""
        reach, entropy = _attended(task, layers)
        memory = reach.clamp_min(LEAST_REACH) / math.log(2)
        strength, found = 0.3 + 0.4 * (1 - entropy), Counter[str]()
        for index, layer in enumerate(layers):
            with task.opened(layer):
                mixer = _mixer(Stack(task.student), task, layer)
                channels = (mixer.heads, -1)  # as many per head as the mixer has heads
                width = outs_of(mixer) // memory.shape[1]
                given = [x[index].repeat_interleave(width).view(channels).mean(1) for x in (memory, strength)]
                bias = next(mixer.parameters())
                memory_H, strength_H = (x.to(bias.device, torch.float32) for x in given)
                found.update(mixer.calibrate(memory_H.clamp(max=MOST_MEMORY), strength_H.clamp(0.01, 0.99)))
        names = ", ".join(f"{name} of {found[name]}" for name in sorted(found)) or "no gate"
        return (
            f"of {len(layers)} mixers {names} set: heads of the teacher look back {reach.min():.3g} to "
            f"{reach.max():.3g} tokens, with {100 * entropy.min():.0f} to {100 * entropy.max():.0f} % of the entropy "
            "of uniform attention"
        )

    def _scales(self, task: RefitTask, layers: Sequence[int]) -> str:
        """Bring the heads of the mixers at some layers to the teacher's size."""
        # one pass for all of them; in shards a block at a time is whole
        groups = [[layer] for layer in layers] if is_sharded(task.student) else [layers]
        found = []
        for group in groups:
            with ExitStack() as whole:
                for layer in group:
                    whole.enter_context(task.opened(layer))
                found.append(_scaled(task, group))
        scales = torch.cat(found)
        return f"heads brought to the teacher's size: by {scales.min():.2f} to {scales.max():.2f}"


def _slimmed(layers: Sequence[int]) -> str:
    """Heads of the teacher that are gone have no say, and which these are nobody knows any more."""
    return f"mixers of layers {layers_text(layers)} stay as they are: their attention had lost some of its heads before"


def _mixer(stack: Stack, task: RefitTask, layer: int) -> Any:
    """The mixer that stands for the attention at a layer."""
    hosted = stack.layers[task.record.layers.index(layer)].get_submodule(stack.family.attn)
    assert isinstance(hosted, HostedMixer)
    return hosted.mixer


def _scaled(task: RefitTask, layers: Sequence[int]) -> Tensor:
    """Scale the columns of the output projections of the mixers at some layers by head; returns by how much [L, H]."""
    stack, ours = Stack(task.teacher), Stack(task.student)
    path, cache, width = stack.family.attn, stack.family.cache_key, stack.dims.head_dim
    hosted = [ours.layers[task.record.layers.index(layer)].get_submodule(path) for layer in layers]
    mixers = [_mixer(ours, task, layer) for layer in layers]
    outs = [stack.layers[layer].get_submodule(stack.family.out) for layer in layers]
    sums = torch.zeros(len(layers), 2, outs_of(mixers[0]) // width, dtype=torch.float64, device=task.device)

    def visit(index: int, call: Call, _output: Any) -> None:
        wanted = heard[0]
        with _hearing([mixers[index].get_submodule(OUT)]) as own:
            hosted[index](*call.args, **{key: value for key, value in call.kwargs.items() if key != cache})
        y, m = (x.double().unflatten(-1, (-1, width)) for x in (wanted, own[0]))
        sums[index] += torch.stack([(y * m).sum((0, 1, 3)), m.square().sum((0, 1, 3))])
        heard.clear()

    for batch in task.fit:
        with _hearing(outs) as heard:
            follow(stack, batch.to(task.device), _spans(stack, layers), visit)
    task.ranks.add(sums)
    scales = (sums[:, 0] / sums[:, 1].clamp_min(torch.finfo(torch.float64).tiny)).clamp(*SCALES)
    for mixer, scale_H in zip(mixers, scales, strict=True):
        weight = mixer.get_submodule(OUT).weight
        weight.mul_(scale_H.repeat_interleave(width).to(weight.dtype))
    return scales


def outs_of(mixer: Any) -> int:
    """Channels that a mixer gives to its output projection."""
    return int(mixer.get_submodule(OUT).in_features)


def _spans(stack: Stack, layers: Sequence[int]) -> list[tuple[nn.Module, nn.Module]]:
    return [(stack.layers[layer].get_submodule(stack.family.attn),) * 2 for layer in layers]


@contextmanager
def _hearing(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What goes into some modules inside the context, in the order in which they are called."""
    heard: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        heard.append(args[0])

    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _attended(task: RefitTask, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean look-back in tokens, and entropy over that of uniform rows, of the teacher's heads, each [L, H]."""
    stack = Stack(task.teacher)
    found: list[Tensor | None] = [None] * len(layers)

    def visit(index: int, _call: Call, output: Any) -> None:
        weights = output[1]
        if weights is None:
            raise ValueError("refit=calibrate: the teacher's attention gives no weights in this family: leave it out")
        new, old = _statistics(weights, places), found[index]
        found[index] = new if old is None else old + new

    with attention_weights(stack):
        for batch in task.fit:
            places = positions_in(batch.to(task.device), stack.separator)
            follow(stack, batch.to(task.device), _spans(stack, layers), visit)
    sums = torch.stack([one for one in found if one is not None])  # [L, 3, H]
    task.ranks.add(sums)
    mass, reach, entropy = sums.cpu().unbind(1)
    if not mass.amax(1).all():
        raise ValueError(
            "refit=calibrate: nowhere in the calibration text does the teacher look at another token than the first of "
            f"a document: windows of {task.fit[0].shape[1]} tokens tell nothing of its gates; raise data.seq_len, or "
            "leave calibrate out of refit=[...]"
        )
    mass = mass.clamp_min(torch.finfo(torch.float64).tiny)
    return reach / mass, (entropy / mass).clamp(0, 1)


def _statistics(weights_BHTT: Tensor, places: Tensor) -> Tensor:
    """Sums over rows, weighted by what a row does not give to the first token: of that weight, look-back and entropy.

    [3, H], float64. A row's entropy is over log t, that of uniform weights on its t tokens but the first. `places` of
    the tokens in their documents [B or 1, T]: each has a first token of its own.
    """
    every = [_of_heads(part, places) for part in weights_BHTT.split(1, dim=1)]  # T x T doubles: one head at a time
    return torch.cat(every, dim=1)


def _of_heads(weights_BHTT: Tensor, places: Tensor) -> Tensor:
    """`_statistics` of some heads."""
    place = places[:, None]
    # the first row that could look at two such tokens is the third
    weights = weights_BHTT.double() * ((place > 0)[..., None, :] & (place > 1)[..., None])
    spot = torch.arange(weights.shape[-1], device=weights.device)
    back = (spot[:, None] - spot).clamp_min(0)
    mass = weights.sum(-1)
    shares = weights / mass.clamp_min(torch.finfo(torch.float64).tiny)[..., None]
    entropy = torch.special.entr(shares).sum(-1) / place.clamp_min(2).double().log()
    return torch.stack([(x * mass).sum((0, 2)) for x in (torch.ones_like(mass), (shares * back).sum(-1), entropy)])
