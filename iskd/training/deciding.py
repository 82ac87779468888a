"""What comes next: score the student, ask the schedule, and tell every rank the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from iskd.blocks import check_mergeable, check_text
from iskd.importance import AttentionImportance, Fixed, WindowImportance, by_layer, refuse_not_finite, within_noise
from iskd.models import Stack, surgery
from iskd.plan import Edit, Stage, to_json
from iskd.plan.edits import Merge
from iskd.plan.reading import stage_from_json
from iskd.plan.results import GUESSING
from iskd.refits import Text
from iskd.schedules import Choice, ConvertTo, History, Schedule, forecast, next_stages
from iskd.schedules.mixed import Mixed, in_vain, of_stage, parts_of, possible, refuse_in_vain, turn_of
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


def check_edits(schedule: Schedule, teacher: PreTrainedModel, history: History) -> None:
    """Raise ValueError, before anything is scored, for a mixer that is named in vain or a part that cannot be made.

    A part calls its keys `mixer.KEY` or `block.KEY`: of an entry of `edit.mixers` or a step they are told as they were
    written. Nothing has weights here.

    Args:
        schedule: of the run.
        teacher: its teacher, on any device.
        history: of a run that begins, with scores of any value.
    """
    refuse_in_vain(schedule, history)
    if not isinstance(schedule, Mixed) and not getattr(getattr(schedule, "edit", None), "mixers", None):
        return  # the plan says the same, under the right names
    model, record = surgery.rebuild(teacher, history.record, "meta"), history.record
    for stage in forecast(schedule, history):
        for edit in stage.edits:
            with _named(schedule, stage.step, edit):
                record = surgery.apply(model, record, [edit])
    # scores to come may choose other layers: of each entry one that they may choose is tried
    stack, layers = Stack(surgery.rebuild(teacher, history.record, "meta")), history.record.layers
    for number, edit in possible(schedule, history):
        with _named(schedule, number, edit):
            surgery.build_converted(stack, stack.layers[layers.index(edit.layer)], edit)


def check_merges(plan: Sequence[Stage], teacher: PreTrainedModel, text: Callable[[Stage], Text]) -> None:
    """Raise ValueError, before anything is scored, where merges of the plan could not be carried out.

    Args:
        plan: the stages of the run.
        teacher: its teacher, on any device.
        text: gives what a stage's blocks are fitted to.
    """
    for stage in plan:
        if any(isinstance(edit, Merge) for edit in stage.edits):
            check_mergeable(Stack(teacher))
            check_text(text(stage).fit, text(stage).held)


def check_floor(schedule: Schedule, plan: Sequence[Stage], refitted: Callable[[Stage], bool]) -> None:
    """Raise ValueError where a floor judges a student that only later stages would refit or train.

    One that misses it ends the run, and what it was to be healed by is never used.

    Args:
        schedule: of the run.
        plan: its stages.
        refitted: whether refits follow a stage's edits.
    """
    for number, stage in enumerate(plan):
        floor, later = of_stage(schedule, stage).floor, plan[number + 1 :]
        if floor is None or not stage.edits or stage.tokens or refitted(stage):
            continue
        place = f"schedule.steps[{stage.step}]." if isinstance(schedule, Mixed) else "schedule."
        epochs = getattr(of_stage(schedule, stage), "epochs", None) is not None
        # by epochs all stages that train get as much
        train = f"{place}final_share={0 if epochs else 0.5} (train after each)"
        ways = [train] * any(each.tokens for each in later)
        ways += [f"{place}refit_share=1 (refit after each)"] * any(map(refitted, later))
        if ways:
            raise ValueError(
                f"{place}floor={floor:g} judges each stage at its end, and {stage.name!r} is neither refitted nor "
                "trained by then: a run that misses it there ends with a student that nothing has healed. Set "
                f"{' or '.join(ways)}, or leave the floor out"
            )


@contextmanager
def _named(schedule: Schedule, step: int, edit: Edit) -> Iterator[None]:
    """Errors about an edit's part name its keys as the user wrote them."""
    try:
        yield
    except ValueError as error:
        mixed = isinstance(schedule, Mixed)
        written = schedule.steps[step] if isinstance(schedule, Mixed) and schedule.steps else {}
        kind = getattr(parts_of(schedule)[step].schedule, "edit", None)
        entry = kind.entry_of(edit.layer) if isinstance(kind, ConvertTo) else None
        place = f"schedule.steps[{step}]." if mixed else ""
        own = {group: f"{place}{group}." for group in ("block", "mixer") if group in written}
        own |= {} if entry is None else {"mixer": f"{place}edit.mixers.{entry}."}
        said = str(error)
        for group, name in own.items():
            said = re.sub(rf"(?<![\w.]){group}\.", name, said)
        raise ValueError(said) from error


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
    if turn is not None and turn.begins:
        vain = in_vain(turn.step.schedule, replace(turn.history, scores=state.scores))
        if vain and not state.finished:
            raise ValueError(vain)
        events += [vain] if vain else []  # of a later step: what was trained by then is kept
    found = next_stages(schedule, history_of(state, module, pass_tokens))
    stages = [stage_from_json(stage) for stage in ranks.first([to_json(stage) for stage in found])]
    trial_tokens = of_stage(schedule, stages[0]).trial_tokens if stages else 0
    state.next_stage(stages, trial_tokens, events)


