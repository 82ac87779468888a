"""What both models say of the same prompts, and how sure the numbers of a stage are."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from iskd.evaluation import measure_quality
from iskd.evaluation.speaking import PROMPTS, samples, samples_of, write_samples
from iskd.models.tokenizers import byte_tokenizer
from iskd.plan.options import MOST_SAMPLES
from iskd.report import write_report
from tests.factories import louder, tiny, windows
from tests.run_folders import Balanced, write_run


def test_both_models_continue_the_same_prompts(tmp_path: Path) -> None:
    """Side by side on the page; the same model says the same, and markup in a text stays text."""
    teacher, tokenizer = louder(tiny("llama", vocab=257, context=128)), byte_tokenizer()
    student = louder(tiny("llama", vocab=257, context=128, seed=1))
    write_samples(tmp_path, samples(student, teacher, tokenizer, (), 2))
    found = samples_of(json.loads((tmp_path / "samples.json").read_text()))
    assert [sample.prompt for sample in found] == list(PROMPTS[:2])
    assert all(sample.same < sample.tokens == 48 for sample in found)
    write_samples(tmp_path, samples(teacher, teacher, tokenizer, (), 1))
    (same,) = samples_of(json.loads((tmp_path / "samples.json").read_text()))
    assert (same.same, same.teacher) == (48, same.student)
    run = write_run(tmp_path / "run")
    said = {"prompt": "a <b>", "teacher": "<script>1</script>", "student": "two", "same": 1, "tokens": 3}
    (run / "samples.json").write_text(json.dumps([said]))
    page = Balanced(write_report(run).read_text(encoding="utf-8"))
    assert "a <b><script>1</script>two1 of 3" in page.text
    assert "script" not in page.tags
    assert len(PROMPTS) == MOST_SAMPLES
    with pytest.raises(ValueError, match="must hold a list"):
        samples_of({})


def test_bounds_hold_the_number_and_shrink_with_more_windows() -> None:
    """The same at every call and for any layout of batches; the numbers themselves are those without bounds."""
    teacher = louder(tiny("llama"))
    student = copy.deepcopy(teacher)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in (each for each in student.parameters() if each.dim() > 1):
            weight += 0.1 * weight.std() * torch.randn_like(weight)
    nn.Module.train(student, False)
    ids = windows(48, 12)
    few, many = ([{"input_ids": part} for part in ids[:count].split(8)] for count in (6, 48))
    found = measure_quality(student, teacher, many, intervals=True)
    plain = measure_quality(student, teacher, many)
    for key in ("ppl", "kl", "top1"):
        assert found[key] == pytest.approx(plain[key], rel=1e-9)
        assert found[f"{key}_low"] < found[key] < found[f"{key}_high"]
    again = measure_quality(student, teacher, [{"input_ids": part} for part in ids.split(5)], intervals=True)
    assert again["kl_low"] == pytest.approx(found["kl_low"], rel=1e-6)
    wide = measure_quality(student, teacher, few, intervals=True)
    assert wide["kl_high"] - wide["kl_low"] > found["kl_high"] - found["kl_low"]
    assert "kl_low" not in measure_quality(student, teacher, [{"input_ids": ids[:1]}], intervals=True)
