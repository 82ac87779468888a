"""Two processes: DDP and FSDP2 give what one process gives while the architecture changes, and survive as much."""

from __future__ import annotations

import csv
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from iskd.evaluation import EvalSpec
from iskd.export import load
from iskd.importance.bi_veto import BlockInfluenceVeto
from iskd.models import sharding
from iskd.models.weights import model_tensors
from iskd.schedules.edits import MergeLayers
from iskd.schedules.iterative import Iterative
from iskd.training.state import checkpoint, checkpoint_files
from iskd.training.step.muon import MuonSpec
from tests import programs
from tests.evaluation.test_questions import WRITING, lines, piqa
from tests.factories import tiny
from tests.reliability import Bench
from tests.runs import TOKENS, Scripted, every_edit, largest_difference, write_text
from tests.worlds import World, run_world

STRATEGIES = ("ddp", "fsdp")
MANY = {None: 1, "ddp": 2, "fsdp": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with the text and the shards of all runs here."""
    path = tmp_path_factory.mktemp("ranks")
    write_text(path)
    return path


def trained(folder: Path, name: str, strategy: str | None, **changes: Any) -> list[dict[str, Any]]:
    """What the ranks of a finished run saw."""
    size = MANY[strategy]
    run_world(size, programs.train, folder, name, size, strategy, changes, folder=folder / "logs" / name)
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """A run with every kind of edit in one process."""
    return trained(folder, "one", None)[0]


def ends(folder: Path, *names: str) -> float:
    """Largest difference between the final weights of two runs."""
    first, second = (load_file(folder / f"{name}.safetensors") for name in names)
    return largest_difference(first, second)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_many_processes_equal_one(strategy: str, folder: Path, one: dict[str, Any]) -> None:
    """A fitted block, a removal, a mixer and a bottleneck: losses, weights, results; freed blocks; moved parameters."""
    seen = trained(folder, strategy, strategy)
    for mine in seen:
        assert max(abs(a - b) for a, b in zip(mine["losses"], one["losses"], strict=True)) < 1e-6
        assert all(len(set(step)) == 1 for step in mine["digests"]), "ranks differ after a step"
        assert mine["sums"] == pytest.approx(one["sums"], rel=1e-6), "the whole weights, after every step"
        assert mine["moved"]
        assert all(mine["moved"].values())
        assert mine["leaked"] == 0
        assert mine["roots"] == (1 if strategy == "fsdp" else 0)
        for a, b in zip(mine["stages"], one["stages"], strict=True):
            assert (a[0], a[3:]) == (b[0], b[3:])
            assert a[1:3] == pytest.approx(b[1:3], rel=1e-5, abs=1e-6)
    assert ends(folder, strategy, "one") < 5e-5


def test_without_the_reset_the_run_stops(folder: Path) -> None:
    """What `reset_roots` is for; if torch ever did without, this test would say so."""
    world = World(2, programs.forgetful, (folder, "leaky"), folder / "logs" / "leaky")
    assert world.wait() == [1, 1]
    assert "takes ['', 'model.layers.2'] for roots of the student in shards" in world.said()


def test_the_installed_torch_was_tested() -> None:
    assert sharding.UNTESTED is None, "this file passed with it? then add its minor to iskd.models.sharding.TESTED"


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bit_for_bit(strategy: str, tmp_path: Path) -> None:
    """A few of the trials whose table is in docs/reliability.md."""
    bench = Bench(tmp_path, 2, strategy, seed=1)
    for number, (place, call, victim) in enumerate(
        [("save", 5, 0), ("regroup", 2, 1)][: 2 if strategy == "ddp" else 1]
    ):
        trial = bench.trial(number, place, call, victim)
        assert trial.results
        assert (trial.weights, trial.optimizer) == (0, 0)
        assert trial.seconds < 60
        other = (tmp_path / "logs" / f"trial{number}" / f"rank{1 - victim}.log").read_text()
        assert f"rank {victim} died, so rank {1 - victim} stops as well" in other


@pytest.mark.parametrize(("missing", "strategy"), [(0, "ddp"), (1, "fsdp")])
def test_a_rank_that_never_comes_is_not_waited_for(missing: int, strategy: str, folder: Path) -> None:
    """Torch would wait for as long as for a collective: half an hour."""
    name = f"absent-{missing}"
    world = World(2, programs.absent, (folder, name, missing, strategy), folder / "logs" / name)
    codes = world.wait(60)
    assert codes == [missing, 1 - missing], world.said()
    assert f"rank {missing} did not come to 127.0.0.1:" in world.said()
    assert "ISKD_MEET_SECONDS=SECONDS" in world.said()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("strategy", "place", "call"),
    [
        ("ddp", "validation", 0),
        ("ddp", "fit", 0),
        pytest.param("ddp", "validation", 2, marks=SLOW),
        pytest.param("fsdp", "validation", 2, marks=SLOW),
        pytest.param("fsdp", "fit", 0, marks=SLOW),
        pytest.param("fsdp", "samples", 0, marks=SLOW),
    ],
)
def test_a_stop_of_one_process_ends_all_in_the_middle_of_their_work(
    strategy: str, place: str, call: int, folder: Path, one: dict[str, Any]
) -> None:
    """Validation of the teacher, a fit, validation after healing, the end; what was begun is done again."""
    name = f"inside-{strategy}-{place}-{call}"
    world = World(2, programs.stopped_inside, (folder, name, strategy, place, call), folder / "logs" / name)
    assert sorted(world.wait(60)) == [0, 143], world.said()
    again = trained(folder, name, strategy, resume=True)[0]
    for mine, other in zip(again["stages"], one["stages"], strict=True):
        assert mine[1:3] == pytest.approx(other[1:3], rel=1e-5, abs=1e-6)


def test_sharded_checkpoints_resume_and_are_whole(folder: Path, one: dict[str, Any]) -> None:
    options = {"checkpoints": "sharded", "checkpoint_every": 2}
    world = World(
        2, programs.stopped, (folder, "sharded", 2, "fsdp", {"options": options}, 0, 11), folder / "logs" / "s1"
    )
    assert sorted(world.wait()) == [0, 143], world.said()
    newest = checkpoint_files.newest(folder / "sharded" / "checkpoints")
    assert newest is not None
    names = {file.name for file in newest.glob("student*")}
    assert names == {"student-00001-of-00002.safetensors", "student-00002-of-00002.safetensors"}
    trained(folder, "sharded", "fsdp", options=options, resume=True)
    assert ends(folder, "sharded", "one") < 5e-5
    newest = checkpoint_files.newest(folder / "sharded" / "checkpoints")
    assert newest is not None
    assert (
        largest_difference(dict(checkpoint.Stored(newest, "student")), load_file(folder / "sharded.safetensors")) == 0
    )


@pytest.mark.parametrize(
    ("before", "after"), [("ddp", None), (None, "fsdp"), pytest.param("fsdp", "ddp", marks=pytest.mark.slow)]
)
def test_the_number_of_processes_changes_at_a_stage_boundary(
    before: str | None, after: str | None, folder: Path, one: dict[str, Any]
) -> None:
    """Killed right after the first stage's checkpoint; the same windows per step, so the same run."""
    name, size = f"{before}-{after}", MANY[before]
    logs = folder / "logs" / name
    world = World(size, programs.killed, (folder, name, size, before, {}, 0, "regroup", 1), logs)
    assert world.wait()[0] == -signal.SIGKILL, world.said()
    newest = checkpoint_files.newest(folder / name / "checkpoints")
    assert newest is not None
    assert newest.name.endswith(checkpoint_files.BOUNDARY)
    size = MANY[after]
    run_world(size, programs.train, folder, name, size, after, {"resume": True}, folder=logs)
    assert ends(folder, name, "one") < 5e-5


def test_the_number_of_processes_does_not_change_inside_a_stage(folder: Path) -> None:
    world = World(2, programs.stopped, (folder, "inside", 2, "ddp", {}, 1, 3), folder / "logs" / "inside")
    world.wait()
    alone = World(1, programs.train, (folder, "inside", 1, None, {"resume": True}), folder / "logs" / "inside-alone")
    assert alone.wait() == [1]
    assert "lies inside stage 1, made by 2 processes, and now there are 1" in alone.said()


@pytest.mark.parametrize(
    ("strategy", "after"), [("ddp", "ddp"), ("fsdp", "fsdp"), pytest.param("fsdp", "ddp", marks=pytest.mark.slow)]
)
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    strategy: str, after: str, folder: Path, one: dict[str, Any]
) -> None:
    """Inside a stage; the strategy may change there as well, the number of processes may not."""
    name = f"stopped-{strategy}-{after}"
    world = World(2, programs.stopped, (folder, name, 2, strategy, {}, 1, 11), folder / "logs" / name)
    assert world.wait() == [143, 0], world.said()
    newest = checkpoint_files.newest(folder / name / "checkpoints")
    assert newest is not None
    state = checkpoint.read_state(newest)
    assert (len(state.finished), state.batch) == (1, 4), "the 11th micro-batch is the first of the sixth step"
    trained(folder, name, after, resume=True)
    assert ends(folder, name, "one") < 5e-5


