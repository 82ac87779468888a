"""Laws of the corpus and its shards: splits are disjoint and stable, streams are the joined tokens, damage is seen."""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from iskd.data.files.readers import detokenize_wikitext
from iskd.data.framing import separator
from iskd.data.shards import Shards, open_shards, tokenizer_hash
from iskd.data.sources import Docstrings, HubDataset, TextFiles
from iskd.data.splits import SPLITS, Document, Splitter
from iskd.models.tokenizers import EOS, byte_tokenizer


@dataclass(frozen=True)
class Listed:
    """Documents given in the test."""

    items: tuple[Document, ...]

    def documents(self) -> Iterator[Document]:
        yield from self.items

    def fingerprint(self) -> str:
        return repr(self.items)


NUMBERED = Listed(tuple((f"document {number} " * 3, None) for number in range(400)))


def texts(count: int) -> str:
    return "\n\n".join(f"Paragraph {number}. " + "It says little. " * 70 for number in range(count)) + "\n"


def word_tokenizer(vocab: dict[str, int], **special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(vocab, unk_token=next(iter(vocab))))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_byte_tokenizer_round_trips() -> None:
    tokenizer = byte_tokenizer()
    for text in (
        "plain",
        " two  spaces \n\ttab\r\n",
        "na\u00efve \u4f60\u597d \U0001f600",
        "\x00\x7f\x85",
        "".join(map(chr, range(600))),
    ):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token == EOS
    assert tokenizer.eos_token_id == 256
    assert len(tokenizer) == 257


def test_splits_are_disjoint_and_do_not_depend_on_order() -> None:
    items = [*NUMBERED.items, *NUMBERED.items[:50]]
    placed = list(Splitter(0.1, 0.2, 0.1).assign(items))
    assert len(placed) == len(items)
    assert dict(placed) == dict(Splitter(0.1, 0.2, 0.1).assign(items[::-1]))
    by_split = {split: {text for text, place in placed if place == split} for split in SPLITS}
    assert sum(map(len, by_split.values())) == len(set(items))
    for split, share in zip(SPLITS, (0.6, 0.1, 0.2, 0.1), strict=True):
        assert len(by_split[split]) / 400 == pytest.approx(share, abs=0.06)


def test_more_text_moves_no_document() -> None:
    few, many = (dict(Splitter().assign(NUMBERED.items[:count])) for count in (100, 400))
    assert few.items() <= many.items()


def test_the_same_file_for_choosing_and_for_reporting_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"document {number} " + "word " * 250 for number in range(100)))
    with pytest.raises(ValueError, match=r"dropped because the same texts are in data\.val_path"):
        open_shards(TextFiles(str(file), val_path=str(file)), byte_tokenizer(), Splitter(), tmp_path / "cache").windows(
            "calibration", 64
        )


