"""What the time of a run is made of, as far as it is known before its first step, and how its parts add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from iskd.plan import Stage
from iskd.schedules import History, Schedule
from iskd.schedules.mixed import of_stage
from iskd.system import Json

_DISK = 5e8  # bytes that are written or read in a second, of an ordinary disk
_PROCESS = 12.0  # seconds until a fresh process has imported torch and transformers
_NEW_TOKENS = 50  # of a continued prompt
_STEP = 0.02  # seconds in which a small model takes one decoding step on a CPU
_TURNS = 128  # decoding steps behind the speed of weights in fewer bits
_FEW = 2  # items of each task that tell how long all of them take
_MANY = 1000  # items of a task without a limit


@dataclass(frozen=True)
class Costs:
    """What the time of a run is made of; in seconds.

    Attributes:
        token: of a training token.
        refit_tokens: of a stage, training tokens that take as long as the refits of its edits, on all of their text.
        fit_tokens: the same of the fits of its edits.
        begun: what was measured before the plan: the teacher, the student of an earlier run, tasks.
        validation: of a measurement of the student. asking: of its tasks and text along the run.
        scoring: by stage, of the scores that choose its layers; None = there are some, and no earlier ones to go by.
            score_tokens: tokens that a pass over all layers for each of them reads.
        trials: by stage, how many candidates are tried before one is kept, and training tokens of each; () = no trials.
        before: whether the student is measured between edits and healing as well.
        every: training tokens between two measurements inside a stage; None = there are none.
        keeping: of a byte of a student that is kept, of which a stage keeps one; 0 = none is kept.
        saving: of a byte of a checkpoint, of which a stage has one at its end and one every `checkpoint_every` steps.
        ends: export and its verification, tasks, efficiency and samples at the end.
    """

    token: float = 0.0
    refit_tokens: Callable[[Stage], float] = lambda _stage: 0.0
    fit_tokens: Callable[[Stage], float] = lambda _stage: 0.0
    begun: float = 0.0
    validation: float = 0.0
    asking: float = 0.0
    scoring: Sequence[float | None] = ()
    score_tokens: int = 0
    trials: Sequence[tuple[int, int]] = ()
    before: bool = True
    every: int | None = None
    keeping: float = 0.0
    saving: float = 0.0
    checkpoint_every: int = 0
    ends: float = 0.0

    def of(self, number: int, stage: Stage, row: Json, before: int) -> Json:
        """Time of a stage's parts.

        Args:
            number: of the stage, from 0.
            stage: itself.
            row: of its plan: `tokens`, `steps`, `params` and, where it trains, `trained`.
            before: training tokens of the stages before it.
        """
        tokens, steps, params = row["tokens"], row["steps"], row["params"]
        refit = stage.refit_share * self.refit_tokens(stage) * self.token if stage.edits else 0.0
        fit = self.fit_tokens(stage) * self.token
        # those inside come after a step, and the last step is the end
        inside = min((before + tokens - 1) // self.every - before // self.every, steps - 1) if self.every else 0
        validations = 1 + bool(self.before and stage.edits and tokens) + max(0, inside if tokens else 0)
        count, trial_tokens = self.trials[number] if self.trials else (0, 0)
        # judged by text of their own, on which the teacher is asked as well
        trials = count * (trial_tokens * self.token + refit + fit + 2 * self.validation)
        saves = 1 + (steps // self.checkpoint_every if self.checkpoint_every else 0)
        scores = self.scoring[number] if self.scoring else 0.0
        if scores is None:  # a forward pass is a third of a training step
            scores = self.score_tokens * self.token / 3
        # float32 weights, and the optimizer's two moments of what trains
        saved = 4 * params + 8 * (row.get("trained") or 0)
        found = {
            "train_seconds": tokens * self.token,
            "refit_seconds": refit,
            "fit_seconds": fit,
            "score_seconds": scores,
            "trial_seconds": trials,
            "measure_seconds": validations * self.validation + self.asking,
            "keep_seconds": 4 * params * self.keeping,
            "save_seconds": saves * saved * self.saving,
        }
        return {name: round(value, 1) for name, value in found.items()}


def trials_ahead(schedule: Schedule, history: History) -> list[tuple[int, int]]:
    """How many candidates every stage to come has beside none, and the training tokens that each of them gets."""
    found = []
    while candidates := schedule.candidates_for(history):
        tokens = of_stage(schedule, candidates[0]).trial_tokens
        found.append((len(candidates), tokens) if len(candidates) > 1 else (0, 0))
        history = history.after(candidates[0])
    return found


def writing(kept: bool) -> float:
    """Seconds that a byte of a student's weights takes that is written and read again; 0 where none is."""
    return 2 / _DISK if kept else 0.0


def export_seconds(params: int) -> float:
    """About how long a student of so many parameters is written, and reopened in a fresh process."""
    return _PROCESS + 3 * 4 * params * writing(True)


def speaking_seconds(prompts: int, token: float, device: torch.device) -> float:
    """About how long teacher and student continue so many prompts; `token`: seconds of a training token."""
    return 2 * prompts * _NEW_TOKENS * _decoding(token, device)


def _decoding(token: float, device: torch.device) -> float:
    """About how long a decoding step takes."""
    return max(token, _STEP if device.type == "cpu" else _STEP / 2)


def quantizing_seconds(kinds: int, tokens: int, token: float, device: torch.device) -> float:
    """About how long so many kinds of fewer bits are measured on a text; `token`: seconds of a training token."""
    # the text is read as the student is and in each kind, and both write in turns
    return (bool(kinds) + kinds) * tokens * token / 3 + kinds * _TURNS * _decoding(token, device)


def a_few(spec: Any) -> list[tuple[Any, float]]:
    """Evaluations that ask a few items of each task, and a window of the text; how many times each is whole."""
    little, found = replace(spec, resamples=1, quantize=(), every=None), []
    if spec.tasks:
        whole = spec.limit or _MANY
        few = min(_FEW, whole)
        found.append((replace(little, limit=few, text=None), whole / few))
    if spec.text:
        tokens = min(spec.tokens, spec.window)
        found.append((replace(little, tasks=(), metrics={}, fewshot=None, tokens=tokens), spec.tokens / tokens))
    return found


def check_every(every: int | str | None, tokens: int) -> None:
    """Raise ValueError for an `eval.every` that a run of so many training tokens never comes to."""
    if isinstance(every, int) and every >= tokens:
        raise ValueError(
            f"eval.every={every}: the run trains on {tokens:,} tokens, so that no student would be validated inside a "
            "stage; give fewer, or eval.every=stage"
        )
