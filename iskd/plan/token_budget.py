"""How many tokens a run trains on where nobody says: by the kind of machine, and on a GPU by how much text there is."""

from __future__ import annotations

from dataclasses import dataclass

ON_CPU = 32_768
"""Tokens of a run on a CPU: minutes for a model of some hundred million parameters, and no more than a first look."""
ON_GPU = 20_000_000
"""Tokens of a run on a GPU, where there is enough text for them."""
PASSES = 4
"""Over the same text: up to four are nearly as good as new text (Muennighoff et al. 2023, arXiv 2305.16264)."""


@dataclass(frozen=True)
class TokenBudget:
    """What was decided, and the sentence that the plan says of it.

    Attributes:
        tokens: training tokens of the whole run.
        told: which machine was seen, what was chosen, and which keys choose otherwise.
    """

    tokens: int
    told: str


def cpu_token_budget(machine: str) -> TokenBudget:
    """That of a run on a CPU; `machine` is what it is called."""
    return TokenBudget(
        ON_CPU,
        f"schedule.tokens is not set: {ON_CPU:,} for a run on a CPU ({machine}), which is a first look; "
        "another number by schedule.tokens=N",
    )


def gpu_token_budget(machine: str, text_tokens: int) -> TokenBudget:
    """That of a run on a GPU: `ON_GPU`, but at most `PASSES` over the training text and at least what a CPU gets.

    Args:
        machine: what it is called.
        text_tokens: of the training text.
    """
    tokens = max(ON_CPU, min(ON_GPU, PASSES * text_tokens))
    if tokens == ON_GPU:
        how, other = f"{tokens:,} for a run on a GPU ({machine})", "another number by schedule.tokens=N"
    else:
        how = (
            f"{tokens:,} on a GPU ({machine}), {tokens / max(1, text_tokens):.1f} passes over the {text_tokens:,} "
            f"tokens of training text; with more text it would be {ON_GPU:,}"
        )
        other = "more text by data=, another number by schedule.tokens=N"
    return TokenBudget(tokens, f"schedule.tokens is not set: {how}; {other}")
