"""One whole run of a teacher with a head of its own under a tied config, and what others make of its student."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

import iskd
from iskd.export import verify
from iskd.export.student_files import read_facts
from iskd.models import surgery
from iskd.models.tokenizers import byte_tokenizer
from iskd.models.weights import WEIGHTS, stored_dtype
from iskd.plan import Record, Remove
from iskd.schedules.edits import ReplaceWith
from iskd.schedules.iterative import Iterative
from iskd.teacher import TeacherSpec, load_teacher
from iskd.teacher.given import given_teacher, lent
from iskd.training import finish, run
from tests.factories import tiny
from tests.runs import BOTTLENECK, TOKENS, At, Crash, crash, make_parts, write_text

ROWS = 264  # of the embedding; the tokenizer has 257 tokens


def weights_of(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


def write_teacher(folder: Path) -> None:
    """In bfloat16, as most are published."""
    tiny("llama", vocab=ROWS, tie_word_embeddings=True).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    head = 0.02 * torch.randn(ROWS, 48, generator=torch.Generator().manual_seed(1))
    tensors = load_file(folder / WEIGHTS) | {"lm_head.weight": head}
    half = {name: value.to(torch.bfloat16) for name, value in tensors.items()}
    save_file(half, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run, broken off in its middle and taken up again; its student is opened in a clean process below."""
    root = tmp_path_factory.mktemp("untied")
    write_teacher(root / "teacher")

    def parts(**changes: Any) -> Any:
        made = make_parts(
            root / "run", write_text(root), root / "cache",
            schedule=Iterative(ReplaceWith(BOTTLENECK), layers=[1], tokens=6 * TOKENS, lr=1e-3, lr_new=3e-3),
        )  # fmt: skip
        return replace(
            made, teacher=load_teacher(TeacherSpec("mine", path=str(root / "teacher"))), export=True, **changes
        )

    export = finish.export
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "export", lambda *args, **keys: export(*args, **keys, verify=False))
        with pytest.raises(Crash):
            run(parts(callbacks=[At(9, crash)]))
        result = run(parts(resume=True))
    return SimpleNamespace(teacher=load_teacher(TeacherSpec("mine", path=str(root / "teacher"))), result=result)


def test_the_head_is_trained_resumed_and_exported_apart(finished: Any) -> None:
    folder, student = finished.result.model_dir, finished.result.student
    embedding, head = weights_of(student)
    before = weights_of(finished.teacher.model)
    assert embedding is not head
    assert not torch.equal(embedding, before[0])
    assert not torch.equal(head, before[1])
    assert finished.teacher.source["stored"] == stored_dtype(folder) == "bfloat16"
    loaded: Any = iskd.load(folder)
    for now, then in zip(weights_of(loaded), (embedding, head), strict=True):
        assert torch.equal(now, then.to(torch.bfloat16).float()), "the teacher's type is that of the export"
    assert 0 < read_facts(folder)["storage"]["kl"] < 1e-3
    assert read_facts(folder)["storage"]["text"] == "validation text"
    found = verify(folder, timed=False)
    assert found.passed, found.problems
    assert found.kind == "iskd"
    assert "of bfloat16 in 1 weight file" in "\n".join(found.lines())


@torch.no_grad()
def test_pipelines_and_the_harness_open_the_student(finished: Any) -> None:
    """By its folder, and with a tokenizer that has fewer tokens than the embedding has rows."""
    folder = finished.result.model_dir
    expected: Any = iskd.load(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) < ROWS == expected.config.vocab_size
    for place in ("cpu", {"": "cpu"}, "auto"):
        loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=place)
        assert loaded.dtype == torch.bfloat16
        devices = {parameter.device.type for parameter in loaded.parameters()}
        assert devices == {"cpu"} if place != "auto" else len(devices) == 1
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    ids = torch.tensor([tokenizer("Once upon")["input_ids"]])
    text = tokenizer.decode(expected.generate(ids, **options)[0], skip_special_tokens=True)
    said = pipeline("text-generation", model=str(folder), device="cpu")("Once upon", **options)
    assert said[0]["generated_text"] == text

    harness = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    lm = harness.HFLM(pretrained=str(folder), device="cpu", batch_size=1)
    request = Instance("loglikelihood", {}, ("Once upon", " a time"), 0)
    ((score, _),) = lm.loglikelihood([request], disable_tqdm=True)
    whole, start = (tokenizer(words)["input_ids"] for words in ("Once upon a time", "Once upon"))
    logits = expected(torch.tensor([whole])).logits[0, len(start) - 1 : -1].float().log_softmax(-1)
    assert score == pytest.approx(float(logits.gather(1, torch.tensor(whole[len(start) :])[:, None]).sum()), abs=0.1)


def test_a_model_that_is_lent_gets_its_config_back(tmp_path: Path) -> None:
    write_teacher(tmp_path)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.config.tie_word_embeddings
    head = weights_of(model)[1].clone()
    assert given_teacher(model, byte_tokenizer()).source["stored"] == "float32"
    with lent(model):
        student = surgery.rebuild(model, Record(4).extended([Remove(1)]))
        for copied in (student, copy.deepcopy(model)):
            assert weights_of(copied)[0] is not weights_of(copied)[1]
            assert copied.config.tie_word_embeddings is False
    assert model.config.tie_word_embeddings
    assert torch.equal(weights_of(model)[1], head)
