"""Small modules that several mixers share: short convolution, rotary positions, norm and gate of the output, decays.

Fresh modules start where a copied attention is disturbed least: the convolution as the identity, the gate at 1, decays
near 1. What is copied then means something from the first step (arXiv 2408.10189 starts its mixers the same way).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from iskd.mixers.modules.limits import MAX_TEMPER, check_memory, check_number
from iskd.models.families import rotary_of

# silu(1.27846) = 1 and sigmoid(3) = 0.95: with weights of zero, where a gate starts
_GATES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "silu": (F.silu, 1.2784645427610738),
    "sigmoid": (torch.sigmoid, 3.0),
}


class ShortConv(nn.Module):
    """Depthwise causal convolution along the tokens; starts as the identity: the last tap 1, all others 0.

    It has no activation of its own, unlike those of the published mixers: behind a copied projection one would undo the
    copying (`mixer.conv_activation`, and `mixer.activation` of some, put one there).
    Called by `iskd.mixers.base.Context.conv`, which knows the inputs before the first token.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        taps = torch.zeros(channels, size)
        taps[:, -1] = 1.0
        self.weight = nn.Parameter(taps)

    @property
    def size(self) -> int:
        """Tokens that it sees, the present one included."""
        return self.weight.shape[1]

    def forward(self, window: list[Tensor]) -> Tensor:
        """The taps' sum over `window`: inputs [B, T, C] of `size - 1`, ..., 1 and 0 tokens ago."""
        total = window[-1] * self.weight[:, -1]
        for tap, x_BTC in enumerate(window[:-1]):
            total = total + x_BTC * self.weight[:, tap]
        return total.to(window[-1].dtype)


class Rotary:
    """The rotary positions of the teacher's family, made from its config.

    No module, so that neither a cast to bf16 nor the meta device reaches the frequencies. They are made on the CPU at
    once, for other devices on first use: what is made while a graph is drawn (torch.export) would hold no numbers.
    """

    def __init__(self, kind: type[nn.Module], config: PreTrainedConfig, layer_type: str | None = None) -> None:
        self._kind: Any = kind
        self._config = copy.deepcopy(config) if layer_type else config  # layers may leave, and their types with them
        self._of = rotary_of(config, layer_type)
        self._made: dict[torch.device, nn.Module] = {}
        self._for(torch.device("cpu"))

    def __call__(self, x_BTHK: Tensor, positions_BT: Tensor) -> Tensor:
        """Turn pairs (i, i + K'/2) of the first K' channels by their angle at the position; K' < K for some Phi."""
        cos, sin = (table.unsqueeze(2) for table in self._for(x_BTHK.device)(x_BTHK, positions_BT, *self._of))
        turned, rest = x_BTHK.split([cos.shape[-1], x_BTHK.shape[-1] - cos.shape[-1]], dim=-1)
        left, right = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat([-right, left], dim=-1) * sin
        return torch.cat([turned.to(x_BTHK.dtype), rest], dim=-1)  # OLMo 2 has its angles in float32

    def _for(self, device: torch.device) -> nn.Module:
        if device not in self._made:
            with torch.device(device), torch.inference_mode(False):
                self._made[device] = self._kind(self._config)
        return self._made[device]


class HeadNorm(nn.Module):
    """RMS norm (or layer norm, `centre`) of each head's output, with a weight per head and channel.

    It runs in the core's wide dtype: o is a sum over the whole past. `RecurrentMixer` sets where its weight starts.
    """

    def __init__(self, heads: int, width: int, *, centre: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, width))
        self.centre, self.eps = centre, eps

    @torch.no_grad()
    def size_to(self, v_proj: Tensor) -> None:
        """Start at 1/16 of the size that the values of each head have on a stream of variance 1.

        A quarter is what is left of a value when 16 unlike ones are averaged, as attention does; another quarter is
        what norms before an attention leave of the variance (SmolLM2-135M: weights of 0.04 to 0.42). At weight 1 the
        output would be many times that of the copied attention.

        Args:
            v_proj: weight of the values' projection [G * V, D].
        """
        size_G = v_proj.unflatten(0, (-1, self.weight.shape[1])).square().sum(-1).mean(-1).sqrt()
        size_H = size_G.repeat_interleave(self.weight.shape[0] // len(size_G))
        self.weight.copy_((size_H / 16)[:, None].expand_as(self.weight))

    def forward(self, o_BTHV: Tensor) -> Tensor:
        """Normalised o, dtype kept."""
        if self.centre:
            o_BTHV = o_BTHV - o_BTHV.mean(-1, keepdim=True)
        normed = o_BTHV * torch.rsqrt(o_BTHV.square().mean(-1, keepdim=True) + self.eps)
        return normed * self.weight.to(normed.dtype)


class OutputGate(nn.Module):
    """o * activation(W x + b), W zero and b such that the gate starts at 1 (silu) or 0.95 (sigmoid, which ends at 1).

    The published gates have random weights and no bias: a SiLU of small numbers, which would hide the copied values.
    """

    def __init__(self, stream: int, width: int, activation: str = "silu") -> None:
        super().__init__()
        self.activation, start = _GATES[activation]
        self.proj = nn.Linear(stream, width)
        nn.init.zeros_(self.proj.weight)
        nn.init.constant_(self.proj.bias, start)

    def forward(self, o_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """Gate every channel of every head by the mixer's input."""
        gate_BTHV: Tensor = self.activation(self.proj(x_BTD)).unflatten(-1, o_BTHV.shape[2:])
        return o_BTHV * gate_BTHV


def gate_proj(stream: int, out: int, *, rank: int | None = None, bias: float = 0.0, std: float = 0.01) -> nn.Module:
    """A projection [D] -> [out] for gates that all start near `bias`: weights are drawn with deviation `std`.

    With `rank`, through so many channels (GLA, arXiv 2312.06635, section 4.4). The weights are not zero, so that both
    factors get a gradient from the first step.
    """
    last = nn.Linear(stream if rank is None else rank, out)
    nn.init.normal_(last.weight, std=std)
    nn.init.constant_(last.bias, bias)
    return last if rank is None else nn.Sequential(nn.Linear(stream, rank, bias=False), last)


def last_bias(gate: nn.Module) -> nn.Parameter:
    """The bias [out] of a `gate_proj`, which says where its gates start."""
    last = gate[-1] if isinstance(gate, nn.Sequential) else gate
    return last.get_parameter("bias")


def logits_of_memory(tokens_C: Tensor, temper: float = 1.0) -> Tensor:
    """`logit_of_memory` of every channel; tokens above 0."""
    return -torch.expm1(temper / tokens_C).log()


def logit_of_memory(tokens: float, temper: float = 1.0) -> float:
    """The z with sigmoid(z)^(1/temper) = exp(-1/tokens): where a decay gate starts that forgets after `tokens` tokens.

    Raises ValueError when `tokens` or `temper` is out of its range (`iskd.mixers.modules.limits`).
    """
    check_memory(tokens)
    check_number("temper", temper, 1, MAX_TEMPER)
    # log(d / (1 - d)) of d = exp(-temper / tokens), without the cancellation
    return -math.log(math.expm1(temper / tokens))
