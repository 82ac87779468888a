"""Subquadratic students (arXiv 2504.14366): align the mixers, align the hidden states, distil end to end.

Shares of the tokens, rates and their shapes are those of the authors' configs: 2.6 / 5.3 / 92 % of 3 G tokens, as in
MOHAWK (arXiv 2408.10189), at 2e-4 and 2e-3 with a stable plateau, and 3e-4 falling linearly.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, ClassVar

from pydantic import PositiveFloat

from iskd.plan import Stage
from iskd.plan.stage import SHAPES
from iskd.schedules.base import Choice, History
from iskd.schedules.edits import ConvertTo
from iskd.schedules.layerwise import LayerSchedule
from iskd.schedules.settings import Heal, Layers

MIXERS = ("auto", "matrix", "mixer_output")
_OFF = (None, False, "off")


@dataclass(frozen=True)
class Align(Layers, Heal):
    """All conversions at once, then up to three stages; a technique that is off leaves its tokens to the last one.

    Keys beside those of `Layers` and `Heal`, whose `train` and `lr` are of the last stage:

    Attributes:
        mixers: what the mixers learn first, on the teacher's own inputs: `matrix`, `mixer_output` (cheaper, for any
            mixer), `auto` (`matrix` where the mixer exposes one, else `mixer_output`) or null.
        hidden: whether every edited block then learns the teacher's block output.
        mixers_share, hidden_share: shares of `tokens` of the first two stages.
        mixers_lr, hidden_lr: their learning rates.
        mixers_shape, hidden_shape, shape: how the rate of each of the three stages falls over it
            (`iskd.training.step.optimizer.OptimSpec.decay`); "" = as configured there.
        local_share: share of `tokens` whose time refits of the conversions take before any training (`refit=`), in
            [0, 1); the stages have the rest. 0 = refits read as much text as they ask for, on top of `tokens`.
        mixers_train, hidden_train: what trains in the first two, of what their objective reaches.

    Raises:
        ValueError: a value that cannot work; the message names its key.

    Source: arXiv 2504.14366; stages of MOHAWK (arXiv 2408.10189)
    Needs: `edit=convert`; a trainer other than fsdp; enough tokens for some dozens of steps a stage
    Costs: mixing matrices [B, H, T, T] of teacher and student while they are aligned
    Measured: KL 1.393 instead of 2.552 by distillation alone, gated_deltanet on SmolLM2-135M
        (experiments/subquadratic-smollm2/README.md)
    """

    takes: ClassVar[tuple[str, ...]] = ("edit", "seed")
    trial_tokens: ClassVar[int] = 0
    floor: ClassVar[float | None] = None
    removes: ClassVar[bool] = False
    _: KW_ONLY
    mixers: str | bool | None = "matrix"
    hidden: bool = True
    count: int | None = -1
    mixers_share: float = 0.026
    hidden_share: float = 0.053
    local_share: float = 0.0
    mixers_lr: PositiveFloat = 2e-4
    hidden_lr: PositiveFloat = 2e-3
    lr: PositiveFloat = 3e-4
    mixers_shape: str = "wsd"
    hidden_shape: str = "wsd"
    shape: str = "linear"
    mixers_train: str = "new"
    hidden_train: str = "edited"

    def __post_init__(self) -> None:
        """Check the values."""
        if not isinstance(self.edit, ConvertTo):
            raise ValueError("schedule=align aligns mixers with the attention they replace; use edit=convert")
        if self.mixers not in (*MIXERS, *_OFF):
            raise ValueError(f"schedule.mixers={self.mixers!r} is unknown; choose auto, matrix, mixer_output or null")
        given = (self.mixers_share, self.hidden_share, self.local_share)
        used = (self.mixers_share * (self.mixers not in _OFF), self.hidden_share * self.hidden, self.local_share)
        if min(given) < 0 or self.mixers_share + self.hidden_share >= 1 or sum(used) >= 1:
            raise ValueError(
                "schedule.mixers_share, hidden_share and local_share must be >= 0 and leave something for the last "
                f"stage, got {self.mixers_share}, {self.hidden_share} and {self.local_share}"
            )
        for name in (self.mixers_shape, self.hidden_shape, self.shape):
            if name not in SHAPES:
                raise ValueError(f"schedule: shape {name!r} of a rate is unknown; choose one of {SHAPES}")
        Layers.__post_init__(self)
        assert self._conversions  # checks the others that are shared

    @property
    def stages(self) -> list[Stage]:
        """The stages of `tokens`, their edits not chosen yet."""
        return self._stages(self.tokens)

    def _stages(self, tokens: int) -> list[Stage]:
        mixers = "loss" if self.mixers in _OFF else str(self.mixers)
        if mixers == "auto":
            assert isinstance(self.edit, ConvertTo)
            exposed = [getattr(mixer.resolve(), "exposes_matrix", False) for mixer in self.edit.every]
            mixers = "matrix" if all(exposed) else "mixer_output"
        rows = [
            ("mixers", mixers, self.mixers_share, self.mixers_train, self.mixers_lr, self.mixers_shape),
            (
                "hidden",
                "hidden" if self.hidden else "loss",
                self.hidden_share,
                self.hidden_train,
                self.hidden_lr,
                self.hidden_shape,
            ),
        ]
        stages = [
            Stage(name, (), round(tokens * share), trains, rate, rate, fit=False, objective=objective, shape=falls)
            for name, objective, share, trains, rate, falls in rows
            if objective != "loss" and round(tokens * share)
        ]
        local = round(tokens * self.local_share)
        rest = tokens - local - sum(stage.tokens for stage in stages)
        last: dict[str, Any] = {"train": self.train, "lora": self.adapters(self.seed), "shape": self.shape}
        stages.append(Stage("end to end", (), rest, lr=self.lr, lr_new=self.lr, fit=False, **last))
        return [replace(stages[0], refit_budget=local), *stages[1:]]

    @property
    def scoring(self) -> str:
        """When scores are computed: once, where some layers are converted and `order` is by importance."""
        return self._conversions.scoring

    def complete(self, history: History) -> bool:
        """Whether all stages are done."""
        return len(history.stages) >= len(self._stages(self.budget(history)))

    def choice(self, history: History) -> Choice:
        """The layers that may be converted, and how many of them are."""
        return self._conversions.choice(history)

    def chosen(self, history: History) -> list[int] | None:
        """All layers that are still to be converted, the first one first; None where nobody has scored them yet."""
        return self._conversions.chosen(history)

    def candidates_for(self, history: History) -> list[Stage]:
        """The next stage, the first one with all conversions; none when the run is complete.

        Raises:
            ValueError: the choice of layers does not fit the teacher.
        """
        if self.complete(history):
            return []
        stage = self._stages(self.budget(history))[len(history.stages)]
        if history.stages:
            return [stage]
        [everything] = self._conversions.candidates_for(history)
        return [replace(stage, edits=tuple(sorted(everything.edits, key=lambda edit: edit.layer)))]

    @property
    def _conversions(self) -> LayerSchedule:
        """The choice of layers: all conversions as one stage."""
        shared = {key.name: getattr(self, key.name) for kind in (Layers, Heal) for key in fields(kind)}
        if self.attention_share is not None:
            shared |= {"count": None if self.count == -1 else self.count}
        elif self.count == -1 or (self.count is None and self.layers is not None):
            # a list says how many it means; where all are converted, nobody asks in which order
            shared |= {"order": "middle_out", "count": self.count if self.layers is None else None}
        return LayerSchedule(**shared)
