"""A selective scan token after token, on a CPU: what Mamba's recurrence costs when nothing is computed twice.

    h_t = a_t h_{t-1} + x_t B_t,  a_t = exp(dt_t rate)        o_t = C_t^T h_t        per channel

A step is one product and sum over [B, I, N] numbers that lie in the processor's cache; joining spans by doubling, which
suits a GPU, moves all of them through memory log T times. The backward pass runs the same recurrence from the end,

    g_t = o'_t C_t + a_{t+1} g_{t+1}

with the states of a chunk computed again, from the one that it began with. No logs are summed and nothing is divided.

Sizes: B sequences, T tokens, I channels, N numbers a channel keeps; in a chunk, C tokens lead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def scan(
    dt_BTI: Tensor,
    x_BTI: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    begins_BT: Tensor,
    rate_IN: Tensor,
    state_BIN: Tensor,
    size: int,
) -> tuple[Tensor, Tensor]:
    """O [B, T, I] and the last h [B, I, N]; a document begins with h = 0. All in one dtype but `begins_BT`, bool.

    Args:
        dt_BTI: step sizes, not negative.
        x_BTI: inputs.
        b_BTN: what inputs are written with.
        c_BTN: what states are read with.
        begins_BT: first tokens of documents.
        rate_IN: of decay, negative.
        state_BIN: h before the first token.
        size: tokens whose states [B, I, N] exist at a time; changes the speed, not the result.
    """
    o, last = _Scan.apply(dt_BTI, x_BTI, b_BTN, c_BTN, begins_BT, rate_IN, state_BIN, size)  # type: ignore[no-untyped-call]
    return o, last


def _first(x_BT: Tensor) -> Tensor:
    """Tokens lead, so that a step reads what lies side by side."""
    return x_BT.transpose(0, 1).contiguous()


def _states(
    dt_CBI: Tensor, x_CBI: Tensor, b_CBN: Tensor, begins_CB: Tensor, rate_IN: Tensor, before_BIN: Tensor
) -> tuple[Tensor, Tensor]:
    """Decays and states [C, B, I, N] of a chunk."""
    decay = (dt_CBI[..., None] * rate_IN).exp_().masked_fill_(begins_CB[..., None, None], 0.0)
    h = x_CBI[..., None] * b_CBN[:, :, None]
    for now, kept in zip(h.unbind(0), decay.unbind(0), strict=True):
        torch.addcmul(now, kept, before_BIN, out=now)
        before_BIN = now
    return decay, h


class _Scan(Function):
    @staticmethod
    def forward(
        ctx: Any, dt: Tensor, x: Tensor, b: Tensor, c: Tensor, begins: Tensor, rate: Tensor, state: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        rows = [_first(each) for each in (dt, x, b, c, begins)]
        befores, outputs = [state.contiguous()], []
        for dt_C, x_C, b_C, c_C, begins_C in zip(*(row.split(size) for row in rows), strict=True):
            _, h = _states(dt_C, x_C, b_C, begins_C, rate, befores[-1])
            outputs.append((h @ c_C[..., None]).squeeze(-1))
            befores.append(h[-1].clone())
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*rows, rate, *befores[:-1])
            ctx.size = size
        return torch.cat(outputs).transpose(0, 1), befores[-1]

    @staticmethod
    def backward(ctx: Any, o_BTI: Tensor, last_BIN: Tensor) -> Any:
        dt, x, b, c, begins, rate, *befores = ctx.saved_tensors
        chunks = zip(*(row.split(ctx.size) for row in (_first(o_BTI), dt, x, b, c, begins)), befores, strict=True)
        carried, by_rate = last_BIN, torch.zeros_like(rate)
        found: list[tuple[Tensor, ...]] = []
        for o_C, dt_C, x_C, b_C, c_C, begins_C, before in reversed(list(chunks)):
            decay, h = _states(dt_C, x_C, b_C, begins_C, rate, before)
            g = o_C[..., None] * c_C[:, :, None]
            g[-1] += carried
            steps = list(zip(g.unbind(0), decay.unbind(0), strict=True))
            for (now, kept), (earlier, _) in zip(steps[:0:-1], steps[-2::-1], strict=True):
                earlier.addcmul_(kept, now)
            carried = decay[0] * g[0]
            by_c = (o_C[:, :, None] @ h).squeeze(2)
            by_b = (x_C[:, :, None] @ g).squeeze(2)
            by_x = (g @ b_C[..., None]).squeeze(-1)
            # through the decay, in place of the states: g_t h_{t-1} a_t
            h[1:] = h[:-1].clone()
            h[0] = before
            slope = h.mul_(g).mul_(decay)
            by_rate += torch.einsum("tbin,tbi->in", slope, dt_C)
            found.append(((slope * rate).sum(-1), by_x, by_b, by_c))
        by_dt, by_x, by_b, by_c = (torch.cat(each[::-1]).transpose(0, 1) for each in zip(*found, strict=True))
        return by_dt, by_x, by_b, by_c, None, by_rate, carried, None
