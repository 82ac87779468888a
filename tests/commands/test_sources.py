"""Laws of the keys of `data`: every kind of text of docs/data.md is read, and a wrong key of a source is named."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from iskd.commands.arguments import literal_paths
from iskd.commands.build import source_of
from iskd.commands.compose import compose_config
from iskd.commands.line.sources import PRESETS
from iskd.commands.resume import _differences
from iskd.commands.values.config import as_meant
from iskd.data import HubDataset, Source, TextFiles
from iskd.data.hub_rows import offline
from iskd.data.mix import Mix
from iskd.data.sources import Docstrings
from tests.documents import ROOT, blocks_of

PAGE = ROOT / "docs" / "data.md"


@cache
def composed(choice: str) -> DictConfig:
    """The config of `data=CHOICE`, composed once: seconds on a busy machine."""
    return compose_config([choice])[0]


def config_of(*overrides: str) -> DictConfig:
    """What the overrides of `data` make of a config."""
    choice, *others = overrides if overrides[0].startswith("data=") else ("data=docstrings", *overrides)
    config = copy.deepcopy(composed(choice))
    for given in literal_paths([each for each in others if each.startswith("data.")]):
        key, _, value = given.lstrip("+").partition("=")
        OmegaConf.update(config, key, yaml.safe_load(value), force_add=True)
    return as_meant(config)


def source(*overrides: str) -> Source:
    return source_of(config_of(*overrides))


def test_every_kind_of_text_of_the_page_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(PAGE)
    exec(compile(next(block for block in blocks if block.language == "python").text, "data.md", "exec"), {})
    commands = [words[2:] for block in blocks for words in block.commands if words[:2] == ["python", "train.py"]]
    read = 0
    for words in commands:
        paths = [word.partition("path=")[2] for word in words if re.match(r"data\.(sources\.\w+\.)?path=", word)]
        if any(word.startswith("data.sources.web") for word in words) or not paths:
            source(*(word for word in words if "COMMIT" not in word))
            continue
        found = list(source(*words).documents())
        assert len(found) > 50, words
        read += 1
    assert read >= 7


def test_sources_are_what_their_few_keys_say() -> None:
    given = ["data=mix", "data.sources.a.path=a.txt", "data.sources.a.field=body", "data.sources.b.name=o/n"]
    given += ["data.sources.b.weight=2", "data.sources.b.streaming=true", "data.sources.c.data=wikitext2"]
    given += ["data.sources.d={data: wikitext2, path: d.txt, weight: 0.5}", "data.sources.e.data=docstrings"]
    mix = source(*given, "data.sources.a.weight=1", "data.sources.a.weight=3", "data.source.exhausted=stop")
    assert isinstance(mix, Mix)
    assert mix.exhausted == "stop"
    wiki = HubDataset("Salesforce/wikitext", "wikitext-2-v1", val_split="validation", test_split="test",
                      detokenize="wikitext", lines=True)  # fmt: skip
    assert mix.sources == {
        "a": (TextFiles("a.txt", field="body"), 3.0),
        "b": (HubDataset("o/n", streaming=True), 2.0),
        "c": (wiki, 1.0),
        "d": (TextFiles("d.txt", detokenize="wikitext"), 0.5),
        "e": (Docstrings(), 1.0),
    }
    # what a run saves is read as the same
    config = config_of(*given)
    again = as_meant(OmegaConf.create(OmegaConf.to_container(config)))  # type: ignore[arg-type]
    assert again == config


def test_a_preset_with_files_below_it_is_a_source(caplog: pytest.LogCaptureFixture) -> None:
    """Every choice of `data` that names a text; what it says of all of `data` beside is the mix's, and told."""
    given = [f"data.sources.{name}.data={name}" for name in PRESETS]
    mix = source("data=mix", *given)
    assert isinstance(mix, Mix)
    assert mix.sources["tinystories_iskd"][0] == HubDataset("roneneldan/TinyStories", max_documents=50_000)
    by_preset = {message.partition("=")[0].split(".")[2]: message for message in caplog.messages}
    assert by_preset.keys() == {"fineweb", "rulm", "tinystories_iskd"}
    told = by_preset["tinystories_iskd"]
    assert told.startswith(
        "data.sources.tinystories_iskd.data=tinystories_iskd: a mix takes the text of a preset alone"
    )
    shared = ["data.bos=bare", "data.validation_fraction=0.098", "data.calibration_fraction=0.002"]
    assert told.endswith(f": {' '.join(shared)}")
    caplog.clear()
    source("data=mix", *(key for key in given if key.rpartition("=")[2] not in ("fineweb", "rulm")), *shared)
    assert not caplog.messages
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert f"(a preset: {', '.join(f'`{name}`' for name in PRESETS)};" in page


