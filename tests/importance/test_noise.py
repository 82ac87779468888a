"""`iskd score`: intervals, ties, files, and the command on a tiny model."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from iskd.importance.noise import bootstrap, layer_scores
from iskd.report import score_table, write_scores
from tests.commands.test_cli import ROOT


@pytest.fixture
def rows() -> torch.Tensor:
    """Four layers on 40 windows: 2 and 7 differ by less than their paired noise, 5 and 9 are far above."""
    generator = torch.Generator().manual_seed(0)
    hard = torch.randn(40, generator=generator)  # what makes a window hard for every layer
    noise = 0.05 * torch.randn(4, 40, generator=generator)
    return torch.tensor([1.0, 3.0, 1.001, 4.0])[:, None] + hard + noise


def test_summary(rows: torch.Tensor) -> None:
    scores = layer_scores(rows, [2, 5, 7, 9])
    assert [entry.layer for entry in scores] == [2, 5, 7, 9]
    assert [entry.tied for entry in scores] == [True, False, True, False]
    for entry, row in zip(scores, rows.numpy(), strict=True):
        assert entry.score == pytest.approx(row.mean(), rel=1e-5)
        assert entry.error == pytest.approx(row.std(ddof=1) / np.sqrt(40), rel=1e-4)
        assert entry.low < entry.score < entry.high


def test_bootstrap_is_seeded_and_matches_resampling(rows: torch.Tensor) -> None:
    low, high = bootstrap(rows, seed=3)
    assert torch.equal(low, bootstrap(rows, seed=3)[0])
    drawn = torch.randint(40, (2000, 40), generator=torch.Generator().manual_seed(3)).numpy()
    means = np.stack([rows.numpy()[:, windows].mean(1) for windows in drawn], 1)
    assert np.allclose(low.numpy(), np.quantile(means, 0.025, axis=1), atol=1e-5)
    assert np.allclose(high.numpy(), np.quantile(means, 0.975, axis=1), atol=1e-5)


def test_one_window_has_no_noise_and_bad_scores_are_named() -> None:
    scores = layer_scores(torch.tensor([[1.0], [2.0]]), [0, 1])
    assert np.isnan([scores[0].error, scores[0].low, scores[0].high]).all()
    (column,) = [column for column in score_table(scores, "random").columns if column.header == "95 % interval"]
    assert list(column.cells) == ["", ""]
    assert [entry.tied for entry in scores] == [True, False]
    with pytest.raises(ValueError, match=r"importance of layers \[1\] is not finite"):
        layer_scores(torch.tensor([[1.0], [float("nan")]]), [0, 1])


def test_files(rows: torch.Tensor, tmp_path: Path) -> None:
    scores = layer_scores(rows, [2, 5, 7, 9])
    files = write_scores(tmp_path / "out", scores, rows, "ablation")
    table = list(csv.DictReader(files[0].read_text().splitlines()))
    assert [int(row["layer"]) for row in table] == [2, 5, 7, 9]
    assert len(files[1].read_text().splitlines()[0].split(",")) == 41
    assert files[2].read_bytes().startswith(b"\x89PNG")
    assert len(files) == 3
    assert score_table(scores, "ablation").row_count == 4


def test_runs_of_layers_by_length_the_best_first(rows: torch.Tensor, tmp_path: Path) -> None:
    nan = float("nan")
    runs = torch.tensor([[0.3, 0.1, 0.2, 0.4], [0.5, 0.7, 0.6, nan], [0.9, 0.8, nan, nan]])
    *_, file = write_scores(tmp_path, layer_scores(rows, [2, 5, 7, 9]), rows, "angular", runs)
    found = [(row["layers"], row["first"], row["last"]) for row in csv.DictReader(file.read_text().splitlines())]
    assert found[:4] == [("1", "5", "5"), ("1", "7", "7"), ("1", "2", "2"), ("1", "9", "9")]
    assert found[4:] == [("2", "2", "5"), ("2", "7", "9"), ("2", "5", "7"), ("3", "5", "9"), ("3", "2", "7")]


def test_the_command(tmp_path: Path) -> None:
    code = "import sys; sys.argv[0] = 'iskd'; from iskd.__main__ import main; main()"
    folder = tmp_path / "s[/b] [x]"
    arguments = [
        "score",
        "debug=smoke",
        "importance=ablation",
        f"cache_dir={tmp_path}/c",
        f"hydra.run.dir={folder}",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "importance: ablation" in done.stdout
    assert str(folder / "scores.csv") in done.stdout.splitlines()
    assert len((folder / "scores.csv").read_text().splitlines()) == 5
