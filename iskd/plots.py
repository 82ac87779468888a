"""Figures of a run, drawn with matplotlib and returned as inline SVG (html report) or written as one PNG (README).

Colours are Okabe-Ito's colour-blind-safe set (Okabe and Ito, "Color Universal Design", 2008); every colour is backed
by a shape, a position or a label. Each hex value in `PALETTE` becomes the CSS variable of its name in the SVG, so the
page switches between light and dark without a second drawing. Text stays text: small, selectable, in the page's font.
matplotlib is imported inside functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from iskd.table import number, percent
from iskd.tracking import StageResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Name of the CSS variable -> its colour in the light scheme.
PALETTE = {
    "ink": "#1b1f24",
    "muted": "#66707b",
    "grid": "#e3e6ea",
    "surface": "#fdfdfe",
    "cell": "#c9ced5",
    "blue": "#0072b2",
    "vermillion": "#d55e00",
    "green": "#009e73",
    "orange": "#e69f00",
    "purple": "#cc79a7",
    "sky": "#56b4e9",
}
KINDS = ("original", "compact", "removed", "converted")
_KIND_OF_OP = {"replace": "compact", "remove": "removed", "convert": "converted"}
_KIND_COLOUR = {
    "original": PALETTE["cell"],
    "compact": PALETTE["blue"],
    "removed": PALETTE["vermillion"],
    "converted": PALETTE["green"],
}
_LINES = (
    (PALETTE["ink"], "-"),
    (PALETTE["blue"], "-"),
    (PALETTE["vermillion"], "--"),
    (PALETTE["green"], "-."),
    (PALETTE["purple"], ":"),
    (PALETTE["orange"], "--"),
    (PALETTE["sky"], "-."),
)
_WIDTH = 6.1  # inches of 72 units: between a phone and one report column, so text is legible on both
_LOG_SPREAD = 30.0
_SQUARES: dict[str, Any] = {
    "borderpad": 0.1,
    "handlelength": 0.9,
    "handleheight": 0.9,
    "columnspacing": 1.4,
    "handletextpad": 0.5,
}
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.labelsize": 11,
    "axes.titlesize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "text.color": PALETTE["ink"],
    "axes.labelcolor": PALETTE["muted"],
    "axes.edgecolor": PALETTE["muted"],
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": PALETTE["grid"],
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.linewidth": 0.8,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "xtick.major.size": 3,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "text.parse_math": False,  # a stage's name may hold a dollar sign
    "svg.fonttype": "none",
    "svg.hashsalt": "iskd",
}


@contextmanager
def _figure(height: float, width: float = _WIDTH) -> Iterator[Figure]:
    """A figure of `width` x `height` inches under our style, whatever the user's matplotlibrc says."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(cast(Any, _STYLE))  # its stubs list the keys one by one
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an `<svg>` element: no fixed size, ids prefixed by `name`, palette colours as CSS variables."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None, "matplotlib writes a viewBox"
    opening = f'<svg {view.group(0)} role="img" aria-label="{title}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    text = opening + text[text.index(">") + 1 :]
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    text = re.sub(r"(font(?:-family)?: [^;\"<>]*?)'DejaVu Sans'[^;\"<>]*", r"\1var(--sans)", text)
    for variable, colour in PALETTE.items():
        text = text.replace(colour, f"var(--{variable})")
    # Whitespace inside <text> is content, so only the indentation between elements goes.
    return re.sub(r">\s*\n\s*<", ">\n<", text).strip()


def _plain(value: float, _: object = None) -> str:
    return f"{value:g}"


def _spread(values: Sequence[float]) -> bool:
    """Whether the values span more than a linear axis can show; False when one is zero or less: a log axis hides it."""
    return bool(values) and min(values) > 0 and max(values) > _LOG_SPREAD * min(values)


