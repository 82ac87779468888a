"""Subquadratic students (arXiv 2504.14366): align the mixers, align the hidden states, distil end to end.

Shares of the tokens, rates and their shapes are those of the authors' configs: 2.6 / 5.3 / 92 % of 3 G tokens, as in
MOHAWK (arXiv 2408.10189), at 2e-4 and 2e-3 with a stable plateau, and 3e-4 falling linearly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from iskd.plan import Stage
from iskd.plan.stage import SHAPES
from iskd.schedules.base import ConvertTo, EditKind, History
from iskd.schedules.layerwise import LayerSchedule

MIXERS = ("auto", "matrix", "mixer_output")
_OFF = (None, False, "off")


class Align(LayerSchedule):
    """All conversions at once, then up to three stages; a technique that is off leaves its tokens to the last one.

    Args:
        edit: the conversion (edit=convert).
        mixers: what the mixers learn first, on the teacher's own inputs: `matrix`, `mixer_output` (cheaper, for any
            mixer), `auto` (`matrix` where the mixer exposes one, else `mixer_output`) or null.
        hidden: whether every edited block then learns the teacher's block output.
        count: how many layers are converted, the first of `order`; -1 = every one that is not protected.
        layers: among which: `all`, `every_second` (layers 1, 3, ...), or a list.
        order, protect, protect_first, protect_last, restart_at_edit, lora, seed: as in `LayerSchedule`.
        tokens: training tokens of the whole run.
        mixers_share, hidden_share: shares of `tokens` of the first two stages.
        mixers_lr, hidden_lr, lr: learning rates of the three stages.
        mixers_shape, hidden_shape, shape: how each rate falls over its stage
            (`iskd.training.step.optimizer.OptimSpec.decay`); "" = as configured there.
        mixers_train, hidden_train, train: what trains in each (see `iskd.plan.stage.Stage`), of what its objective
            reaches.

    Raises:
        ValueError: a value that cannot work; the message names its key.

    Source: arXiv 2504.14366; stages of MOHAWK (arXiv 2408.10189)
    Needs: `edit=convert`; a trainer other than fsdp; enough tokens for some dozens of steps a stage
    Costs: mixing matrices [B, H, T, T] of teacher and student while they are aligned
    Measured: KL 1.393 instead of 2.552 by distillation alone, gated_deltanet on SmolLM2-135M
        (experiments/subquadratic-smollm2/README.md)
    """

    def __init__(
        self,
        edit: EditKind,
        *,
        mixers: str | bool | None = "matrix",
        hidden: bool = True,
        count: int | None = -1,
        layers: str | Sequence[int] | None = None,
        order: str = "importance",
        protect: Sequence[int] = (),
        protect_first: int = 0,
        protect_last: int = 0,
        tokens: int = 100_000,
        mixers_share: float = 0.026,
        hidden_share: float = 0.053,
        mixers_lr: float = 2e-4,
        hidden_lr: float = 2e-3,
        lr: float = 3e-4,
        mixers_shape: str = "wsd",
        hidden_shape: str = "wsd",
        shape: str = "linear",
        mixers_train: str = "new",
        hidden_train: str = "edited",
        train: str = "all",
        lora: Mapping[str, Any] | None = None,
        restart_at_edit: bool = False,
        seed: int = 0,
    ) -> None:
        if not isinstance(edit, ConvertTo):
            raise ValueError("schedule=align aligns mixers with the attention they replace; use edit=convert")
        if mixers not in (*MIXERS, *_OFF):
            raise ValueError(f"schedule.mixers={mixers!r} is unknown; choose auto, matrix, mixer_output or null")
        if min(mixers_share, hidden_share) < 0 or mixers_share + hidden_share >= 1:
            raise ValueError(
                "schedule.mixers_share and schedule.hidden_share must be >= 0 and leave something for the last stage, "
                f"got {mixers_share} and {hidden_share}"
            )
        for name in (mixers_shape, hidden_shape, shape):
            if name not in SHAPES:
                raise ValueError(f"schedule: shape {name!r} of a rate is unknown; choose one of {SHAPES}")
        if mixers == "auto":
            mixers = "matrix" if getattr(edit.mixer.resolve(), "exposes_matrix", False) else "mixer_output"
        everything = count == -1 or (count is None and layers is not None)
        super().__init__(
            edit,
            # a list says how many it means; where all are converted, nobody asks in which order
            count=None if everything and layers is not None else count,
            order="middle_out" if everything else order,
            layers=layers,
            per_stage=None,
            tokens=tokens,
            protect=protect,
            protect_first=protect_first,
            protect_last=protect_last,
            restart_at_edit=restart_at_edit,
            train=train,
            lr=lr,
            lora=lora,
            seed=seed,
        )
        parts = [
            ("mixers", "loss" if mixers in _OFF else str(mixers), mixers_share, mixers_train, mixers_lr, mixers_shape),
            ("hidden", "hidden" if hidden else "loss", hidden_share, hidden_train, hidden_lr, hidden_shape),
        ]
        self.stages = [
            Stage(name, (), round(tokens * share), trains, rate, rate, fit=False, objective=objective, shape=falls)
            for name, objective, share, trains, rate, falls in parts
            if objective != "loss" and round(tokens * share)
        ]
        rest = tokens - sum(stage.tokens for stage in self.stages)
        self.stages.append(Stage("end to end", (), rest, train, lr, lr, fit=False, lora=self.lora, shape=shape))

    def complete(self, history: History) -> bool:
        """Whether all stages are done."""
        return len(history.stages) >= len(self.stages)

    def candidates_for(self, history: History) -> list[Stage]:
        """The next stage, the first one with all conversions; none when the run is complete.

        Raises:
            ValueError: the choice of layers does not fit the teacher.
        """
        if self.complete(history):
            return []
        stage = self.stages[len(history.stages)]
        if history.stages:
            return [stage]
        return [replace(stage, edits=tuple(self.edit.make(layer, self.seed) for layer in self._chosen(history)))]

    def _chosen(self, history: History) -> list[int]:
        """The layers to convert, ascending."""
        [everything] = super().candidates_for(history)
        return sorted(edit.layer for edit in everything.edits)
