"""Laws of the library: options fitted by themselves and no worse for it, whole after a kill, bound to their origin."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from iskd.blocks.slim import Slim
from iskd.export.student import native_config
from iskd.models import Stack
from iskd.refits.local import Local
from iskd.schedules.budget import library as library_file
from iskd.schedules.budget.fitting import Fit, _Walk, fit_options
from iskd.schedules.budget.library import Library, recipe_of
from iskd.schedules.budget.options import Option, able, layers_of, module_of, options_of
from iskd.schedules.budget.search import Place
from iskd.schedules.budget.settings import Budget
from iskd.schedules.budget.text import Texts, texts_of
from iskd.system.files import draft_of
from iskd.system.version import PACKAGE
from iskd.teacher.cache import answering
from tests.factories import FAMILIES, conf_group, digest, hooks, louder, tiny, windows

OPTIONS: dict[str, Any] = conf_group("budget")["default"]["options"]
SMALL: dict[str, Any] = {"fit_tokens": 320, "held_tokens": 96, "score_tokens": 128}
BUDGET = Budget(params=0.7, options=OPTIONS, epochs=0, **SMALL)


def text(tokens: int) -> list[Tensor]:
    return list(windows(max(3, tokens // 16), 16, seed=5).split(4))


def place(folder: Path, **others: Any) -> Place:
    others = {"note": lambda _said: None, **others}
    return Place(folder, nullcontext, lambda model: native_config(model) is not None, **others)


def opened(teacher: PreTrainedModel, folder: Path, budget: Budget = BUDGET, **others: Any) -> tuple[Library, Texts]:
    texts = others.pop("texts", texts_of(budget, text))
    recipe = recipe_of(budget, answering(teacher, None), texts.digest, others.get("seed", 0))
    return Library.open(budget, folder, recipe, teacher, others.get("seed", 0)), texts


def fill(library: Library, texts: Texts, teacher: PreTrainedModel, options: Sequence[Option], **others: Any) -> int:
    """How many options were fitted."""
    done: list[int] = []
    jobs = others.pop("jobs", library.missing(options))
    fit_options(teacher, texts, jobs, others.pop("budget", BUDGET), 0, library.keep, lambda: done.append(1))
    return len(done)


@pytest.mark.parametrize(
    "family",
    # Granite multiplies what is added; behind Gemma's attention and MLP stands a norm
    [name if name in ("llama", "gemma2") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_every_option_is_fitted_in_every_family_that_can_have_it(family: str, tmp_path: Path) -> None:
    teacher = louder(tiny(family, layers=2))
    before = digest(teacher)
    options, told = able(options_of(OPTIONS), teacher, 0, named=False)
    assert len(options) >= len(OPTIONS) - 1, told
    library, texts = opened(teacher, tmp_path)
    fill(library, texts, teacher, options)
    assert not any(library.missing(options).values())
    assert digest(teacher) == before
    assert hooks(teacher) == 0
    better = 0
    for option in options:
        for layer in layers_of(option, Stack(teacher)):
            module, errors = library.block(layer, option), library.errors(layer, option)
            if not option.fitted:
                assert module is errors is None
                continue
            assert module is not None
            assert errors is not None
            assert errors[1] <= errors[0], (option.name, errors)
            better += errors[1] < errors[0]
    assert better


def test_a_block_that_is_not_to_be_fitted_is_as_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a run, whose `edit.fit=false` starts from the inherited weights."""
    fitted: list[Any] = []
    fit = Slim.fit
    monkeypatch.setattr(
        Slim, "fit", lambda block, *others, **kwargs: fitted.append(block) or fit(block, *others, **kwargs)
    )
    teacher = louder(tiny("llama", layers=2))
    options = options_of({"plain": {**OPTIONS["slim_50"], "fit": False}, "fitted": OPTIONS["slim_50"]})
    library, texts = opened(teacher, tmp_path)
    fill(library, texts, teacher, options)
    assert len(fitted) == 2, "one option in two layers"
    errors, block, made = (
        library.errors(1, options[0]),
        library.block(1, options[0]),
        module_of(options[0], Stack(teacher), 1, 0),
    )
    assert errors is not None
    assert block is not None
    assert made is not None
    assert errors[0] == errors[1]
    assert all(map(torch.equal, block.state_dict().values(), made.state_dict().values()))


