"""`iskd generate`: the same prompt for both, the right teacher, the same draws, and no comparison across tokenizers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from iskd.commands.generate import generate, run
from iskd.export import export
from iskd.models import surgery
from iskd.models.tokenizers import byte_tokenizer, check_same_tokenizer
from iskd.plan import Convert, Edit, Record, Replace, Spec
from iskd.plan.run_files import FACTS
from iskd.system.version import CONF
from iskd.teacher import Loaded, TeacherSpec, load_teacher
from iskd.teacher.origin import find_teacher
from tests.factories import tiny

PROMPT = "def f(x):"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: its config, a student that is its teacher's equal, and an edited one; the teacher beside it."""
    root = tmp_path_factory.mktemp("root")
    teacher = tiny("llama", vocab=257)
    teacher.save_pretrained(root / "teacher")
    byte_tokenizer().save_pretrained(root / "teacher")
    loaded = load_teacher(TeacherSpec("mine", path=str(root / "teacher")))
    (root / "run").mkdir()
    model = {"_target_": "iskd.teacher.load.TeacherSpec", "name": "mine", "path": str(root / "teacher")}
    (root / "run" / "config.yaml").write_text(yaml.safe_dump({"model": {**model, "trust_remote_code": True}}))
    edits: dict[str, list[Edit]] = {"same": [], "model": [Replace(1, Spec("iskd.blocks.slim.Slim", {"ratio": 0.3}))]}
    for name, chosen in edits.items():
        student = tiny("llama", vocab=257)
        record = surgery.apply(student, Record(4), chosen)
        export(
            root / "run" / name,
            student,
            record,
            teacher.config,
            byte_tokenizer(),
            verify=False,
            teacher=loaded.source,
            run_dir=root / "run",
        )
    return root / "run"


