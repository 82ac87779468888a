"""The LightningDataModule: shards on disk to batches of token windows, in an order that a resumed run continues.

Order: the k-th window of training is perm(seed, epoch)[k mod n] with epoch = k // n and n windows, and the global
micro-batch b on rank r of w takes the windows k = (b*w + r)*B ... + B. A position is thus one integer; nothing random
is stored, and stages, restarts and processes agree on who sees what.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray

from iskd.corpus import SPLITS, Source, Splitter
from iskd.shards import Shards, Tokens, open_shards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, torch.Tensor]

_log = logging.getLogger(__name__)


class TextData(L.LightningDataModule):
    """Windows of text for training, validation and calibration.

    Args:
        source: where documents come from (`iskd.corpus`).
        tokenizer: the teacher's tokenizer.
        cache_dir: folder that keeps token shards between runs.
        seq_len: tokens per window.
        batch_size: windows per micro-batch and process.
        val_tokens: tokens of validation text, spread evenly over the split.
        calibration_tokens: tokens for importance scores, likewise.
        seed: order of the training windows.
        max_train_tokens: use only the first so many tokens of the training split.
        validation_fraction: share of documents (by hash) for validation, where the source has no file for it.
        calibration_fraction: share for calibration.
        test_fraction: share for test, where the source has no file for it.
        max_context: longest sequence the model takes; None skips the check.
        vocab_size: rows of the model's embedding; None skips the check.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        *,
        cache_dir: str | Path,
        seq_len: int = 512,
        batch_size: int = 2,
        val_tokens: int = 16384,
        calibration_tokens: int = 8192,
        seed: int = 0,
        max_train_tokens: int | None = None,
        validation_fraction: float = 0.04,
        calibration_fraction: float = 0.04,
        test_fraction: float = 0.0,
        max_context: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "val_tokens": val_tokens, "calibration_tokens": calibration_tokens}
        for key, value in {"seq_len": seq_len, **sizes}.items():
            if value < (2 if key == "seq_len" else 1):
                raise ValueError(f"data.{key}={value} is too small; seq_len is at least 2, the others at least 1")
        if seed < 0:
            raise ValueError(f"data.seed={seed} is negative; use 0 or more")
        if max_context is not None and seq_len > max_context:
            raise ValueError(
                f"data.seq_len={seq_len} is longer than the model's context of {max_context} tokens; "
                f"set data.seq_len to at most {max_context}"
            )
        if max_train_tokens is not None and max_train_tokens < seq_len:
            raise ValueError(
                f"data.max_train_tokens={max_train_tokens} is less than one window of data.seq_len={seq_len}; "
                "raise it, or lower data.seq_len"
            )
        self.source, self.tokenizer, self.cache_dir = source, tokenizer, Path(cache_dir).expanduser()
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self.val_tokens, self.calibration_tokens = val_tokens, calibration_tokens
        self.max_train_tokens, self.vocab_size = max_train_tokens, vocab_size
        self._splitter = Splitter(validation_fraction, calibration_fraction, test_fraction)
        self._shards: Shards | None = None
        self._stage: tuple[int, int] | None = None
        self._loader: ResumableLoader | None = None
        self._calibrations: dict[int, str] = {}

    def prepare(self) -> None:
        """Build or open the shards; calls after the first cost nothing.

        Raises:
            ValueError: the source, a shard or the tokenizer is not usable, or a split is shorter than one window.
        """
        if self._shards is not None:
            return
        shards = open_shards(self.source, self.tokenizer, self._splitter, self.cache_dir)
        for split in SPLITS[:3]:
            shards.windows(split, self.seq_len)
        if self.vocab_size is not None and shards.meta["max_id"] >= self.vocab_size:
            raise ValueError(
                f"the tokenizer gave id {shards.meta['max_id']}, but the model has vocab_size={self.vocab_size}; "
                "use the model's own tokenizer, or resize the model's embedding"
            )
        self._shards = shards

    def prepare_data(self) -> None:
        """Lightning's hook: one process per node builds the shards before the others open them."""
        self.prepare()

    def setup(self, stage: str) -> None:
        """Lightning's hook: every process opens the shards."""
        self.prepare()

    def windows(self, split: str) -> Tokens:
        """Return all windows of a split, memory-mapped, [windows, seq_len]."""
        self.prepare()
        assert self._shards is not None
        windows = self._shards.windows(split, self.seq_len)
        if split == "train" and self.max_train_tokens is not None:
            windows = windows[: self.max_train_tokens // self.seq_len]
        return windows

    def validation_windows(self) -> torch.Tensor:
        """Return the validation windows, evenly spaced over the split, [windows, seq_len] int64."""
        return _tensor(self._spread("validation", self.val_tokens))

    def calibration(self, tokens: int | None = None) -> list[torch.Tensor]:
        """Return windows for importance scores, evenly spaced over the calibration split, the same on every rank.

        Args:
            tokens: how many tokens to take; None takes `calibration_tokens`. At least one window is returned.

        Returns:
            Batches of [at most batch_size, seq_len] int64.
        """
        tokens = self.calibration_tokens if tokens is None else tokens
        windows = self._spread("calibration", tokens)
        self._calibrations[tokens] = _sha256(windows)
        return list(_tensor(windows).split(self.batch_size))

    def set_stage(self, first_step: int, steps: int) -> None:
        """Make the next train_dataloader() yield `steps` batches from global micro-batch `first_step` on.

        Lightning asks for the loader before `on_train_epoch_start`: call this in `on_fit_start` for the first stage
        of a fresh run and in `on_train_epoch_end` for the next one. A checkpoint carries the stage, so a resumed run
        has it already. Save none in `on_train_batch_end` of a stage's last batch (`trainer.is_last_batch`): Lightning
        resumes it without validation and without `on_train_epoch_end`.
        """
        if first_step < 0 or steps < 1:
            raise ValueError(f"stage first_step={first_step}, steps={steps}: the first is >= 0, the second >= 1")
        self._stage, self._loader = (first_step, steps), None

    def train_dataloader(self) -> ResumableLoader:
        """Return the batches of the stage; without a stage, one pass over the training split.

        Raises:
            ValueError: the stage was already trained to its end, so its data would be repeated.
        """
        if self._stage is not None and self._loader is not None and self._loader.finished:
            raise ValueError(
                f"the stage first_step={self._stage[0]}, steps={self._stage[1]} was already trained to its end; call "
                "set_stage for the next one in on_train_epoch_end. When resuming: this checkpoint was saved after the "
                "last batch of a stage and before its validation; resume from the one before or after it"
            )
        windows = self.windows("train")
        rank, world_size = self._ranks()
        one_pass = max(1, len(windows) // (self.batch_size * world_size))
        first_step, steps = self._stage or (0, one_pass)
        self._loader = ResumableLoader(
            windows,
            batch_size=self.batch_size,
            seed=self.seed,
            first_step=first_step,
            steps=steps,
            rank=rank,
            world_size=world_size,
        )
        return self._loader

    def val_dataloader(self) -> FixedLoader:
        """Return this rank's validation batches: each window is on one rank, every rank has as many batches.

        Raises:
            ValueError: there are fewer windows than processes.
        """
        windows, (rank, world_size) = self.validation_windows(), self._ranks()
        if len(windows) < world_size:
            raise ValueError(
                f"data.val_tokens={self.val_tokens} gives {len(windows)} windows for {world_size} processes; "
                f"raise it to at least {world_size * self.seq_len}, or use more validation text"
            )
        count = -(-(len(windows) // world_size) // self.batch_size)
        return FixedLoader(windows[rank::world_size].tensor_split(count))

    def manifest(self) -> dict[str, Any]:
        """Return what identifies the data of this run, as plain JSON values."""
        self.prepare()
        assert self._shards is not None
        self.calibration()
        meta = self._shards.meta
        return {
            "source": meta["source"],
            "content": meta["content"],
            "tokenizer": meta["tokenizer"],
            "separator": meta["separator"],
            "cache": self._shards.folder.name,
            "tokens": {split: self._shards.tokens(split) for split in SPLITS},
            "documents": {split: meta["splits"][split]["documents"] for split in SPLITS},
            "dropped_duplicates": meta["dropped"],
            "train_windows": len(self.windows("train")),
            "validation_sha256": _sha256(self._spread("validation", self.val_tokens)),
            "calibration_sha256": {str(tokens): digest for tokens, digest in sorted(self._calibrations.items())},
            "seed": self.seed,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the stage for the checkpoint."""
        return {} if self._stage is None else {"first_step": self._stage[0], "steps": self._stage[1]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the stage from a checkpoint."""
        self.set_stage(state_dict["first_step"], state_dict["steps"])

    def _spread(self, split: str, tokens: int) -> Tokens:
        windows = self.windows(split)
        wanted = max(1, tokens // self.seq_len)
        if wanted > len(windows):
            _log.warning("%s: %d windows wanted, the split has %d", split, wanted, len(windows))
        count = min(wanted, len(windows))
        return windows[np.arange(count) * len(windows) // count]

    def _ranks(self) -> tuple[int, int]:
        """Return (rank, world size) among the processes that see different data."""
        kwargs = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (0, 1) if kwargs is None else (int(kwargs["rank"]), int(kwargs["num_replicas"]))


class ResumableLoader:
    """A sized, restartable loader over windows whose place is one integer.

    Having a length matters: Lightning then fetches no batch ahead, and the batches handed out are the batches trained
    on (`lightning.pytorch.loops.fetchers`). After `load_state_dict` the first pass yields what was left, while the
    length stays that of the whole stage, as Lightning's progress counters expect.

    Args:
        windows: [windows, seq_len] of token ids, may be memory-mapped.
        batch_size: windows per micro-batch and process.
        seed: of the order.
        first_step: global micro-batch at which this stage begins.
        steps: micro-batches in this stage.
        rank: this process among those that see different data.
        world_size: how many those are.
    """

    def __init__(
        self,
        windows: Tokens,
        *,
        batch_size: int,
        seed: int,
        first_step: int,
        steps: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.windows, self.batch_size, self.seed = windows, batch_size, seed
        self.first_step, self.steps = first_step, steps
        self.rank, self.world_size = rank, world_size
        self._start = self._yielded = 0

    def __len__(self) -> int:
        """Return the micro-batches of the whole stage."""
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        """Yield {"input_ids": [batch_size, seq_len] int64}."""
        # Lightning makes an iterator, then another, before it takes a batch: the place moves only with the first one.
        start, self._start = self._start, 0
        for step in range(start, self.steps):
            self._yielded = step + 1
            yield self.batch(self.first_step + step)

    @property
    def finished(self) -> bool:
        """Whether the last batch was handed out, in this run or the one it resumes."""
        return self._yielded == self.steps

    def batch(self, micro_batch: int) -> Batch:
        """Return the batch of this rank at a global micro-batch number."""
        count = len(self.windows)
        first = (micro_batch * self.world_size + self.rank) * self.batch_size
        order = [_permutation(self.seed, k // count, count)[k % count] for k in range(first, first + self.batch_size)]
        return {"input_ids": _tensor(self.windows[order])}

    def state_dict(self) -> dict[str, int]:
        """Return the next global micro-batch and what its meaning depends on, all ints and equal on every rank."""
        return {"position": self.first_step + self._yielded, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue at a saved position.

        Raises:
            ValueError: the order of the saved run was another one, or its position is outside this stage.
        """
        for key, value in self._identity().items():
            if state_dict[key] != value:
                raise ValueError(
                    f"the checkpoint's data order has {key}={state_dict[key]}, this run has {key}={value}; "
                    "resume with the same data and number of processes, or start a new run"
                )
        done = state_dict["position"] - self.first_step
        if not 0 <= done <= self.steps:
            raise ValueError(
                f"the checkpoint is at micro-batch {state_dict['position']}, outside this stage of {self.steps} from "
                f"{self.first_step}; resume with the same schedule and budgets"
            )
        self._start = self._yielded = done

    def _identity(self) -> dict[str, int]:
        count, seq_len = self.windows.shape
        sizes = {"windows": int(count), "seq_len": int(seq_len)}
        return sizes | {"batch_size": self.batch_size, "seed": self.seed, "world_size": self.world_size}


class FixedLoader:
    """A sized loader over batches in memory; a bare list would be taken for many loaders.

    Args:
        batches: token ids, each [windows, seq_len] int64.
    """

    def __init__(self, batches: Sequence[torch.Tensor]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        """Yield {"input_ids": [windows, seq_len] int64}."""
        return ({"input_ids": batch} for batch in self.batches)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Return the order of one epoch; two are kept because a batch may straddle them."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    return generator.permutation(count)


def _tensor(windows: Tokens) -> torch.Tensor:
    return torch.from_numpy(windows.astype(np.int64))


def _sha256(windows: Tokens) -> str:
    return hashlib.sha256(windows.astype("<i8").tobytes()).hexdigest()