def _scored(
    importance: Importance, module: DistillModule, batches: Sequence[Tensor], layers: Sequence[int], choice: Choice
) -> tuple[Tensor, str]:
    """Scores [L], and which of the layers not chosen the calibration windows cannot tell from the last one chosen."""
    positions = [layers.index(layer) for layer in choice.layers]
    asked = _asked(importance, choice, layers)
    if isinstance(asked, WindowImportance):
        scores, rows = asked.scored(module.student, module.teacher, batches)
    else:
        scores = asked(module.student, module.teacher, batches)
        rows = scores[:, None]
    refuse_not_finite(scores[positions], choice.layers)
    order = sorted(positions, key=lambda position: (scores[position].item(), position))
    last = order[choice.number - 1]
    ties = [layers[position] for position in within_noise(rows, last, order[choice.number :])]
    return scores, f"the scores of layers {ties} are within noise of that of layer {layers[last]}" if ties else ""


def _asked(importance: Importance, choice: Choice, layers: Sequence[int]) -> Importance:
    """The importance for a choice among some of the student's layers."""
    if not isinstance(importance, WindowImportance):
        return importance
    positions = [layers.index(layer) for layer in choice.layers]
    return importance.choosing(positions, min(choice.number + choice.spare, len(positions)), layers)


def scoring_ahead(
    schedule: Schedule, importance: Importance | None, history: History, stages: Sequence[Stage], known: float
) -> list[float | None]:
    """Seconds of the scores that choose the layers of each stage: 0 where none do, None with nothing to go by.

    Args:
        schedule: of the run.
        importance: of the run.
        history: before the stages.
        stages: those ahead, the first of them chosen.
        known: seconds of the scores that chose it; others of the same importance cost as if each layer in question were
            left out once, and half of the layers there are ran then.
    """
    found, last = list[float | None](), -1
    priced: Importance | None = None
    rate: float | None = None
    for number, stage in enumerate(stages):
        turn = turn_of(schedule, importance, history)
        scoring = "never" if turn is None else turn.step.schedule.scoring
        if turn is None or scoring == "never" or (scoring == "once" and stage.step == last):
            found.append(0.0)
        else:
            layers, scorer = history.record.layers, turn.step.importance
            asked = scorer and _asked(scorer, turn.step.schedule.choice(turn.history), layers)
            in_question = getattr(asked, "candidates", None)
            work = len(layers if in_question is None else in_question) * len(layers)
            if number == 0:
                priced, rate = scorer, known / work
            found.append(None if rate is None or scorer is not priced else rate * work)
        last, history = stage.step, history.after(stage)
    return found


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
