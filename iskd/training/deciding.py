"""What comes next: score the student, ask the schedule, and tell every rank the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from torch import Tensor
from transformers import PreTrainedModel

from iskd.importance import AttentionImportance, Fixed, WindowImportance, by_layer, refuse_not_finite, within_noise
from iskd.models import surgery
from iskd.plan import to_json
from iskd.plan.reading import stage_from_json
from iskd.plan.results import GUESSING
from iskd.schedules import Choice, History, Schedule
from iskd.schedules.mixed import Mixed, of_stage, turn_of
from iskd.system import Ranks
from iskd.training.state import RunState
from iskd.training.step import DistillModule

Importance = Callable[[PreTrainedModel, PreTrainedModel, Sequence[Tensor]], Tensor]


def check_importance(schedule: Schedule, importance: Importance | None) -> None:
    """Raise ValueError where the schedule asks for scores that it cannot get."""
    if isinstance(schedule, Mixed):
        for part in schedule.parts:  # the run's own may be for others of them
            own = part.importance is not None or part.schedule.scoring == "never"
            check_importance(part.schedule, part.importance if own else importance)
        return
    if schedule.scoring == "never" and isinstance(importance, AttentionImportance):
        raise ValueError(
            f"importance={type(importance).__name__.lower()} says which layers keep their attention, and this schedule "
            "is told which layers to edit: set schedule.attention_share or schedule.count, or leave the importance out"
        )
    if schedule.scoring != "never" and importance is None:
        raise ValueError(
            "schedule.order=importance needs scores; choose one: importance=bi_veto, ablation, block_influence, ..."
        )
    if schedule.scoring == "each" and schedule.removes and isinstance(importance, Fixed):
        raise ValueError(
            "importance=fixed holds one entry per block of the student, and a removal leaves fewer; set "
            "schedule.rescore=false"
        )


def history_of(state: RunState, module: DistillModule, pass_tokens: int | None = None) -> History:
    """What the schedule sees."""
    params, others = surgery.sizes(module.student, state.record)
    before = len(state.record.edits) - sum(len(stage.edits) for stage in state.finished)
    return History(state.record, state.finished, state.scores, params, others, pass_tokens, before)


def decide(
    schedule: Schedule,
    importance: Importance | None,
    state: RunState,
    module: DistillModule,
    windows: Callable[[], Sequence[Tensor]],
    ranks: Ranks,
    forward_context: Callable[[], AbstractContextManager[None]],
    pass_tokens: int | None = None,
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
        pass_tokens: tokens of one pass over the training text.
    """
    events: list[str] = []
    turn = turn_of(schedule, importance, history_of(state, module, pass_tokens))
    asks = turn is not None and turn.step.schedule.scoring
    if turn is not None and asks != "never" and (asks == "each" or state.scores is None or turn.begins):
        assert turn.step.importance is not None
        batches = [batch.to(module.device) for batch in windows()]
        choice = turn.step.schedule.choice(turn.history)
        with forward_context():
            scores, note = _scored(turn.step.importance, module, batches, state.record.layers, choice)
        state.scored(ranks.first(by_layer(scores, state.record.layers)))
        events = [note] if note else []
    found = schedule.candidates_for(history_of(state, module, pass_tokens))
    stages = [stage_from_json(stage) for stage in ranks.first([to_json(stage) for stage in found])]
    trial_tokens = of_stage(schedule, stages[0]).trial_tokens if stages else 0
    state.next_stage(stages, trial_tokens, events)


def _scored(
    importance: Importance, module: DistillModule, batches: Sequence[Tensor], layers: Sequence[int], choice: Choice
) -> tuple[Tensor, str]:
    """Scores [L], and which of the layers not chosen the calibration windows cannot tell from the last one chosen."""
    positions = [layers.index(layer) for layer in choice.layers]
    if isinstance(importance, WindowImportance):
        asked = importance.choosing(positions, min(choice.number + choice.spare, len(positions)), layers)
        scores, rows = asked.scored(module.student, module.teacher, batches)
    else:
        scores = importance(module.student, module.teacher, batches)
        rows = scores[:, None]
    refuse_not_finite(scores[positions], choice.layers)
    order = sorted(positions, key=lambda position: (scores[position].item(), position))
    last = order[choice.number - 1]
    ties = [layers[position] for position in within_noise(rows, last, order[choice.number :])]
    return scores, f"the scores of layers {ties} are within noise of that of layer {layers[last]}" if ties else ""


def no_better_than_guessing(quality: Mapping[str, float], rows: int) -> str:
    """A sentence where a student says less than no model would, "" where it does not.

    To guess among `rows` tokens has a perplexity of `rows`. A teacher that guesses itself, e.g. with random weights, is
    no measure; nan is no quality.
    """
    if quality["ppl"] < rows or not quality["teacher_ppl"] < rows:
        return ""
    return (
        f"perplexity {quality['ppl']:.4g} is not below the {rows} {GUESSING}: the student says "
        "nothing of the text; edit less, or train it for more tokens"
    )