def other_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer with two bytes exchanged."""
    values = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    vocab = values["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    backend = type(byte_tokenizer().backend_tokenizer).from_str(json.dumps(values))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>")


def test_equal_models_say_the_same(run_dir: Path) -> None:
    """Greedy and drawn: both get the same prompt and the same random numbers; another seed says something else."""
    greedy = generate(run_dir / "same", prompt=PROMPT, max_new_tokens=12, device="cpu")
    assert greedy.teacher.ids == greedy.student.ids
    assert greedy.same == len(greedy.student.ids) > 0
    assert greedy.prompt_tokens == len(PROMPT)
    assert greedy.notes == ()
    assert greedy.how == "greedy, cpu"
    drawn = [generate(run_dir / "same", None, PROMPT, max_new_tokens=12, temperature=5.0, seed=s) for s in (1, 1, 2)]
    assert all(found.teacher.ids == found.student.ids for found in drawn)
    assert drawn[0].student.ids == drawn[1].student.ids
    assert drawn[0].student.ids != drawn[2].student.ids


def test_greedy_text_is_the_models_own(run_dir: Path) -> None:
    """What is shown is what each model prefers at every step, and the speed is that of what was said."""
    found = generate(run_dir / "model", prompt=PROMPT, max_new_tokens=6)
    loaded = load_teacher(find_teacher(run_dir / "model"))
    ids = torch.tensor([list(PROMPT.encode())])
    for token in found.teacher.ids:
        with torch.no_grad():
            assert int(loaded.model(ids).logits[0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    for spoken in (found.teacher, found.student):
        assert spoken.tokens_per_s == pytest.approx(len(spoken.ids) / spoken.seconds)
        assert spoken.text == byte_tokenizer().decode(spoken.ids, skip_special_tokens=True)


def test_models_and_training_mode_are_taken_as_they_are(run_dir: Path) -> None:
    loaded = load_teacher(find_teacher(run_dir / "model"))
    student = tiny("llama", vocab=257).train()
    found = generate(student, loaded, PROMPT, max_new_tokens=4)
    assert found.teacher.ids == found.student.ids
    assert student.training
    with torch.no_grad():
        next(student.parameters()).fill_(torch.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="this model gives nan for the next token"):
            generate(student, loaded, PROMPT, max_new_tokens=4, temperature=temperature)
    assert student.training


def test_the_teacher_is_found(run_dir: Path, tmp_path: Path) -> None:
    """Said, or by the run, or by what the export says; code that a run's config asks for is not run."""
    teacher = run_dir.parent / "teacher"
    assert find_teacher(run_dir / "model") == TeacherSpec("mine", path=str(teacher))
    assert find_teacher(None, teacher).path == str(teacher)
    assert find_teacher(None, "owner/name") == TeacherSpec("owner/name")
    assert find_teacher(None, "smollm2") == TeacherSpec("HuggingFaceTB/SmolLM2-135M-Instruct", bundled="smollm2")
    assert find_teacher(None, "phi1") == TeacherSpec("microsoft/phi-1")  # a preset, as of model=phi1
    assert find_teacher(None, "gpt2").name == yaml.safe_load((CONF / "model" / "gpt2.yaml").read_text())["name"]
    assert find_teacher(None, "local") == TeacherSpec("local")
    with pytest.raises(ValueError, match=r"which teacher.* --teacher DIR_OR_NAME .* reference=DIR_OR_NAME"):
        find_teacher(tmp_path)
    with pytest.raises(ValueError, match=r"the teacher='\./nowhere': no such folder"):
        find_teacher(None, "./nowhere")
    (tmp_path / FACTS).write_text(json.dumps({"teacher": {"name": "a/b", "kind": "hub", "revision": "v1"}}))
    assert find_teacher(tmp_path) == TeacherSpec("a/b", revision="v1")
    (tmp_path / FACTS).write_text(json.dumps({"teacher": {"name": "mine", "kind": "local"}}))
    with pytest.raises(ValueError, match="which teacher"):
        find_teacher(tmp_path)
    assert "path" not in json.loads((run_dir / "model" / FACTS).read_text())["teacher"]
    inner = tmp_path / "model"
    inner.mkdir()
    for text in ("[]", "model: {odd: 1}", "model: ["):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match="does not say which teacher"):
            find_teacher(inner)
    gone = {"model": {"name": "local", "path": "the model given to iskd.compress"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(gone))
    with pytest.raises(ValueError, match=r"was in memory\); name it: --teacher DIR_OR_NAME .* reference=DIR_OR_NAME"):
        find_teacher(inner)
    assert find_teacher(inner, teacher).path == str(teacher), "named, it is taken"


def test_another_teacher_is_noted(run_dir: Path) -> None:
    loaded = load_teacher(find_teacher(run_dir / "model"))
    other = Loaded(loaded.model, loaded.tokenizer, {**loaded.source, "sha256": "0" * 64})
    assert "not the teacher" in generate(run_dir / "model", other, PROMPT, max_new_tokens=1).notes[0]


def test_tokenizers_that_differ_are_refused(run_dir: Path) -> None:
    with pytest.raises(
        ValueError, match=r"different tokenizers \(.*'a' has id 98 in the student's, 97 in the teacher's"
    ):
        generate(run_dir / "model", prompt=PROMPT, tokenizer=other_tokenizer())
    check_same_tokenizer(byte_tokenizer(), byte_tokenizer(), [PROMPT])
    prefixed = byte_tokenizer()
    values = json.loads(prefixed.backend_tokenizer.to_str())
    values["pre_tokenizer"]["add_prefix_space"] = True
    backend = type(prefixed.backend_tokenizer).from_str(json.dumps(values))
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>")
    with pytest.raises(ValueError, match="one vocabulary, but 'a' is cut into 2 tokens by the student's and 1 by the"):
        check_same_tokenizer(other, byte_tokenizer(), ["a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": 60}, r"9 tokens of prompt and 60 new ones are more than the context of 64"),
        ({"temperature": -1.0}, r"temperature=-1\.0 must be 0"),
        ({"temperature": float("nan")}, r"temperature=nan must be 0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str, run_dir: Path) -> None:
    with pytest.raises(ValueError, match=message):
        generate(run_dir / "model", **{"prompt": PROMPT, **options})


def test_each_goes_as_far_as_it_can(run_dir: Path) -> None:
    """A student without attention goes on past its teacher's context; a table of learned positions ends for both."""
    loaded = load_teacher(find_teacher(run_dir / "model"))
    linear = [Convert(layer, Spec("iskd.mixers.linear_attention.LinearAttention", {})) for layer in range(4)]
    student = tiny("llama", vocab=257, eos_token_id=None)
    surgery.apply(student, Record(4), linear)
    student.generation_config.eos_token_id = None
    for prompt, most in (("a" * 61, 3), ("a" * 90, 0)):
        found = generate(student, loaded, prompt, max_new_tokens=8, device="cpu")
        assert len(found.student.ids) == 8
        assert len(found.teacher.ids) <= most
        assert f"the teacher says at most {most} tokens" in found.notes[0]
        assert "the context of 64" in found.notes[0]
        found.table()
    assert (found.teacher.tokens_per_s, found.same) == (0.0, 0)
    gpt2 = tiny("gpt2", vocab=257)
    surgery.apply(gpt2, Record(4), linear)
    teacher = Loaded(tiny("gpt2", vocab=257), byte_tokenizer(), {"name": "mine"})
    with pytest.raises(ValueError, match=r"61 tokens of prompt and 8 new ones are more than the table of 64 learned"):
        generate(gpt2, teacher, "a" * 61, max_new_tokens=8)


def test_the_command_prints_two_columns(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text that looks like markup is printed as it is."""
    run([str(run_dir), "[bold]x = [1]", "--tokens", "3", "--device", "cpu"])
    printed = capsys.readouterr().out
    for said in ("teacher: mine", "student: ", "[bold]x = [1]", "tokens/s", "greedy, cpu", "times as fast"):
        assert said in printed
    with pytest.raises(ValueError, match="is not a model directory"):
        run([str(run_dir / "model"), "x", "--teacher", str(run_dir)])
    narrow = io.StringIO()
    Console(width=40, file=narrow).print(generate(run_dir / "model", prompt=PROMPT, max_new_tokens=2).table())
    assert max(map(len, narrow.getvalue().splitlines())) <= 40
