"""Laws of a mix: shares of tokens at every moment, an order that is one integer, no text of one source in another's."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iskd.data import TextData, TextFiles
from iskd.data.mix import CYCLE, Mix
from iskd.data.order import MixOrder, apportioned
from iskd.data.shards import open_shards
from iskd.data.splits import Splitter
from iskd.models.tokenizers import byte_tokenizer

SHARES = {"a": 0.6, "b": 0.3, "c": 0.1}
SIZES = {"a": 7, "b": 50, "c": 3}


def order(seed: int = 0, shares: dict[str, float] = SHARES) -> MixOrder:
    starts = {"a": 0, "b": 100, "c": 200}
    return MixOrder({name: starts[name] + np.arange(SIZES[name]) for name in shares}, shares, seed)


@pytest.mark.parametrize("shares", [SHARES, {"a": 0.5, "b": 0.5}, {"a": 0.999, "b": 0.001}, {"a": 1.0}])
def test_every_beginning_has_the_shares(shares: dict[str, float]) -> None:
    mixed, seen = order(shares=shares), Counter[str]()
    for place in range(CYCLE + 50):
        if place in (1, 10, 99, 3000, CYCLE, CYCLE + 49):
            assert mixed.taken(place) == {name: seen[name] for name in shares}
        seen["abc"[mixed[place] // 100]] += 1
        for name, share in shares.items():
            assert abs(seen[name] - share * (place + 1)) <= 1.5


def test_a_source_is_seen_whole_before_it_begins_again() -> None:
    mixed = order()
    for name, size in SIZES.items():
        own = [number for place in range(600) if (number := mixed[place]) // 100 == "abc".index(name)]
        for epoch in range(len(own) // size):
            assert len({*own[epoch * size : (epoch + 1) * size]}) == size
    assert [mixed[place] for place in range(50)] == [order()[place] for place in range(50)]
    assert [mixed[place] for place in range(50)] != [order(seed=1)[place] for place in range(50)]
    end, first = mixed.first_repeat
    assert first == "a"
    assert mixed.taken(end)["a"] == SIZES["a"]
    assert mixed.taken(end + 1)["a"] == SIZES["a"] + 1


def test_whole_numbers_add_up() -> None:
    assert apportioned([1 / 3, 1 / 3, 1 / 3], 100).tolist() == [34, 33, 33]
    assert apportioned([0.5, 0.25, 0.25], 1).tolist() == [1, 0, 0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Texts that say by their letters which file they are of; documents of b are ten times as long."""
    for letter, count, length in (("a", 300, 30), ("b", 60, 300), ("c", 200, 20)):
        lines = [json.dumps({"text": f"{letter * length}{number:03d}"}) for number in range(count)]
        (tmp_path / f"{letter}.jsonl").write_text("\n".join(lines))
    return tmp_path


def data(folder: Path, weights: dict[str, float], exhausted: Any = "repeat", **changes: Any) -> TextData:
    sources = {name: (TextFiles(str(folder / f"{name}.jsonl")), weight) for name, weight in weights.items()}
    options: dict[str, Any] = {"seq_len": 16, "batch_size": 2, "val_tokens": 320, **changes}
    options = {"validation_fraction": 0.2, "calibration_fraction": 0.2, **options}
    return TextData(Mix(sources, exhausted), byte_tokenizer(), cache_dir=folder / "cache", **options)


def letters(windows: Any) -> str:
    """The source of each window, by the letter that it holds most."""
    return "".join(max("abc", key=row.tolist().count) for row in np.vectorize(chr)(np.asarray(windows) % 256))


def rows(module: TextData, first: int, steps: int) -> list[Any]:
    module.set_stage(first, steps)
    return [batch["input_ids"] for batch in module.train_dataloader()]


def test_weights_are_shares_of_tokens(folder: Path) -> None:
    module = data(folder, {"a": 6, "b": 3, "c": 1})
    seen = letters(np.concatenate(rows(module, 0, 100)))
    assert Counter(seen) == {"a": 120, "b": 60, "c": 20}
    assert Counter(letters(module.validation_windows())) == {"a": 12, "b": 6, "c": 2}
    assert Counter(letters(np.concatenate(module.calibration(320)))) == {"a": 12, "b": 6, "c": 2}
    again = data(folder, {"a": 1, "b": 1, "c": 2})
    assert Counter(letters(np.concatenate(rows(again, 0, 20)))) == {"a": 10, "b": 10, "c": 20}
    assert again.manifest()["cache"] == module.manifest()["cache"], "tokens on the disk do not depend on the weights"
    assert again.identity() != module.identity()
    told = module.manifest()["mix"]["sources"]
    assert told["b"]["share"] == 0.3
    assert sum(source["tokens"]["train"] for source in told.values()) == module.manifest()["tokens"]["train"]


