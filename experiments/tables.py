"""Tables of students beside their teacher: means over seeds, intervals of a bootstrap over the items of tasks."""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from scoring import AVERAGED, NAMES, TEXTS
from torch import Tensor


def head(teacher: dict[str, Any], than: str) -> str:
    """The head of a table whose rows are `line`, in Markdown: of what the teacher was asked.

    `than` is the method that the others are held against.
    """
    columns = [name for key, name in NAMES.items() if key in teacher]
    heads = ("method", "params M", "seeds", "tokens k", "s", *columns, "average lost %", f"more than {than}")
    return f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}"


def average(row: dict[str, Any], drawn: dict[str, Tensor] | None = None) -> float:
    """Mean accuracy over the tasks that were asked, on all items or on drawn ones."""
    values = {name: torch.tensor(row[name], dtype=torch.float64) for name in AVERAGED if name in row}
    return mean((v if drawn is None else v[drawn[name]]).mean().item() for name, v in values.items())


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and half the range of some values."""
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {(max(values) - min(values)) / 2:.{digits}f}"


def lost(
    rows: list[dict[str, Any]],
    teacher: dict[str, Any],
    than: list[dict[str, Any]] | None = None,
    resamples: int = 1000,
) -> tuple[float, float, float]:
    """Share of the teacher's average accuracy that is lost, mean over seeds, with its 95 % bootstrap interval.

    With `than`: how much more is lost than by these; every resample draws the same items for all.
    """
    generator = torch.Generator().manual_seed(0)

    def once(drawn: dict[str, Tensor] | None) -> float:
        kept = mean(average(row, drawn) for row in rows) / average(teacher, drawn)
        others = 1.0 if than is None else mean(average(row, drawn) for row in than) / average(teacher, drawn)
        return others - kept

    sizes = {name: len(teacher[name]) for name in AVERAGED if name in teacher}
    draws = [
        once({name: torch.randint(size, (size,), generator=generator) for name, size in sizes.items()})
        for _ in range(resamples)
    ]
    low, high = torch.tensor(draws, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return once(None), low, high


def line(name: str, rows: list[dict[str, Any]], teacher: dict[str, Any], than: list[dict[str, Any]] | None) -> str:
    """A row of the table: means over seeds, half the range after the sign; `than`: rows that it is held against."""
    cells = [
        f"{rows[0]['params'] / 1e6:.1f}",
        str(len(rows)),
        f"{rows[0]['tokens'] / 1e3:.0f}",
        f"{mean(row['seconds'] for row in rows):.0f}",
    ]
    cells += [spread([row[key] for row in rows]) for key in TEXTS]
    cells += [spread([100 * mean(row[key]) for row in rows], 1) for key in NAMES if key in teacher and key not in TEXTS]
    cells.append(interval(*lost(rows, teacher)))
    cells.append("" if than is None or than is rows else interval(*lost(rows, teacher, than)))
    return f"| {name} | " + " | ".join(cells) + " |"


def interval(share: float, low: float, high: float) -> str:
    """In percent."""
    return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
