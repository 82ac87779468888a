"""The style of all figures: palette, style, axes, and the way from matplotlib to inline SVG.

Colours are Okabe-Ito's colour-blind-safe set (Okabe and Ito, "Color Universal Design", 2008); every colour is backed
by a shape, a position or a label. Each hex value in `PALETTE` becomes the CSS variable of its name in the SVG, so the
page switches between light and dark without a second drawing. Text stays text: small, selectable, in the page's font.
matplotlib is imported inside functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from iskd.system import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
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
_WIDTH = 5.4  # inches of 72 units: between a phone and one report column, so text is legible on both
_LOG_SPREAD = 30.0
SQUARES: dict[str, Any] = {
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
def figure_of(height: float, width: float = _WIDTH) -> Iterator[Figure]:
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


def write_figure(figure: Figure, out: Path, **settings: Any) -> Path:
    """Write a figure whole, in the format that the name ends in; a name without an ending gets `.png`."""
    out = out if out.suffix else out.with_name(f"{out.name}.png")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=out.suffix[1:], **settings)
    return write_whole(out, buffer.getvalue())


def to_svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an `<svg>` element: no fixed size, ids prefixed by `name`, palette colours as CSS variables."""
    text = _rendered(figure)
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


def _rendered(figure: Figure) -> str:
    """The file that matplotlib writes."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return buffer.getvalue()


def plain(value: float, _: object = None) -> str:
    """A number as it is said; the second argument is what matplotlib's FuncFormatter passes along."""
    return f"{value:g}"


def needs_log(values: Sequence[float]) -> bool:
    """Whether the values span more than a linear axis can show; False when one is zero or less: a log axis hides it."""
    return bool(values) and min(values) > 0 and max(values) > _LOG_SPREAD * min(values)


def log_y(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers at few ticks; call it once the data are drawn."""
    axes.set_yscale("log")
    _log_ticks(axes.yaxis, axes.get_ylim())


def log_x(axes: Axes) -> None:
    """A logarithmic x axis with plain numbers at few ticks; call it once the data are drawn."""
    axes.set_xscale("log")
    _log_ticks(axes.xaxis, axes.get_xlim())


def _log_ticks(axis: Axis, limits: tuple[float, float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    wide = max(limits) / min(limits) > 1e3
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 3.0), numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())


def plain_x(axes: Axes, ticks: int = 6) -> None:
    """At most `ticks` ticks with plain numbers: no offset and no power of ten at the end of the axis."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))


def integer_x(axes: Axes, low: int, high: int) -> None:
    """Ticks at whole numbers only, half a step of room at both ends."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlim(low - 0.6, high + 0.6)


def set_heading(axes: Axes, text: str) -> None:
    """A panel's quantity and unit above its left edge, read before the numbers; no rotated axis label."""
    axes.set_title(text, loc="left", color=PALETTE["ink"], pad=8)


def legend_at_right(axes: Axes, columns: int = 2) -> None:
    """Legend on the heading's line, at the right, where it can cover no data."""
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=columns, borderpad=0.1, columnspacing=1.2)


def short_label(text: str, limit: int = 20) -> str:
    """At most `limit` characters of a text, in ASCII: a glyph that the font lacks is measured wrongly and warns."""
    text = text.encode("ascii", "replace").decode()
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."
