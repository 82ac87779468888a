"""What is compared at removed layers: how the layers go, what is refitted, and how the student is trained after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from iskd.plan import Edit, Remove, Replace, Spec
from iskd.plan.edits import Merge
from iskd.refits import Refit
from iskd.refits.local import Local
from iskd.refits.magnitude import Magnitude
from iskd.refits.output import Output
from iskd.refits.replaceme import ReplaceMe

LAYERS = {
    26: (12, 13, 14, 25),
    23: (3, 12, 13, 14, 17, 25, 26),
    20: (3, 4, 5, 6, 7, 12, 13, 14, 17, 26),
}
"""The layers that go, the same for all methods of a depth."""

CHOICES = {
    "influence": (12, 13, 14, 15, 17, 25, 26),
    "after-refits": (3, 4, 5, 7, 12, 14, 17),
    "repeated": (3, 4, 5, 6, 12, 25, 26),
    "gap": (12, 13, 14, 15, 16, 17, 18),
}
"""Other seven layers: by block influence, by leave-one-out with a refit after every cut, on windows whose second half
repeats the first, and without refits between."""


@dataclass(frozen=True)
class Recipe:
    """AdamW or Muon, tokens a step, rate, window."""

    optimizer: str = "adamw"
    step: int = 512
    rate: float = 1e-4
    window: int = 512


@dataclass(frozen=True)
class Method:
    """One way to a student; `wikitext`: calibrated on one text instead of both."""

    refits: Sequence[Refit] = ()
    edits: Callable[[Sequence[int]], list[Edit]] = lambda layers: [Remove(layer) for layer in layers]
    layers: Sequence[int] | None = None
    wikitext: bool = False
    recipe: Recipe = Recipe()


def linear_at_gaps(layers: Sequence[int]) -> list[Edit]:
    """Of every gap the lowest layer becomes a linear block, and the others go."""
    block = Spec("iskd.blocks.linear.Linear", {})
    return [Remove(layer) if layer - 1 in layers else Replace(layer, block, seed=layer) for layer in layers]


def merged(layers: Sequence[int]) -> list[Edit]:
    """Each layer goes into the one below it, where that is better than to go alone."""
    return [Merge(layer) for layer in layers]


OUTPUT = Output(tokens=8_192, held_tokens=2_048)
LOCAL = Local(tokens=8_192, held_tokens=2_048)
GAPS = replace(LOCAL, blocks="gaps")

EVERYWHERE = {
    "none": Method(),
    "magnitude": Method([Magnitude(tokens=8_192, held_tokens=2_048)]),
    "replaceme": Method([ReplaceMe(tokens=8_192, held_tokens=2_048)]),
    "linear": Method(edits=linear_at_gaps),
    "linear-local": Method([GAPS], linear_at_gaps),
    "output": Method([OUTPUT]),
    "local": Method([LOCAL]),
    "output-local": Method([OUTPUT, LOCAL]),
    "merge": Method(edits=merged),
    "merge-output": Method([OUTPUT], merged),
}
"""At 26, 23 and 20 layers."""

TURNED = {
    "output-gaps": Method([replace(OUTPUT, blocks="gaps")]),
    "output-above": Method([replace(OUTPUT, blocks="above")]),
    "local-gaps": Method([GAPS]),
    "local-above": Method([replace(LOCAL, blocks="above")]),
    **{f"output-ridge{r}": Method([replace(OUTPUT, ridge=[r])]) for r in (0.01, 0.03, 0.1, 0.3)},
    **{
        f"output-{k}k": Method([Output(tokens=1024 * k, held_tokens=min(256 * k, 8_192))]) for k in (4, 16, 32, 64, 128)
    },
    "output-wikitext": Method([OUTPUT], wikitext=True),
    "output-folds2": Method([replace(OUTPUT, folds=2)]),
    "output-mlp": Method([replace(OUTPUT, projections=["mlp"])]),
    "output-attention": Method([replace(OUTPUT, projections=["attention"])]),
    **{f"output-share{s}": Method([replace(OUTPUT, attention_share=[s])]) for s in (0.25, 0.5, 1.0)},
    **{f"local-epochs{n}": Method([replace(LOCAL, epochs=n)]) for n in (1, 2, 8)},
    "local-step2048": Method([replace(LOCAL, step_tokens=2048)]),
    "local-sublayers": Method([replace(LOCAL, sublayers=True)]),
    **{f"{name}-layers": Method([OUTPUT], layers=layers) for name, layers in CHOICES.items()},
    "gap-layers-32k": Method([Output(tokens=32_768, held_tokens=4_096)], layers=CHOICES["gap"]),
}
"""At 23 layers only: one thing is turned."""

STEPS = {
    "none-step512-3e-4": Method(recipe=Recipe(rate=3e-4)),
    "none-step1024-3e-4": Method(recipe=Recipe(step=1024, rate=3e-4)),
    **{
        f"output-{name}": Method([OUTPUT], recipe=recipe)
        for name, recipe in {
            "step128-1e-4": Recipe(step=128, window=128),
            "step256-1e-4": Recipe(step=256, window=256),
            "step256-2e-4": Recipe(step=256, rate=2e-4, window=256),
            "step512-2e-4": Recipe(rate=2e-4),
            "step1024-1e-4": Recipe(step=1024),
            "step1024-3e-4": Recipe(step=1024, rate=3e-4),
            "step2048-1e-4": Recipe(step=2048),
            "step2048-3e-4": Recipe(step=2048, rate=3e-4),
            "muon512-3e-4": Recipe("muon", rate=3e-4),
        }.items()
    },
}
"""At 23 layers only, trained only: the size of a step, the rate, the window."""


def methods(depth: int) -> dict[str, Method]:
    """All at a depth, by name."""
    return {**EVERYWHERE, **(TURNED | STEPS if depth == 23 else {})}
