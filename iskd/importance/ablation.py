"""Ablation: what is lost when a block is left out.

ILD (arXiv 2511.05085) scores by ablation on tasks; here the loss is read off the logits of calibration windows.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from iskd.importance.base import WindowImportance
from iskd.importance.sweep import PrefixCache, check_metric, leave_one_out_rows
from iskd.models import scoring


class Ablation(WindowImportance):
    """Mean over tokens of what the student loses without the block, in nats.

    Args:
        stride: every `stride`-th position is scored; 1 = all of them, the exact mean.
        metric: `kl`, KL(teacher || student without the block), or `loss`, next-token cross-entropy without the block
            minus that of the whole student.
        width: branches run as one batch; None = 8 on a GPU, 1 on a CPU.
        cache_mb: host memory for the streams of the calibration windows, which spare the next scoring the blocks below
            the first change; 0 = start afresh each time.

    Source: ILD (arXiv 2511.05085), which ablates on tasks
    Needs: calibration tokens (`run.score_tokens`); the teacher for `metric=kl`
    Costs: L (L - 1) / 2 block calls and L heads a window; 10.14 CPU s for 256 tokens through SmolLM2-135M, block
        influence 0.98 (benchmarks/leave_one_out.md)
    Measured: the scores of deleting block after block, 1.74 times as fast (benchmarks/leave_one_out.md)
    """

    def __init__(self, stride: int = 4, metric: str = "kl", width: int | None = None, cache_mb: int = 256) -> None:
        check_metric(metric)
        for key, value in (("stride", stride), ("width", width)):
            if value is not None and value < 1:
                raise ValueError(f"importance.{key} must be at least 1, got {value}")
        self.metric, self.stride, self.width = metric, stride, width
        self.prefix_cache = PrefixCache(cache_mb)

    def rows(self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]) -> Tensor:
        """Scores [L, W] of the student's blocks on each of the W windows in `batches`, token ids [B, T] each."""
        with scoring(student, teacher):
            return leave_one_out_rows(
                student,
                teacher,
                batches,
                metric=self.metric,
                stride=self.stride,
                width=self.width,
                prefix_cache=self.prefix_cache,
            )
