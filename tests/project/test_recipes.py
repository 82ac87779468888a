"""Recipes for a GPU: on real text, within the card, as the page says, and by a sum that a CPU has confirmed."""

from __future__ import annotations

import re

import pytest
import yaml

from benchmarks import recipes
from benchmarks.recipes import CARDS, RECIPES, Recipe, measure, table
from tests.documents import ROOT
from tests.factories import CONF

PAGE = ROOT / "docs" / "quickstart" / "one_gpu.md"
SMOLLM2 = yaml.safe_load((CONF / "model" / "smollm2.yaml").read_text(encoding="utf-8"))["config"]
ON_CPU = 512  # tokens of a chunk of logits there; 40 bytes each (iskd.losses.chunk_size)


def test_expected_memory_is_what_a_cpu_measured() -> None:
    """Our step of benchmarks.step, whose process holds Python and torch too."""
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    measured = float(re.search(r"^\| ours \| 100 \| - \| - \| ([\d.]+) \|", readme, re.MULTILINE)[1])  # type: ignore[index]
    step = Recipe(SMOLLM2, kept=26, batch=4, window=512, tokens=2048, accumulate=1)
    assert step.parameters() == 134_515_008
    assert step.memory(ON_CPU * 40 * SMOLLM2["vocab_size"]) / 2**30 == pytest.approx(measured, rel=0.15)
    flops = float(re.search(r"FLOPs of a step, on every position, the same for all ways: ([\d.]+) TFLOP", readme)[1])  # type: ignore[index]
    assert step.flops / 1e12 == pytest.approx(flops, rel=0.05)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_cards_and_trains_on_real_text(name: str) -> None:
    recipe = Recipe.of(name)
    assert all(0.4 < recipe.memory() / CARDS[card][0] < 0.85 for card in RECIPES[name])
    assert recipe.tokens >= 10**8
    assert recipe.data == "HuggingFaceFW/fineweb-edu"
    assert recipe.precision == "bf16-mixed"
    assert recipe.kept < recipe.config["num_hidden_layers"]
    tokens = 920 * yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text())["data"].get("source", {}).get(
        "max_documents", 150_000
    )
    assert recipe.tokens <= 4 * tokens, "a page has about 1,000 tokens, and 92 % of them train"


def test_the_page_shows_the_table() -> None:
    assert table() in PAGE.read_text(encoding="utf-8")


def test_every_recipe_is_one_of_the_table() -> None:
    assert {file.stem for file in (CONF / "experiment").glob("gpu_*.yaml")} == set(RECIPES)


@pytest.mark.slow
def test_a_recipe_is_measured_by_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ["model=tiny", "model.num_layers=6", "data=sample", "data.seq_len=64", "data.batch_size=2", "trainer=cpu"]
    tiny += ["schedule.target_layers=4", "schedule.tokens=4096", "run.score_tokens=256", "profile.steps=1"]
    monkeypatch.setattr(recipes.torch.cuda, "is_available", lambda: False)
    line = measure("gpu_24gb", tiny)
    assert re.fullmatch(
        r"gpu_24gb on .+: [\d.]+ GiB, [\d,]+ tokens/s, \d+ % of the matrix peak; 4,096 tokens take .+ h", line
    )
