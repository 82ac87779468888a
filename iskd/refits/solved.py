"""What became of projections that were re-solved: the search for a ridge, and what the record says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iskd.refits.projections import few


@dataclass(frozen=True)
class Solved:
    """One projection: mean weighted squared error on rows left out before and after, and what was chosen."""

    layer: int
    path: str
    before: float
    after: float
    ridge: float
    share: float
    rows: int
    features: int


def first_ridge(notes: Sequence[Solved], path: str, ridges: Sequence[float]) -> int:
    """The ridge of the last block that was solved, or the middle one."""
    found = [ridges.index(note.ridge) for note in notes if note.path == path and note.ridge]
    return found[-1] if found else len(ridges) // 2


def summary(notes: Sequence[Solved]) -> list[str]:
    """A sentence for each kind of projection, and a warning where there is little text for the unknowns."""
    lines = []
    for path in sorted({note.path for note in notes}):
        of = [note for note in notes if note.path == path]
        before, after = (sum(values) / len(of) for values in zip(*((n.before, n.after) for n in of), strict=True))
        ridges = sorted({note.ridge for note in of if note.ridge})
        kept = sum(not note.ridge for note in of)
        lines.append(
            f"{path} of {len(of)} blocks re-solved: relative squared error on text left out {before:.4f} -> "
            f"{after:.4f}, ridge {', '.join(f'{ridge:g}' for ridge in ridges) or '-'}"
            + (f", {kept} left as they were" if kept else "")
        )
    if notes:
        widest = max(notes, key=lambda note: note.features)
        lines += few(widest.rows, widest.features, widest.path, "refit.output.tokens")
    return lines
