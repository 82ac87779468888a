"""The LightningDataModule: shards on disk to batches of token windows; where training stands in them is one integer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
import torch

from iskd.data.building import Asked
from iskd.data.coding import Coding
from iskd.data.loader import Batch, StageLoader, batches_of, pinned, to_tensor
from iskd.data.mix import Mix
from iskd.data.overlap import learned, seen_share, tell_seen
from iskd.data.shards import Shards, Tokens, open_shards
from iskd.data.sources import Source
from iskd.data.splits import SPLITS, Splitter
from iskd.data.windows import SplitWindows, check_sizes, of_mix, plan_mix
from iskd.models.packing import Separator, with_successor
from iskd.system import Busy, global_rank
from iskd.system.files import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CALIBRATION_BATCH = 1024  # tokens


class TextData(L.LightningDataModule):
    """Windows of text for training, validation and calibration.

    Args:
        source: where documents come from (`iskd.data.sources`).
        tokenizer: the teacher's tokenizer.
        cache_dir: folder that keeps token shards between runs.
        seq_len: tokens per window.
        batch_size: windows per micro-batch and process; None = 2 (a command: by the budget of its run).
        val_tokens: tokens of validation text, spread evenly over the split.
        seed: order of the training windows.
        max_train_tokens: use only the first so many tokens of the training split.
        validation_fraction: share of documents (by hash) for validation, where the source has no file for it.
        calibration_fraction: share for calibration.
        test_fraction: share for test, where the source has no file for it.
        max_context: longest sequence the model takes; None skips the check.
        vocab_size: rows of the model's embedding; None skips the check.
        boundaries: keep the documents of a window apart (`iskd.models.packing`): no token sees another document, and
            the first one of a document is no target. Attention then takes a mask, which is slower than none.
        bos: where begin tokens stand (`iskd.data.framing`): `document`, `window`, `none`, `bare`; None = as the
            tokenizer does.
        chat_loss: documents are conversations (`iskd.data.files.chat`), of which `all` is learned, or what the
            `assistant` says; None = they are text.
        before: names of the shards in `cache_dir` that the student has learned from in earlier runs.
    """

    BATCH: ClassVar[int] = 2
    """Windows of a micro-batch, where nobody says."""

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        *,
        cache_dir: str | Path,
        seq_len: int = 512,
        batch_size: int | None = None,
        val_tokens: int = 16384,
        seed: int = 0,
        max_train_tokens: int | None = None,
        validation_fraction: float = 0.04,
        calibration_fraction: float = 0.04,
        test_fraction: float = 0.0,
        max_context: int | None = None,
        vocab_size: int | None = None,
        boundaries: bool = False,
        bos: str | None = None,
        chat_loss: str | None = None,
        before: Sequence[str] = (),
    ) -> None:
        super().__init__()
        batch_size = self.BATCH if batch_size is None else batch_size
        sizes = {"seq_len": seq_len, "batch_size": batch_size, "val_tokens": val_tokens}
        check_sizes(sizes, boundaries=boundaries, seed=seed, max_context=max_context, max_train_tokens=max_train_tokens)
        self._mix = source if isinstance(source, Mix) else None
        self._asked = Asked.of_sources(source, max_train_tokens, val_tokens)
        self.source, self.tokenizer, self.cache_dir = source, tokenizer, Path(expanded(cache_dir))
        self.seq_len, self.batch_size, self.seed, self.val_tokens = seq_len, batch_size, seed, val_tokens
        self.max_train_tokens, self.vocab_size = max_train_tokens, vocab_size
        self.boundaries, self.bos, self.chat_loss = boundaries, bos, chat_loss
        self.coding = Coding.of(tokenizer, bos=bos, chat_loss=chat_loss, seq_len=seq_len)
        self._splitter = Splitter(validation_fraction, calibration_fraction, test_fraction)
        self._shards: Shards | None = None
        self._stage: tuple[int, int] | None = None
        self._calibrations: dict[int, str] = {}
        self._before = before
        self._splits: SplitWindows | None = None

    def prepare(self) -> None:
        """Build or open the shards; calls after the first cost nothing.

        Raises:
            ValueError: the source, a shard or the tokenizer is not usable, or a split is shorter than one window.
        """
        if self._shards is not None:
            return
        self.coding.announce(self.tokenizer)
        with Busy("reading the text and its tokens") if global_rank() == 0 else nullcontext():
            shards = open_shards(self.source, self.tokenizer, self._splitter, self.cache_dir, self.coding, self._asked)
        for split in SPLITS[:3]:
            shards.windows(split, self.seq_len)
        if self.vocab_size is not None and shards.meta.max_id >= self.vocab_size:
            raise ValueError(
                f"the tokenizer gave id {shards.meta.max_id}, but the model has vocab_size={self.vocab_size}; "
                "use the model's own tokenizer, or resize the model's embedding"
            )
        self._shards = shards
        self._splits = SplitWindows(shards, self.seq_len, self.max_train_tokens, self._mix)
        for split in SPLITS[:3]:
            self._splits.numbers(split)
        if global_rank() == 0:
            tell_seen(self.seen_share(self.validation_windows()))

    @property
    def _opened(self) -> SplitWindows:
        self.prepare()
        assert self._splits is not None
        return self._splits

    @property
    def separator(self) -> Separator | None:
        """What keeps documents apart; None where a window is one text.

        Raises:
            ValueError: they are to be kept apart and nothing stands between them.
        """
        if not self.boundaries:
            return None
        found = self.coding.separator
        if found is None:
            raise ValueError(
                "data.boundaries=true needs a token between documents, and the tokenizer has neither eos nor bos; set "
                "data.boundaries=false, or tokenizer.eos_token"
            )
        return found

    def prepare_data(self) -> None:
        """Lightning's hook: one process per node builds the shards before the others open them."""
        self.prepare()

    def setup(self, stage: str) -> None:
        """Lightning's hook: every process opens the shards."""
        self.prepare()

    def windows(self, split: str) -> Tokens:
        """Return all windows of a split, memory-mapped, [windows, seq_len]."""
        return self._opened.windows(split)

    @property
    def named(self) -> str:
        """The text in words: its name, or what kind of source it is."""
        named = getattr(self.source, "name", None) or getattr(self.source, "path", None)
        return Path(str(named)).name if named else type(self.source).__name__

    @property
    def pass_tokens(self) -> int:
        """Tokens of one pass over the training text, in whole windows."""
        return len(self._opened.numbers("train")) * self.seq_len

    def validation_windows(self) -> torch.Tensor:
        """Return the validation windows, evenly spaced over the split, [windows, seq_len] int64."""
        return to_tensor(self._opened.spread("validation", self.val_tokens))

    def calibration_batches(self, tokens: int) -> list[Batch]:
        """Return `calibration` as batches to measure quality on: `input_ids`, and `targets` where not all count."""
        return batches_of(self.calibration(tokens), self._opened.spread_targets("calibration", tokens))

    def calibration(self, tokens: int) -> list[torch.Tensor]:
        """Return windows for scores and fits, evenly spaced over the calibration split, the same on every rank.

        Their batches do not depend on `batch_size`: a fit must not change with the layout of training over processes.

        Args:
            tokens: how many tokens to take. At least one window is returned.

        Returns:
            Batches [windows, seq_len] int64 of at most 1024 tokens, or of one window where that is longer.
        """
        windows = self._opened.spread("calibration", tokens)
        self._calibrations[tokens] = _sha256(windows)
        return list(to_tensor(windows).split(max(1, _CALIBRATION_BATCH // self.seq_len)))

    def seen_share(self, windows: torch.Tensor) -> float:
        """Share of the passages of `windows` [W, T] that are in training or calibration text (`iskd.data.overlap`).

        Of this run, and of those that its student comes from.
        """
        own = [self.windows("train"), self.windows("calibration")]
        return seen_share(windows.numpy(), [*own, *learned(self.cache_dir, self._before, self.tokenizer)])

    def validation(self) -> list[Batch]:
        """Return this rank's validation batches: each window is on one rank, every rank has as many batches.

        Returns:
            Dicts with `input_ids`, [at most batch_size + 1, seq_len] int64, the same ones at every call, and `targets`
            like them where not all tokens are learned.

        Raises:
            ValueError: there are fewer windows than processes.
        """
        windows, (rank, world_size) = self.validation_windows(), self._ranks()
        self.check_validation(world_size)
        count = -(-(len(windows) // world_size) // self.batch_size)
        marks = self._opened.spread_targets("validation", self.val_tokens)
        mine = windows[rank::world_size].tensor_split(count)
        return batches_of(mine, None if marks is None else marks[rank::world_size])

    def check_validation(self, processes: int) -> None:
        """Raise ValueError where there are fewer validation windows than processes to share them."""
        if (windows := len(self.validation_windows())) < processes:
            raise ValueError(
                f"data.val_tokens={self.val_tokens} gives {windows} windows for {processes} processes; "
                f"raise it to at least {processes * self.seq_len}, or use more validation text"
            )

    def set_stage(self, first_step: int, steps: int) -> None:
        """Make the next train_dataloader() yield `steps` batches from global micro-batch `first_step` on.

        Lightning asks for the loader before `on_train_epoch_start`: call this in `on_fit_start` for the first stage
        and in `on_train_epoch_end` for the next one. A run resumed after `done` micro-batches of a stage asks for
        what is left of it: `set_stage(first_step + done, steps - done)`.

        Raises:
            ValueError: the first step is negative or there are no steps.
        """
        if first_step < 0 or steps < 1:
            raise ValueError(f"stage first_step={first_step}, steps={steps}: the first is >= 0, the second >= 1")
        self._stage = (first_step, steps)

    def plan_mix(self, tokens: int) -> list[str]:
        """Return what so many tokens take of each source of a mix, a line each; ValueError as `windows.plan_mix`."""
        order = self._opened.order(self.seed)
        return [] if self._mix is None else plan_mix(self._mix, order, tokens // self.seq_len, self.seq_len)

    def train_dataloader(self) -> StageLoader:
        """Return the batches of the stage; without a stage, one pass over the training split."""
        windows, (rank, world_size) = self.windows("train"), self._ranks()
        numbers = self._opened.numbers("train")
        one_pass = max(1, len(numbers) // (self.batch_size * world_size))
        first_step, steps = self._stage or (0, one_pass)
        return StageLoader(
            windows,
            batch_size=self.batch_size,
            seed=self.seed,
            first_step=first_step,
            steps=steps,
            rank=rank,
            world_size=world_size,
            targets=self._opened.targets("train"),
            numbers=numbers,
            order=self._opened.order(self.seed),
        )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Lightning's hook: what a device would be waited for is done on the host.

        Where documents are apart, or answers alone are learned, it finds which tokens have a label; for a
        CUDA device it pins the batch.
        """
        found = dict(batch)
        apart, targets = self.separator, batch.get("targets")
        if apart is not None or targets is not None:
            found["kept"] = with_successor(batch["input_ids"], apart, targets)
        if self.trainer is None:
            return found
        device = self.trainer.strategy.root_device
        return {
            key: pinned(value, device) if isinstance(value, torch.Tensor) else value for key, value in found.items()
        }

    def manifest(self) -> dict[str, Any]:
        """Return what identifies the data of this run, as plain JSON values."""
        self.prepare()
        assert self._shards is not None
        recipe, meta = self._shards.recipe, self._shards.meta
        return {
            **({} if self._mix is None else {"mix": of_mix(self._mix, self._opened, self._shards)}),
            "source": recipe["source"],
            "content": recipe["content"],
            "tokenizer": recipe["tokenizer"],
            "separator": meta.separator,
            "cache": self._shards.folder.name,
            "tokens": {split: self._shards.tokens(split) for split in SPLITS},
            "documents": {split: meta.splits[split].documents for split in SPLITS},
            "dropped_duplicates": meta.dropped,
            "train_windows": len(self._opened.numbers("train")),
            "validation_sha256": _sha256(self._opened.spread("validation", self.val_tokens)),
            "calibration_sha256": {str(tokens): digest for tokens, digest in sorted(self._calibrations.items())},
            "seed": self.seed,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "boundaries": self.boundaries,
            "bos": self.bos,
            "framing": self.coding.framing.to_json(),
            "framed": self.coding.framing.told(self.tokenizer),
            "chat": None if self.coding.chat is None else self.coding.chat.recipe(),
        }

    def identity(self) -> dict[str, Any]:
        """Return what the training data and their order depend on: a resumed run must find it unchanged."""
        manifest = self.manifest()
        mix = ("mix",) if "mix" in manifest else ()
        text = ("content", "tokenizer", "train_windows", "validation_sha256", "framing", "chat")
        order = ("seq_len", "boundaries", "batch_size", "seed")
        return {key: manifest[key] for key in (*text, *order, *mix)}

    def _ranks(self) -> tuple[int, int]:
        """Return (rank, world size) among the processes that see different data."""
        kwargs = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (0, 1) if kwargs is None else (int(kwargs["rank"]), int(kwargs["num_replicas"]))


def _sha256(windows: Tokens) -> str:
    return hashlib.sha256(windows.astype("<i8").tobytes()).hexdigest()
