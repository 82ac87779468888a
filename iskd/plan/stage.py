"""One stage: its edits, what trains at which rate, and for how many tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from iskd.plan.edits import Edit

TARGETS = ("attention", "mlp", "all")
_MAX = 1_000_000
_MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class LoraSpec:
    """Adapters of low rank (LoRA, arXiv 2106.09685): a map W becomes W + alpha / rank * B A.

    Attributes:
        rank: rows of A [rank, in] and columns of B [out, rank]; a map with fewer inputs or outputs gets that many.
        alpha: strength of the update; with alpha / rank constant, a learning rate serves several ranks.
        targets: which maps of the blocks: `attention` (or the mixer in its place), `mlp` (all others), `all`.
        seed: of the first values of A.

    Raises:
        ValueError: a value that cannot work; the message names its key.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values; they may come from anybody's file."""
        if not _is_whole(self.rank) or not 1 <= self.rank <= _MAX:
            raise ValueError(
                f"schedule.lora.rank must be an integer from 1 to {_MAX} (4 to 64 are usual), got {self.rank!r:.80}"
            )
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 < self.alpha <= _MAX:
            raise ValueError(
                f"schedule.lora.alpha must be positive and at most {_MAX} (twice the rank is usual), "
                f"got {self.alpha!r:.80}"
            )
        if self.targets not in TARGETS:
            raise ValueError(f"schedule.lora.targets={self.targets!r:.80}: choose one of {', '.join(TARGETS)}")
        if not _is_whole(self.seed) or not 0 <= self.seed <= _MAX_SEED:
            raise ValueError(f"schedule.lora.seed must be an integer from 0 to {_MAX_SEED}, got {self.seed!r:.80}")

    @classmethod
    def of(cls, values: Any) -> LoraSpec:
        """Read plain values. Raises ValueError on an unknown key or a value that cannot work."""
        if not isinstance(values, Mapping):
            raise ValueError(f"schedule.lora must be an object such as {{rank: 8}}, got {values!r:.80}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(f"schedule.lora has no key {unknown[0]!r:.80}; it takes {', '.join(known)}")
        return cls(**values)


def lora_of(values: Mapping[str, Any] | None, train: str, seed: int = 0) -> LoraSpec:
    """The adapters of a schedule.

    Args:
        values: what was asked for; None = the defaults.
        train: what the schedule's stages train.
        seed: of the run; `values` may name another one.

    Raises:
        ValueError: a value that cannot work, or adapters were asked for that no stage would have.
    """
    asked = LoraSpec.of(values or {})
    if train != "lora" and asked != LoraSpec():
        raise ValueError(
            f"schedule.lora={dict(values or {})} is for schedule.train=lora, and schedule.train={train}; set "
            "schedule.train=lora, or drop schedule.lora"
        )
    return LoraSpec.of({"seed": seed, **(values or {})})


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


TRAIN = ("all", "edited", "new", "adjacent", "lora")
OBJECTIVES = ("loss", "matrix", "mixer_output", "hidden")
SHAPES = ("", "constant", "linear", "cosine", "wsd")


@dataclass(frozen=True)
class Stage:
    """Edits, what trains and how fast, and a budget.

    Attributes:
        name: label in logs, tables and plots.
        edits: applied in order at the start of the stage.
        tokens: training tokens of this stage over all ranks (0 = edit only).
        train: which parameters train: `all`, `edited` (every edited layer so far), `new` (this stage's edits),
            `adjacent` (this stage's edits and the surviving neighbours), `lora` (adapters of low rank, merged at the
            end of the stage, and this stage's new blocks), or a regular expression on parameter names.
        lr: learning rate of everything that trains but the new blocks.
        lr_new: learning rate of the blocks and mixers that this stage inserts.
        fit: fit the inserted blocks to the replaced ones on calibration tokens before training.
        lora: the adapters of `train=lora`.
        objective: what training minimises: the configured `loss` terms, or layer by layer on the teacher's own inputs
            (`iskd.training.step.alignment`) the distance of mixing `matrix`, `mixer_output` or the block's `hidden`
            output.
        shape: how the rates of this stage fall, see `iskd.training.step.optimizer.OptimSpec.decay`; "" = as configured
            there.
    """

    name: str
    edits: tuple[Edit, ...] = ()
    tokens: int = 0
    train: str = "all"
    lr: float = 1e-4
    lr_new: float = 3e-4
    fit: bool = True
    lora: LoraSpec = field(default_factory=LoraSpec)
    objective: str = "loss"
    shape: str = ""
