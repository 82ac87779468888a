"""One edit of a student in training, on one device, under DDP or in shards.

Structure, fit of what was put in, refit of what survives, optimizer groups.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iskd.blocks import Fitted, Merged, warm_start
from iskd.evaluation import measure_quality
from iskd.losses import of_sizes
from iskd.models import Stack, sharding, surgery
from iskd.plan import Convert, Edit, Record, Remove, Stage
from iskd.plan.edits import Merge
from iskd.refits import (
    Refit,
    Text,
    check_refits,
    check_sizes,
    check_used,
    for_stage,
    refit_survivors,
    training_tokens,
)
from iskd.refits.reading import judging, text_of
from iskd.system import Ranks
from iskd.system.text import layers_text
from iskd.training.state import RunState, checkpoint
from iskd.training.step import DistillModule, adapters
from iskd.training.step.trainable import new_parameters

_BATCH = 1024  # tokens of a fit that are read together
_FIT_BLOCKS = 4  # passes of its block that a fit takes as long as, beside the walk: about, of SmolLM2's slimmed ones
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Edited:
    """What an edit made: the student's new record, and sentences worth telling.

    They say how well blocks were fitted, what refits were worth, what mixers took over from the attention, what stays
    frozen. `refit_seconds` is the time that refits took.
    """

    record: Record
    events: list[str]
    refit_seconds: float = 0.0


class BrokenOffError(BaseException):
    """The run is to end in the middle of an edit or a measurement, which the next process begins anew.

    No `Exception`: it may come out of foreign code, which catches those.
    """


def carry_out(
    module: DistillModule,
    optimizer: torch.optim.Optimizer,
    stage: Stage,
    fits: Text,
    forward_context: Callable[[], AbstractContextManager[None]],
    refits: Sequence[Refit] = (),
    text: Text | None = None,
    folder: Path | None = None,
    place: str = "device",
    earlier: Sequence[Edit] = (),
    alike: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Edited:
    """Apply a stage's edits, fit the compact blocks, refit the others, and give the optimizer what the stage trains.

    Every rank does the same. Surviving parameters stay the same objects and keep their AdamW state, unless the
    optimizer starts anew in every stage (`OptimSpec.anew`).

    Args:
        module: its student, record and stage change.
        optimizer: the running one; its groups are rewritten in place.
        stage: what to do.
        fits: calibration windows for the fit, the same on every rank; none = no fit.
        forward_context: the precision under which training runs.
        refits: of the surviving blocks, in order; none where the stage edits nothing.
        text: of the run, which they read; the same on every rank.
        folder: where states on disk lie; None = where the system keeps temporary files.
        place: where those of a fit lie: device, host or disk.
        earlier: edits before the stage's that no refit has followed: the refits are about these as well.
        alike: several processes may be broken off inside, where all call the same modules, which they do in a fit.

    Raises:
        BrokenOffError: a process was asked to stop inside a fit, or between two blocks of a refit.
    """
    student, before = module.student, module.record
    touched = _opened(before, stage.edits)
    origin = sharding.thaw(student, module.teacher, before, touched)
    old = dict(zip(before.layers, Stack(student).layers, strict=True))
    record = surgery.apply(student, before, stage.edits)
    fitted: list[Fitted | Merged] = []
    if fits or any(isinstance(edit, Merge) for edit in stage.edits):
        with forward_context(), alike():
            fitted = _fit(module, old, record, stage, fits, place, folder)
    sharding.freeze(student, origin, optimizer)
    refitted, start = list[str](), time.perf_counter()
    if stage.edits and refits:
        with forward_context():
            refitted = _refit(module, optimizer, record, [*earlier, *stage.edits], refits, text or Text(), folder)
    seconds = time.perf_counter() - start
    adapt(student, record, stage)
    module.hold(student, record)
    module.enter(stage)
    if module.optim.anew:
        optimizer.state.clear()
    frozen = module.regroup(optimizer)
    events = [*map(str, fitted), *refitted, *taken_over(student, record, stage), *frozen]
    for event in events:
        _log.info("%s", event)
    return Edited(record, events, seconds if refitted else 0.0)


def _fit(
    module: DistillModule,
    old: dict[int, nn.Module],
    record: Record,
    stage: Stage,
    text: Text,
    place: str,
    folder: Path | None,
) -> list[Fitted | Merged]:
    """What the fits and merges of a stage say that they did to the student."""
    fit, held = ([*part.split(max(1, _BATCH // part.shape[1]))] if len(part) else [] for part in (text.fit, text.held))
    judge = partial(_distance, module)
    return warm_start(module.student, module.teacher, old, record, stage.edits, fit, held, judge, place, folder)


def _opened(before: Record, edits: Sequence[Edit]) -> list[int]:
    """Layers whose blocks are read or changed: edited ones that are not just removed, and those that merges go into."""
    after = before.extended(edits)
    below = [after.below(edit.layer) for edit in edits if isinstance(edit, Merge)]
    return [*(edit.layer for edit in edits if not isinstance(edit, Remove)), *(x for x in below if x is not None)]


def _distance(module: DistillModule, windows: Sequence[Tensor]) -> float:
    """KL of the student to its teacher on windows [B, T], in nats per token; rank 0's on every rank."""
    quality = measure_quality(module.student, module.teacher, [{"input_ids": batch} for batch in windows])
    sharding.reshard(module.student)
    return float(module.ranks.first(quality["kl"]))