def _log_y(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    wide = high / low > 1e3
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 3.0), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _integer_x(axes: Axes, low: int, high: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlim(low - 0.6, high + 0.6)


def _heading(axes: Axes, text: str) -> None:
    """A panel's quantity and unit above its left edge, read before the numbers; no rotated axis label."""
    axes.set_title(text, loc="left", color=PALETTE["ink"], pad=8)


def _kept(results: Sequence[StageResult]) -> list[StageResult]:
    return [result for result in results if result.status == "kept"]


def _rolled_back(results: Sequence[StageResult]) -> list[StageResult]:
    return [result for result in results if result.status == "rolled_back"]


def _finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def layer_states(results: Sequence[StageResult], num_layers: int) -> list[list[str]]:
    """State of every layer at every stage.

    A rolled-back stage shows what it tried; the next stage starts from what was kept.

    Args:
        results: Stages in order.
        num_layers: Layers of the teacher.

    Returns:
        [stages][layers], each one of `KINDS`.

    Raises:
        ValueError: An edit names a layer outside the teacher.
    """
    current = ["original"] * num_layers
    rows = []
    for result in results:
        tried = list(current)
        for edit in result.edits:
            if edit["layer"] >= num_layers:
                raise ValueError(
                    f"stage {result.index} edits layer {edit['layer']}, but the teacher has {num_layers} layers "
                    f"(0 to {num_layers - 1}): correct num_layers in record.json or the edit in stages.json"
                )
            tried[edit["layer"]] = _KIND_OF_OP[edit["op"]]
        rows.append(tried)
        if result.status == "kept":
            current = tried
    return rows


def progress(results: Sequence[StageResult]) -> str:
    """Retention (percent) above parameters (millions), stage by stage."""
    with _figure(4.3) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1.15, 1))
        kept, undone = _kept(results), _rolled_back(results)
        top.axhline(100, color=PALETTE["muted"], linewidth=0.8, linestyle=(0, (4, 3)))
        top.plot([r.index for r in kept], [100 * r.retention for r in kept], "o-", color=PALETTE["blue"], label="kept")
        if undone:
            points = [r.index for r in undone], [100 * r.retention for r in undone]
            top.plot(*points, "x", color=PALETTE["vermillion"], markeredgewidth=1.6, label="rolled back")
            _legend_at_right(top)
        top.margins(y=0.12)
        _heading(top, "Retention (% of the teacher's score)")
        _draw_sizes(bottom, results)
        bottom.set_xlabel("stage (0 = teacher)")
        _integer_x(bottom, min(r.index for r in results), max(r.index for r in results))
        return _svg(figure, "progress", "Retention and parameters by stage")


def _draw_sizes(axes: Axes, results: Sequence[StageResult]) -> None:
    """Bars of parameters split into blocks and the rest; the first and the last kept one carry their total."""
    for group, strength in ((_kept(results), 1.0), (_rolled_back(results), 0.35)):
        index = [r.index for r in group]
        rest = [(r.params - r.block_params) / 1e6 for r in group]
        blocks = [r.block_params / 1e6 for r in group]
        named = strength == 1.0
        axes.bar(index, rest, 0.62, color=PALETTE["cell"], alpha=strength, label="rest" if named else None)
        axes.bar(index, blocks, 0.62, rest, color=PALETTE["blue"], alpha=strength, label="blocks" if named else None)
    for result in {r.index: r for r in (*_kept(results)[:1], *_kept(results)[-1:])}.values():
        total = result.params / 1e6
        axes.annotate(
            f"{total:.1f}", (result.index, total), (0, 3), textcoords="offset points", ha="center", fontsize=10
        )  # fmt: skip
    axes.margins(y=0.16)
    _heading(axes, "Parameters (millions)")
    _legend_at_right(axes)


def _legend_at_right(axes: Axes, columns: int = 2) -> None:
    """Legend on the heading's line, at the right, where it can cover no data."""
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=columns, borderpad=0.1, columnspacing=1.2)


