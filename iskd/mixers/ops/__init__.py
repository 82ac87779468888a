"""The recurrence of all subquadratic mixers, in torch and by fla's kernels, and attention in a window.

Tensors in, tensors out; no module.

Imports: nothing of iskd.
"""

from __future__ import annotations

from iskd.mixers.ops.inputs import Recurrence
from iskd.mixers.ops.recurrence import chunk, matrix, step

__all__ = ["Recurrence", "chunk", "matrix", "step"]
