"""The student with its weights in fewer bits: what that does to its bytes, its perplexity and its speed.

Weight-only, by torchao's `quantize_` with its own settings for 8 and for 4 bits: every linear map but the head, which
shares its weight with the embedding in many models and would then be stored twice. Maps that are no `torch.nn.Linear`
(GPT-2's) stay as they are. 4 bits have a scale for every 128 inputs, or 64 or 32 where these alone divide their number;
a map of another number of inputs stays as it is, on a CPU also one whose outputs 16 does not divide. Without kernels
for it, as on most CPUs, weights are unpacked for every product: fewer bytes, and no more speed. Nothing is trained, and
the student itself stays as it is.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.evaluation.efficiency import measure
from iskd.evaluation.likelihood import Step
from iskd.evaluation.results import Quantized
from iskd.evaluation.text import TextWindows, text_loss
from iskd.models import Stack
from iskd.models.weights import served
from iskd.system.precision import serving_dtype

_log = logging.getLogger(__name__)
KINDS = ("int8", "int4")
_GROUPS = (128, 64, 32)  # inputs that share a scale in 4 bits: what torchao has kernels for
_ROWS = 16  # outputs that its kernel for CPUs takes at a time
_CONTEXT, _DECODED = 64, 16  # tokens


def check(kinds: Sequence[str], has_text: bool) -> None:
    """Raise ValueError for a kind that there is not, without a text, and without torchao."""
    if not kinds:
        return
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"eval.quantize={kind!r} is unknown: choose from {', '.join(KINDS)}")
    if not has_text:
        raise ValueError("eval.quantize compares perplexities: name a text that was not trained on, eval.text=FILE")
    if find_spec("torchao") is None:
        raise ValueError("eval.quantize needs torchao, which is not installed: pip install torchao")


def quantized(
    model: PreTrainedModel, windows: TextWindows | None, kinds: Sequence[str], *, batch_tokens: int, step: Step
) -> tuple[Quantized, ...]:
    """The student as it would be served, and so in fewer bits; without autocast, which is not how it is served.

    Args:
        model: the student; left as it was.
        windows: the text.
        kinds: names of `KINDS`.
        batch_tokens: of the text, at a time.
        step: told how far it is.

    Returns:
        A row for the model as it is, and one for every kind, without numbers where this machine cannot have it; none
        where no kind is asked for.
    """
    if not kinds or windows is None:
        return ()
    device = next(model.parameters()).device
    with torch.autocast(device.type, enabled=False), torch.no_grad():
        plain = served(model, serving_dtype(device))
        dtype = str(plain.dtype).removeprefix("torch.")
        as_it_is = Quantized(
            dtype, weight_bytes(plain), text_loss(plain, windows, batch_tokens=batch_tokens, step=step).perplexity
        )
        rows = []
        for kind in kinds:
            try:
                packed = packed_as(kind, plain)
                loss = text_loss(packed, windows, batch_tokens=batch_tokens, step=step)
                ours, theirs = _speeds(plain, packed)
            except (
                ArithmeticError,
                AssertionError,
                ImportError,
                NotImplementedError,
                RuntimeError,
                ValueError,
            ) as error:
                why = " ".join(str(error).split())[:200] or type(error).__name__
                _log.warning("eval.quantize=%s was not measured on this machine: %s", kind, why)
                rows.append(Quantized(kind, why=why))
                continue
            rows.append(Quantized(kind, weight_bytes(packed), loss.perplexity, theirs))
            as_it_is = Quantized(dtype, as_it_is.bytes, as_it_is.perplexity, ours)
        return (as_it_is, *rows)


def packed_as(kind: str, model: PreTrainedModel) -> PreTrainedModel:
    """A copy with its weights in fewer bits.

    Raises:
        ValueError: it has no map that torchao could take, or torchao has no kernel for this device.
    """
    from torchao import quantization

    packed = copy.deepcopy(model)
    head, device = packed.get_output_embeddings(), next(packed.parameters()).device.type
    taken: dict[int, set[int]] = {}
    for part in packed.modules():
        # torchao leaves a map whose inputs its groups do not divide as it is, and says nothing
        if isinstance(part, nn.Linear) and part is not head and (group := _group(kind, device, part)):
            taken.setdefault(group, set()).add(id(part))
    if not taken:
        which = " of a size that 4 bits take" if kind == "int4" else ""
        raise ValueError(f"the model has no torch.nn.Linear{which} beside its head")
    for group, parts in taken.items():
        config = _config(kind, device, group)
        quantization.quantize_(packed, config, filter_fn=lambda part, _name, parts=parts: id(part) in parts)
    return packed


def _group(kind: str, device: str, part: nn.Linear) -> int:
    """How many inputs share a scale; 0 for a map that cannot be packed."""
    if kind == "int8":
        return part.in_features
    if device == "cpu" and part.out_features % _ROWS:
        return 0
    return next((group for group in _GROUPS if part.in_features % group == 0), 0)


def _config(kind: str, device: str, group: int) -> Any:
    """The settings that torchao recommends. Raises ValueError for 4 bits on a device without kernels for them."""
    from torchao import quantization

    if kind == "int8":
        return quantization.Int8WeightOnlyConfig()
    if device == "cuda":
        return quantization.Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d")
    if device != "cpu":
        raise ValueError("torchao's kernels for 4 bits are for CUDA devices and CPUs")
    try:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    except ImportError:
        raise ValueError("4 bits on a CPU need torchao 0.18 or newer: pip install --upgrade torchao") from None
    return PrototypeInt4WeightOnlyConfig(group_size=group, set_inductor_config=False)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, each once; those of a packed one are of what it is packed in."""
    return sum(map(_bytes, {id(weight): weight for weight in model.parameters()}.values()))


def _bytes(tensor: Tensor) -> int:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None or type(tensor) in (Tensor, nn.Parameter):
        return tensor.nbytes
    return sum(_bytes(getattr(tensor, name)) for name in flatten()[0])


def _speeds(plain: PreTrainedModel, packed: PreTrainedModel) -> tuple[float, float]:
    """Tokens per second of both, written in turns."""
    limit = Stack(plain).limit
    context = _CONTEXT if limit is None else max(1, min(_CONTEXT, limit - _DECODED))
    found = measure({"teacher": plain, "student": packed}, contexts=[context], decode_tokens=_DECODED, repeats=3)
    both = [found.models[name].contexts[0].decode_seconds_per_token for name in ("teacher", "student")]
    return 1 / both[0], 1 / both[1]
