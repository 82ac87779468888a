"""Laws of all refits: nothing to mend is nothing done, held-out KL never rises, processes count as one."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from iskd.blocks.ridge import row_weights
from iskd.models import Stack, surgery
from iskd.models.block_calls import BlockCalls
from iskd.models.capture import states_after
from iskd.plan import Convert, Edit, Record, Remove, Spec
from iskd.refits import Refit, RefitTask, magnitude, refit_survivors
from iskd.refits import walk as walking
from iskd.refits.calibrate import Calibrate
from iskd.refits.local import Local
from iskd.refits.magnitude import Magnitude
from iskd.refits.output import Output
from iskd.refits.replaceme import ReplaceMe
from iskd.refits.values import Values
from iskd.teacher import TeacherStates
from iskd.teacher import states as states_file
from tests.factories import (
    BEHIND,
    FAMILIES,
    conf_group,
    digest,
    hooks,
    louder,
    mixer_specs,
    modes,
    silence,
    text_of,
    tiny,
    windows,
)

SIZES: dict[str, Any] = {"tokens": 320, "held_tokens": 96}
REFITS: dict[str, Refit] = {
    "output": Output(**SIZES, projections=("mlp",)),
    "both": Output(**SIZES, projections=("attention", "mlp")),
    "local": Local(**SIZES, lr=1e-3, epochs=2),
    "sublayers": Local(**SIZES, lr=1e-3, epochs=1, sublayers=True),
    "apart": Local(**SIZES, lr=1e-3, epochs=1, sublayers=True, inputs="teacher"),
    "magnitude": Magnitude(**SIZES),
    "norms": Magnitude(**SIZES, statistic="norm"),
    "replaceme": ReplaceMe(**SIZES, ridge=1e-3),
    "calibrate": Calibrate(**SIZES),
    "values": Values(**SIZES),
}
# what a refit works on, where that is no cut
EDITS: dict[str, Sequence[Edit]] = {
    "calibrate": (Convert(1, mixer_specs()["gla"], seed=3),),
    "values": (Convert(1, Spec("iskd.mixers.sliding.Sliding", {"window": 3, "sinks": 1}), seed=3),),
}


def text(tokens: int) -> list[Tensor]:
    return list(windows(max(2, tokens // 16), 16, seed=5).split(4))


def student(family: str = "llama", edits: Sequence[Edit] = (Remove(1),), **config: Any) -> tuple[Any, Any, Record]:
    teacher = louder(tiny(family, **config))
    made = copy.deepcopy(teacher)
    return made, teacher, surgery.apply(made, Record(4), edits)


def refitted(refit: Refit, edits: Sequence[Edit] = (Remove(1),), family: str = "llama", **config: Any) -> Any:
    made, teacher, record = student(family, edits, **config)
    told = refit_survivors([refit], made, teacher, record, edits, text_of(text, refit))
    return made, teacher, record, told


def distance(made: Any, teacher: Any) -> float:
    """Mean distance of the last states on the text of the fits."""
    with torch.no_grad():
        found = [Stack(made).last_hidden(ids) - Stack(teacher).last_hidden(ids) for ids in text(320)]
    return float(torch.cat(found).norm(dim=-1).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_called_one_by_one_are_the_model(family: str) -> None:
    model = tiny(family)
    stack, ids = Stack(model), windows(2, 12)
    calls = BlockCalls(stack, ids)
    with torch.no_grad():
        h = calls.embedded
        for position, block in enumerate(stack.layers):
            h = calls.run(position, block, h)
        expected = states_after(stack, range(4), {3}, ids)[3]
    assert torch.equal(h, expected)
    assert hooks(model) == 0


def test_every_yaml_is_tested_here() -> None:
    targets = {values["_target_"] for group in conf_group("refit").values() for values in group.values()}
    assert {f"{type(refit).__module__}.{type(refit).__name__}" for refit in REFITS.values()} == targets


@pytest.mark.parametrize(
    ("name", "family"), [*((name, "llama") for name in REFITS), *(("both", family) for family in FAMILIES[:2])]
)
def test_kl_on_held_out_text_never_rises(name: str, family: str) -> None:
    made, teacher, _, told = refitted(REFITS[name], EDITS.get(name, (Remove(1),)), family)
    line = told[-1]
    before, after = (float(word) for word in (line.split("KL ")[1].split(" ->")[0], line.split("-> ")[1].split(" ")[0]))
    assert after <= before or "taken back" in line
    assert hooks(made) == hooks(teacher) == 0
    assert not any(p.grad is not None for p in made.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["both", "sublayers", "apart"])
def test_a_cut_is_partly_made_up_for(name: str, family: str) -> None:
    """Judged by the text of the fit, as random models have no other."""
    made, teacher, record = student(family)
    before = distance(made, teacher)
    if name == "both" and family in BEHIND:
        unchanged = digest(made)
        for refit in (REFITS[name], ReplaceMe(tokens=160)):
            with pytest.raises(ValueError, match=r"layer 0: .*a norm stands behind it.*use refit=local"):
                refit.refit(RefitTask(made, teacher, record, [Remove(1)], text(320), text(320)))
        assert digest(made) == unchanged
        return
    with torch.no_grad():
        REFITS[name].refit(RefitTask(made, teacher, record, [Remove(1)], text(320), text(320)))
    assert distance(made, teacher) < before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_that_is_larger_everywhere_is_the_same_model(family: str) -> None:
    """What refit=magnitude does below a cut, done to a whole model, changes nothing: it reaches all that writes."""
    model = tiny(family, tie_word_embeddings=True)
    task: Any = SimpleNamespace(student=model, teacher=model, record=Record(4), edits=[Remove(3)])
    with torch.no_grad():
        model.get_input_embeddings().get_parameter("weight").mul_(10)  # beside which the norms' epsilon is nothing
        before = model(windows()).logits
        if family == "olmo2":
            with pytest.raises(ValueError, match="olmo2 read it without a norm in front of them: use refit=local"):
                Magnitude().refit(task)
            return
        magnitude._fold(task, 4, 1.7)
        torch.testing.assert_close(model(windows()).logits, before, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("name", REFITS)
def test_a_student_like_its_teacher_stays_so(name: str) -> None:
    """The removed layer adds nothing, so there is nothing to mend."""
    teacher = louder(tiny("llama"))
    silence(teacher, 1)
    made = copy.deepcopy(teacher)
    record = surgery.apply(made, Record(4), [Remove(1)])
    before = digest(made)
    told = refit_survivors([REFITS[name]], made, teacher, record, [Remove(1)], text_of(text, REFITS[name]))
    assert digest(made) == before or told[-1].endswith(("again", "changed nothing"))


def test_a_refit_that_does_not_help_is_taken_back() -> None:
    class Worse(Magnitude):
        def refit(self, task: RefitTask) -> list[str]:
            for parameter in task.student.parameters():
                parameter.mul_(3.0)
            return ["made it worse"]

    made, teacher, record = student()
    before, training = digest(made), modes(made)
    told = refit_survivors([Worse(**SIZES)], made, teacher, record, [Remove(1)], text_of(text, Worse(**SIZES)))
    assert "taken back" in told[-1]
    assert digest(made) == before
    assert modes(made) == training


@torch.no_grad()
@pytest.mark.parametrize("name", REFITS)
def test_all_that_a_refit_changes_can_be_taken_back(name: str) -> None:
    edits = EDITS.get(name, (Remove(1),))
    made, teacher, record = student(edits=edits)
    task = RefitTask(made, teacher, record, edits, text(320), text(96))
    held = {id(p) for module in REFITS[name].changes(task) for p in module.parameters()}
    before = {n: p.clone() for n, p in made.named_parameters()}
    REFITS[name].refit(task)
    changed = [n for n, p in made.named_parameters() if not torch.equal(p, before[n])]
    assert changed
    assert not [n for n, p in made.named_parameters() if n in changed and id(p) not in held]


def solved_slowly(task: RefitTask, ridge: float) -> Any:
    """Down projections one after the other by least squares on stacked rows, the pull towards W0 as rows of its own."""
    made, stack = copy.deepcopy(task.student), Stack(task.teacher)
    for position, layer in enumerate(task.record.layers):
        block = Stack(made).layers[position]
        down: Any = block.get_submodule("mlp.down_proj")
        x, y = [], []
        for batch in task.fit:
            goal = states_after(stack, range(4), {task.record.state_after(layer)}, batch)[
                task.record.state_after(layer)
            ]
            seen: list[Tensor] = []
            handle = down.register_forward_hook(lambda _m, args, out, into=seen: into.extend((args[0], out)))
            after = states_after(Stack(made), task.record.layers, {layer}, batch)[layer]
            handle.remove()
            w = row_weights(goal)
            x.append((seen[0] * w).flatten(0, 1).double())
            y.append(((goal - (after - seen[1])) * w).flatten(0, 1).double())
        rows, goals, old = torch.cat(x), torch.cat(y), down.weight.double()
        pull = (ridge * rows.square().sum(0).mean()).sqrt()
        a = torch.cat([rows, pull * torch.eye(rows.shape[1], dtype=torch.float64)])
        b = torch.cat([goals, pull * old.T])
        down.weight.data.copy_(torch.linalg.lstsq(a, b).solution.T)
    return made


@torch.no_grad()
def test_output_is_the_slow_least_squares() -> None:
    made, teacher, record = student()
    task = RefitTask(made, teacher, record, [Remove(1)], text(320), text(320))  # judged by what it is fitted to
    expected = solved_slowly(task, 0.1)
    Output(**SIZES, projections=("mlp",), ridge=0.1, folds=1).refit(task)
    for (name, ours), theirs in zip(made.named_parameters(), expected.parameters(), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), name


@torch.no_grad()
def test_output_runs_every_block_once() -> None:
    made, teacher, record = student()
    task = RefitTask(made, teacher, record, [Remove(1)], text(128), text(64))
    ran: list[str] = []
    for name, model in (("student", made), ("teacher", teacher)):
        for position, block in enumerate(Stack(model).layers):
            block.register_forward_hook(lambda *_, key=f"{name} {position}": ran.append(key))
    Output(**SIZES, projections=("mlp",)).refit(task)
    batches = len(task.fit) + len(task.held)
    # of each model's first block, beside that: what kind of output it has; of the student's, whether it can be solved
    assert ran.count("teacher 0") == batches + 1
    assert ran.count("student 0") == batches + 1 + 2
    assert all(ran.count(f"teacher {position}") == batches for position in (1, 2, 3))
    assert all(ran.count(f"student {position}") == batches for position in (1, 2))


@pytest.mark.parametrize("place", ["host", "disk"])
def test_streams_may_lie_elsewhere(place: str) -> None:
    here, *_ = refitted(Output(**SIZES, projections=("mlp",)))
    there, *_ = refitted(Output(**SIZES, projections=("mlp",), streams=place))
    assert digest(here) == digest(there)


@torch.no_grad()
@pytest.mark.parametrize("name", ["both", "sublayers"])
def test_kept_states_of_the_teacher_give_the_same_student(name: str, tmp_path: Path) -> None:
    held = list(windows(4, 16, seed=9).split(4))

    def refit(states: TeacherStates | None, edits: Sequence[Edit] = (Remove(1),)) -> tuple[str, int]:
        made, teacher, record = student(edits=edits)
        ran: list[int] = []
        for block in Stack(teacher).layers[1:]:
            block.register_forward_hook(lambda *_: ran.append(0))
        REFITS[name].refit(RefitTask(made, teacher, record, edits, text(320), held, states=states))
        return digest(made), len(ran)

    def kept() -> TeacherStates:
        return TeacherStates(student()[1], tmp_path)

    expected, passes = refit(None)
    assert refit(kept()) == (expected, passes)
    assert refit(kept()) == (expected, 0)
    # other layers go: what is there is read, the rest is computed
    further = (Remove(1), Remove(2))
    assert refit(kept(), further)[0] == refit(None, further)[0]
    # damaged, in another precision, or of another teacher: computed again
    for file in tmp_path.rglob("*.rows"):
        file.write_bytes(bytes(file.stat().st_size))
    assert refit(kept()) == (expected, passes)
    with torch.autocast("cpu", torch.bfloat16):
        assert kept().folder != TeacherStates(student()[1], tmp_path / "other").folder
        assert refit(kept()) == refit(None)
    other = TeacherStates(tiny("llama", seed=3), tmp_path)
    assert other.folder.parent == tmp_path
    assert other.folder != kept().folder


def test_refits_that_read_other_amounts_of_text_share_the_states_of_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block of the teacher runs once on a window, whoever reads it, in however large a batch."""
    ran: list[int] = []
    original = walking.teacher_block

    def counted(stack: Any, layer: int, calls: Any, h_BTD: Tensor, **keys: Any) -> Any:
        ran.append(len(h_BTD))
        return original(stack, layer, calls, h_BTD, **keys)

    monkeypatch.setattr(walking, "teacher_block", counted)
    made, teacher, record = student()
    small = Output(tokens=160, held_tokens=64, projections=("attention", "mlp"))
    large = Local(tokens=320, held_tokens=160, lr=1e-3, epochs=1, sublayers=True, step_tokens=16)
    states = TeacherStates(teacher, tmp_path)
    refit_survivors([large, small], made, teacher, record, [Remove(1)], text_of(text, large, small), states=states)
    assert sum(ran) == 30 * 4, "windows of the larger text, blocks of the teacher"
    other, *_ = student()
    refit_survivors([large, small], other, teacher, record, [Remove(1)], text_of(text, large, small))
    for one, two in zip(made.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


class _Moved(Magnitude):
    """A refit that adds a number to the first block's weights; `more` once it was added."""

    prepares = True

    def __init__(self, by: float, *, prepares: bool = True) -> None:
        super().__init__(tokens=320, held_tokens=96)
        object.__setattr__(self, "by", by)
        object.__setattr__(self, "prepares", prepares)

    def refit(self, task: RefitTask) -> list[str]:
        """Move."""
        for parameter in Stack(task.student).layers[0].parameters():
            parameter.add_(self.by)  # type: ignore[attr-defined]
        return ["moved"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("moves", "told", "left"),
    [
        ([_Moved(0.05), _Moved(-0.05, prepares=False)], ["left for _moved", "changed nothing|taken back"], 0.0),
        ([_Moved(0.05), _Moved(0.02, prepares=False)], ["left for _moved", r"taken back.* \(with what waited"], 0.0),
        ([_Moved(0.05)], ["taken back"], 0.0),
        ([_Moved(0.05, prepares=False), _Moved(0.05)], ["taken back", "taken back"], 0.0),
        ([_Moved(torch.nan), _Moved(-0.05, prepares=False)], ["taken back", "taken back"], 0.0),
        ([_Moved(0.05), _Moved(-0.06, prepares=False)], ["left for _moved", ""], -0.01),
    ],
)
def test_what_prepares_the_next_refit_is_judged_with_it(moves: Any, told: Sequence[str], left: float) -> None:
    made, teacher, record = student(edits=())
    if left:  # the student is off by as much as both moves make up for
        for parameter in Stack(made).layers[0].parameters():
            parameter.add_(-left)
    before = [parameter.clone() for parameter in Stack(made).layers[0].parameters()]
    all_said = refit_survivors(moves, made, teacher, record, [], text_of(text, *moves))
    said = [line for line in all_said if "held-out KL" in line]
    assert len(said) == len(told)
    assert all(re.search(part, line) for part, line in zip(told, said, strict=True)), said
    for one, parameter in zip(before, Stack(made).layers[0].parameters(), strict=True):
        torch.testing.assert_close(parameter, one + left, atol=1e-6, rtol=0)


def test_states_leave_room_for_everything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, teacher, record = student()
    states = TeacherStates(teacher, tmp_path)
    monkeypatch.setattr(states_file.shutil, "disk_usage", lambda _: SimpleNamespace(free=states_file._SPARE - 1))
    expected, *_ = refitted(REFITS["output"])
    refit_survivors(
        [REFITS["output"]], made, teacher, record, [Remove(1)], text_of(text, REFITS["output"]), states=states
    )
    assert digest(made) == digest(expected)
    assert not list(tmp_path.rglob("*.rows"))
    assert "1.1 GB are free, which are left to the run's checkpoints); they are computed for each refit" in caplog.text


def test_states_that_cannot_be_kept_are_computed(tmp_path: Path) -> None:
    made, teacher, record = student()
    states = TeacherStates(teacher, tmp_path / "file")
    (tmp_path / "file").write_text("in the way")
    expected, *_ = refitted(REFITS["output"])
    refit_survivors(
        [REFITS["output"]], made, teacher, record, [Remove(1)], text_of(text, REFITS["output"]), states=states
    )
    assert digest(made) == digest(expected)
