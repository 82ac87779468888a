"""What a run takes of the keys of `trainer:`: nothing that would end its schedule early or do its work twice."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import lightning as L
import pytest

from iskd.plan.trainer_settings import FREE, TrainerKeys, seconds, trainer_settings, with_defaults

KNOWN = inspect.signature(L.Trainer).parameters


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("max_steps", 3, "schedule.tokens"),
        ("max_steps", 0, "schedule.tokens"),
        ("max_epochs", 1, "schedule.tokens"),
        ("min_steps", 10, "schedule.tokens"),
        ("min_epochs", 2, "schedule.tokens"),
        ("limit_train_batches", 2, "schedule.tokens"),
        ("limit_train_batches", 1, "schedule.tokens"),  # one batch, where 1.0 is all of them
        ("limit_train_batches", 0.5, "schedule.tokens"),
        ("limit_val_batches", 4, "data.val_tokens"),
        ("limit_test_batches", 4, "eval.limit"),
        ("num_sanity_val_steps", 2, "data.val_tokens"),
        ("val_check_interval", 10, "eval=validation eval.every=TOKENS"),
        ("overfit_batches", 1, "data.path"),
        ("overfit_batches", 0.1, "data.path"),
        ("fast_dev_run", True, "plan_only=true"),
        ("fast_dev_run", 3, "debug=smoke"),
        ("reload_dataloaders_every_n_epochs", 0, "data"),
        ("use_distributed_sampler", True, "data"),
        ("enable_checkpointing", True, "run.checkpoint_every"),
        ("default_root_dir", "runs", "hydra.run.dir"),
        ("gradient_clip_val", 0.5, "optim.clip"),
        ("gradient_clip_algorithm", "value", "optim.clip"),
        ("enable_progress_bar", False, "trainer.progress"),
        ("barebones", True, "run.mfu"),
        ("logger", True, "logger=wandb"),
        ("callbacks", [], "Parts.callbacks"),
        ("max_step", 3, "no setting of that name"),
        ("accumulate_grad_batches", {0: 4}, "an integer"),
        ("accumulate_grad_batches", 1.5, "an integer"),
        ("log_every_n_steps", "often", "an integer"),
        ("progress", "yes", "true or false"),
        ("max_time", "soon", "DAYS:HOURS:MINUTES:SECONDS"),
    ],
)
def test_what_is_not_for_a_run_names_the_key_to_use(key: str, value: Any, instead: str) -> None:
    with pytest.raises(ValueError, match=rf"trainer\.{key}.*{instead}"):
        trainer_settings({key: value}, KNOWN)


def test_values_that_ask_for_nothing_are_left_out() -> None:
    nothing = {
        **{"max_steps": -1, "max_epochs": None, "min_steps": 0, "limit_train_batches": 1.0, "fast_dev_run": False},
        **{"overfit_batches": 0.0, "gradient_clip_val": None, "enable_checkpointing": False, "max_time": None},
    }
    assert trainer_settings({**nothing, "max_epochs": -1, "devices": 2}, KNOWN) == {"devices": 2}
    assert set(FREE) <= set(KNOWN), "a key that Lightning has dropped"


def test_every_default_of_the_trainer_asks_for_nothing_or_is_the_runs_own() -> None:
    """Lightning's own signature: None everywhere but for a few, so that no default has to be known."""
    none = dict.fromkeys(FREE)
    assert trainer_settings(none, KNOWN) == {}


def test_a_key_without_a_value_is_that_of_the_command_line() -> None:
    given = with_defaults({"devices": 2, "max_steps": -1})
    assert (given["devices"], given["max_steps"], given["log_every_n_steps"]) == (2, -1, 5)
    lightning = {key: KNOWN[key].default for key in KNOWN}
    own = {key: value for key, value in asdict(TrainerKeys()).items() if (key, value) not in lightning.items()}
    assert own == {
        "devices": 1, "precision": "auto", "log_every_n_steps": 5, "progress": True, "enable_model_summary": False,
    }  # fmt: skip


def test_time_is_read_as_the_trainer_reads_it() -> None:
    assert seconds("01:02:03:04") == timedelta(days=1, hours=2, minutes=3, seconds=4).total_seconds()
    assert seconds({"hours": 2}) == seconds(timedelta(hours=2)) == 7200
    assert seconds(None) is None
    for wrong in ("12:00", 90, 1.5, True, {"hour": 1}, "00:00:00:00", [1], {"hours": "2"}):
        with pytest.raises(ValueError, match=r"trainer\.max_time=.*DAYS:HOURS:MINUTES:SECONDS"):
            seconds(wrong)
