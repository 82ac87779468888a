"""Bounds on the settings of a mixer. A record may come from anywhere: what is out of range is refused by its name.

Upper limits are beyond any use and within what memory and float32 hold: a decay of exp(-1e-6) is still below 1 there.
"""

from __future__ import annotations

MAX_MEMORY = 1e6
MAX_TEMPER = 100.0
MAX_TOKENS = 1_000_000  # in a window or a chunk
MAX_CONV = 1024
MAX_FEATURES = 128  # channels; their squares are 8,256 features
MAX_STEPS = 8  # delta rules a token
MAX_NU = 16  # neighbours in dpfp's products
MIN_EPS = 1e-12
MAX_TIMES = 4  # widths of the stream in a rank or a state


def check_count(name: str, value: int, least: int, most: int) -> None:
    """Raise ValueError unless `value`, what `mixer.<name>` was set to, is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"mixer.{name} must be a whole number from {least} to {most}, got {value!r:.50}")


def check_number(name: str, value: float, least: float, most: float) -> None:
    """Raise ValueError unless `value`, what `mixer.<name>` was set to, is a number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"mixer.{name} must be a number from {least:g} to {most:g}, got {value!r:.50}")


def check_memory(tokens: float) -> None:
    """Raise ValueError unless `mixer.memory`, in tokens, is from 1 to `MAX_MEMORY`."""
    check_number("memory", tokens, 1, MAX_MEMORY)


def check_width(name: str, value: int, stream: int) -> None:
    """Raise ValueError unless `mixer.<name>`, a number of channels, is from 1 to `MAX_TIMES` the stream's."""
    check_count(name, value, 1, MAX_TIMES * stream)