def test_training_behind_a_fit_never_makes_it_worse(tmp_path: Path) -> None:
    teacher = louder(tiny("llama", layers=2))
    options = options_of(OPTIONS, ["slim_50", "window"])
    budget = Budget(params=0.7, options=OPTIONS, epochs=2, lr=1e-3, **SMALL)
    plain, trained = (opened(teacher, tmp_path / name, asked) for name, asked in (("a", BUDGET), ("b", budget)))
    fill(*plain, teacher, options)
    fill(*trained, teacher, options, budget=budget)
    for option in options:
        for layer in range(2):
            without, with_it = (found.errors(layer, option) for found in (plain[0], trained[0]))
            assert with_it is not None
            assert without is not None
            assert with_it[1] <= without[1] * (1 + 1e-6)


def test_a_library_goes_on_where_it_was_killed_and_mends_what_is_damaged(tmp_path: Path) -> None:
    teacher = louder(tiny("llama", layers=3))
    options = options_of(OPTIONS, ["slim_50", "no_attention", "remove"])
    library, texts = opened(teacher, tmp_path)

    class Killed(Exception):
        pass

    kept = []

    def keep(layer: int, option: Option, fit: Fit) -> None:
        library.keep(layer, option, fit)
        kept.append(library.file(layer, option))
        if len(kept) == 3:
            raise Killed

    with pytest.raises(Killed):
        fit_options(teacher, texts, library.missing(options), BUDGET, 0, keep, lambda: None)
    assert fill(library, texts, teacher, options) == 3, "six in all"
    whole = {file.name: file.read_bytes() for file in library.folder.glob("*.safetensors")}
    torn, flipped, lost = sorted(library.folder.glob("*.safetensors"))[:3]
    torn.write_bytes(torn.read_bytes()[:-8])
    content = bytearray(flipped.read_bytes())
    content[-5] ^= 1
    flipped.write_bytes(content)
    lost.unlink()
    again, _ = opened(teacher, tmp_path)
    assert fill(again, texts, teacher, options) == 3
    assert {file.name: file.read_bytes() for file in library.folder.glob("*.safetensors")} == whole, "the same bits"
    renamed = options_of({"other": OPTIONS["slim_50"]})
    assert not any(again.missing(renamed).values()), "what an option is called does not bind it"
    changed = options_of(
        {"slim_50": {**OPTIONS["slim_50"], "block": {"_target_": "iskd.blocks.slim.Slim", "ratio": 0.4}}}
    )
    assert sum(map(len, again.missing(changed).values())) == 3


def test_layers_fitted_by_several_processes_are_those_of_one(tmp_path: Path) -> None:
    teacher = louder(tiny("llama", layers=4))
    options = options_of(OPTIONS, ["mlp_50", "merge"])
    one, texts = opened(teacher, tmp_path / "one")
    fill(one, texts, teacher, options)
    several, _ = opened(teacher, tmp_path / "several")
    for rank in (1, 0):
        jobs = {layer: found for layer, found in several.missing(options).items() if layer % 2 == rank}
        fill(several, texts, teacher, options, jobs=jobs)
    names = sorted(file.name for file in one.folder.glob("*.safetensors"))
    assert names == sorted(file.name for file in several.folder.glob("*.safetensors"))
    assert all((one.folder / name).read_bytes() == (several.folder / name).read_bytes() for name in names)


def test_a_library_is_bound_to_teacher_text_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny("llama", layers=2)
    mine = Budget(params=0.7, options=OPTIONS, library=str(tmp_path / "mine"), epochs=0, **SMALL)
    opened(teacher, tmp_path, mine)
    opened(teacher, tmp_path, mine)
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match=r"budget\.library=.*mine was made of another teacher: give another folder"):
        opened(other, tmp_path, mine)
    texts = texts_of(mine, lambda tokens: [batch + 1 for batch in text(tokens)])
    with pytest.raises(ValueError, match="was made of other calibration text"):
        opened(teacher, tmp_path, mine, texts=texts)
    with pytest.raises(ValueError, match=r"with other settings of its fits \(budget\.epochs"):
        opened(teacher, tmp_path, mine, seed=3)
    with monkeypatch.context() as patched:
        patched.setattr(library_file, "code_digest", lambda: "other")
        with pytest.raises(ValueError, match="was made by another version of iskd"):
            opened(teacher, tmp_path, mine)
        library, _ = opened(teacher, tmp_path / "below")
    assert library.folder.parent == tmp_path / "below", "without a name of its own it is another folder"
    (tmp_path / "mine" / "meta.json").write_text("[")
    with pytest.raises(ValueError, match=r"meta\.json is damaged .*delete the folder"):
        opened(teacher, tmp_path, mine)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "notes.txt").write_text("mine")
    strange = Budget(params=0.7, options=OPTIONS, library=str(tmp_path / "strange"))
    with pytest.raises(ValueError, match="holds other files and no library"):
        opened(teacher, tmp_path, strange)


