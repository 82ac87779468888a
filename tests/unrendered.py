"""Figures are built and not rendered: matplotlib takes seconds for those of one page, and every run writes a page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from iskd.report.figures import style


def leave_unrendered(setattr_: Callable[[Any, str, Any], Any] = setattr) -> None:
    """Let every figure of a page become an SVG without a drawing; what `style.to_svg` makes of it stays as it is."""
    setattr_(style, "_rendered", lambda _figure: '<svg viewBox="0 0 1 1">\n<g id="nothing"/>\n</svg>\n')
