"""No edits: the fine-tune-only control. Without it, retention mixes compression with adaptation to the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iskd.plan import Stage
from iskd.plan.stage import lora_of
from iskd.schedules.base import Choice, History


class NoEdits:
    """One stage that trains the unedited student for `tokens`.

    Source: none: the control
    Needs: nothing
    Costs: training alone
    Measured: perplexity 20.55 to 15.57 on the text it trains on, KL 0.26 (experiments/iskd-smollm2/README.md)
    """

    def __init__(
        self, *, tokens: int = 100_000, train: str = "all", lr: float = 1e-4, lora: Mapping[str, Any] | None = None
    ) -> None:
        if tokens < 1:
            raise ValueError(f"schedule.tokens={tokens}: nothing would be edited or trained")
        self.tokens, self.train, self.lr, self.lora = tokens, train, lr, lora_of(lora, train)
        self.floor: float | None = None
        self.scoring, self.removes = "never", False
        self.restart_at_edit = False
        self.candidates, self.trial_tokens = 1, 0

    def complete(self, history: History) -> bool:
        """Whether the single stage is done."""
        return bool(history.stages)

    def choice(self, history: History) -> Choice:
        """Nothing to choose."""
        return Choice()

    def candidates_for(self, history: History) -> list[Stage]:
        """The single stage; nothing afterwards."""
        stage = self.next_stage(history)
        return [] if stage is None else [stage]

    def next_stage(self, history: History) -> Stage | None:
        """The single stage; None afterwards."""
        if self.complete(history):
            return None
        return Stage(
            "finetune", tokens=self.tokens, train=self.train, lr=self.lr, lr_new=self.lr, fit=False, lora=self.lora
        )
