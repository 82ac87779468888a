"""Print the tables of the grid, mixers by techniques, and write RESULTS, a csv: what stages.json of every run says."""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WITHOUT_MATRIX = ("mamba",)
"""Mixers without a mixing matrix per head; run.sh aligns their outputs in its place."""
TECHNIQUES = ("kl", "copy", "matrix", "hidden", "all")
TITLES = ("only KL", "+ copy", "+ matrix", "+ hidden", "all")
LOCAL = "local"
"""Before the share of the tokens that went into local work."""
COLUMNS = ("kl", "ppl", "retention", "params", "tokens")


def last_row(run: Path) -> dict[str, Any]:
    """The last kept stage of a run, with the seconds of all."""
    rows = json.loads((run / "stages.json").read_text())
    last = [row for row in rows if row["status"] == "kept"][-1]
    return {**{key: last[key] for key in COLUMNS}, "seconds": sum(row["seconds"] for row in rows)}


def read(results: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The rows that a csv holds already, by mixer and technique."""
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    if results.exists():
        with results.open(newline="") as file:
            for row in csv.DictReader(file):
                values = {key: float(row[key]) for key in (*COLUMNS, "seconds")}
                found[row["mixer"]][row["technique"]] = values | {key: int(values[key]) for key in ("params", "tokens")}
    return found


def show(found: Mapping[str, Mapping[str, Mapping[str, Any]]], techniques: Mapping[str, str]) -> None:
    """Print a table of each measure; `techniques` by name, with the titles of their columns."""
    for key, title, digits in (("kl", "KL to the teacher, nats per token", 3), ("retention", "retention, %", 1)):
        print(f"\n{title}\n\n| mixer | parameters | {' | '.join(techniques.values())} |")
        print(f"|---|---|{'---|' * len(techniques)}")
        factor = 100 if key == "retention" else 1
        for mixer, runs in sorted(found.items(), key=lambda pair: min(row["kl"] for row in pair[1].values())):
            cells = [f"{factor * runs[name][key]:.{digits}f}" if name in runs else "" for name in techniques]
            star = "*" if mixer in WITHOUT_MATRIX else ""
            print(f"| {mixer}{star} | {next(iter(runs.values()))['params'] / 1e3:.0f} k | {' | '.join(cells)} |")


def main() -> None:
    """`table.py FOLDER RESULTS`: the runs in a folder beside those that RESULTS holds already."""
    found = read(Path(sys.argv[2]))
    for report in sorted(Path(sys.argv[1]).glob("*/report.html")):
        mixer, _, technique = report.parent.name.rpartition("-")
        found[mixer][technique] = last_row(report.parent)
    with Path(sys.argv[2]).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["mixer", "technique", *COLUMNS, "seconds"])
        for mixer, runs in found.items():
            for technique, row in runs.items():
                values = (f"{value:.5g}" if isinstance(value, float) else value for value in row.values())
                writer.writerow([mixer, technique, *values])
    show(found, dict(zip(TECHNIQUES, TITLES, strict=True)))
    for mixer in sorted(set(WITHOUT_MATRIX) & found.keys()):
        print(f"\n* {mixer} has no mixing matrix: its columns '+ matrix' and 'all' align outputs (mixer_output).")
    shares = sorted({name for runs in found.values() for name in runs if name.startswith(LOCAL)})
    if shares:
        local = {mixer: runs for mixer, runs in found.items() if set(shares) & runs.keys()}
        show(local, {name: f"{100 * float(name.removeprefix(LOCAL)):.0f} %" for name in shares})


if __name__ == "__main__":
    main()