def test_explicit_validation_is_kept_whole_and_apart() -> None:
    held = [(text, "validation") for text, _ in NUMBERED.items[:40]]
    splitter = Splitter(0.3, 0.3)
    placed = list(splitter.assign([*held, *NUMBERED.items]))
    assert [text for text, split in placed if split == "validation"] == [text for text, _ in held]
    rest = {split: {text for text, place in placed if place == split} for split in ("train", "calibration")}
    assert rest["calibration"]
    assert not rest["calibration"] & rest["train"]
    assert not {text for text, _ in held} & (rest["calibration"] | rest["train"])
    assert splitter.dropped == 40


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ((("a", None), ("b", "test")), "yield it first"),
        ((("a", "dev"),), "split 'dev'"),
        ((("half \ud800", None),), "half a character"),
    ],
)
def test_splitter_refuses(items: tuple[Document, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(Splitter().assign(items))


@pytest.mark.parametrize(("shares", "message"), [((1.2, 0, 0), "validation_fraction"), ((0.5, 0.3, 0.2), "nothing to")])
def test_splitter_refuses_shares(shares: tuple[float, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Splitter(*shares)


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table
    (tmp_path / "a.txt").write_text(texts(5))
    expected = list(TextFiles(str(tmp_path / "a.txt")).documents())
    assert len(expected) == 5
    rows = [text for text, _ in expected]
    lines = "".join(json.dumps({"body": text, "id": 1}) + "\n" for text in rows)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(texts(5).encode()))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    parquet.write_table(table({"body": rows}), tmp_path / "a.parquet")
    for name in ("a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.parquet"):
        assert list(TextFiles(str(tmp_path / name), field="body").documents()) == expected, name


def test_folder_glob_and_explicit_splits(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "notes.md"):
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "c.txt").write_text("text of c.txt")
    source = TextFiles(str(tmp_path / "*.txt"), val_path=str(tmp_path / "held"), test_path=str(tmp_path / "notes.md"))
    assert list(source.documents()) == [
        ("text of c.txt", "validation"),
        ("text of notes.md", "test"),
        ("text of a.txt", None),
        ("text of b.txt", None),
    ]
    before = source.fingerprint()
    (tmp_path / "held" / "c.txt").write_text("changed")
    assert source.fingerprint() != before


def test_a_file_without_blank_lines_is_cut_at_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one line of text\n" * 5_000)
    documents = [text for text, _ in TextFiles(str(tmp_path / "a.txt")).documents()]
    assert len(documents) > 5
    assert "\n".join(documents) + "\n" == "one line of text\n" * 5_000


def test_detokenize_wikitext() -> None:
    words = " = = <unk> 's role = = \n He didn 't win $ 2 @.@ 5 million , a two @-@ part \" role \" ( in 1 @,@ 000 ) . "
    assert (
        detokenize_wikitext(words) == "== <unk>'s role ==\nHe didn't win $2.5 million, a two-part \"role\" (in 1,000)."
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "does not exist"),
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n \n", "holds no text"),
        ("nul.txt", b"text\0text", "holds NUL bytes"),
        ("latin.txt", "d\u00e9j\u00e0".encode("latin-1"), "not UTF-8"),
        ("cut.txt.gz", gzip.compress(b"text " * 999, mtime=0)[:-9], "not a whole gzip file"),
        ("plain.txt.gz", b"text", "not a whole gzip file"),
        ("bad.jsonl", b"not json\n", "line 1 is not JSON"),
        ("field.jsonl", b'{"body": "x"}\n', r"no field 'text', only \['body'\]"),
        ("list.jsonl", b"[1]\n", "item 1 is int, not a row of fields"),
        ("number.jsonl", b'{"text": 1}\n', "is int, not text"),
        ("bad.parquet", b"no magic bytes here", "is not parquet, which its suffix says"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(TextFiles(str(tmp_path / name)).documents())
    assert name in str(caught.value)


def test_bad_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fmt='xlsx'"):
        TextFiles("a.xlsx", fmt="xlsx")
    with pytest.raises(ValueError, match="detokenize='ptb'"):
        TextFiles("a.txt", detokenize="ptb")
    for nothing in (None, ""):
        with pytest.raises(ValueError, match=r"set data\.path=FILE"):
            TextFiles(nothing)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"set data\.source\.name=OWNER/NAME"):
            HubDataset(nothing)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the folder has no"):
        list(TextFiles(str(tmp_path)).documents())


def test_hub_rows_and_offline_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"train": [{"text": "a"}, {"text": " "}, {"text": "b"}], "validation": [{"text": "v"}]}

    def load(name: str, config: str | None, *, split: str, **_: Any) -> list[dict[str, str]]:
        if name == "away":
            raise ConnectionError("no route")
        return rows[split]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    assert list(HubDataset("here", val_split="validation").documents()) == [
        ("v", "validation"),
        ("a", None),
        ("b", None),
    ]
    assert list(HubDataset("here", lines=True).documents()) == [("a\n \nb", None)]
    with pytest.raises(ValueError, match=r"'away'.*no route.*data=text data\.path=.*data=docstrings"):
        list(HubDataset("away").documents())
    found: list[dict[str, Any]] = []
    read = SimpleNamespace(load_dataset=lambda path, **keys: found.append({"path": path, **keys}) or rows["train"])
    monkeypatch.setitem(sys.modules, "datasets", read)
    files = HubDataset("OWNER/SET", revision="v1", files="train/*.jsonl.zst")
    assert list(files.documents()) == [("a", None), ("b", None)]
    where = "hf://datasets/OWNER/SET@v1/train/*.jsonl.zst"
    assert found == [
        {
            "path": "json",
            "data_files": {"train": where},
            "split": "train",
            "streaming": False,
            "trust_remote_code": False,
        }
    ]
    assert files.fingerprint() != replace(files, files=None).fingerprint()
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    with pytest.raises(ValueError, match=r"data\.path='FOLDER/train/\*\.jsonl'"):
        list(HubDataset("away", files="train/*.jsonl").documents())
    with pytest.raises(ValueError, match=r"files=train/\*\.rar: name files that end in \.jsonl, .*\.txt"):
        list(HubDataset("here", files="train/*.rar").documents())
    with pytest.raises(ValueError, match=r"those of data\.source\.split, .*: leave config, val_split"):
        HubDataset("here", files="train/*.jsonl", val_split="validation")
    with pytest.raises(ValueError, match="no field 'story'"):
        list(HubDataset("here", field="story").documents())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        list(HubDataset("here").documents())


def test_docstrings_are_about_two_megabytes() -> None:
    source = Docstrings()
    documents = [text for text, _ in source.documents()]
    assert 1_000_000 < sum(map(len, documents)) < 5_000_000
    assert set(dict(Splitter().assign((text, None) for text in documents)).values()) == {*SPLITS[:3]}
    assert source.fingerprint().startswith(sys.implementation.name)


def reference_stream(items: list[str]) -> list[int]:
    joined: list[int] = []
    for text in items:
        joined += [256, *text.encode()] if joined else [*text.encode()]
    return joined


def test_streams_are_the_documents_joined_by_eos(tmp_path: Path) -> None:
    shards = open_shards(NUMBERED, byte_tokenizer(), Splitter(), tmp_path)
    placed = list(Splitter().assign(NUMBERED.documents()))
    for split in SPLITS[:3]:
        expected = reference_stream([text for text, place in placed if place == split])
        stream = shards.stream(split)
        assert stream.dtype == np.uint16
        assert stream.tolist() == expected
        windows = shards.windows(split, 32)
        assert isinstance(windows.base, np.memmap)
        assert windows.ravel().tolist() == expected[: len(expected) // 32 * 32]
    assert shards.tokens("test") == shards.stream("test").size == 0
    assert shards.meta.max_id == 256


def test_shards_are_built_once_and_rebuilt_for_new_content(tmp_path: Path) -> None:
    def build(source: Listed, splitter: Splitter) -> Shards:
        return open_shards(source, byte_tokenizer(), splitter, tmp_path)

    first = build(NUMBERED, Splitter())
    stamp = (first.folder / "meta.json").stat().st_mtime_ns
    assert (build(NUMBERED, Splitter()).folder / "meta.json").stat().st_mtime_ns == stamp
    assert build(Listed(NUMBERED.items[:300]), Splitter()).folder != first.folder
    assert build(NUMBERED, Splitter(0.1)).folder != first.folder
    assert {path.name for path in first.folder.iterdir()} == {"meta.json", *(f"{split}.bin" for split in SPLITS)}
    assert all(not path.name.startswith(".") for path in tmp_path.iterdir()), "a temporary folder was left behind"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="yield it first"):
        open_shards(Listed((("a", None), ("b", "test"))), byte_tokenizer(), Splitter(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    source = Listed((("low high low", "train"),))
    shards = open_shards(source, word_tokenizer({"low": 0, "high": 70_000}), Splitter(), tmp_path)
    assert shards.stream("train").tolist() == [0, 70_000, 0]
    assert shards.meta.dtype == "<u4"


def test_separator_falls_back_and_is_recorded(tmp_path: Path) -> None:
    source = Listed((("a", "train"), ("b", "train")))
    vocab = {"a": 0, "b": 1, "<s>": 2, "</s>": 3}
    cases: list[tuple[dict[str, str], str, list[int]]] = [
        ({"eos_token": "</s>", "bos_token": "<s>"}, "eos", [0, 3, 1]),
        ({"bos_token": "<s>"}, "bos", [0, 2, 1]),
        ({}, "none", [0, 1]),
    ]
    for special, name, stream in cases:
        tokenizer = word_tokenizer(vocab, **special)
        shards = open_shards(source, tokenizer, Splitter(), tmp_path)
        assert shards.meta.separator == separator(tokenizer)[0] == name
        assert shards.stream("train").tolist() == stream


def test_tokenizer_hash_is_of_what_it_does() -> None:
    tokenizer = byte_tokenizer()
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "bbb"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == before == tokenizer_hash(byte_tokenizer())
    tokenizer.add_tokens(["new"])
    assert tokenizer_hash(tokenizer) != before


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "SHA-256"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "bytes, not"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.with_name("meta.json").write_text("{"), "meta.json is damaged"),
        (lambda path: path.with_name("meta.json").write_text('{"splits": {}}'), "meta.json is damaged"),
    ],
)
def test_damage_is_named_with_the_fix(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    folder = open_shards(NUMBERED, byte_tokenizer(), Splitter(), tmp_path).folder
    damage(folder / "train.bin")
    with pytest.raises(ValueError, match=message) as caught:
        open_shards(NUMBERED, byte_tokenizer(), Splitter(), tmp_path)
    assert f"delete the folder {folder}" in str(caught.value)


def forge(folder: Path, **changes: Any) -> None:
    """Rewrite meta.json; a key may lead into the train split with a leading `train_`."""
    meta = json.loads((folder / "meta.json").read_text())
    for key, value in changes.items():
        place = meta["splits"]["train"] if key.startswith("train_") else meta
        place[key.removeprefix("train_")] = value
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_file": "../../x"}, r"the file of split train must be train\.bin, got '../../x'"),
        ({"train_file": "validation.bin"}, "the file of split train must be"),
        ({"dtype": "O"}, "dtype must be one of .* got 'O'"),
        ({"dtype": ["<u2"]}, "dtype must be one of"),
        ({"train_tokens": -2}, "splits: train: tokens must be between 0 and"),
        ({"train_tokens": 10**12}, "has .* bytes, not 2000000000000"),
        ({"train_tokens": True}, "tokens must be an integer"),
        ({"train_documents": 1.0}, "documents must be an integer"),
        ({"train_sha256": None}, "splits: train: sha256 must be a string, got None"),
        ({"train_targets": None}, "splits: train: targets must be a string, got None"),
        ({"max_id": 99}, "holds the token 256, above the max_id=99"),
        ({"max_id": None}, "max_id must be an integer"),
        ({"tokenizer": "another"}, "its tokenizer is that of other shards"),
        ({"splits": []}, "is damaged"),
        ({"separator": 3}, "separator must be a string, got 3"),
    ],
)
def test_a_forged_meta_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = open_shards(NUMBERED, byte_tokenizer(), Splitter(), tmp_path).folder
    forge(folder, **change)
    with pytest.raises(ValueError, match=message) as caught:
        open_shards(NUMBERED, byte_tokenizer(), Splitter(), tmp_path)
    assert f"delete the folder {folder}" in str(caught.value)


def test_a_shard_that_is_a_link_is_refused(tmp_path: Path) -> None:
    folder = open_shards(NUMBERED, byte_tokenizer(), Splitter(), tmp_path).folder
    (folder / "train.bin").rename(tmp_path / "elsewhere.bin")
    (folder / "train.bin").symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(ValueError, match="is missing or no plain file"):
        open_shards(NUMBERED, byte_tokenizer(), Splitter(), tmp_path)
