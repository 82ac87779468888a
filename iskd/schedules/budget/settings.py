"""What a budget is told: how large or fast the student may be, what may be done to layers, what choosing may cost."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from iskd.system.typed_values import read_value

LIMITS = ("params", "bytes", "cache_bytes", "prefill_ms", "decode_ms")
"""Keys of `budget` that bound a student; every plan is told what it costs in each that was measured."""
TIMES = ("prefill_ms", "decode_ms")
SHARES = ("params", "bytes", "cache_bytes")
"""Those of which a number up to 1 is a share."""
_CONTEXT = 1024
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")

Amount = float | str
"""A number, or a text such as 75%."""


def as_keys(limits: Mapping[str, object]) -> str:
    """Limits as they were asked for, e.g. budget.params=0.8 and budget.decode_ms=70%."""
    return " and ".join(f"budget.{key}={value}" for key, value in limits.items())


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How large or fast a student may be, and what may be done to each of its layers for it.

    A limit is a number or a share of the teacher's: 75% of any of them, or of `params`, `bytes` and `cache_bytes` a
    number up to 1. Shares of `params` and `bytes` are of the blocks alone; numbers are of the whole student, embeddings
    included.

    Attributes:
        params: parameters.
        bytes: of the weights, in the type that they are exported in.
        cache_bytes: of the KV cache and of mixers' states, after `context` tokens of `batch` sequences.
        prefill_ms: milliseconds for reading `context` tokens of `batch` sequences, on the device of the run.
        decode_ms: milliseconds for one more token of each after them.
        context: tokens at which cache and time count; None = 1,024, or the teacher's context where that is shorter.
        batch: sequences at which they count.
        native: only students that plain transformers opens, and vLLM and llama.cpp as far as is known.
        options: what there is to choose from beside keeping a layer, by name: `edit` (replace, remove, merge, convert)
            with `block` or `mixer` and the other keys of that edit.
        use: names of the options that are chosen from; None = all that this teacher and device can have.
        fit_tokens, held_tokens: calibration tokens that every option is fitted to, and that judge its fit.
        score_tokens: further ones, for the KL of students.
        race_tokens: of these, for scores of single options; None = all.
        stride: every so many-th position of them is scored where single layers are compared.
        epochs, lr: local training of every option behind its fit in closed form; 0 epochs = none.
        rounds: how often the best plan's surroundings are scored again, and a better plan looked for there; 0 = no
            scores but those of single options, beside layers that are out too.
        plans: so many of the best plans are built and measured before one is taken.
        finalists: twice as many are fitted as the run will do it, and refitted on a quarter of the text that options
            are fitted to, and half as many on all of it; the nearest one then is taken. 0 or 1 = none, the best of the
            library's blocks.
        pairs: pairs of neighbouring edits, at most, whose common KL is measured for a plan.
        library: folder of the fitted options; None = one of its own below `cache_dir`.
        plan: a plan file of `iskd search`, which is carried out as it is; nothing is searched for.

    Raises:
        ValueError: a value that cannot work; the message names its key.
    """

    params: Amount | list[Amount] | None = None
    bytes: Amount | list[Amount] | None = None
    cache_bytes: Amount | list[Amount] | None = None
    prefill_ms: Amount | list[Amount] | None = None
    decode_ms: Amount | list[Amount] | None = None
    context: PositiveInt | None = None
    batch: PositiveInt = 1
    native: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    use: list[str] | None = None
    fit_tokens: PositiveInt = 8192
    held_tokens: PositiveInt = 2048
    score_tokens: PositiveInt = 4096
    race_tokens: PositiveInt | None = None
    stride: PositiveInt = 4
    epochs: NonNegativeInt = 1
    lr: PositiveFloat = 1e-4
    rounds: NonNegativeInt = 2
    plans: PositiveInt = 3
    finalists: NonNegativeInt = 4
    pairs: NonNegativeInt = 16
    library: str | None = None
    plan: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        for key in ("context", "batch", "fit_tokens", "held_tokens", "score_tokens", "race_tokens", "stride", "plans"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"budget.{key} must be at least 1, got {getattr(self, key)}")
        for key in ("epochs", "rounds", "finalists", "pairs"):
            if getattr(self, key) < 0:
                raise ValueError(f"budget.{key} must not be negative, got {getattr(self, key)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"budget.lr={self.lr}: give a positive rate")
        for key in LIMITS:
            for value in _listed(getattr(self, key)):
                _amount(key, value)
        several = [key for key in LIMITS if isinstance(getattr(self, key), list | tuple)]
        if len(several) > 1:
            raise ValueError(f"budget.{several[0]} and budget.{several[1]} are both lists: give one of them one value")
        if any(not getattr(self, key) for key in several):
            raise ValueError(f"budget.{several[0]}=[] is no budget: give at least one value")

    @property
    def asked(self) -> dict[str, Amount]:
        """The limits that are set, as they were given. Raises ValueError where one is a list, or none is set."""
        found = {key: getattr(self, key) for key in LIMITS if getattr(self, key) is not None}
        for key, value in found.items():
            if isinstance(value, list | tuple):
                raise ValueError(
                    f"budget.{key}={list(value)}: a run has one budget; iskd search solves several from one library"
                )
        if not found:
            raise ValueError(
                "budget: say how large or fast the student may be, with budget.params=0.75, budget.bytes, "
                "budget.cache_bytes, budget.prefill_ms or budget.decode_ms"
            )
        return {key: int(value) if _is_whole(value) else value for key, value in found.items()}

    @property
    def each(self) -> list[Budget]:
        """One budget for every value of the limit that is a list; itself where none is."""
        for key in LIMITS:
            value = getattr(self, key)
            if isinstance(value, list | tuple):
                return [replace(self, **{key: one}) for one in value]
        return [self]

    def at(self, longest: int | None, bound: str) -> Budget:
        """This budget with a context in tokens, for a model of so many at most.

        Raises ValueError where a longer one was asked for.
        """
        if self.context is None:
            return replace(self, context=_CONTEXT if longest is None else min(_CONTEXT, longest))
        if longest is not None and self.context > longest:
            raise ValueError(f"budget.context={self.context} is longer than {bound}: lower it")
        return self

    @property
    def timed(self) -> bool:
        """Whether a limit is one of time."""
        return any(getattr(self, key) is not None for key in TIMES)


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value > 1 and value.is_integer()


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [] if value is None else [value]


def _amount(key: str, value: Any) -> tuple[float, bool]:
    """A limit, and whether it is a share. Raises ValueError where it is none."""
    percent = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    if key.endswith("bytes") and isinstance(value, str):
        value = value.strip().removesuffix("B")  # 200MB is 200M
    try:
        number = float(percent[1]) / 100 if percent else read_value(key, value, float)
    except ValueError:
        number = math.nan
    share = bool(percent) or (key in SHARES and number <= 1)
    if not 0 < number < math.inf or (share and number > 1):
        usual = "0.75, 75% or a number above 1" if key in SHARES else "milliseconds, or a share of the teacher's as 75%"
        raise ValueError(f"budget.{key}={value!s:.80} is no budget: give {usual}")
    return number, share


def limit_of(key: str, value: Amount, whole: float, blocks: float) -> float:
    """A limit as an amount of the whole student.

    Args:
        key: one of `LIMITS`.
        value: as it was given.
        whole: the teacher's amount.
        blocks: that of its blocks alone, of which a share is taken.
    """
    number, share = _amount(key, value)
    return whole - blocks + number * blocks if share else number
