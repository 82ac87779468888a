"""Where a run stands: everything but weights, optimizer state and random numbers, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import PreTrainedModel

from iskd import surgery
from iskd.plan import Json, Record, Stage, record_from_json, stage_from_json, to_json
from iskd.tracking import QUALITY, StageResult

Status = Literal["kept", "rolled_back"]


@dataclass
class RunState:
    """The position of a run.

    Attributes:
        record: edits applied to the student.
        stage: the stage in progress, or the next one at a stage boundary; None when the run is complete.
        edited: whether the edits of `stage` are already in `record`.
        batch: micro-batches of `stage` that are done.
        first_batch: global micro-batch number at which `stage` begins.
        steps: optimizer steps of finished stages.
        total_steps, total_stages: optimizer steps and stages of the whole run as planned at its start.
        tokens: training tokens so far, over all ranks.
        seconds: wall time spent in `stage` so far.
        before: quality right after the edits of `stage`, before healing.
        finished: finished stages, oldest first.
        results: rows of the stage table, the teacher's first.
        scores: latest importance by layer.
        identity: what a resumed run must find unchanged: teacher, text, windows, batch size, seed, processes.
    """

    record: Record
    stage: Stage | None = None
    edited: bool = False
    batch: int = 0
    first_batch: int = 0
    steps: int = 0
    total_steps: int = 0
    total_stages: int = 0
    tokens: int = 0
    seconds: float = 0.0
    before: dict[str, float] | None = None
    events: list[str] = field(default_factory=list)
    finished: tuple[Stage, ...] = ()
    results: list[StageResult] = field(default_factory=list)
    scores: dict[int, float] | None = None
    identity: dict[str, Any] = field(default_factory=dict)

    def row(
        self, model: PreTrainedModel, name: str, quality: Mapping[str, float], train_speed: float | None, status: Status
    ) -> StageResult:
        """The next row of the stage table, for the stage that just ended."""
        edits = () if self.stage is None else to_json(self.stage)["edits"]
        return StageResult(
            index=len(self.results),
            name=name,
            edits=[_edit_row(edit) for edit in edits],
            params=surgery.parameters(model),
            block_params=surgery.block_parameters(model),
            **{key: quality[key] for key in QUALITY},
            before=self.before,
            tokens=self.tokens,
            seconds=self.seconds,
            train_tokens_per_s=train_speed,
            tokens_per_s=quality["tokens_per_s"],
            scores=None if self.scores is None else {str(layer): score for layer, score in self.scores.items()},
            status=status,
            events=list(self.events),
        )

    def check_identity(self, found: Mapping[str, Any]) -> None:
        """Raise ValueError naming the first thing that would give a resumed run other data."""
        for key, value in self.identity.items():
            if found.get(key) != value:
                raise ValueError(
                    f"the run was made with {key}={value!r}, now it is {found.get(key)!r}; resume with the same "
                    "teacher, text, batch size, seed and number of processes, or start a new run"
                )

    def to_json(self) -> Json:
        """Plain JSON values."""
        nested = {"record", "stage", "finished", "results", "scores"}
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in nested}
        return {
            **plain,
            "record": to_json(self.record),
            "stage": None if self.stage is None else to_json(self.stage),
            "finished": [to_json(stage) for stage in self.finished],
            "results": [result.to_json() for result in self.results],
            "scores": None if self.scores is None else {str(layer): score for layer, score in self.scores.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunState:
        """Inverse of `to_json`. Raises ValueError when a key is missing or a value cannot be read."""
        values = dict(data)
        try:
            values["record"] = record_from_json(values["record"])
            values["stage"] = None if values["stage"] is None else stage_from_json(values["stage"])
            values["finished"] = tuple(stage_from_json(stage) for stage in values["finished"])
            values["results"] = [StageResult.from_json(result) for result in values["results"]]
            scores = values["scores"]
            values["scores"] = None if scores is None else {int(layer): float(score) for layer, score in scores.items()}
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"the saved state cannot be read: {error!r}; is the checkpoint from another version?"
            ) from error


def _edit_row(edit: Mapping[str, Any]) -> dict[str, Any]:
    """An edit as the tables show it: the class by name."""
    row = {"op": edit["op"], "layer": edit["layer"]}
    for part in ("block", "mixer"):
        if part in edit:
            row[part] = edit[part]["target"]
    return row
