"""Laws of the data module: an order that is one integer, taken up anywhere, under a real Trainer too."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from iskd.data.loader import StageLoader
from iskd.data.module import TextData
from iskd.data.sources import TextFiles
from iskd.models.tokenizers import byte_tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
STAGES = (5, 4, 6)
WINDOWS = np.arange(23 * 4, dtype=np.uint16).reshape(23, 4)


def loader(first_step: int = 0, steps: int = 10, **changes: int) -> StageLoader:
    options = {"batch_size": 2, "seed": 3, **changes}
    return StageLoader(WINDOWS, first_step=first_step, steps=steps, **options)


def seen(batches: Any) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in batches]


def flat(batches: Any) -> list[int]:
    return [row[0] // 4 for rows in seen(batches) for row in rows]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    words = ["red", "green", "blue", "seven", "of", "the", "and", "runs"]
    groups = ["\n".join(" ".join(rng.choice(words, 12)) for _ in range(22)) for _ in range(60)]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(groups))
    return path


def data(text: Path, **changes: Any) -> TextData:
    options: dict[str, Any] = {"seq_len": 16, "batch_size": 2, "val_tokens": 160, **changes}
    return TextData(TextFiles(str(text)), byte_tokenizer(), cache_dir=text.parent / "cache", **options)


def test_each_epoch_sees_every_window_once() -> None:
    order = flat(loader(steps=23))
    assert sorted(order[:23]) == sorted(order[23:]) == list(range(23))
    assert order[:23] != order[23:]
    assert order != flat(loader(steps=23, seed=4))
    assert loader().batch(0)["input_ids"].dtype == torch.int64


def test_ranks_partition_the_order_of_one_process() -> None:
    ranks = [seen(loader(first_step=2, steps=6, rank=rank, world_size=3)) for rank in range(3)]
    together = [rows for step in zip(*ranks, strict=True) for rows in step]
    assert together == seen(loader(first_step=6, steps=18))


def test_stages_continue_each_other() -> None:
    assert seen(loader(0, 4)) + seen(loader(4, 7)) == seen(loader(0, 11))


def test_started_anywhere_continues_the_one_before() -> None:
    whole = seen(loader(7, 10))
    assert len(loader(7, 10)) == len(whole) == 10
    for done in range(10):
        rest = loader(7 + done, 10 - done)
        assert seen(rest) == whole[done:]
        assert seen(rest) == whole[done:], "a second pass is the same one"
        assert seen([rest.batch(7 + done)]) == whole[done : done + 1]


class Recorder(L.LightningModule):
    """One weight; remembers the batches it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: list[tuple[int, list[list[int]]]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append((self.trainer.current_epoch, batch["input_ids"].tolist()))
        return self.weight * batch["input_ids"].float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Stages(L.Callback):
    """Tells the data what to yield next, from `done` micro-batches of the run on."""

    def __init__(self, datamodule: TextData, done: int) -> None:
        self.datamodule, self.done = datamodule, done

    def set_stage(self) -> bool:
        ends = [sum(STAGES[: number + 1]) for number in range(len(STAGES))]
        end = next((end for end in ends if end > self.done), None)
        if end is not None:
            self.datamodule.set_stage(self.done, end - self.done)
        return end is not None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.set_stage()

    def on_train_batch_end(self, *_: Any) -> None:
        self.done += 1

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = not self.set_stage()


def fit(text: Path, done: int = 0, **options: Any) -> list[tuple[int, list[list[int]]]]:
    module, datamodule = Recorder(), data(text)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[Stages(datamodule, done)],
        **options,
    )
    trainer.fit(module, datamodule=datamodule)
    return module.seen


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_sees_the_right_batches_from_anywhere(text: Path, accumulate: int) -> None:
    whole = fit(text, accumulate_grad_batches=accumulate)
    assert [epoch for epoch, _ in whole] == [0] * 5 + [1] * 4 + [2] * 6
    datamodule = data(text)
    datamodule.set_stage(0, sum(STAGES))
    assert [rows for _, rows in whole] == seen(datamodule.train_dataloader())
    for done in range(1, sum(STAGES)):
        resumed = fit(text, done, accumulate_grad_batches=accumulate)
        assert [rows for _, rows in resumed] == [rows for _, rows in whole[done:]], f"resumed after {done} batches"


def test_default_stage_is_one_pass(text: Path) -> None:
    module = data(text)
    windows = module.windows("train")
    batches = list(module.train_dataloader())
    assert len(batches) == len(windows) // 2
    assert batches[0]["input_ids"].shape == (2, 16)
    assert len(data(text, max_train_tokens=100).windows("train")) == 6


