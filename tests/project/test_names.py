"""`model=` takes presets, folders and hub ids alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from iskd.commands.arguments import arguments
from iskd.commands.config import CONF


def model_of(argument: str) -> tuple[str, str | None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        model = compose("config", arguments([argument])).model
    return str(model.name), None if model.path is None else str(model.path)


@pytest.mark.parametrize("name", ["plain", "with space", "a=b,c", "it's", "{x}"])
def test_a_folder_is_a_local_model_whatever_its_name(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    assert model_of(f"model={folder}") == ("local", str(folder))


def test_a_hub_id_is_a_model_of_the_hub() -> None:
    assert model_of("model=HuggingFaceTB/SmolLM2-360M") == ("HuggingFaceTB/SmolLM2-360M", None)


def test_a_preset_goes_before_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_of("model=tiny") == ("tiny", None)
    assert model_of("model=./tiny") == ("local", "./tiny")


@pytest.mark.parametrize("argument", ["model=smollm2,gpt2", "model=typo", "model.seed=1", "mixer=gla"])
def test_anything_else_is_left_to_hydra(argument: str) -> None:
    assert arguments([argument]) == [argument]
