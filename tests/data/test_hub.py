"""Laws of data sets of the hub: streams end where enough is read, and a run keeps the commit it began with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iskd.data import HubDataset, TextData, TextFiles, hub_rows, sources
from iskd.data.mix import Mix
from iskd.data.shards import open_shards
from iskd.data.sources import pinned
from iskd.data.splits import Splitter
from iskd.models.tokenizers import byte_tokenizer

COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder in the layout of a data set of the hub: 5,000 rows to train on, 2,000 to validate on."""
    (tmp_path / "set").mkdir()
    for split, count in (("train", 5000), ("validation", 2000)):
        lines = (json.dumps({"text": f"{split} row {number} " + "of a long set " * 4}) for number in range(count))
        (tmp_path / "set" / f"{split}.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many rows were taken of each split."""
    counts: dict[str, int] = {}

    def counted(real: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def rows(name: str, config: str | None, split: str, **options: Any) -> Iterator[Any]:
            for row in real(name, config, split, **options):
                counts[split] = counts.get(split, 0) + 1
                yield row

        return rows

    monkeypatch.setattr(sources, "hub_rows", counted(hub_rows.hub_rows))
    return counts


def data(source: Any, hub: Path, **changes: Any) -> TextData:
    options: dict[str, Any] = {"seq_len": 32, "batch_size": 2, "val_tokens": 2048, **changes}
    return TextData(source, byte_tokenizer(), cache_dir=hub / "cache", **options)


def test_a_stream_is_read_as_far_as_it_is_asked_for(hub: Path, read: dict[str, int]) -> None:
    pytest.importorskip("datasets")
    source = HubDataset(str(hub / "set"), val_split="validation", streaming=True)
    module = data(source, hub, max_train_tokens=40_000)
    manifest = module.manifest()
    assert manifest["tokens"]["train"] >= 40_000
    assert min(manifest["tokens"][split] for split in ("validation", "calibration")) >= 2048
    assert read["train"] < 1500
    assert read["validation"] <= 256
    assert manifest["train_windows"] == 40_000 // 32
    # the same rows as where everything is read, and the same again where the shards are gone
    whole = data(replace(source, streaming=False, val_split=None), hub, validation_fraction=0.0)
    with pytest.raises(ValueError, match="split 'validation' got 0"):
        whole.prepare()
    again = TextData(source, byte_tokenizer(), cache_dir=hub / "other", seq_len=32, val_tokens=2048, batch_size=2,
                     max_train_tokens=40_000)  # fmt: skip
    assert again.identity() == module.identity()
    assert np.array_equal(again.windows("train"), module.windows("train"))


def test_what_streams_is_the_beginning_of_what_is_read_whole(hub: Path) -> None:
    pytest.importorskip("datasets")
    source = HubDataset(str(hub / "set"))
    whole = data(source, hub)
    part = data(replace(source, streaming=True), hub, max_train_tokens=20_000)
    assert len(part.windows("train")) == 20_000 // 32
    assert np.array_equal(part.windows("train"), whole.windows("train")[: 20_000 // 32])
    assert part.manifest()["cache"] != whole.manifest()["cache"]


def test_a_stream_without_an_end_needs_a_number(hub: Path) -> None:
    with pytest.raises(ValueError, match=r"set data\.max_train_tokens=COUNT"):
        data(HubDataset(str(hub / "set"), streaming=True), hub)


def test_a_stream_in_a_mix_is_read_by_its_share(hub: Path, read: dict[str, int]) -> None:
    pytest.importorskip("datasets")
    (hub / "own.txt").write_text("\n\n".join(f"own text {number} " * 90 for number in range(90)))
    streamed = HubDataset(str(hub / "set"), streaming=True)
    mix = Mix({"web": (streamed, 3.0), "own": (TextFiles(str(hub / "own.txt")), 1.0)})
    told = data(mix, hub, max_train_tokens=80_000, val_tokens=512).manifest()["mix"]["sources"]
    assert read["train"] < 2000
    assert 60_000 <= told["web"]["tokens"]["train"] < 90_000
    assert told["web"]["train_windows"] == 60_000 // 32


def test_a_stream_that_breaks_says_where(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def broken(*_: Any, **__: Any) -> Iterator[dict[str, str]]:
        yield {"text": "first"}
        raise ConnectionError("gone")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(ValueError, match=r"gone \(after 1 rows\); run the same command again"):
        list(HubDataset("some/set", streaming=True).documents())


def test_a_revision_of_a_folder_is_refused(hub: Path) -> None:
    with pytest.raises(ValueError, match=r"revision=main names a commit of the hub, and .* is a local folder"):
        HubDataset(str(hub / "set"), revision="main")


def test_a_run_is_pinned_to_the_commit_of_its_start(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now: dict[str | None, str | None] = {None: COMMIT, "v1": OTHER}
    monkeypatch.setattr(sources, "commit_of", lambda name, revision: now.get(revision))
    source = HubDataset("some/set", lines=True)
    assert pinned(source, hub) == replace(source, revision=COMMIT)
    assert pinned(replace(source, revision="v1"), hub) == replace(source, revision=OTHER)
    assert pinned(HubDataset(str(hub / "set")), hub) == HubDataset(str(hub / "set"))
    files = TextFiles("a.txt")
    assert pinned(files, hub) is files
    # without a network: the commit that the tokens on the disk were made of
    now.clear()
    assert pinned(source, hub) == source
    for name, commit in (("old", OTHER), ("new", COMMIT)):
        (hub / name).mkdir()
        said = f"Mix(x={replace(source, revision=commit)!r})"
        (hub / name / "meta.json").write_text(json.dumps({"source": said}))
    (hub / "damaged").mkdir()
    (hub / "damaged" / "meta.json").write_text("{")
    assert pinned(source, hub) == replace(source, revision=COMMIT)
    assert pinned(HubDataset("other/set"), hub).revision is None


def test_a_pin_decides_which_tokens_are_read(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "hub_rows", lambda *_, **__: iter([{"text": f"text {n}"} for n in range(300)]))
    folders = {
        open_shards(HubDataset("some/set", revision=revision), byte_tokenizer(), Splitter(), hub / "cache").folder
        for revision in (COMMIT, OTHER, None)
    }
    assert len(folders) == 3


def test_the_hub_is_asked_for_no_commit_that_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked: list[str | None] = []

    class Api:
        def dataset_info(self, name: str, *, revision: str | None, timeout: float) -> Any:
            asked.append(revision)
            if name == "away/set":
                raise ConnectionError("no route")
            return type("Info", (), {"sha": COMMIT})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert hub_rows.commit_of("some/set", None) == COMMIT
    assert hub_rows.commit_of("some/set", OTHER) == OTHER
    assert hub_rows.commit_of(str(tmp_path), None) is None
    assert hub_rows.commit_of("away/set", "v1") is None
    assert asked == [None, "v1"]