def healing(results: Sequence[StageResult]) -> str | None:
    """KL and perplexity before (hollow) and after (solid) healing; None when no stage was measured before healing."""
    healed = [result for result in results if result.before]
    if not healed:
        return None
    panels = (("kl", "KL (nats per token)"), ("ppl", "Perplexity (validation text)"))
    with _figure(4.3) as figure:
        both = figure.subplots(2, 1, sharex=True)
        for axes, (key, heading) in zip(both, panels, strict=True):
            _dumbbells(axes, healed, key)
            _heading(axes, heading)
        teacher = next((r for r in results if r.index == 0), None)
        if teacher is not None and math.isfinite(teacher.ppl):
            line = both[1].axhline(teacher.ppl, color=PALETTE["muted"], linewidth=0.9, linestyle=(0, (4, 3)))
            both[1].legend([line], ["teacher"], loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0.1)
        _legend_at_right(both[0])
        both[1].set_xlabel("stage")
        _integer_x(both[1], min(r.index for r in healed), max(r.index for r in healed))
        return _svg(figure, "healing", "KL and perplexity before and after healing")


def _dumbbells(axes: Axes, healed: Sequence[StageResult], key: str) -> None:
    x = [r.index for r in healed]
    before = [(r.before or {}).get(key, math.nan) for r in healed]
    after = [float(getattr(r, key)) for r in healed]
    pairs = [(i, b, a) for i, b, a in zip(x, before, after, strict=True) if math.isfinite(b) and math.isfinite(a)]
    axes.vlines(
        [i for i, _, _ in pairs], [a for *_, a in pairs], [b for _, b, _ in pairs], color=PALETTE["cell"], linewidth=2
    )
    axes.plot(
        x, before, "o", markerfacecolor=PALETTE["surface"], markeredgecolor=PALETTE["orange"], markeredgewidth=1.6,
        label="after the edit",
    )  # fmt: skip
    axes.plot(x, after, "o", color=PALETTE["blue"], label="after healing")
    if _spread(_finite([*before, *after])):
        _log_y(axes)
    else:
        axes.margins(y=0.12)


def edit_map(results: Sequence[StageResult], num_layers: int) -> str:
    """Grid of stages (rows) by layers (columns): what sits at each layer, and what each stage changed."""
    with _figure(1.25 + min(0.235 * len(results), 9.0)) as figure:
        _draw_edit_map(figure.subplots(), results, num_layers)
        return _svg(figure, "edits", "Edit map: stages by layers")