def test_chats_are_of_all_sources() -> None:
    chats = source("data=mix", "data.chat.loss=all", "data.sources.a.path=a.jsonl", "data.sources.b.name=o/n")
    assert isinstance(chats, Mix)
    assert all(getattr(each, "chat", False) for each, _ in chats.sources.values())
    with pytest.raises(
        ValueError, match=r"wants rows of chats, and Docstrings has texts: set .* data\.sources\.b\.path"
    ):
        source("data=mix", "data.chat.loss=all", "data.sources.a.path=a.jsonl", "data.sources.b.data=docstrings")
    with pytest.raises(ValueError, match="set it to assistant or all"):
        source("data=mix", "data.sources.a.path=a.jsonl", "data.sources.a.chat=true")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["data.sources.a.weight=1"],
            r"data\.sources\.a: nothing names its text; set one of data\.sources\.a\.path=FILE",
        ),
        (["data.sources.a.path=x", "data.sources.a.name=o/n"], "path and name both name its text"),
        (["data.sources.a=3"], r"data\.sources\.a=3 takes keys"),
        (["data.sources.a.path=x", "data.sources.a.wieght=1"], r"a\.wieght is no key \(did you mean weight\?\)"),
        (["data.sources.a.path=x", "data.sources.a.weight=0"], r"data\.sources\.a\.weight=0 must be"),
        (["data.sources.a.path=x", "data.sources.a.weight=-1"], r"data\.sources\.a\.weight=-1 must be"),
        (["data.sources.a.path=x", "data.sources.a.weight=nan"], r"data\.sources\.a\.weight=nan must be"),
        (["data.sources.a.path=x", "data.sources.a.weight=x"], r"data\.sources\.a\.weight='?x'? must be"),
        (["data.sources.a.data=wikitext3"], r"a\.data=wikitext3 is no preset \(did you mean wikitext2\?\); use one of"),
        (["data.sources.a.data=mix"], r"a\.data=mix is no preset"),
        (["data.sources.a.name=o/n", "data.sources.a.detokenize=ptb"], r"data\.sources\.a\.detokenize='ptb'"),
        (["data.sources.a.path=x", "data.path=y"], r"data\.path names the text of one source"),
        ([], "data=mix has no sources"),
    ],
)
def test_what_is_no_source_is_refused(given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source("data=mix", *given)


def test_sources_are_of_a_mix_alone() -> None:
    with pytest.raises(ValueError, match=r"data\.sources\.a is a source of a mix: add data=mix"):
        source("data=docstrings", "data.sources.a.path=x")


def test_a_path_of_a_source_is_taken_as_it_is(tmp_path: Path) -> None:
    odd = tmp_path / "a=b, (c).txt"
    odd.write_text("text")
    given = ["data=mix", f"data.sources.a.path={odd}", "data.sources.home.path=~/x.txt"]
    mix = source_of(as_meant(compose_config(given)[0]))  # by Hydra itself
    assert isinstance(mix, Mix)
    assert mix.sources["a"][0] == TextFiles(str(odd))
    assert "~" not in str(mix.sources["home"][0])


def test_a_resumed_run_may_be_told_its_branch_again() -> None:
    commit = "a" * 40
    for now in (None, "main"):
        assert not _differences({"data.source.revision": commit}, {"data.source.revision": now}, set())
        assert not _differences({"data.sources.a.revision": commit}, {"data.sources.a.revision": now}, set())
    assert _differences({"data.source.revision": commit}, {"data.source.revision": "b" * 40}, set())
    assert _differences({"model.revision": commit}, {"model.revision": "main"}, set())


def test_a_local_copy_keeps_how_much_of_the_set_is_read(tmp_path: Path) -> None:
    """Documents, framing and splits of a preset stay; only where its rows lie is another place."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "story {number}"}}\n' for number in range(9)))
    asked, _ = compose_config(["data=tinystories_iskd", f"data.path={rows}", "data.source.max_documents=4"])
    source = source_of(asked)
    assert isinstance(source, TextFiles)
    assert [text for text, _ in source.documents()] == [f"story {number}" for number in range(4)]
    assert (asked.data.bos, asked.data.validation_fraction) == ("bare", 0.098)
    assert source.fingerprint() != TextFiles(str(rows)).fingerprint()
    whole = TextFiles(str(rows), max_documents=50_000)
    assert source_of(compose_config(["data=tinystories_iskd", f"data.path={rows}"])[0]) == whole
    held = TextFiles(str(rows), val_path=str(rows), max_documents=2)
    assert [split for _, split in held.documents()] == ["validation"] * 9 + [None] * 2


def test_what_is_away_is_said_with_the_way_that_keeps_the_preset() -> None:
    said = offline("o/n")
    assert "hf download --repo-type dataset o/n" in said
    assert "add data.path=FOLDER" in said
