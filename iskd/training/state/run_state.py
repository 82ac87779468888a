"""Where a run stands: everything but weights, optimizer state and random numbers, as JSON."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from transformers import PreTrainedModel

from iskd.models import surgery
from iskd.plan import Edit, Record, Stage, StageResult, to_json
from iskd.plan.metric_names import QUALITY
from iskd.plan.results import check_inside, check_quality
from iskd.system import Json
from iskd.system.faults import NonFiniteError, Verdict
from iskd.system.files import MAX_NUMBER
from iskd.system.reading import Count, Number, is_integer, read_as
from iskd.training.state.tournament import Tournament

_log = logging.getLogger(__name__)
Status = Literal["kept", "rolled_back"]
# windows per micro-batch and process, micro-batches per optimizer step, processes
LAYOUT = ("batch_size", "accumulate", "processes")
_FIRST_STEP = "steps"
"""Key of `first_step` in the file, as every version has written it."""
# what every version has written
_ALWAYS = ("record", "stage", "finished", "results", "scores")


def _identity(values: dict[str, Any]) -> dict[str, Any]:
    for key in LAYOUT:
        value = values.get(key, 1)
        if not is_integer(value) or not 1 <= value <= MAX_NUMBER:
            raise ValueError(f"{key} must be an integer from 1, got {value!r:.80}")
    return values


@dataclass
class RunState:
    """The position of a run. Only its own methods change it, each of them at one event of the stage loop.

    Attributes:
        record: edits applied to the student.
        stage: the stage in progress, or the next one at a stage boundary; None when the run is complete.
        edited: whether the edits of `stage` are already in `record`.
        batch: micro-batches of `stage` that are done.
        first_batch: global micro-batch number at which `stage` begins.
        first_step: optimizer steps of finished stages, so the number of the first one of `stage`, from 0.
        total_steps, total_stages: optimizer steps and stages of the whole run as planned at its start.
        tokens: training tokens so far, over all ranks.
        seconds: wall time spent in `stage` so far.
        before: quality right after the edits of `stage`, before healing.
        inside: quality inside `stage`, with the tokens so far, in order.
        events: sentences about `stage`, for its row.
        tournament: trials of the candidates for the next stage, while they last.
        finished: finished stages, oldest first.
        results: rows of the stage table, the teacher's first.
        scores: latest importance by layer.
        skipped: optimizer steps that were skipped because the loss or a gradient was not finite.
        skipped_in_a_row: how many of them were the latest steps.
        identity: what a resumed run must find unchanged (teacher, text, windows, seed), and the layout of its batches
            over processes, which may change between two stages (`take_up`).
    """

    record: Record
    stage: Stage | None = None
    edited: bool = False
    batch: Count = 0
    first_batch: Count = 0
    first_step: Annotated[Count, Field(alias=_FIRST_STEP)] = 0
    total_steps: Count = 0
    total_stages: Count = 0
    tokens: Count = 0
    seconds: Number = 0.0
    before: Annotated[dict[str, Number], AfterValidator(check_quality)] | None = None
    inside: list[Annotated[dict[str, Number], AfterValidator(check_inside)]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    tournament: Tournament | None = None
    finished: tuple[Stage, ...] = ()
    results: list[StageResult] = field(default_factory=list)
    scores: dict[int, Number] | None = None
    skipped: Count = 0
    skipped_in_a_row: Count = 0
    identity: Annotated[dict[str, Any], AfterValidator(_identity)] = field(default_factory=dict)

    # ---- what happens to it -----------------------------------------------------------------------------------------

    def begin(self, identity: Mapping[str, Any]) -> None:
        """The run starts, with this to be found again by a resumed one."""
        self.identity = dict(identity)

    def plan_ahead(self, steps: Sequence[int]) -> None:
        """Optimizer steps of every stage ahead."""
        self.total_steps, self.total_stages = max(1, sum(steps)), len(steps)

    def scored(self, scores: dict[int, float]) -> None:
        """The student has a new importance by layer."""
        self.scores = scores

    def next_stage(self, candidates: Sequence[Stage], trial_tokens: int, events: Iterable[str] = ()) -> None:
        """What comes next was decided.

        Args:
            candidates: none = the run is complete; of several, trials are to choose.
            trial_tokens: training tokens of every trial.
            events: what is worth telling of the decision.
        """
        self.tournament = Tournament(tuple(candidates), trial_tokens) if len(candidates) > 1 else None
        self.stage = self.tournament.stage if self.tournament else candidates[0] if candidates else None
        self.events, self.before, self.seconds, self.inside = list(events), None, 0.0, []
        self.edited, self.batch = False, 0

    def edit_made(self, record: Record, events: Iterable[str]) -> None:
        """The edits of `stage` are carried out, and `record` holds them."""
        self.record, self.edited = record, True
        self.note(events)

    def measured_before(self, quality: Mapping[str, float]) -> None:
        """The student was measured after the edits and before healing."""
        self.before = {key: quality[key] for key in QUALITY}

    def measured_inside(self, quality: Mapping[str, float]) -> None:
        """The student was measured inside `stage`."""
        self.inside.append({"tokens": float(self.tokens), **{key: quality[key] for key in QUALITY}})

    def batch_done(self, tokens: int) -> None:
        """A micro-batch was trained, of so many tokens over all ranks."""
        self.batch += 1
        self.tokens += tokens

    def spent(self, seconds: float) -> None:
        """Wall time went into `stage`."""
        self.seconds += seconds

    def note(self, events: Iterable[str]) -> None:
        """Something is worth telling of `stage`."""
        self.events += events

    def stage_kept(self, steps: int, batches: int) -> None:
        """`stage` is finished after so many optimizer steps and micro-batches; what comes next is to be decided."""
        assert self.stage is not None
        self.finished = (*self.finished, self.stage)
        self.first_batch += batches
        self.first_step += steps

    def rolled_back(self, record: Record) -> None:
        """The student is, with `record`, as it was before the edits of `stage`."""
        self.record = record
        self.edited, self.batch, self.before, self.inside = False, 0, None, []

    def trial_judged(self, kl: float) -> None:
        """A trial was rolled back, and left this divergence from the teacher: the next one, or the winner, follows."""
        assert self.tournament is not None
        trials = self.tournament.judged(kl)
        self.stage = trials.stage
        self.tournament = None if trials.over else trials
        self.note([trials.verdict()] if trials.over else [])

    def run_complete(self) -> None:
        """No stage follows."""
        self.stage = None

    def stage_measured(
        self,
        model: PreTrainedModel,
        name: str,
        quality: Mapping[str, float],
        train_speed: float | None,
        status: Status,
        evaluation: Json | None = None,
        edits: Sequence[Edit] = (),
    ) -> StageResult:
        """A new row of the stage table, for the stage that just ended; `edits` are those before the first one."""
        made = edits if self.stage is None else self.stage.edits
        row = StageResult(
            index=len(self.results),
            name=name,
            edits=[_edit_row(edit) for edit in to_json(Stage(name, tuple(made)))["edits"]],
            params=surgery.parameters(model),
            block_params=surgery.block_parameters(model),
            **{key: quality[key] for key in QUALITY},
            before=self.before,
            intervals={
                key: [quality[f"{key}_low"], quality[f"{key}_high"]] for key in QUALITY if f"{key}_low" in quality
            }
            or None,
            tokens=self.tokens,
            seconds=self.seconds,
            train_tokens_per_s=train_speed,
            tokens_per_s=quality["tokens_per_s"],
            inside=list(self.inside),
            evaluation=evaluation,
            scores=None if self.scores is None else {str(layer): score for layer, score in self.scores.items()},
            status=status,
            events=list(self.events),
        )
        self.results.append(row)
        self.seconds = 0.0
        return row

    def take_up(self, found: Mapping[str, Any]) -> None:
        """Compare with what a resumed run found, and express the position in its layout of batches.

        Raises:
            ValueError: naming the first thing that would give the run other data, or a layout that cannot change here.
        """
        for key, value in self.identity.items():
            if key not in LAYOUT and found.get(key) != value:
                raise ValueError(
                    f"the run was made with {key}={value!r}, now it is {found.get(key)!r}; resume with the same "
                    "teacher, text and seed, or start a new run"
                )
        before, now = ({key: int(layout.get(key, 1)) for key in LAYOUT} for layout in (self.identity, found))
        if before != now:
            self._lay_out(before, now)
        self.identity = dict(found)

    def _lay_out(self, before: Mapping[str, int], now: Mapping[str, int]) -> None:
        """Count in micro-batches and steps of another size; inside a stage only where that changes no number."""
        micro, step = (before["batch_size"] * before["processes"], math.prod(before.values()))
        new_micro, new_step = (now["batch_size"] * now["processes"], math.prod(now.values()))
        if self.edited and self.batch:
            place = f"the newest checkpoint lies inside stage {len(self.finished) + 1}"
            if before["processes"] != now["processes"]:
                raise ValueError(
                    f"{place}, made by {before['processes']} processes, and now there are {now['processes']}: each has "
                    "its own windows and random numbers there. Continue with as many as before (trainer.devices, "
                    "trainer.num_nodes); at a stage boundary the number may change"
                )
            if step != new_step or self.batch * micro % new_micro or self.first_batch * micro % new_micro:
                raise ValueError(
                    f"{place}, with {step} windows in an optimizer step, and now there are {new_step}: keep "
                    "data.batch_size x trainer.accumulate_grad_batches, or change them at a stage boundary"
                )
        self.batch = self.batch * micro // new_micro
        self.first_batch = -(-self.first_batch * micro // new_micro)
        self.first_step = round(self.first_step * step / new_step)
        self.total_steps = max(1, round(self.total_steps * step / new_step))
        self.events.append(f"continued with {dict(now)} instead of {dict(before)}")

    def count_steps(self, verdicts: Iterable[Verdict], *, most: int) -> None:
        """Note which optimizer steps were skipped.

        Raises:
            NonFiniteError: more than `most` steps in a row were; on every rank, as all skip alike.
        """
        for verdict in verdicts:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if verdict.skipped else 0
            if not verdict.skipped:
                continue
            self.skipped += 1
            self.events.append(f"step {verdict.number} skipped: the loss or a gradient was not finite")
            _log.warning("step %d is skipped: the loss or a gradient is not finite", verdict.number)
            if self.skipped_in_a_row > most:
                raise NonFiniteError(
                    f"the loss or a gradient was not finite in {self.skipped_in_a_row} optimizer steps in a row "
                    f"(run.max_skipped={most})"
                )

    # ---- as a file --------------------------------------------------------------------------------------------------

    def to_json(self) -> Json:
        """Plain JSON values."""
        nested = {"record", "stage", "tournament", "finished", "results", "scores"}
        names = {f.name: f.name for f in fields(self) if f.name not in nested} | {"first_step": _FIRST_STEP}
        plain = {key: getattr(self, name) for name, key in names.items()}
        return {
            **plain,
            "record": to_json(self.record),
            "stage": None if self.stage is None else to_json(self.stage),
            "tournament": None if self.tournament is None else self.tournament.to_json(),
            "finished": [to_json(stage) for stage in self.finished],
            "results": [result.to_json() for result in self.results],
            "scores": None if self.scores is None else {str(layer): score for layer, score in self.scores.items()},
        }

    @classmethod
    def from_json(cls, data: Any) -> RunState:
        """Inverse of `to_json`. Raises ValueError when a key is missing or a value cannot be read."""
        what = "the saved state"
        if isinstance(data, dict) and (missing := [key for key in _ALWAYS if key not in data]):
            raise ValueError(f"{what}: key {missing[0]!r} is missing; is the checkpoint from another version?")
        return read_as(cls, data, what)


def _edit_row(edit: Mapping[str, Any]) -> dict[str, Any]:
    """An edit as the tables show it: the class by name."""
    row = {"op": edit["op"], "layer": edit["layer"]}
    for part in ("block", "mixer"):
        if part in edit:
            row[part] = edit[part]["target"]
    return row
