"""Laws of the data module: an order that is one integer, resumed exactly, under a real Trainer too."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from iskd.corpus import TextFiles
from iskd.data import ResumableLoader, TextData
from iskd.tokenizer import byte_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
STAGES = (5, 4, 6)
WINDOWS = np.arange(23 * 4, dtype=np.uint16).reshape(23, 4)


def loader(first_step: int = 0, steps: int = 10, **changes: int) -> ResumableLoader:
    options = {"batch_size": 2, "seed": 3, **changes}
    return ResumableLoader(WINDOWS, first_step=first_step, steps=steps, **options)


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
    options: dict[str, Any] = {"seq_len": 16, "batch_size": 2, "val_tokens": 160, "calibration_tokens": 96, **changes}
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


def test_resumed_anywhere_equals_uninterrupted() -> None:
    whole = seen(loader(7, 10))
    for done in range(11):
        first = loader(7, 10)
        head = seen(islice(first, done))
        state = json.loads(json.dumps(first.state_dict()))
        second = loader(7, 10)
        second.load_state_dict(state)
        iter(second)
        assert second.state_dict() == state
        assert len(second) == 10
        assert head + seen(second) == whole
        assert seen(second) == whole, "the pass after the resumed one is a whole one"


def test_finished_stage_resumes_as_the_next() -> None:
    first = loader(0, 4)
    list(first)
    second = loader(4, 3)
    second.load_state_dict(first.state_dict())
    assert seen(second) == seen(loader(4, 3))


@pytest.mark.parametrize("changes", [{"seed": 4}, {"batch_size": 3}, {"world_size": 2}])
def test_another_order_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))}=.*resume with the same"):
        loader(**changes).load_state_dict(loader().state_dict())


def test_position_outside_the_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="outside this stage of 10 from 20"):
        loader(20).load_state_dict(loader(0).state_dict())


class Recorder(L.LightningModule):
    """One weight; remembers the batches it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: list[tuple[int, list[list[int]]]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append((self.trainer.current_epoch, batch["input_ids"].tolist()))
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        assert batch["input_ids"].shape[1] == 16

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Stages(L.Callback):
    """Sets the stage of each epoch; saves after every batch, validation and epoch if given a folder."""

    def __init__(self, datamodule: TextData, folder: Path | None = None, resumed: bool = False) -> None:
        self.datamodule, self.folder, self.resumed = datamodule, folder, resumed

    def save(self, trainer: L.Trainer, name: str) -> None:
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.resumed:
            self.datamodule.set_stage(0, STAGES[0])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.save(trainer, f"batch{len(pl_module.seen)}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer, f"validation{trainer.current_epoch}")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        following = trainer.current_epoch + 1
        if following < len(STAGES):
            self.datamodule.set_stage(sum(STAGES[:following]), STAGES[following])
        self.save(trainer, f"epoch{trainer.current_epoch}")


def fit(
    text: Path, folder: Path | None = None, checkpoint: Path | None = None, **options: Any
) -> list[tuple[int, list[list[int]]]]:
    module, datamodule = Recorder(), data(text)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=len(STAGES),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[Stages(datamodule, folder, resumed=checkpoint is not None)],
        **options,
    )
    trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    return module.seen


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*LeafSpec.*:FutureWarning")
def test_trainer_resumed_anywhere_sees_the_same_batches(text: Path, tmp_path: Path, accumulate: int) -> None:
    whole = fit(text, tmp_path, accumulate_grad_batches=accumulate)
    assert [epoch for epoch, _ in whole] == [0] * 5 + [1] * 4 + [2] * 6
    datamodule = data(text)
    datamodule.set_stage(0, sum(STAGES))
    assert [rows for _, rows in whole] == seen(datamodule.train_dataloader())
    saved = {f"batch{count}": count for count in range(1, 15) if count not in (5, 9)}
    saved |= {f"validation{epoch}": sum(STAGES[: epoch + 1]) for epoch in range(2)}
    saved |= {f"epoch{epoch}": sum(STAGES[: epoch + 1]) for epoch in range(2)}
    for name, count in saved.items():
        resumed = fit(text, checkpoint=tmp_path / f"{name}.ckpt", accumulate_grad_batches=accumulate)
        assert resumed == whole[count:], name
    with pytest.raises(ValueError, match="first_step=0, steps=5 was already trained to its end"):
        fit(text, checkpoint=tmp_path / "batch5.ckpt", accumulate_grad_batches=accumulate)


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
    batches = module.calibration()
    assert [tuple(batch.shape) for batch in batches] == [(2, 16)] * 3
    assert torch.equal(torch.cat(batches), torch.cat(data(text, seed=9).calibration()))
    every = module.windows("calibration")
    assert torch.equal(torch.cat(batches), torch.from_numpy(every[np.arange(6) * len(every) // 6].astype(np.int64)))
    assert len(torch.cat(module.calibration(10**9))) == len(every)
    documents = {split: bytes(module.windows(split).ravel() % 256) for split in ("train", "validation", "calibration")}
    line = documents["calibration"].split(b"\n")[1]
    assert line not in documents["train"] + documents["validation"]


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 2), (1, 3), (2, 2), (3, 2), (4, 1)])
def test_validation_is_partitioned_over_ranks(text: Path, world_size: int, batch_size: int) -> None:
    module = data(text, batch_size=batch_size)
    parts = []
    for rank in range(world_size):
        kwargs = {"rank": rank, "num_replicas": world_size}
        module.trainer = SimpleNamespace(distributed_sampler_kwargs=kwargs)  # type: ignore[assignment]
        parts.append([batch["input_ids"] for batch in module.val_dataloader()])
        assert module.train_dataloader().rank == rank
    assert len({len(part) for part in parts}) == 1
    rows = torch.cat([batch for part in parts for batch in part]).tolist()
    assert sorted(rows) == sorted(module.validation_windows().tolist())


def test_fewer_windows_than_processes_is_refused(text: Path) -> None:
    module = data(text, val_tokens=16)
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        distributed_sampler_kwargs={"rank": 0, "num_replicas": 2}
    )
    with pytest.raises(ValueError, match="val_tokens=16 gives 1 windows for 2 processes"):
        module.val_dataloader()


def test_manifest_is_plain_and_stable(text: Path) -> None:
    module = data(text)
    manifest = module.manifest()
    assert json.loads(json.dumps(manifest)) == manifest == data(text).manifest()
    assert manifest["separator"] == "eos"
    assert manifest["tokens"]["train"] > manifest["tokens"]["validation"] > 0
    module.calibration(32)
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