@pytest.mark.parametrize("strategy", [None, pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_fresh_process_for_every_edit(strategy: str | None, folder: Path, one: dict[str, Any]) -> None:
    """`schedule.restart_at_edit`: as many processes as edits, one after the other, and no private name of torch."""
    name, size = f"restart-{strategy}", MANY[strategy]
    codes = []
    for _ in range(8):
        arguments = (folder, name, size, strategy, {"restart": True, "resume": bool(codes)})
        world = World(size, programs.train, arguments, folder / "logs" / name)
        codes.append(world.wait())
        assert all(code in (0, 75) for code in codes[-1]), world.said()
        if codes[-1] == [0] * size:
            break
    assert len(codes) == 5, "four edits, each in a process of its own"
    rows = list(csv.DictReader((folder / name / "metrics.csv").read_text().splitlines()))
    assert sum(bool(row["val/kl"]) for row in rows) == 5, "the teacher's row and one for every stage"
    if strategy is None:
        assert ends(folder, name, "one") == 0
    else:
        assert ends(folder, name, "one") < 5e-5


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
def test_a_missed_floor_rolls_back_on_all_ranks(strategy: str | None, folder: Path) -> None:
    """The first stage is undone: the student is the teacher again, to the bit, in every layout."""
    name = f"floor-{strategy}"
    seen = trained(folder, name, strategy, floor=1e9)
    assert [stage[-1] for stage in seen[0]["stages"]] == ["kept", "rolled_back"]
    teacher = model_tensors(tiny("llama", vocab=257))
    assert largest_difference(load_file(folder / f"{name}.safetensors"), teacher) == 0


def test_scores_and_choices_are_the_same_in_shards(folder: Path) -> None:
    """Leave-one-out sweeps, cosine scores, rescoring, judged merges and steps of Muon on a student in shards."""
    choose = Iterative(MergeLayers(), count=2, tokens=4 * TOKENS, lr=1e-3, rescore=True)
    changes = {"schedule": choose, "importance": BlockInfluenceVeto(), "optim": MuonSpec()}
    alone, split = (trained(folder, f"scores-{s}", s, **changes)[0]["stages"] for s in (None, "fsdp"))
    assert [stage[0] for stage in alone] == [stage[0] for stage in split]
    assert [stage[1] for stage in split] == pytest.approx([stage[1] for stage in alone], rel=1e-5)


def asking(folder: Path, *names: str) -> EvalSpec:
    """Likelihoods and texts that are written, here and in the harness, and a text."""
    rows = [{"text": f"number {n} is", "answer": f"{n}", "summary": f"{n}"} for n in range(2)]
    file = lines(folder, "summary", rows) / "summary" / "eval.jsonl"
    tasks, cache = folder / "tasks", json.dumps(str(folder / "cache"))
    tasks.mkdir(exist_ok=True)
    config = WRITING.replace("{test: FILE}}", f"{{test: {json.dumps(str(file))}}}, cache_dir: {cache}}}")
    (tasks / "writing.yaml").write_text(config)
    (folder / "asked.txt").write_text("Sentence number 500 says that 500 plus 3 is 503. " * 8)
    options: dict[str, Any] = {"text": str(folder / "asked.txt"), "tokens": 96, "window": 32, "resamples": 5}
    return EvalSpec(names, 2, str(lines(folder, "piqa", piqa(4))), str(tasks), every="stage", **options)


@pytest.mark.parametrize(
    "names", [("copy", "recall_64", "summary"), pytest.param(("piqa", "writing"), marks=pytest.mark.slow)]
)
def test_students_in_shards_are_asked_as_in_one_process(names: tuple[str, ...], folder: Path) -> None:
    """The teacher, and students with a compact block and a mixer: scores of every task, perplexity, words."""
    replaced, _, converted, _ = every_edit(1)
    keep = {"options": {"keep_students": 1, "samples": 2}}
    changes = {"schedule": Scripted([replaced, converted]), "evaluation": asking(folder, *names), **keep}
    runs = [f"{names[0]}-{strategy}" for strategy in (None, "fsdp")]
    (alone,), split = (trained(folder, run, s, **changes) for run, s in zip(runs, (None, "fsdp"), strict=True))
    assert split[0]["asked"] == split[1]["asked"], "the first process's count"
    assert len(split[0]["asked"]) == len(alone["asked"]) == 3
    for mine, other in zip(split[0]["asked"], alone["asked"], strict=True):
        assert mine["text"]["sha256"] == other["text"]["sha256"]
        assert mine["text"]["perplexity"] == pytest.approx(other["text"]["perplexity"], rel=1e-4)
        scores = [[(task["task"], task["items"], task["metrics"]) for task in each["tasks"]] for each in (mine, other)]
        assert [score[:2] for score in scores[0]] == [score[:2] for score in scores[1]]
        for (_, _, ours), (_, _, theirs) in zip(*scores, strict=True):
            for who in ("student", "teacher"):
                assert ours[who] == pytest.approx(theirs[who], rel=1e-4, abs=1e-6)

    for run, told in zip(runs, (alone, split[0]), strict=True):  # the last stage's student is the run's
        at_the_end = json.loads((folder / run / "evaluation.json").read_text())
        assert [task["metrics"] for task in at_the_end["tasks"]] == [
            task["metrics"] for task in told["asked"][-1]["tasks"]
        ]
    said = [json.loads((folder / run / "samples.json").read_text()) for run in runs]
    assert said[0] == said[1]
    assert len(said[0]) == 2
    kept = [dict(load(folder / run / "students" / "002").state_dict()) for run in runs]
    assert largest_difference(*kept) < 5e-5


def test_processes_that_end_a_text_sooner_go_on_with_the_others(folder: Path) -> None:
    """Every token is a pass in which blocks are gathered: whoever left would leave the others waiting for ever."""
    run_world(2, programs.written_in_shards, folder, -1, folder=folder / "logs" / "written")
    (first,), _ = json.loads((folder / "written-0.json").read_text())
    run_world(2, programs.written_in_shards, folder, first[7], folder=folder / "logs" / "written-sooner")
    told = [json.loads((folder / f"written-{rank}.json").read_text()) for rank in range(2)]
    assert all(alone == found for alone, found in told)
    assert len(told[1][0][0]) < len(told[0][0][0]) == 5 + 8


def test_ranks_that_see_different_checkpoints_stop(folder: Path) -> None:
    world = World(2, programs.stopped, (folder, "torn", 2, "ddp", {}, 1, 11), folder / "logs" / "torn")
    world.wait()
    world = World(2, programs.torn_on_one_rank, (folder, "torn"), folder / "logs" / "torn-on-one")
    assert world.wait(60) == [1, 1]
    for log in world.logs:
        assert "the processes do not agree (newest whole checkpoint, teacher): rank 0" in log.read_text()


def test_one_rank_with_a_loss_that_is_not_finite_makes_all_skip(folder: Path) -> None:
    run_world(2, programs.poisoned, folder, "poison", 1, folder=folder / "logs" / "poison")
    seen = [json.loads((folder / f"poison-{rank}.json").read_text()) for rank in (0, 1)]
    assert seen[0]["skipped"] == seen[1]["skipped"] == 1
    assert all(len(set(step)) == 1 for step in seen[0]["digests"])


def test_an_error_on_one_rank_ends_the_other(folder: Path) -> None:
    """Rank 1 does not even exit; rank 0 stops by itself, long before any timeout of torch."""
    world = World(2, programs.lonely, (folder, "lonely"), folder / "logs" / "lonely")
    world.processes[0].join(45)
    assert world.processes[0].exitcode == 1, world.said()
    world.processes[1].kill()
    world.wait()
    assert "rank 1 died, so rank 0 stops as well" in world.logs[0].read_text()


def test_a_full_disk_on_rank_0_ends_all_ranks_alike(folder: Path) -> None:
    started = time.monotonic()
    world = World(2, programs.full_disk, (folder, "full"), folder / "logs" / "full")
    assert world.wait() == [1, 1]
    assert time.monotonic() - started < 60
    for log in world.logs:
        assert "the disk is full" in log.read_text()
