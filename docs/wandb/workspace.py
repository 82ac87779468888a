"""A saved view of a project's runs: python docs/wandb/workspace.py ENTITY PROJECT (needs wandb-workspaces and a login).

`workspace` only describes it; W&B is asked when it is saved.
"""

from __future__ import annotations

import sys
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws


def workspace(entity: str, project: str) -> Any:
    """Quality against size of all runs, their healing, and what one run shows: its page, its texts, its scores."""
    final = "final/retention", "final/params", "final/ppl", "final/kl"
    compared = ws.Section(
        name="Runs compared",
        is_open=True,
        panels=[
            wr.ScatterPlot(title="retention against size", x="final/params", y="final/retention"),
            wr.ParallelCoordinatesPlot(
                columns=[wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(name)) for name in final]
            ),
            *(wr.BarPlot(title=name, metrics=[wr.SummaryMetric(name)]) for name in final[:2]),
        ],
    )
    along = ws.Section(
        name="Along the runs",
        is_open=True,
        panels=[
            wr.LinePlot(title=name, x="tokens", y=[name])
            for name in ("train/loss", "val/ppl", "val/kl", "val/retention", "model/params", "train/tokens_per_s")
        ],
    )
    shown = ws.Section(name="What a run shows", panels=[wr.MediaBrowser(media_keys=["picture", "report"])])
    return ws.Workspace(entity=entity, project=project, name="iskd", sections=[compared, along, shown])


if __name__ == "__main__":
    print(workspace(*sys.argv[1:3]).save().url)
