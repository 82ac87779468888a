"""Task accuracy: what a student loses on tasks when a block is left out.

    score = mean over tasks of (accuracy with all blocks - accuracy without the block)

Source: ILD (arXiv 2511.05085), which ranks layers by the mean of seven tasks without them, generation among them. As
there, every task has the same weight. Differences are paired by item, so the standard error of a row is that of the
score; at 50 items a task it is a few points, more than most blocks differ by.

The prefix below a block is computed once for all that are left out above it, and no module is moved meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iskd.data import Framing, framing_of
from iskd.evaluation.judging import judge, pairs_of
from iskd.evaluation.likelihood import BATCH_TOKENS, by_branch
from iskd.evaluation.tasks import Item, check_choosable, file_of, items_of, metric_of, subset
from iskd.evaluation.tasks.task_items import CBT_SENTENCE, split_items
from iskd.importance.base import WindowImportance
from iskd.models import Stack, scoring
from iskd.models.capture import Trace
from iskd.models.tokenizers import byte_tokenizer, load_tokenizer
from iskd.system.faults import UnavailableError
from iskd.system.files import expanded

METRICS = ("acc", "acc_norm")


class TaskAccuracy(WindowImportance):
    """Accuracy lost without the block, in [-1, 1], mean over tasks; the calibration windows are not read.

    Args:
        data_dir: folder that holds NAME/eval.jsonl of every task.
        tasks: names in `iskd.evaluation.TASKS`, `copy`, `copy_doc`, `copy_para`, `cbt_sentence`, `translation` and
            `summary`. `lambada` is scored by greedy decoding, copying by the share of tokens repeated before the first
            mistake, written texts by the share of the reference's tokens that are the likeliest after those before.
        items: at most so many of each task.
        share: of a task's items that may be used here; the rest is for reports. `split_items` with the same share and
            seed gives both sides.
        seed: of the split and the draw.
        tokenizer: directory of the student's tokenizer, or the tokenizer; None = the run's, and outside a run the one
            beside the teacher's weights, or bytes for a teacher made from a config.
        metric: `acc` or `acc_norm` (by characters) of multiple choice.
        batch_tokens: most tokens in a batch.
        bos: what stands before a text (`data.bos`, `iskd.data.framing`).

    Attributes:
        selection: the items used, by task; a run keeps their hashes, and its evaluation leaves them out.

    Raises:
        ValueError: a value out of range, an unknown task, or a task without a file.

    Source: ILD (arXiv 2511.05085)
    Needs: files of the tasks (`importance.data_dir`) and a tokenizer
    Costs: L (L - 1) / 2 block calls for every item
    Measured: not measured
    """

    takes = ("bos",)

    def __init__(
        self,
        data_dir: str | Path | None = None,
        tasks: Sequence[str] = ("hellaswag", "piqa", "arc_easy", "lambada", "copy"),
        items: PositiveInt = 50,
        share: Annotated[float, Field(gt=0, lt=1)] = 0.5,
        seed: NonNegativeInt = 0,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        metric: str = "acc",
        batch_tokens: PositiveInt = BATCH_TOKENS,
        bos: str | None = None,
    ) -> None:
        for task in tasks:
            check_choosable(task)
        if not tasks or len(set(tasks)) < len(tasks):
            raise ValueError(f"importance.tasks must name at least one task and none twice, got {list(tasks)}")
        read = {task: held for task in tasks if (held := file_of(task)) is not None}
        if data_dir is None and read:
            raise UnavailableError(
                "importance.data_dir is not set: give the folder that holds NAME/eval.jsonl of every task (on the hub, "
                f"or its fields: {'; '.join(f'{task}: {held}' for task, held in read.items())}), or choose a score "
                "that needs no tasks, importance=ablation"
            )
        if items < 1 or batch_tokens < 1:
            raise ValueError(
                f"importance.items and importance.batch_tokens must be at least 1, got {items} and {batch_tokens}"
            )
        if metric not in METRICS:
            raise ValueError(f"importance.metric={metric!r}: choose {' or '.join(METRICS)}")
        self.tokenizer, self.metric, self.batch_tokens, self.bos = tokenizer, metric, batch_tokens, bos
        self.selection: dict[str, list[Item]] = {}
        for task in tasks:
            mine, _ = split_items(items_of(task, data_dir), share, seed)
            self.selection[task] = subset(mine, items, seed)

    def rows(self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]) -> Tensor:
        """Scores [L, items of all tasks]; items of small tasks weigh more, so that the mean is the mean over tasks.

        Raises:
            ValueError: there is no tokenizer, or it does not fit the student.
        """
        stack = Stack(student)
        tokenizer = tokenizer_of(teacher) if self.tokenizer is None else _load(self.tokenizer)
        correct: dict[str, list[Tensor]] = {}
        with scoring(student):
            for alone in (False, True):
                ways = {"frame": Framing() if alone else framing_of(tokenizer, self.bos), "first_given": alone}
                correct |= self._correct(stack, student, tokenizer, alone, ways)
        *without, whole = [torch.cat(each) for each in zip(*(correct[task] for task in self.selection), strict=True)]
        return (whole - torch.stack(without)) * self._weights()

    def _correct(
        self,
        stack: Stack,
        student: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        alone: bool,
        ways: dict[str, Any],
    ) -> dict[str, list[Tensor]]:
        """Correctness [items] by task, without each block and with all; of sentences that stand alone, or of others."""
        some = {task: items for task, items in self.selection.items() if (task == CBT_SENTENCE) is alone}
        everything = [item for items in some.values() for item in items]
        if not everything:
            return {}
        sizes, pairs = [len(items) for items in some.values()], pairs_of(everything)
        found = by_branch(
            student, tokenizer, pairs, lambda ids: without_each(stack, ids), batch_tokens=self.batch_tokens, **ways
        )
        results = [judge(everything, likelihoods) for likelihoods in found]
        return {
            task: [result.of(metric_of(task, self.metric)).split(sizes)[place] for result in results]
            for place, task in enumerate(some)
        }

    def _weights(self) -> Tensor:
        """Factor [items] that turns the mean over items into the mean over tasks."""
        sizes = torch.tensor([len(items) for items in self.selection.values()])
        return (sizes.sum() / (len(sizes) * sizes)).repeat_interleave(sizes)


def without_each(stack: Stack, ids: Tensor) -> Iterator[Tensor]:
    """Final state [B, T, D] without block 0, without block 1, ..., and last with all blocks, for ids [B, T]."""
    trace = Trace(stack, ids, 0)
    h_BTD = trace.input
    for position, block in enumerate(stack.layers):
        branch = h_BTD
        for later in range(position + 1, len(stack.layers)):
            branch = trace.run(later, stack.layers[later], branch)
        yield stack.final_norm(branch)
        h_BTD = trace.run(position, block, h_BTD)
    yield stack.final_norm(h_BTD)


def tokenizer_of(teacher: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights that a teacher was loaded from; bytes if it was made from a config.

    Raises:
        ValueError: there is none on this machine.
    """
    return _load(teacher.name_or_path) if teacher.name_or_path else byte_tokenizer()


def _load(place: str | Path | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if isinstance(place, PreTrainedTokenizerBase):
        return place
    try:
        return load_tokenizer(expanded(place))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer in {place} ({str(error).splitlines()[0]}): set importance.tokenizer to the directory that "
            "holds the teacher's tokenizer.json"
        ) from error
