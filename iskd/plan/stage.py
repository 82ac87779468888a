"""One stage: its edits, what trains at which rate, and for how many tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

from iskd.plan.edits import MAX_LAYERS, Edit, Record
from iskd.system.files import MAX_NUMBER
from iskd.system.reading import Count, is_integer, is_number, must_be, one_of, read_as

TARGETS = ("attention", "mlp", "all")
_MAX = 1_000_000
_MAX_WAYS = 500_000
_MAX_NAME = 256

_Rank = Annotated[
    int,
    must_be(f"an integer from 1 to {_MAX} (4 to 64 are usual)", lambda it: is_integer(it) and 1 <= it <= _MAX),
]
_Alpha = Annotated[
    float,
    must_be(f"positive and at most {_MAX} (twice the rank is usual)", lambda it: is_number(it) and 0 < it <= _MAX),
]
_Rate = Annotated[float, must_be("a finite number >= 0", lambda it: is_number(it) and 0 <= it <= MAX_NUMBER)]
_Share = Annotated[float, must_be("in [0, 1]", lambda it: is_number(it) and 0 <= it <= 1)]


@dataclass(frozen=True)
class LoraSpec:
    """Adapters of low rank (LoRA, arXiv 2106.09685): a map W becomes W + alpha / rank * B A.

    Attributes:
        rank: rows of A [rank, in] and columns of B [out, rank]; a map with fewer inputs or outputs gets that many.
        alpha: strength of the update; with alpha / rank constant, a learning rate serves several ranks.
        targets: which maps of the blocks: `attention` (or the mixer in its place), `mlp` (all others), `all`.
        seed: of the first values of A.
    """

    rank: _Rank = 8
    alpha: _Alpha = 16.0
    targets: Annotated[str, one_of(TARGETS)] = "all"
    seed: Count = 0

    @classmethod
    def of(cls, values: Any) -> LoraSpec:
        """Read plain values. Raises ValueError on an unknown key or a value that cannot work; it names the key."""
        return read_as(cls, values, "schedule.lora", joint=".")


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


TRAIN = ("all", "edited", "new", "adjacent", "lora")
OBJECTIVES = ("loss", "matrix", "mixer_output", "hidden")
SHAPES = ("", "constant", "linear", "cosine", "wsd")


def _whole(tokens: Any) -> Any:
    """A budget written as 1e6 is a float in YAML and in JSON."""
    return int(tokens) if isinstance(tokens, float) and tokens.is_integer() else tokens


def _trainable(text: str) -> str:
    """Check a word of `TRAIN` or a regular expression, and that trying it on a parameter name ends soon.

    Matching tries every way of splitting a name among repeats and alternatives, so their number is bounded: about 50
    positions for a repeat, 2 for an optional piece, the branches of each group. A repeated group has no such bound.
    """
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{text!r:.80} is neither {'/'.join(TRAIN)} nor a regular expression: {error}") from None
    simple = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "a", text, flags=re.DOTALL)
    groups = re.sub(r"\(\?", "(", simple)
    ways = 50 ** len(re.findall(r"[*+{]", groups)) * 2 ** groups.count("?")
    ways *= math.prod(group.count("|") + 1 for group in groups.split("("))
    if ways > _MAX_WAYS or re.search(r"\)[*+{]", groups):
        raise ValueError(
            f"{text!r:.80} could take hours to match: use at most three of * + {{, and none of them on a group"
        )
    return text


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
        lr_new: learning rate of the blocks and mixers that this stage inserts. For both, edits of the stages before it
            that trained nothing are its own (`fresh`).
        fit: fit the inserted blocks to the replaced ones on calibration tokens before training.
        lora: the adapters of `train=lora`.
        objective: what training minimises: the configured `loss` terms, or layer by layer on the teacher's own inputs
            (`iskd.training.step.alignment`) the distance of mixing `matrix`, `mixer_output` or the block's `hidden`
            output.
        shape: how the rates of this stage fall, see `iskd.training.step.optimizer.OptimSpec.decay`; "" = as configured
            there.
        refit_share: share of the refits' calibration text that is read after these edits; 0 = they are not carried out.
        refit_budget: training tokens whose time the refits are to take, by more or less text than they ask for; 0 = as
            much as they ask for.
        step: which one of several schedules it comes from (`schedule=mixed`), from 0.
        untrained: how many edits right before its own no stage has trained: to training they are of this stage.
    """

    name: Annotated[str, Field(max_length=10_000)]
    edits: Annotated[tuple[Edit, ...], Field(max_length=3 * MAX_LAYERS)] = ()
    tokens: Annotated[Count, BeforeValidator(_whole)] = 0
    train: Annotated[str, Field(max_length=_MAX_NAME), AfterValidator(_trainable)] = "all"
    lr: _Rate = 1e-4
    lr_new: _Rate = 3e-4
    fit: bool = True
    lora: Annotated[LoraSpec, PlainValidator(LoraSpec.of)] = field(default_factory=LoraSpec)
    objective: Annotated[str, one_of(OBJECTIVES)] = "loss"
    shape: Annotated[str, one_of(SHAPES)] = ""
    refit_share: _Share = 1.0
    refit_budget: Annotated[Count, BeforeValidator(_whole)] = 0
    step: Count = 0
    untrained: Count = 0

    def fresh(self, record: Record) -> tuple[Edit, ...]:
        """Edits that its training is the first to follow: its own, after those of stages before it without training.

        `record` ends with its edits.
        """
        start = len(record.edits) - len(self.edits)
        return (*record.edits[start - self.untrained : start], *self.edits)
