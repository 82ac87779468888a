"""The recurrence by the Triton kernels of fla (flash-linear-attention, package fla-core >= 0.6).

    decay g          without delta rule     with delta rule
    none             chunk_simple_gla       chunk_delta_rule
    scalar           chunk_simple_gla       chunk_gated_delta_rule
    vector           chunk_gla              chunk_kda

They take half precision on CUDA and keys of at most 256 features. A bonus and documents packed in a row stay in torch.
`ISKD_FLA=0` in the environment keeps everything there. On Hopper (H100, H200) fla refuses the gradient of its kernels
with a scalar decay under Triton 3.4.0 to 3.7.0, which compile it wrongly: those calls stay in torch too.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from iskd.mixers.ops.inputs import Recurrence

_log = logging.getLogger(__name__)

MAX_WIDTH = 256
# fla refuses odd widths in half precision (Triton miscompiles masked tails), and a normaliser's column of ones makes
# widths odd. Eight numbers are 16 bytes, what one load takes.
WIDTH_STEP = 8


def serve(x: Recurrence, state_BGKV: Tensor | None = None) -> bool:
    """Whether `chunk` takes these inputs now: half precision of one kind, CUDA, width, fla there and wanted."""
    half = x.q.dtype in (torch.bfloat16, torch.float16) and x.q.dtype == x.k.dtype == x.v.dtype
    fits = x.q.is_cuda and x.k.shape[-1] <= MAX_WIDTH
    if not (half and fits and os.environ.get("ISKD_FLA") != "0" and ops() is not None):
        return False
    if x.g is None or x.g.dim() != 3 or not torch.is_grad_enabled():
        return True
    learns = any(each is not None and each.requires_grad for each in (x.q, x.k, x.v, x.g, x.beta, state_BGKV))
    return not (learns and refuses_scalar_gradients())


@cache
def refuses_scalar_gradients() -> bool:
    """Whether fla refuses the gradient of a scalar decay on this machine, by its own flags; a True is logged once.

    `chunk_bwd_dqkwg` in fla/ops/common/chunk_o.py raises by these flags. Versions before 0.5.2 lack the last one and
    refuse under every Triton from 3.4.0 on.
    """
    try:
        from fla import utils
    except ImportError:
        return False
    flags = ("IS_NVIDIA_HOPPER", "TRITON_ABOVE_3_4_0", "TRITON_ABOVE_3_7_1")
    hopper, broken, mended = (bool(getattr(utils, name, False)) for name in flags)
    refused = hopper and broken and not mended
    if refused:
        _log.warning(
            "mixers with one decay per head (retnet, mamba2, mlstm, gated_deltanet) train in torch here, not by the "
            "faster kernels of fla: on Hopper, fla refuses their gradient under Triton 3.4.0 to 3.7.0; install "
            "Triton 3.7.1 or later"
        )
    return refused


@cache
def ops() -> ModuleType | None:
    """The package fla.ops, or None where it, Triton or einops is missing (the extra `gpu` installs them)."""
    try:
        import fla.ops
    except ImportError:
        return None
    package: ModuleType = fla.ops
    return package


def chunk(x: Recurrence, state_BGKV: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, V] and the last state [B, G, K, V] in float32; arguments as in `recurrence.chunk`.

    Gates and states stay in float32. The kernels know one key head per query head, so key heads are repeated.
    """
    repeats = x.q.shape[2] // x.k.shape[2]
    k, v = (each.repeat_interleave(repeats, 2) for each in (x.k, x.v))
    given = {"g": x.g, "beta": x.beta}
    gates = {name: gate.float().repeat_interleave(repeats, 2) for name, gate in given.items() if gate is not None}
    width, values = k.shape[-1], v.shape[-1]
    more_k, more_v = -width % WIDTH_STEP, -values % WIDTH_STEP
    q, k, v = F.pad(x.q, (0, more_k)), F.pad(k, (0, more_k)), F.pad(v, (0, more_v))
    if x.g is not None and x.g.dim() == 4:
        gates["g"] = F.pad(gates["g"], (0, more_k))
    initial = None
    if state_BGKV is not None:
        initial = F.pad(state_BGKV.float().repeat_interleave(repeats, 1), (0, more_v, 0, more_k))
    kernel = getattr(ops(), _name(x.g, x.beta))
    o, state = kernel(q, k, v, **gates, scale=x.scale, initial_state=initial, output_final_state=True)
    return o[..., :values].float(), state[:, ::repeats, :width, :values]


def _name(g: Tensor | None, beta: Tensor | None) -> str:
    """The kernel for this kind of decay and rule; see the table above."""
    if beta is None:
        return "chunk_gla" if g is not None and g.dim() == 4 else "chunk_simple_gla"
    if g is None:
        return "chunk_delta_rule"
    return "chunk_gated_delta_rule" if g.dim() == 3 else "chunk_kda"
