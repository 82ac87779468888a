"""Where a resumed run goes on: at the newest whole checkpoint of its folder, never over work that is there."""

from __future__ import annotations

from pathlib import Path

from iskd.plan.run_files import CHECKPOINTS, CONFIG_FILE, MODEL, work_in
from iskd.system import file_sha256
from iskd.system.text import argument
from iskd.training.state import checkpoint, checkpoint_files
from iskd.training.state.run_state import RunState


def last_position(run_dir: Path, layers: int) -> tuple[RunState, Path] | None:
    """State and folder of the newest whole checkpoint; None where the run had not come to its first one.

    Args:
        run_dir: the run's.
        layers: of the teacher that is there.

    Raises:
        ValueError: the folder has work but no whole checkpoint, its config was changed, or the teacher is another one.
    """
    newest = checkpoint_files.newest(run_dir / CHECKPOINTS)
    if newest is None:
        _refuse_lost(run_dir)
        return None
    state = _state(run_dir, newest)
    if state.record.num_layers != layers:
        raise ValueError(
            f"the run was made from a teacher with {state.record.num_layers} layers, model= gives one with {layers}"
        )
    return state, newest


def student_weights(run_dir: Path) -> list[Path]:
    """Files of the student's weights at the newest checkpoint, none before the first; no large file is read.

    Asked before anything is made that the config names: its sizes may be anybody's.

    Raises:
        ValueError: the config was changed since.
    """
    newest = checkpoint_files.newest(run_dir / CHECKPOINTS, digests=False)
    if newest is None:
        return []
    _state(run_dir, newest)
    return sorted(newest.glob(f"{checkpoint_files.STUDENT}*.safetensors"))


def _state(run_dir: Path, newest: Path) -> RunState:
    """The position at a checkpoint that was made with the config that is there."""
    state = checkpoint.read_state(newest)
    saved = state.identity.get("config")
    if saved is not None and saved != config_digest(run_dir):
        raise ValueError(
            f"{run_dir / CONFIG_FILE} is not the one that the checkpoint {newest} was made with: it was edited, or one "
            "of them comes from another run. Put it back as it was; what may change when a run is continued is said on "
            f"the command line ({argument('resume', run_dir)} KEY=VALUE), and anything else is a new run"
        )
    return state


def config_digest(run_dir: Path) -> str | None:
    """SHA-256 of a run's config, in hex; None where the run was put together by hand."""
    file = run_dir / CONFIG_FILE
    return file_sha256(file) if file.is_file() else None


def _refuse_lost(run_dir: Path) -> None:
    """Without a checkpoint a run would begin anew, over the files of the one that is there."""
    root = run_dir / CHECKPOINTS
    torn = {path: checkpoint_files.problem(path) for path in sorted(root.glob("[0-9]*-*"))}
    there = work_in(run_dir)
    if not there:
        return
    why = "; ".join(f"{path.name}: {problem}" for path, problem in torn.items()) or "there is none"
    student = (
        f"Its student is whole and needs no checkpoint: {run_dir / MODEL} (iskd verify, iskd evaluate model=DIR)"
        if MODEL in there
        else "With a checkpoint put back from a copy, resume= goes on, or writes the student of a finished run "
        "(export=true)"
    )
    raise ValueError(
        f"{argument('resume', run_dir)}: no whole checkpoint in {root} ({why}), and starting from the beginning would "
        f"overwrite what the run left ({', '.join(there)}). {student}. To start "
        f"over, give the command without resume= and another hydra.run.dir, or move {run_dir} away first"
    )
