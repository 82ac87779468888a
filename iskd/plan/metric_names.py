"""Names of the metrics that a run logs, and of the axis they are drawn over."""

from __future__ import annotations

from collections.abc import Mapping

X_AXIS = "tokens"

#: Keys of a quality measurement, as in `StageResult` and in `StageResult.before`.
QUALITY = ("ppl", "kl", "top1", "retention")

ALIGN = "align/"
"""Before the number of a layer: how far it is from the teacher's in a stage that aligns layers."""
INSIDE = "val/inside"
"""1 in the rows that were measured inside a stage (`eval.every`)."""

#: Every metric a run logs, with its unit. A loss term `x` adds `train/x`, a task `x` of `eval.every` `task/x`, a layer
#: that is aligned `align/LAYER`: its distance from the teacher's in the unit of the stage's objective.
METRICS: Mapping[str, str] = {
    X_AXIS: "training tokens since the start of the run",
    "step": "optimizer steps since the start of the run",
    "stage": "index of the stage in progress, 1-based; 0 is the teacher",
    "train/loss": "weighted sum of the loss terms, per token",
    "train/kl": "nats per token",
    "train/ce": "nats per token",
    "train/hidden": "mean square per token; in a stage that aligns blocks, L2 distance per token, mean over layers",
    "train/matrix": "Frobenius distance of mixing matrices, mean over heads and layers",
    "train/mixer_output": "mean square, mean over layers",
    "train/grad_norm": "L2 norm before clipping",
    "train/tokens_per_s": "tokens per second of training, over the stage",
    "train/mfu": "model FLOPs utilisation over the stage: share of the matrix peak measured in the same run, 0 to 1",
    "train/flops_per_token": "FLOPs of a training step per token, counted",
    "train/data_share": "share of the stage's training time between two batches: loader and transfer, 0 to 1",
    "train/refit_seconds": "seconds of the refits behind the stage's edits",
    "lr/base": "learning rate of the step before, inherited weights",
    "lr/new": "learning rate of the step before, weights made by an edit",
    "val/ppl": "perplexity of the student",
    "val/kl": "nats per token from teacher to student",
    "val/top1": "share of positions where both prefer the same token, 0 to 1",
    "val/retention": "student's score / teacher's score",
    INSIDE: "1 where the student was measured inside a stage, eval.every",
    "val/tokens_per_s": "tokens per second while scoring",
    "model/params": "parameters",
    "model/block_params": "parameters of the layers' blocks",
}

#: Metrics under `train/` that are not losses, so the loss plot leaves them out.
NOT_LOSSES = frozenset(
    {"train/grad_norm", "train/tokens_per_s", "train/mfu", "train/flops_per_token", "train/data_share"}
    | {"train/refit_seconds"}
)
