"""What comes next: score the student, ask the schedule, and tell every rank the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from iskd import surgery
from iskd.distributed import Ranks
from iskd.importance.base import by_layer, rows_of, within_noise
from iskd.module import DistillModule
from iskd.plan import stage_from_json, to_json
from iskd.schedules.base import History, Schedule
from iskd.state import RunState
from iskd.tournament import Tournament

Importance = Callable[[PreTrainedModel, PreTrainedModel, Sequence[Tensor]], Tensor]


def history_of(state: RunState, module: DistillModule) -> History:
    """What the schedule sees."""
    params, others = surgery.sizes(module.student, state.record)
    return History(state.record, state.finished, state.scores, params, others)


def decide(
    schedule: Schedule,
    importance: Importance | None,
    state: RunState,
    module: DistillModule,
    windows: Callable[[], Sequence[Tensor]],
    ranks: Ranks,
    forward_context: Callable[[], AbstractContextManager[None]],
) -> None:
    """Put the next stage into `state`, or None when the run is complete; a collective.

    Args:
        schedule: decides, on rank 0.
        importance: scores the student where the schedule asks for it.
        state: is changed; its events start anew.
        module: student and teacher.
        windows: gives the calibration windows [B, T] for the scores.
        ranks: the processes of the run.
        forward_context: the precision under which training runs.
    """
    state.events, state.before, state.seconds = [], None, 0.0
    stale = schedule.scoring == "each" or state.scores is None
    if schedule.scoring != "never" and stale and not schedule.complete(history_of(state, module)):
        assert importance is not None
        batches = [batch.to(module.device) for batch in windows()]
        with forward_context():
            scores, note = _scored(importance, module, batches, state.record.layers)
        state.scores = ranks.first(by_layer(scores, state.record.layers))
        state.events += [note] if note else []
    found = schedule.candidates_for(history_of(state, module))
    stages = [stage_from_json(stage) for stage in ranks.first([to_json(stage) for stage in found])]
    state.tournament = Tournament(tuple(stages), schedule.trial_tokens) if len(stages) > 1 else None
    state.stage = state.tournament.stage if state.tournament else stages[0] if stages else None
    state.edited, state.batch = False, 0


def _scored(
    importance: Importance, module: DistillModule, batches: Sequence[Tensor], layers: Sequence[int]
) -> tuple[Tensor, str]:
    """Scores [L], and which layers the calibration windows cannot tell from the lowest one."""
    rows = rows_of(importance, module.student, module.teacher, batches)
    scores = rows.mean(1)
    lowest = int(torch.argmin(scores))
    ties = [layers[position] for position in within_noise(rows, lowest, range(len(rows)))]
    return scores, f"the scores of layers {ties} are within noise of that of layer {layers[lowest]}" if ties else ""