def test_validation_and_calibration_are_fixed_and_disjoint(text: Path) -> None:
    module = data(text)
    assert module.validation_windows().shape == (10, 16)
    batches = module.calibration(96)
    assert [tuple(batch.shape) for batch in batches] == [(6, 16)]
    other = data(text, batch_size=3).calibration(10**9)
    assert [b.shape for b in other] == [b.shape for b in module.calibration(10**9)], "no fit depends on batch_size"
    assert all(batch.numel() <= 1024 for batch in other)
    assert torch.equal(torch.cat(batches), torch.cat(data(text, seed=9).calibration(96)))
    every = module.windows("calibration")
    assert torch.equal(torch.cat(batches), torch.from_numpy(every[np.arange(6) * len(every) // 6].astype(np.int64)))
    assert len(torch.cat(module.calibration(10**9))) == len(every)
    documents = {split: bytes(module.windows(split).ravel() % 256) for split in ("train", "validation", "calibration")}
    line = documents["calibration"].split(b"\n")[1]
    assert line not in documents["train"] + documents["validation"]


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 2), (1, 3), (2, 2), (3, 2), (4, 1)])
def test_validation_is_partitioned_over_ranks(text: Path, world_size: int, batch_size: int) -> None:
    module = data(text, batch_size=batch_size)
    ranks = []
    for rank in range(world_size):
        kwargs = {"rank": rank, "num_replicas": world_size}
        module.trainer = SimpleNamespace(distributed_sampler_kwargs=kwargs)  # type: ignore[assignment]
        ranks.append([batch["input_ids"] for batch in module.validation()])
        assert module.train_dataloader().rank == rank
    assert len({len(rank) for rank in ranks}) == 1
    rows = torch.cat([batch for rank in ranks for batch in rank]).tolist()
    assert sorted(rows) == sorted(module.validation_windows().tolist())


def test_fewer_windows_than_processes_is_refused(text: Path) -> None:
    module = data(text, val_tokens=16)
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        distributed_sampler_kwargs={"rank": 0, "num_replicas": 2}
    )
    with pytest.raises(ValueError, match="val_tokens=16 gives 1 windows for 2 processes"):
        module.validation()


def test_short_split_is_told_once(text: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = data(text)
    with caplog.at_level(logging.INFO, logger="iskd.data.windows"):
        for _ in range(3):
            module.calibration(10**9)
    said = [record for record in caplog.records if record.name == "iskd.data.windows"]
    assert [(record.levelno, record.getMessage()) for record in said] == [
        (logging.INFO, f"calibration: 62500000 windows wanted, the split has {len(module.windows('calibration'))}")
    ]


def test_manifest_is_plain_and_stable(text: Path) -> None:
    module = data(text)
    manifest = module.manifest()
    assert json.loads(json.dumps(manifest)) == manifest == data(text).manifest()
    assert manifest["separator"] == "eos"
    assert manifest["tokens"]["train"] > manifest["tokens"]["validation"] > 0
    module.calibration(32)
    module.calibration(96)
    assert module.manifest()["calibration_sha256"].keys() == {"32", "96"}
    assert data(text, val_tokens=32).manifest()["validation_sha256"] != manifest["validation_sha256"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 1}, "data.seq_len=1"),
        ({"batch_size": 0}, "data.batch_size=0"),
        ({"val_tokens": 0}, "data.val_tokens=0"),
        ({"seed": -1}, "data.seed=-1"),
        ({"max_context": 8}, "data.seq_len=16 is longer than the model's context of 8"),
        ({"max_train_tokens": 8}, "data.max_train_tokens=8"),
        ({"validation_fraction": 2.0}, "data.validation_fraction=2.0"),
        ({"seq_len": 10**6}, r"split 'train' of .* has \d+ tokens, less than one window of data.seq_len=1000000"),
        (
            {"calibration_fraction": 0.0},
            "split 'calibration' got 0 of the .* documents.*raise data.calibration_fraction",
        ),
        ({"vocab_size": 100}, "the tokenizer gave id 256, but the model has vocab_size=100"),
    ],
)
def test_bad_values_are_named_with_the_fix(text: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(text, **changes).prepare()


@pytest.mark.parametrize("stage", [(-1, 5), (0, 0)])
def test_bad_stage_is_refused(text: Path, stage: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"first_step={stage[0]}, steps={stage[1]}"):
        data(text).set_stage(*stage)


@pytest.mark.skipif(not (SHARED / "wikitext2").is_dir(), reason="no real text: ../shared/data/wikitext2 is absent")
def test_real_text_with_its_own_validation(tmp_path: Path) -> None:
    files = {
        key: str(SHARED / "wikitext2" / f"{name}.txt.gz") for key, name in (("path", "test"), ("val_path", "valid"))
    }
    module = TextData(TextFiles(**files, detokenize="wikitext"), byte_tokenizer(), cache_dir=tmp_path)
    manifest = module.manifest()
    assert manifest["tokens"]["validation"] == pytest.approx(1_100_000, rel=0.1)
    divided = manifest["documents"]["train"] + manifest["documents"]["calibration"]
    assert manifest["documents"]["calibration"] == pytest.approx(0.04 * divided, abs=3 * (0.04 * divided) ** 0.5)
    decoded = byte_tokenizer().decode(module.validation_windows().flatten())
    assert "@-@" not in decoded
    assert " , " not in decoded
