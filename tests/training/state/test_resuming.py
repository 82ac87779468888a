"""Where a resumed run goes on, and that finished work is never begun over."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from iskd.plan import Record
from iskd.plan.run_files import CONFIG_FILE
from iskd.training.state import RunState
from iskd.training.state import resuming as place
from iskd.training.state.resuming import config_digest, last_position, student_weights


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "a run"
    folder.mkdir()
    return folder


def test_a_run_that_left_nothing_starts(run_dir: Path) -> None:
    (run_dir / CONFIG_FILE).write_text("seed: 1")
    (run_dir / "checkpoints" / ".draft-000001-boundary").mkdir(parents=True)
    assert last_position(run_dir, 4) is None


@pytest.mark.parametrize("left", ["stages.json", "record.json", "model/", "checkpoints/000003-stage/"])
def test_without_a_whole_checkpoint_nothing_is_thrown_away(left: str, run_dir: Path) -> None:
    file = run_dir / left
    if left.endswith("/"):
        file.mkdir(parents=True)
    else:
        file.write_text("{}")
    with pytest.raises(
        ValueError, match=r"no whole checkpoint in .*To start over, .* another hydra\.run\.dir"
    ) as refused:
        last_position(run_dir, 4)
    assert file.name in str(refused.value)
    assert ("iskd evaluate" in str(refused.value)) == (left == "model/")


def test_an_edited_config_is_found(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_dir / CONFIG_FILE
    config.write_text("seed: 1\n")
    state = RunState(record=Record(4), identity={"config": config_digest(run_dir)})
    monkeypatch.setattr(place.checkpoint_files, "newest", lambda root, **_: tmp_path / "000001-stage")
    monkeypatch.setattr(place.checkpoint, "read_state", lambda newest: state)
    assert (last_position(run_dir, 4) or (None,))[0] is state
    config.write_text("seed: 2\n")
    for read in (student_weights, partial(last_position, layers=4)):
        with pytest.raises(ValueError, match=r"config\.yaml is not the one .*command line \('resume="):
            read(run_dir)
    state.identity = {}  # of a version that did not say
    assert (last_position(run_dir, 4) or (None,))[0] is state
