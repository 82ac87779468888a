"""In which order layers are edited.

`gpt2_paper` and `phi1_paper` are the two orders of ISKD (COLING 2025), read off its code; the second is irregular and
its origin is not stated. `middle_out` and `alternate` extend the idea of the first to any depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_PAPER = {
    "gpt2_paper": (5, 7, 3, 9, 1, 11, 2, 10, 4, 8, 6, 0),
    "phi1_paper": (9, 1, 19, 15, 14, 7, 17, 8, 10, 11, 13, 20, 0, 4, 12, 18, 6, 21, 5, 2, 23, 3, 16, 22),
}
NAMES = (*_PAPER, "middle_out", "alternate", "importance")


def ordered(name: str, num_layers: int, scores: Mapping[int, float] | None = None) -> list[int]:
    """Layers in the order in which they are edited.

    Args:
        name: one of `NAMES`. `middle_out` starts in the middle and moves outwards; `alternate` takes the odd layers
            from the middle outwards, then the even ones, so that no two compact blocks meet before the half;
            `importance` takes the lowest score first.
        num_layers: depth of the teacher.
        scores: importance by layer, needed for `importance`; ties go to the lower layer.

    Raises:
        ValueError: unknown name, a paper's order at another depth, or scores missing.
    """
    if name in _PAPER:
        if len(_PAPER[name]) != num_layers:
            raise ValueError(
                f"schedule.order={name} was published for {len(_PAPER[name])} layers, the teacher has {num_layers}; "
                "use alternate, middle_out, importance or a list in schedule.layers"
            )
        return list(_PAPER[name])
    if name == "importance":
        if scores is None:
            raise ValueError("schedule.order=importance needs scores; choose one with importance=...")
        return sorted(scores, key=lambda layer: (scores[layer], layer))
    outwards = sorted(range(num_layers), key=lambda layer: (abs(2 * layer - num_layers + 1), layer))
    if name == "middle_out":
        return outwards
    if name == "alternate":
        return [layer for layer in outwards if layer % 2] + [layer for layer in outwards if not layer % 2]
    raise ValueError(f"schedule.order={name!r} is unknown; choose one of {', '.join(NAMES)}")


def first_available(order: Sequence[int], used: Sequence[int], protect: Sequence[int], count: int) -> list[int]:
    """The first `count` layers of `order` that are neither used nor protected."""
    return [layer for layer in order if layer not in set(used) | set(protect)][:count]
