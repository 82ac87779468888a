"""Device and precision of a pass outside the trainer."""

from __future__ import annotations

import torch


def precision(asked: str, accelerator: str) -> str:
    """`auto`: bf16 autocast on a GPU that has it and on a CPU with bf16 matrix units, else float32."""
    if asked.startswith("16"):
        raise ValueError(f"trainer.precision={asked}: fp16 overflows in distillation losses; use bf16-mixed or 32-true")
    if asked != "auto":
        return asked
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    return "bf16-mixed" if fast_bf16() else "32-true"


def fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AMX tiles or AVX-512 BF16); elsewhere float32 is faster."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check is not None and check() for check in checks)