def _draw_edit_map(axes: Axes, results: Sequence[StageResult], num_layers: int) -> None:
    from matplotlib.patches import Patch, PathPatch
    from matplotlib.path import Path as Shape

    states = layer_states(results, num_layers)
    for kind in KINDS:
        cells = [_box(first, last, row) for row, line in enumerate(states) for first, last in _runs(line, kind)]
        if cells:  # one path per colour keeps the SVG small
            axes.add_patch(PathPatch(Shape.make_compound_path(*map(Shape, cells)), color=_KIND_COLOUR[kind], lw=0))
    axes.vlines([i - 0.5 for i in range(1, num_layers)], -0.5, len(states) - 0.5, color=PALETTE["surface"], lw=1.4)
    axes.hlines([i - 0.5 for i in range(1, len(states))], -0.5, num_layers - 0.5, color=PALETTE["surface"], lw=2.2)
    for status, marker, size in (("kept", "o", 3.2), ("rolled_back", "x", 4.6)):
        new = [(e["layer"], row) for row, r in enumerate(results) if r.status == status for e in r.edits]
        axes.plot(
            [layer for layer, _ in new], [row for _, row in new], marker, color=PALETTE["surface"], markersize=size,
            markeredgewidth=0 if marker == "o" else 1.5,
        )  # fmt: skip
    every = math.ceil(len(results) / 40)
    rows = [f"{result.index}: {_label(result.name)}" for result in results[::every]]
    axes.set_yticks(range(0, len(results), every), rows, color=PALETTE["ink"])
    axes.set_xlim(-0.5, num_layers - 0.5)
    axes.set_ylim(len(states) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    step = next(s for s in (1, 2, 5, 10, 20, 50) if num_layers / s <= 16 or s == 50)
    axes.set_xticks(range(0, num_layers, step))
    axes.set_xlabel("layer (teacher's index)")
    shown = [kind for kind in KINDS if any(kind in line for line in states)]
    axes.legend(
        handles=[Patch(color=_KIND_COLOUR[kind], lw=0, label=kind) for kind in shown],
        loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(KINDS), borderaxespad=0.6, **_SQUARES,
    )  # fmt: skip


def _label(text: str, limit: int = 20) -> str:
    # ASCII, because a glyph missing from the font would be measured wrongly and warn.
    text = text.encode("ascii", "replace").decode()
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _runs(line: Sequence[str], kind: str) -> Iterator[tuple[int, int]]:
    """First and last layer of every stretch of `kind`."""
    start = None
    for layer, state in enumerate([*line, None]):
        if state == kind and start is None:
            start = layer
        elif state != kind and start is not None:
            yield start, layer - 1
            start = None


def _box(first: int, last: int, row: int) -> list[tuple[float, float]]:
    left, right, low, high = first - 0.5, last + 0.5, row - 0.5, row + 0.5
    return [(left, low), (right, low), (right, high), (left, high), (left, low)]


def losses(
    curves: Mapping[str, Sequence[tuple[float, float]]], results: Sequence[StageResult], axis: str, points: int = 240
) -> str | None:
    """Loss terms against cumulative tokens, a vertical line where a stage edits the model; None without curves.

    Args:
        curves: For each metric, its points (x, value) in order.
        results: Stages in order; their token counts place the lines.
        axis: Name of what x counts, e.g. "tokens".
        points: Most points per curve; longer ones are averaged in equal stretches.
    """
    thin = {name: _thin(curve, points) for name, curve in curves.items() if curve}
    values = [value for curve in thin.values() for _, value in curve]
    if not values:
        return None
    furthest = max(x for curve in thin.values() for x, _ in curve)
    scale, unit = (1e6, " (millions)") if furthest >= 2e6 else (1e3, " (thousands)") if furthest >= 2e3 else (1.0, "")
    with _figure(3.5) as figure:
        axes = figure.subplots()
        for (name, curve), (colour, style) in zip(sorted(thin.items(), key=_total_first), cycle(_LINES), strict=False):
            label = _label(name.removeprefix("train/"))
            axes.plot([x / scale for x, _ in curve], [v for _, v in curve], style, color=colour, label=label)
        if _spread(values):
            _log_y(axes)
        if axis == "tokens":
            for start in (start for start in _edit_tokens(results) if start <= furthest):
                axes.axvline(start / scale, color=PALETTE["muted"], linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"cumulative training {axis}{unit}")
        _heading(axes, "Training loss (per token)")
        _legend_at_right(axes, columns=4)
        return _svg(figure, "losses", "Training losses against cumulative tokens")


def _total_first(item: tuple[str, object]) -> tuple[bool, str]:
    return item[0] != "train/loss", item[0]


def _edit_tokens(results: Sequence[StageResult]) -> list[int]:
    """Cumulative tokens at the start of every stage that edits the model."""
    starts = [0, *(result.tokens for result in results)]
    return sorted({start for start, result in zip(starts, results, strict=False) if result.edits})


def _thin(curve: Sequence[tuple[float, float]], points: int) -> list[tuple[float, float]]:
    """At most `points` points, each the mean of an equal stretch; non-finite values are left out."""
    finite = [(x, y) for x, y in curve if math.isfinite(x) and math.isfinite(y)]
    stretch = math.ceil(len(finite) / points) if finite else 1
    groups = [finite[i : i + stretch] for i in range(0, len(finite), stretch)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def importance(results: Sequence[StageResult], num_layers: int) -> str | None:
    """First and latest importance scores by layer, coloured by what became of the layer; None without scores."""
    from matplotlib.patches import Patch

    scored = [result for result in results if result.scores]
    if not scored:
        return None
    final = layer_states(_kept(results), num_layers)[-1] if _kept(results) else ["original"] * num_layers
    first = _by_layer(scored[0])
    with _figure(3.3) as figure:
        axes = figure.subplots()
        axes.bar(list(first), list(first.values()), width=0.72, color=[_KIND_COLOUR[final[i]] for i in first])
        shown = [kind for kind in KINDS if kind in [final[i] for i in first]]
        handles: list[Any] = [Patch(color=_KIND_COLOUR[kind], lw=0, label=kind) for kind in shown]
        values = list(first.values())
        if len(scored) > 1:
            last = _by_layer(scored[-1])
            values += last.values()
            handles += axes.plot(
                list(last), list(last.values()), "o", markersize=4, markerfacecolor=PALETTE["surface"],
                markeredgecolor=PALETTE["ink"], label=f"score at stage {scored[-1].index}",
            )  # fmt: skip
        if _spread(values):
            axes.set_ylim(min(values) / 2, max(values) * 1.5)
            _log_y(axes)
        _heading(axes, f"Importance at stage {scored[0].index} (higher = keep)")
        axes.set_xlabel("layer (teacher's index), coloured by what became of it")
        _integer_x(axes, 0, num_layers - 1)
        figure.legend(handles=handles, loc="outside lower left", ncols=5, **_SQUARES)
        return _svg(figure, "importance", "Importance by layer")


def _by_layer(result: StageResult) -> dict[int, float]:
    scores = {int(layer): score for layer, score in (result.scores or {}).items()}
    return {layer: scores[layer] for layer in sorted(scores) if math.isfinite(scores[layer])}


def write_picture(results: Sequence[StageResult], num_layers: int, out: Path) -> None:
    """Write a 1200 x 600 PNG: retention against parameters along the stages, and the edit map.

    Args:
        results: Stages in order, at least one kept.
        num_layers: Layers of the teacher.
        out: The PNG to write.
    """
    with _figure(6.0, width=12.0) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        first, last = _kept(results)[0], _kept(results)[-1]
        size = f"{first.params / 1e6:.1f} M to {last.params / 1e6:.1f} M parameters"
        perplexity = f"perplexity {number(first.ppl, 4)} to {number(last.ppl, 4)}"
        title = f"{size}, {perplexity}, retention {percent(last.retention)} %"
        figure.suptitle(title, fontsize=14, x=0.02, ha="left")
        _draw_tradeoff(left, results)
        _draw_edit_map(right, results, num_layers)
        figure.get_layout_engine().set(w_pad=0.25, h_pad=0.2, wspace=0.04)  # type: ignore[union-attr,call-arg]
        figure.savefig(out, format="png", dpi=100, facecolor="#ffffff", metadata={"Software": None})


def _draw_tradeoff(axes: Axes, results: Sequence[StageResult]) -> None:
    from matplotlib.ticker import FuncFormatter

    kept, undone = _kept(results), _rolled_back(results)
    axes.axhline(100, color=PALETTE["muted"], linewidth=0.8, linestyle=(0, (4, 3)))
    axes.plot([r.params / 1e6 for r in kept], [100 * r.retention for r in kept], "o-", color=PALETTE["blue"])
    if undone:
        points = [r.params / 1e6 for r in undone], [100 * r.retention for r in undone]
        axes.plot(*points, "x", color=PALETTE["vermillion"], markeredgewidth=1.6, label="rolled back")
        axes.legend(loc="lower left")
    start = f"stage {kept[0].index}" if kept[0].index else "teacher"
    for text, result in [(start, kept[0]), ("student", kept[-1])][: len(kept)]:
        at = (result.params / 1e6, 100 * result.retention)
        axes.annotate(text, at, (9, 6), textcoords="offset points", ha="left")
    axes.invert_xaxis()  # a run goes from left to right
    axes.margins(x=0.16, y=0.12)
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    _heading(axes, "Retention (% of the teacher's score)")
    axes.set_xlabel("parameters (millions)")
