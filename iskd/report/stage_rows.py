"""The stage table: one row per stage, the same cells in the terminal and in the html report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from iskd.plan import StageResult
from iskd.plan.results import teacher_of
from iskd.system import number
from iskd.system.text import ABSENT, kl_text, layers_text, percent

COLUMNS = (
    "stage",
    "edits",
    "params (M)",
    "blocks % of teacher's",
    "perplexity",
    "KL (nats)",
    "top-1 %",
    "retention %",
    "tokens/s",
    "tokens (k)",
    "status",
)
#: The same columns over a terminal: two lines each, so that a row of one edit fits into 120 characters.
_HEADS = (
    "stage",
    "edits",
    "params\n(M)",
    "blocks\n%",
    "perplexity",
    "KL\n(nats)",
    "top-1\n%",
    "retention\n%",
    "tokens\n/s",
    "tokens\n(k)",
    "status",
)
SPARE = ("stage", "tokens /s", "blocks %", "tokens (k)", "top-1 %", "params (M)", "KL (nats)")
"""Columns that a narrow terminal leaves out, the first one first; by their heads there."""
_CAPTION = (
    "perplexity: before -> after healing; blocks: % of the teacher's; tokens/s: of scoring; tokens: trained so far"
)
_TEXT = ("stage", "edits", "status")  # left-aligned; the others are numbers


def _part(edit: dict[str, Any]) -> str:
    """Class name of the block or mixer an edit puts in: "iskd.blocks.slim.Slim" -> "Slim"; "" for a removal."""
    part = edit.get("block", edit.get("mixer"))
    if isinstance(part, dict):
        part = part.get("target")
    return part.rsplit(".", 1)[-1] if isinstance(part, str) else ""


def edits_text(result: StageResult) -> str:
    """The stage in words: "replace 3, 5 (Slim)"; the stage's name leads where it says more than the edits do."""
    groups: dict[tuple[str, str], list[int]] = {}
    for edit in result.edits:
        groups.setdefault((edit["op"], _part(edit)), []).append(edit["layer"])
    described = "; ".join(
        f"{op} {layers_text(layers)}" + (f" ({part})" if part else "") for (op, part), layers in groups.items()
    )
    obvious = "; ".join(f"{op} {', '.join(map(str, layers))}" for (op, _), layers in groups.items())
    if not described:
        return result.name
    return described if result.name in ("", obvious) or result.name in described else f"{result.name}: {described}"


def perplexity_text(result: StageResult) -> str:
    """Perplexity "before -> after" healing, or the one value when nothing was measured before."""
    before = (result.before or {}).get("ppl")
    return number(result.ppl, 4) if before is None else f"{number(before, 4)} -> {number(result.ppl, 4)}"


def stage_rows(results: Sequence[StageResult]) -> list[list[str]]:
    """Cells of the table, one list per stage, in the order of `COLUMNS`."""
    teacher = teacher_of(results)
    blocks = teacher.block_params if teacher else 0
    return [
        [
            str(result.index),
            edits_text(result),
            f"{result.params / 1e6:.2f}",
            percent(result.block_params / blocks) if blocks else ABSENT,
            perplexity_text(result),
            kl_text(result.kl),
            percent(result.top1),
            percent(result.retention),
            ABSENT if result.tokens_per_s is None else number(result.tokens_per_s),
            f"{result.tokens / 1e3:.0f}",
            result.status.replace("_", " "),
        ]
        for result in results
    ]


def stage_table(results: Sequence[StageResult]) -> Table:
    """The stages as a rich table for the terminal; rolled-back stages are dimmed."""
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        header_style="bold",
        caption=_CAPTION,
        caption_justify="left",
    )
    for column, head in zip(COLUMNS, _HEADS, strict=True):
        # Folding rather than an ellipsis: on a narrow terminal a number is broken, never lost.
        table.add_column(
            head,
            justify="left" if column in _TEXT else "right",
            overflow="fold",
        )
    for result, row in zip(results, stage_rows(results), strict=True):
        table.add_row(*map(Text, row), style="dim" if result.status == "rolled_back" else None)
    return table