def test_processes_that_start_together_share_a_new_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that looks while another one writes: its draft lies there, or all of it and a first fit."""
    teacher = tiny("llama", layers=2)
    mine = Budget(params=0.7, options=OPTIONS, library=str(tmp_path / "mine"), epochs=0, **SMALL)
    meta = tmp_path / "mine" / "meta.json"
    meta.parent.mkdir()
    draft_of(meta).write_text("{")
    opened(teacher, tmp_path, mine)
    assert json.loads(meta.read_text())["version"] == 1
    whole = meta.read_text()
    meta.unlink()
    look = Path.iterdir

    def meanwhile(self: Path) -> Iterator[Path]:
        if self == meta.parent and not meta.exists():
            meta.write_text(whole)
            (self / "000-slim_50-0123456789abcdef.safetensors").write_bytes(b"")
        return look(self)

    monkeypatch.setattr(Path, "iterdir", meanwhile)
    opened(teacher, tmp_path, mine)


def test_all_code_that_decides_what_is_written_down_is_there() -> None:
    assert not [name for name in library_file._CODE if not (PACKAGE / name).exists()]
    for name in ("sweep.py", "scores.py", "students.py", "fitting.py"):
        assert any(each.endswith(name) for each in library_file._CODE)


def test_the_header_says_what_a_file_is(tmp_path: Path) -> None:
    teacher = tiny("llama", layers=2)
    option = options_of(OPTIONS, ["slim_50"])[0]
    library, texts = opened(teacher, tmp_path)
    fill(library, texts, teacher, [option])
    content = library.file(1, option).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    told = json.loads(header["__metadata__"]["iskd"])
    assert told["option"] == option.described()
    assert (told["layer"], told["after"] <= told["before"]) == (1, True)


def test_a_batch_to_fit_to_is_a_step_of_local_training() -> None:
    """As in `refit=local`: several windows go into one only where they are short."""
    for length, expected in ((128, 4), (256, 2), (512, 1), (1024, 1)):
        texts = texts_of(BUDGET, lambda _tokens, length=length: [windows(12, length)])
        assert {len(batch) for batch in texts.fit[:-1]} == {expected}
        assert expected == max(1, Local.step_tokens // length)


def test_the_three_parts_of_the_text_have_no_window_in_common() -> None:
    texts = texts_of(BUDGET, text)
    rows = [{tuple(row) for batch in part for row in batch.tolist()} for part in (texts.fit, texts.held, texts.score)]
    assert [len(found) for found in rows] == [20, 6, 8]
    assert not rows[0] & rows[1] | rows[0] & rows[2] | rows[1] & rows[2]
    with pytest.raises(ValueError, match=r"2 calibration windows of 16 tokens, and one each is needed"):
        texts_of(BUDGET, lambda _tokens: [windows(2, 16)])
    with pytest.raises(ValueError, match=r"raise data\.seq_len to 2"):
        texts_of(BUDGET, lambda _tokens: [windows(9, 1)])


def test_mixers_are_solved_towards_the_state_that_the_teacher_has(tmp_path: Path) -> None:
    """Where a block adds a multiple of what attention gives (Granite), its o_proj is solved for that multiple."""
    teacher = louder(tiny("granite", layers=2))
    assert Stack(teacher).residual_scale not in (0.0, 1.0)
    texts = texts_of(BUDGET, text)
    with torch.no_grad():
        for at in _Walk(teacher, texts).through(1):
            block, middle = Stack(teacher).layers[at.layer], at.middle
            assert middle is not None
            for index, inputs in enumerate(at.inputs):
                after = middle[index] + Stack(teacher).residual_scale * block.mlp(
                    block.post_attention_layernorm(middle[index])
                )
                torch.testing.assert_close(after, at.outputs[index])
                assert not torch.equal(inputs, middle[index])
    options = options_of({"window": OPTIONS["window"], "gated_deltanet": OPTIONS["gated_deltanet"]})
    library, texts = opened(teacher, tmp_path)
    fill(library, texts, teacher, options)
    errors = [library.errors(layer, option) for layer in range(2) for option in options[1:]]
    assert all(found is not None and found[1] < found[0] for found in errors), errors


def test_less_text_than_a_budget_asks_for_is_told() -> None:
    asked = Budget(params=0.7, options=OPTIONS, fit_tokens=320, held_tokens=96, score_tokens=128)
    assert texts_of(asked, text).short_of(asked) == []
    [told] = texts_of(asked, lambda _tokens: text(96)).short_of(asked)
    assert told.startswith(
        "the calibration text has 96 tokens of the 544 that the budget asks for: options are fitted to "
    )
