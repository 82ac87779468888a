"""Pictures of a budget's plan: which option every layer got, and predicted KL beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from iskd.report.figures.style import PALETTE, SQUARES, figure_of, set_heading, to_svg

_COLOURS = ("blue", "vermillion", "green", "orange", "purple", "sky", "muted", "ink")
_HATCHES = ("", "//", "..", "xx")


def choice_map(names: Sequence[str], choice: Sequence[str], kept: str) -> str:
    """One cell for every layer, coloured and hatched by what it got.

    Args:
        names: of the options that some layer got, kept layers first where there are any.
        choice: the name for every layer.
        kept: the name of a kept layer.
    """
    from matplotlib.patches import Patch

    others = [name for name in names if name != kept]
    looks = {name: (PALETTE[_COLOURS[at % 8]], _HATCHES[at // 8 % 4]) for at, name in enumerate(others)}
    looks[kept] = (PALETTE["cell"], "")
    with figure_of(1.5 + 0.16 * math.ceil(len(names) / 3)) as figure:
        axes = figure.subplots()
        for layer, name in enumerate(choice):
            colour, hatch = looks[name]
            axes.add_patch(_cell(layer, colour, hatch))
        axes.set_xlim(-0.5, len(choice) - 0.5)
        axes.set_ylim(0, 1)
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        step = next(s for s in (1, 2, 5, 10, 20, 50) if len(choice) / s <= 16 or s == 50)
        axes.set_xticks(range(0, len(choice), step))
        axes.set_xlabel("layer (teacher's index)")
        handles = [Patch(facecolor=looks[name][0], hatch=looks[name][1], lw=0, label=name) for name in names]
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0.6, **SQUARES)
        return to_svg(figure, "choice", "What every layer became")


def _cell(layer: int, colour: str, hatch: str):  # type: ignore[no-untyped-def]
    from matplotlib.patches import Rectangle

    return Rectangle((layer - 0.46, 0.05), 0.92, 0.9, facecolor=colour, hatch=hatch, edgecolor=PALETTE["surface"], lw=0)


def predicted_measured(points: Sequence[tuple[float, float]], taken: int) -> str | None:
    """Predicted KL against measured KL of the plans that were tried; None for fewer than two finite ones.

    Args:
        points: (predicted, measured), nats.
        taken: which of them the run carries out.
    """
    known = [(at, x, y) for at, (x, y) in enumerate(points) if math.isfinite(x) and math.isfinite(y)]
    if len(known) < 2:
        return None
    with figure_of(3.2) as figure:
        axes = figure.subplots()
        top = max(max(x, y) for _, x, y in known) * 1.08
        axes.plot([0, top], [0, top], color=PALETTE["muted"], linewidth=0.8, linestyle=(0, (4, 3)))
        for at, x, y in known:
            mark, colour = ("D", "vermillion") if at == taken else ("o", "blue")
            axes.plot([x], [y], mark, color=PALETTE[colour])
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("predicted KL")
        set_heading(axes, "measured KL with blocks of the library (diamond: taken)")
        return to_svg(figure, "predicted", "Predicted and measured KL of the plans that were tried")


def front(points: Sequence[tuple[float, float]], here: tuple[float, float] | None, name: str) -> str | None:
    """Predicted KL by budget; None without two points.

    Args:
        points: (share of the teacher's blocks, predicted KL).
        here: share and predicted KL of the plan; None = not drawn.
        name: of the limit.
    """
    known = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(known) < 2:
        return None
    with figure_of(3.2) as figure:
        axes = figure.subplots()
        axes.plot([100 * x for x, _ in known], [y for _, y in known], "-o", color=PALETTE["blue"])
        drawn = here is not None and all(map(math.isfinite, here))
        if here is not None and drawn:
            axes.plot([100 * here[0]], [here[1]], "D", color=PALETTE["vermillion"])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"{name}, % of the teacher's blocks")
        set_heading(axes, f"predicted KL by budget, by single scores{' (diamond: this plan)' * drawn}")
        return to_svg(figure, "front", "Predicted KL by budget")
