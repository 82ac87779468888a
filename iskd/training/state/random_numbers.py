"""The random number generators of a process as tensors."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def rng_tensors() -> dict[str, Tensor]:
    """State of this process's random number generators."""
    numpy_state: Any = np.random.get_state(legacy=True)
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
        "numpy": torch.from_numpy(np.append(numpy_state[1].astype(np.int64), numpy_state[2])),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng(states: Mapping[str, Tensor]) -> None:
    """Inverse of `rng_tensors`."""
    try:
        torch.set_rng_state(states["torch"])
        random.setstate((3, tuple(states["python"].tolist()), None))
        values = states["numpy"].numpy()
        # numpy takes any position and would read beyond its table
        if values.shape != (625,) or values.dtype != np.int64 or not 0 <= values[-1] <= 624:
            raise ValueError("numpy's state has 624 words and a position among them")
        np.random.set_state(("MT19937", values[:-1].astype(np.uint32), int(values[-1]), 0, 0.0))
    except (KeyError, TypeError, RuntimeError, OverflowError, ValueError) as error:
        raise ValueError(f"the saved random numbers cannot be used: {error!s:.200}") from error
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
