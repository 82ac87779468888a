"""The text part of a model of pictures and text, saved by the lines of the page, is a model of a known family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from iskd.models.model_folder import check_model_folder
from iskd.models.tokenizers import byte_tokenizer
from tests.documents import ROOT, blocks_of
from tests.factories import tiny

PAGE = ROOT / "docs" / "tutorials" / "new_model.md"


def test_the_text_part_of_gemma_3_is_a_model_of_its_own(tmp_path: Path) -> None:
    text = tiny("gemma3_text", vocab=300).config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    sizes: dict[str, Any] = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4}
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(AutoConfig.for_model("gemma3", **sizes)).eval()
    whole.save_pretrained(tmp_path / "whole")
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"'gemma3' reads more than text \(vision_config\)"):
        check_model_folder(tmp_path / "whole")
    lines = next(block.text for block in blocks_of(PAGE) if "language_model" in block.text)
    exec(compile(lines, PAGE.name, "exec"), {"SOURCE": tmp_path / "whole", "TARGET": tmp_path / "text"})
    assert check_model_folder(tmp_path / "text")["model_type"] == "gemma3_text"
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(alone(ids).logits, whole(input_ids=ids).logits)
