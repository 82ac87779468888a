"""`iskd score model=... importance=...`: score the layers of a model without training it."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor, nn

from iskd.commands.arguments import hydra_main
from iskd.commands.build import importance_of, read_with, teacher_of, text_data
from iskd.commands.values import as_meant
from iskd.export import load
from iskd.export.loading import record_of
from iskd.importance import AttentionImportance, layer_scores, rows_of
from iskd.importance.angular import Angular, angular_windows
from iskd.models import Stack
from iskd.plan.trainer_settings import with_defaults
from iskd.report import score_table, write_scores
from iskd.report.terminal import print_table, terminal
from iskd.system.precision import place


@hydra_main
def main(config: DictConfig) -> None:
    """Print and write the scores."""
    folder, name = Path(HydraConfig.get().runtime.output_dir), HydraConfig.get().runtime.choices["importance"]
    rows, layers, runs = importance_rows(config)
    scores = layer_scores(rows, layers, config.seed)
    console = terminal()
    print_table(score_table(scores, name), console=console)
    for file in write_scores(folder, scores, rows, name, runs):
        console.print(str(file), soft_wrap=True)


def importance_rows(config: DictConfig) -> tuple[Tensor, tuple[int, ...], Tensor | None]:
    """Rows [L, W] of the configured importance on the model as it is, and the numbers of its layers.

    A student is scored beside its own teacher, by the teacher's numbers.

    Third is what `angular` says of every run of consecutive layers [L - 1, L] (`iskd.importance.angular`), None of
    other importances. The windows are `run.score_tokens` of the calibration split; the precision is the trainer's.
    """
    config = as_meant(config)
    teacher, start = teacher_of(config)
    model = teacher.model if start is None else load(start)
    layers = tuple(range(len(Stack(model).layers)))
    if start is not None:
        layers = record_of(start, len(Stack(teacher.model).layers)).layers
    stack = Stack(model.eval())
    data = text_data(config, teacher.tokenizer, stack)
    stack.keep_apart(data.separator)
    windows = data.calibration(config.run.score_tokens)
    device, forward_context = place(with_defaults(config.trainer))
    for each in (teacher.model, model):
        nn.Module.to(each, device)
    batches = [batch.to(device) for batch in windows]
    with forward_context():
        importance, depth = importance_of(config), len(stack.layers)
        read_with(teacher.tokenizer, [importance], data.bos)
        if isinstance(importance, AttentionImportance):
            importance.layers = layers
        rows = rows_of(importance, model, teacher.model, batches)
        runs = None
        if isinstance(importance, Angular) and depth > 1:
            runs = angular_windows(model, batches, depth - 1, importance.tokens)
    return rows, layers, runs
