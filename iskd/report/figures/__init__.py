"""Figures of the reports, one per file; each returns an SVG or draws on given axes.

Imports: system, plan, evaluation.
"""

from __future__ import annotations

from iskd.report.figures.style import figure_of, short_label
from iskd.report.figures.tradeoff import pareto_front

__all__ = ["figure_of", "pareto_front", "short_label"]
