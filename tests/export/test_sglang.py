"""Native exports against what SGLang's model files read; it is not run here (docs/loading.md says which were read)."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.export.test_loaders import DOCS, KINDS, VLLM, native_export, verdict

# Its files came from vLLM's, and take the same tensors and sizes; some read a key more.
SGLANG = {family: VLLM[family] for family in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2")}
SGLANG["phi"] = replace(VLLM["phi"], keys=(*VLLM["phi"].keys, "partial_rotary_factor"))
SGLANG["opt"] = replace(
    VLLM["opt"], keys=(*VLLM["opt"].keys, "layer_norm_elementwise_affine", "activation_function", "pad_token_id")
)


def documented() -> dict[str, list[str]]:
    """The cells below "### SGLang", by family."""
    text = DOCS.read_text(encoding="utf-8").partition("\n### SGLang\n")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows[2:]}


def test_the_page_names_the_families_that_were_read() -> None:
    assert set(documented()) == set(SGLANG)


@pytest.mark.parametrize("family", SGLANG)
def test_the_table_is_what_the_names_and_sizes_say(family: str, tmp_path: Path) -> None:
    found = []
    for kind in KINDS:
        export = native_export(family, kind, tmp_path / kind)
        found.append("-" if export is None else verdict(SGLANG[family], family, *export))
    assert found == documented()[family]


def test_the_page_says_what_was_read() -> None:
    text = DOCS.read_text(encoding="utf-8").partition("\n### SGLang\n")[2]
    for family in SGLANG:
        assert re.search(rf"{family} [0-9a-f]{{8}}", text) or family == "mistral"
