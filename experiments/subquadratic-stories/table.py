"""Print the tables of the grid, mixers by techniques, and write RESULTS, a csv: what stages.json of every run says."""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

WITHOUT_MATRIX = ("mamba",)
"""Mixers without a mixing matrix per head; run.sh aligns their outputs in its place."""
TECHNIQUES = ("kl", "copy", "matrix", "hidden", "all")
TITLES = ("only KL", "+ copy", "+ matrix", "+ hidden", "all")
COLUMNS = ("kl", "ppl", "retention", "params", "tokens")


def last_row(run: Path) -> dict[str, Any]:
    """The last kept stage of a run, with the seconds of all."""
    rows = json.loads((run / "stages.json").read_text())
    last = [row for row in rows if row["status"] == "kept"][-1]
    return {**{key: last[key] for key in COLUMNS}, "seconds": sum(row["seconds"] for row in rows)}


def main() -> None:
    """`table.py FOLDER RESULTS`."""
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
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
    for key, title, digits in (("kl", "KL to the teacher, nats per token", 3), ("retention", "retention, %", 1)):
        print(f"\n{title}\n\n| mixer | parameters | {' | '.join(TITLES)} |\n|---|---|{'---|' * len(TITLES)}")
        factor = 100 if key == "retention" else 1
        for mixer, runs in sorted(found.items(), key=lambda pair: min(row["kl"] for row in pair[1].values())):
            cells = [f"{factor * runs[name][key]:.{digits}f}" if name in runs else "" for name in TECHNIQUES]
            star = "*" if mixer in WITHOUT_MATRIX else ""
            print(f"| {mixer}{star} | {next(iter(runs.values()))['params'] / 1e3:.0f} k | {' | '.join(cells)} |")
    for mixer in sorted(set(WITHOUT_MATRIX) & found.keys()):
        print(f"\n* {mixer} has no mixing matrix: its columns '+ matrix' and 'all' align outputs (mixer_output).")


if __name__ == "__main__":
    main()
