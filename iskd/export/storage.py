"""The type in which a student's weights are stored, and what rounding to it costs.

Students train in float32; their teachers are mostly published in half of that. An export has the type that the
teacher's weights were stored in, or the one that `export.dtype` names. Norms and biases are stored in it as well, as
the families' own checkpoints have them. Buffers stay as they are, and so does what a module lists in `keep_float32`:
numbers that stand in the exponent of a decay, such as `A_log`, where rounding is multiplied by the distance in tokens.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.models.weights import stored_as
from iskd.system import Json

STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENS = 512  # of the text on which rounding is measured
_AT_ONCE = 64  # tokens whose logits are held in float64


@dataclass(frozen=True)
class Rounding:
    """What storing cost, in the words of `export.json`.

    Attributes:
        dtype: of the weights as they are stored.
        rounded: how many numbers are others than before.
        kl: from the student as it was trained to the one that is stored, nats a token; 0 where nothing was rounded.
        tokens: over how many tokens, 0 where nothing was rounded.
        text: what text these were.
    """

    dtype: str
    rounded: int = 0
    kl: float = 0.0
    tokens: int = 0
    text: str = ""

    def to_json(self) -> Json:
        """Plain JSON."""
        return asdict(self)


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16` of `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def rounded(model: PreTrainedModel, dtype: torch.dtype) -> tuple[PreTrainedModel, int]:
    """The model with its parameters as they are stored, on the CPU, and how many numbers that changes.

    What is tied stays tied. The model itself is not touched; where it is in that type already, it is what is returned.

    Raises:
        ValueError: a number is larger than the type holds; the message names the weight.
    """
    new: dict[int, nn.Parameter | Tensor] = {}
    changed, casts = 0, False
    for name, value, wanted in stored_as(model, dtype):
        small = value.detach().to("cpu", wanted)
        casts |= wanted != value.dtype
        if wanted.itemsize < value.dtype.itemsize or {wanted, value.dtype} == {torch.bfloat16, torch.float16}:
            before = value.detach().cpu()
            _check_range(name, before, small)
            changed += int((small.to(before.dtype) != before).logical_and(~before.isnan()).sum())
        new[id(value)] = nn.Parameter(small, requires_grad=value.requires_grad and small.is_floating_point())
    if not casts:
        return model, 0
    new |= {id(buffer): buffer.detach().to("cpu", copy=True) for buffer in model.buffers()}
    return copy.deepcopy(model, new), changed  # the copy takes these in the place of copies of its own


def _check_range(name: str, before: Tensor, after: Tensor) -> None:
    lost = after.isinf() & ~before.isinf()
    if lost.any():
        largest, kind = float(before[lost].abs().max()), name_of(after.dtype)
        wider = "export.dtype=float32" if after.dtype == torch.bfloat16 else "export.dtype=bfloat16 or float32"
        raise ValueError(
            f"{name} holds {largest:.6g}, and {kind} ends at {torch.finfo(after.dtype).max:.6g}: the student cannot be "
            f"stored as {kind}; set {wider} (with resume=RUN_DIR, nothing is trained again)"
        )


@torch.no_grad()
def rounding_of(
    trained: PreTrainedModel, stored: PreTrainedModel, dtype: torch.dtype, changed: int, windows_BT: Tensor, text: str
) -> Rounding:
    """Measure what rounding changed, on the first tokens of `windows_BT` [B, T]; `text` says what text they are."""
    if not changed:
        return Rounding(name_of(dtype))
    rows = max(1, _TOKENS // windows_BT.shape[1])
    ids = windows_BT[:rows, :_TOKENS]
    wide = copy.deepcopy(stored)
    for parameter in wide.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    where, total = next(trained.parameters()).device, 0.0
    for row in ids.unbind():
        with torch.autocast(where.type, enabled=False):
            before_TV = trained(row[None].to(where)).logits[0].float().cpu()
        after_TV = wide(row[None].cpu()).logits[0]
        for pair in zip(before_TV.split(_AT_ONCE), after_TV.split(_AT_ONCE), strict=True):
            # in float32 what float16 costs is less than the error of the sums
            before, after = (logits.double().log_softmax(-1) for logits in pair)
            total += float((before.exp() * (before - after)).sum())
    return Rounding(name_of(dtype), changed, max(0.0, total / ids.numel()), ids.numel(), text)
