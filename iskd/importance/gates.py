"""Gates: attention and mixer side by side in every layer, and how much of each is wanted, learned by all at once.

    o_l = g_l attention_l(x) + (1 - g_l) mixer_l(x),  g = sigmoid(a)        score = g
    loss = L + penalty * max(0, mean(g) - share)

All weights are frozen, a is all that is trained (FlashMorph, arXiv 2606.30562, on synthetic retrieval; its code was not
read). L is asked of text that has to be recalled, or is KL to the teacher. Scores of one layer at a time
(`importance=restore`) do not see that two layers do the same; gates that are paid for together do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from iskd.importance.base import AttentionImportance, Conversions, refuse_not_finite, repeated, standing_in
from iskd.models import Stack, autocast_head, cap_logits, project, scoring
from iskd.models.capture import state_of
from iskd.models.projections import with_submodule

METRICS = ("recall", "kl")
SHARE = 0.25  # of layers with attention, where neither the config nor a schedule says


class Gates(AttentionImportance):
    """How much attention each layer keeps when all pay for it together, in (0, 1); higher = keep the attention.

    Args:
        metric: `recall`, cross-entropy in the half of a window that says the other half again; `kl`, KL to the teacher.
        steps: windows that the gates learn from, one a step, again from the first where there are fewer.
        lr: rate of Adam, of logits that start at 0.
        penalty: nats that the mean gate above `share` costs, per unit.
        share: layers that are to keep their attention, of those in question; None = as the schedule says, else 0.25.
        chunk: positions whose logits exist at the same time.
        convert: the kind of edit that makes the mixers. seed: of the run.
        stand_in: windows of so many tokens stand for recurrent mixers, which have yet to learn; None = they themselves.

    Source: FlashMorph (arXiv 2606.30562)
    Needs: calibration tokens (`run.score_tokens`), `edit=convert` and a mixer
    Costs: a forward and a backward pass a step, with attention and mixer in every layer
    Measured: not measured
    """

    def __init__(
        self,
        metric: str = "recall",
        steps: PositiveInt = 64,
        lr: PositiveFloat = 0.1,
        penalty: NonNegativeFloat = 4.0,
        share: Annotated[float, Field(gt=0, lt=1)] | None = None,
        chunk: PositiveInt = 256,
        convert: Conversions | None = None,
        seed: int = 0,
        stand_in: PositiveInt | None = None,
    ) -> None:
        if metric not in METRICS:
            raise ValueError(f"importance.metric={metric!r} is unknown: choose {' or '.join(METRICS)}")
        for key, value in (("steps", steps), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"importance.{key} must be at least 1, got {value}")
        if not (lr > 0 and penalty >= 0) or not (share is None or 0 < share < 1):
            raise ValueError(
                f"importance.lr={lr}, penalty={penalty} and share={share}: give a positive rate, a penalty that is not "
                "negative and a share in (0, 1)"
            )
        self.metric, self.steps, self.lr, self.penalty, self.share = metric, steps, lr, penalty, share
        self.chunk, self.convert, self.seed, self.stand_in = chunk, convert, seed, stand_in

    def choosing(self, candidates: Sequence[int], number: int, layers: Sequence[int]) -> Gates:
        """These gates among some positions, the `number` lowest of which are going to be converted."""
        chosen = copy.copy(self)
        chosen.candidates, chosen.number, chosen.layers = tuple(candidates), number, tuple(layers)
        return chosen

    def rows(self, student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]) -> Tensor:
        """Gates [L, 1]; blocks that are not in question have 1.

        Raises ValueError as `AttentionImportance.in_question` does, and for windows too short.
        """
        stack = Stack(student)
        longest = max(batch.shape[1] for batch in batches)
        positions, blocks = self.in_question(student, longest, recall=self.metric == "recall")
        if self.metric == "recall":
            batches = repeated(batches, None if stack.separator is None else stack.separator.token, self.begin)
        windows = [window for batch in batches for window in batch.split(1)]
        share = self.share
        if share is None:
            share = SHARE if self.number is None else 1 - self.number / len(positions)
        device = windows[0].device
        with scoring(student, teacher), _alone([*student.parameters(), *_parameters(blocks.values())]):
            logits = torch.zeros(len(positions), device=device, requires_grad=True)
            optimizer = torch.optim.Adam([logits], lr=self.lr)
            gated = {
                at: _gated(stack, stack.layers[at], blocks[at], partial(torch.select, logits, 0, index))
                for index, at in enumerate(positions)
            }
            # before other blocks stand in: the student may be the teacher itself
            goals = [Stack(teacher).last_hidden(window)[0] if self.metric == "kl" else None for window in windows]
            with standing_in(stack, gated):
                for step in range(self.steps):
                    number = step % len(windows)
                    window = windows[number].clone()
                    with torch.enable_grad():
                        h_1TD = stack.last_hidden(window)
                        pull = self._pull(stack, h_1TD.detach(), teacher, window, goals[number])
                        cost = self.penalty * (logits.sigmoid().mean() - share).clamp_min(0)
                        slopes = [pull.to(h_1TD.dtype), torch.ones_like(cost)]
                        (logits.grad,) = torch.autograd.grad([h_1TD, cost], logits, slopes)
                    optimizer.step()
        gates = torch.ones(len(stack.layers), 1)
        gates[positions, 0] = logits.detach().sigmoid().float().cpu()
        refuse_not_finite(gates, range(len(gates)), "blocks")
        return gates

    def _pull(
        self, stack: Stack, h_1TD: Tensor, teacher: PreTrainedModel, window: Tensor, goal_TD: Tensor | None
    ) -> Tensor:
        """Gradient [1, T, D] of the mean loss of one window [1, T] by the head's input, some positions at a time.

        `goal_TD` is the input of the teacher's head, for the metric `kl`.
        """
        tokens = window.shape[1]
        scored = range((tokens + len(self.begin)) // 2, tokens - 1) if self.metric == "recall" else range(tokens)
        found = torch.zeros_like(h_1TD)
        for start in range(scored.start, scored.stop, self.chunk):
            rows = slice(start, min(start + self.chunk, scored.stop))
            state = h_1TD[0, rows].requires_grad_()
            said = _log_probabilities(stack, state)
            if goal_TD is None:
                loss = F.nll_loss(said, window[0, rows.start + 1 : rows.stop + 1], reduction="sum")
            else:
                with torch.no_grad():
                    wanted = _log_probabilities(Stack(teacher), goal_TD[rows])
                loss = F.kl_div(said, wanted, reduction="sum", log_target=True)
            (found[0, rows],) = torch.autograd.grad(loss / len(scored), state)
        return found


class _Gated(nn.Module):
    """Attention and mixer of one layer, added by a gate; where a host calls its attention."""

    def __init__(self, attention: nn.Module, mixer: nn.Module, logit: Callable[[], Tensor]) -> None:
        super().__init__()
        self.attention, self.mixer, self._logit = attention, mixer, logit

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """The mixed stream [B, T, D], and no attention weights."""
        one, other = (state_of(part(hidden_states, **kwargs)) for part in (self.attention, self.mixer))
        gate = self._logit().sigmoid()
        return (gate * one + (1 - gate) * other).to(one.dtype), None


def _gated(stack: Stack, own: nn.Module, converted: nn.Module, logit: Callable[[], Tensor]) -> nn.Module:
    """A block with both; norms and MLP are the student's."""
    path = stack.family.attn
    both = _Gated(own.get_submodule(path), converted.get_submodule(path), logit)
    return with_submodule(own, path, both.train(own.training))


def _parameters(modules: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    for module in modules:
        yield from module.parameters()


def _log_probabilities(stack: Stack, hidden_nD: Tensor) -> Tensor:
    return cap_logits(project(hidden_nD, autocast_head(stack.head)), scale=1.0, softcap=stack.softcap).log_softmax(-1)


@contextmanager
def _alone(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """No gradient for any of them, so that a backward pass ends at the gates; afterwards they are as they were."""
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        with torch.inference_mode(False):
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