def test_no_window_is_of_two_sources(folder: Path) -> None:
    module = data(folder, {"a": 1, "b": 1, "c": 1})
    for row in np.concatenate(rows(module, 0, 300)):
        assert len({*map(chr, row)} & {*"abc"}) <= 1


def test_taken_up_anywhere_it_is_the_same(folder: Path) -> None:
    whole = rows(data(folder, {"a": 5, "c": 2}), 0, 40)
    for done in (1, 7, 39):
        rest = rows(data(folder, {"a": 5, "c": 2}), done, 40 - done)
        assert all(map(np.array_equal, rest, whole[done:]))


def test_the_tokens_of_a_run_are_shared_too(folder: Path) -> None:
    module = data(folder, {"a": 3, "b": 1}, max_train_tokens=16 * 40)
    told = module.manifest()["mix"]["sources"]
    assert {name: source["train_windows"] for name, source in told.items()} == {"a": 30, "b": 10}


def test_what_one_source_holds_out_no_other_trains_on(folder: Path) -> None:
    held = json.loads((folder / "a.jsonl").read_text().splitlines()[5])["text"]
    (folder / "held.jsonl").write_text(json.dumps({"text": held}) + "\n" + json.dumps({"text": "b" * 99}))
    first = TextFiles(str(folder / "a.jsonl"))
    second = TextFiles(str(folder / "b.jsonl"), val_path=str(folder / "held.jsonl"))
    shards = open_shards(Mix({"a": (first, 1), "b": (second, 1)}), byte_tokenizer(), Splitter(0.1, 0.1), folder / "s")
    train = bytes((np.asarray(shards.stream("train")) % 256).tolist())
    assert held.encode() not in train
    assert held.encode() in bytes((np.asarray(shards.stream("validation")) % 256).tolist())
    assert shards.meta.dropped == 1
    sections = shards.meta.splits["validation"].sections
    assert sections is not None
    assert [*sections] == ["b", "a"], "a source without a split of its own still has its share of it"
    assert sum(sections.values()) == shards.tokens("validation")


def test_a_source_that_runs_out_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = 16 * 1000
    lines = data(folder, {"a": 1, "c": 3}).plan_mix(tokens)
    assert lines[0].startswith("a: 25.0% of training, 4,000 of ")
    assert lines[1].startswith("c: 75.0% of training, 12,000 of ")
    assert "times" in lines[1]
    stopping = data(folder, {"a": 1, "c": 3}, exhausted="stop")
    assert len(stopping.plan_mix(16 * 100)) == 2
    with pytest.raises(ValueError, match=r"data\.sources\.c is used up after .* tokens of the run; lower .*repeat"):
        stopping.plan_mix(tokens)
    (folder / "d.jsonl").write_text(json.dumps({"text": "d" * 40}))
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match=r"data\.sources\.d has \d+ tokens to train"):
        data(folder, {"a": 1, "d": 1}, seq_len=64).prepare()


@dataclass(frozen=True)
class Nothing:
    """A source without a document."""

    def documents(self) -> Any:
        return iter(())

    def fingerprint(self) -> str:
        return ""


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (0.0, r"data\.sources\.b\.weight=0 is no share"),
        (-1.0, r"weight=-1 is no share"),
        (float("nan"), "weight=nan is no share"),
        (float("inf"), "weight=inf is no share"),
        (1e-6, "less than one window in 10,000"),
    ],
)
def test_weights_that_are_none(weight: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mix({"a": (Nothing(), 1.0), "b": (Nothing(), weight)})


def test_what_is_no_mix_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="data=mix has no sources"):
        Mix({})
    with pytest.raises(ValueError, match=r"data\.source\.exhausted='wait'"):
        Mix({"a": (Nothing(), 1.0)}, "wait")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data\.sources\.a b: the name"):
        Mix({"a b": (Nothing(), 1.0)})
    assert Mix({"a": (Nothing(), 1e308), "b": (Nothing(), 1e308)}).shares == {"a": 0.5, "b": 0.5}
    mix = Mix({"a": (TextFiles(str(folder / "a.jsonl")), 1.0), "b": (Nothing(), 1.0)})
    empty = TextData(mix, byte_tokenizer(), cache_dir=folder / "cache", seq_len=16)
    with pytest.raises(ValueError, match=r"data\.sources\.b has 0 tokens"):
        empty.prepare()


def test_errors_name_the_source_and_its_keys(folder: Path) -> None:
    (folder / "b.jsonl").write_text(json.dumps({"body": "text"}))
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1 has no field .* set data\.sources\.b\.field"):
        data(folder, {"a": 1, "b": 1}).prepare()
    (folder / "b.jsonl").unlink()
    with pytest.raises(ValueError, match=r"^data\.sources\.b\.path=.* does not exist"):
        data(folder, {"a": 1, "b": 1}).prepare()