def _refit(
    module: DistillModule,
    optimizer: torch.optim.Optimizer,
    record: Record,
    edits: Sequence[Edit],
    refits: Sequence[Refit],
    text: Text,
    folder: Path | None,
) -> list[str]:
    """What the refits that follow some edits say that they did to the student."""
    student = module.student

    @contextmanager
    def opened(layer: int) -> Iterator[None]:
        """A block in shards is whole while it is refitted, and no other one is."""
        origin = sharding.thaw(student, module.teacher, record, [layer])
        yield
        sharding.freeze(student, origin, optimizer)

    def check_stop() -> None:
        if module.stopping():
            raise BrokenOffError

    return refit_survivors(
        refits, student, module.teacher, record, edits, text,
        ranks=module.ranks, opened=opened, check_stop=check_stop, states=module.teacher_states, folder=folder,
    )  # fmt: skip


class Editor:
    """Where the edits of a run are carried out: between two stages of the process that trains them.

    Args:
        refits: of the surviving blocks after every edit, in order.
        windows: gives calibration windows [B, T] of so many tokens for them, the same on every rank.
        by_step: in the place of `refits`, those of each step of `schedule=mixed`.
        folder, place: where states on disk lie (None = as temporary files do), and those of a fit (device, host, disk).
        window: tokens of a window.
        fit_tokens: that blocks are fitted to and pairs merged on; 0 = nothing is fitted.
    """

    in_place = True
    """Whether edits meet a student that the strategy has wrapped."""

    def __init__(
        self,
        refits: Sequence[Refit] = (),
        windows: Callable[[int], Sequence[Tensor]] = lambda _tokens: (),
        by_step: Sequence[Sequence[Refit]] = (),
        folder: Path | None = None,
        place: str = "device",
        window: int = 1,
        fit_tokens: int = 0,
    ) -> None:
        self.refits, self.windows, self.by_step, self.folder, self.place = refits, windows, by_step, folder, place
        self.window, self.fit_tokens = window, fit_tokens
        self._texts: dict[int, Text] = {}

    def text(self, ranks: Ranks) -> Text:
        """What is fitted to in this run and what judges it, in all stages: as much as whoever reads most asks for."""
        if ranks.size not in self._texts:
            every = [refit for refits in self.by_step for refit in refits] if self.by_step else self.refits
            self._texts[ranks.size] = text_of(every, self.fit_tokens, self.windows, self.window, ranks.size)
        return self._texts[ranks.size]

    def fit_text(self, stage: Stage, ranks: Ranks) -> Text:
        """What the blocks of a stage are fitted to; none = no fit."""
        fits = stage.fit and stage.edits and self.fit_tokens
        return self.text(ranks).few(self.fit_tokens, judging(self.fit_tokens)) if fits else Text()

    def refits_of(self, stage: Stage) -> Sequence[Refit]:
        """The refits of a stage's step."""
        return self.by_step[stage.step] if self.by_step else self.refits

    def refits_after(self, stage: Stage) -> bool:
        """Whether refits follow a stage's edits."""
        return bool(stage.edits and stage.refit_share and self.refits_of(stage))

    def not_refitted(self, finished: Sequence[Stage]) -> list[Edit]:
        """Edits of the latest of these stages that no refit has followed."""
        latest = list(takewhile(lambda stage: not self.refits_after(stage), reversed(finished)))
        return [edit for stage in reversed(latest) for edit in stage.edits]

    def fit_tokens_of(self, stage: Stage, depth: int) -> float:
        """Training tokens that take about as long as the fits of its edits, which are one walk from below.

        Args:
            stage: whose.
            depth: layers of the teacher.
        """
        fits = sum(edit.op in ("replace", "merge") for edit in stage.edits)
        read = self.fit_text(stage, Ranks()).tokens if fits else 0
        return read * (2 + _FIT_BLOCKS * fits / depth) / 4  # a step is four passes of a model

    def refit_tokens_of(self, stage: Stage) -> float:
        """Training tokens that take about as long as the refits of its edits."""
        whole = training_tokens(self.refits_of(stage), self.text(Ranks()))
        return stage.refit_budget if whole and stage.refit_budget else whole

    def check(self, *, timed: bool) -> None:
        """Raise ValueError for settings of the run that do not go with it; `timed`: one process has a time limit."""

    def check_refits(self, module: DistillModule, plan: Sequence[Stage]) -> None:
        """Raise ValueError, before anything is scored, where refits of the plan could not be carried out."""
        edits, stages = list(module.record.edits), list[tuple[Stage, Sequence[Refit]]]()
        for stage in plan:
            edits += stage.edits
            refits = list[Refit]()
            if stage.edits:
                # a fresh process edits whole weights, by itself
                ranks = module.ranks if self.in_place else Ranks()
                sharded = self.in_place and sharding.is_sharded(module.student)
                refits = for_stage(self.refits_of(stage), stage, self.window, ranks, sharded=sharded)
                check_refits(refits, module.teacher, edits, self.text(ranks), ranks, sharded=sharded)
            stages.append((stage, refits))
        check_sizes(stages, of_sizes(module.terms, tied=bool(module.teacher.config.tie_word_embeddings)))
        check_used([refit for stage in plan for refit in self.refits_of(stage)], edits)

    def before_wrapping(
        self,
        state: RunState,
        module: DistillModule,
        path: Path,
        device: torch.device,
        forward_context: Callable[[], AbstractContextManager[None]],
        alike: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """A run is taken up from the checkpoint `path`, and nothing is wrapped; whole models have room on `device`."""

    def restore(self, path: Path, module: DistillModule, optimizer: torch.optim.Optimizer, rank: int) -> None:
        """Weights, optimizer state and random numbers of a checkpoint."""
        checkpoint.restore(path, module.student, optimizer, rank)

    def carry_out(
        self,
        module: DistillModule,
        optimizer: torch.optim.Optimizer,
        stage: Stage,
        forward_context: Callable[[], AbstractContextManager[None]],
        finished: Sequence[Stage],
        alike: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Edited:
        """See `carry_out`. What the stages before it, `finished`, have left to its refits, they do."""
        text, fits = self.text(module.ranks), self.fit_text(stage, module.ranks)
        rest = text, self.folder, self.place, self.not_refitted(finished), alike
        sharded = sharding.is_sharded(module.student)
        refits = for_stage(self.refits_of(stage), stage, self.window, module.ranks, sharded=sharded)
        return carry_out(module, optimizer, stage, fits, forward_context, refits, *rest)

    def leaves_before(self, state: RunState) -> bool:
        """Whether the process ends where the run stands, because it cannot make the edit that comes next."""
        return False

    def leave(self, run_dir: Path) -> None:
        """End a process that `leaves_before` an edit."""


def taken_over(student: PreTrainedModel, record: Record, stage: Stage) -> list[str]:
    """What the mixers of a stage copied, drew fresh or dropped, layers that did the same in one sentence."""
    stack, layers = Stack(student), defaultdict(list)
    for edit in stage.edits:
        if isinstance(edit, Convert) and edit.layer in record.layers:
            attention = stack.layers[record.layers.index(edit.layer)].get_submodule(stack.family.attn)
            report = getattr(getattr(attention, "mixer", None), "report", None)
            if report:
                layers[edit.mixer.target.rpartition(".")[2], tuple(report)].append(edit.layer)
    return [f"{name}, layers {layers_text(numbers)}: {'; '.join(report)}" for (name, report), numbers in layers.items()]


def adapt(student: PreTrainedModel, record: Record, stage: Stage) -> None:
    """Attach the adapters of a stage that trains them; nothing for any other.

    Raises ValueError when they cannot be attached, or would not move.
    """
    if stage.train != "lora":
        return
    if stage.tokens and not stage.lr:
        raise ValueError(
            f"schedule.lr=0 in stage {stage.name!r}: the adapters of schedule.train=lora train at this rate"
        )
    adapters.attach(student, record, stage.lora, new_parameters(student, record, stage))


def merge_adapters(module: DistillModule, optimizer: torch.optim.Optimizer) -> None:
    """Merge the adapters at the end of a stage, so that scores, edits and checkpoints see a plain student."""
    if adapters.merge(module.student):
        module.enter(adapters.merged(module.stage))
        module.regroup(optimizer)
