"""The rooms of the package, read off the source: the place of every file, its imports, the libraries it may know."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "iskd"

# From the bottom up: a room may import itself and the rooms above it in this list, and nothing below.
ROOMS = (
    "system",
    "plan",
    "models",
    "losses",
    "teacher",
    "data/files",
    "data",
    "blocks",
    "mixers/ops",
    "mixers/modules",
    "mixers",
    "evaluation/tasks",
    "evaluation",
    "refits",
    "importance",
    "schedules",
    "schedules/budget",
    "report/figures",
    "report",
    "export",
    "training/step",
    "training/state",
    "training/metrics",
    "training",
    "training/profile",
    "commands/line",
    "commands/values",
    "commands/build",
    "commands",
    "commands/search",
)
SHELVES = ("losses", "blocks", "mixers", "refits", "importance", "schedules")
"""Rooms of parts: one file and one yaml are a part. A part never imports another of its kind."""
TOP = "(top)"
"""iskd/__init__.py and __main__.py, which may import everything."""
AT_THE_TOP, IN_A_ROOM, LINES = 19, 17, 300

# A face holds what other rooms need often. Beyond it they may open these files; all others are a room's own business.
OPEN = {
    "system/allocator": "set before torch is imported, so before any face is",
    "system/faults": "what a step, a checkpoint and the end of a run say of the same fault",
    "system/files": "readers of a run's files go by its limits",
    "system/machine": "one clock and one description of the machine for every measurement",
    "system/patches": "what another library is made to do, in one file, where it is made to",
    "system/ranks": "a process among several starts and names nothing by itself",
    "system/reading": "what a field of a file may hold is said where the field is",
    "system/run_lock": "held by whoever claims a run's folder, handed on to a fresh process",
    "system/precision": "device and precision of passes outside the trainer",
    "system/stop_signals": "the trainer and the parent of a fresh process listen",
    "system/tables": "tables of metrics, scores and curves, written and read",
    "system/text": "numbers look alike in logs, tables, pages and cards",
    "system/typed_values": "keys of a config take what the arguments they become take",
    "system/version": "exports say what wrote them, commands and teachers by name what can be chosen",
    "system/watchdog": "started by the trainer",
    "plan/token_budget": "commands ask for the default number of tokens, schedules have that of a CPU",
    "plan/budget_plan": "found by a search, carried out by a schedule, shown by reports",
    "plan/edits": "what else a record may name, and edits in words",
    "plan/failure": "written where a run fails, read where runs are listed",
    "plan/metric_names": "metrics are logged, drawn and described under one name",
    "plan/options": "the keys of `run:`",
    "plan/reading": "records and stages come back from files of runs, checkpoints and exports",
    "plan/results": "rows of the stage table, and who is the teacher, the student, kept",
    "plan/run_files": "names of the files of a run, for everybody who writes or reads one",
    "plan/saved_config": "a run's config is taken up, compared, described and logged",
    "plan/stage": "the words of `train` and `shape`, checked where they are used",
    "plan/trainer_settings": "the keys of `trainer:`",
    "plan/summary": "what a sweep is told",
    "models/block_calls": "refits walk two models block by block",
    "models/cache": "the memory of a cache is measured",
    "models/capture": "alignment, importance and fits read other states than signals hold",
    "models/families": "blocks and exports ask for a family's paths and sizes",
    "models/head": "the slope of a softcap, for the closed form of a loss",
    "models/hosting": "mixers and alignment know whether they are hosted",
    "models/packing": "documents apart: data, mixers and a step ask",
    "models/projections": "blocks, mixers and adapters read linear maps in every layout",
    "models/sharding": "every room that touches weights must know shards",
    "models/signals": "labels of windows",
    "models/skeletons": "teachers and students are bounded by their weights before they are built",
    "models/stack": "a mixer asks for the class of a hosted module",
    "models/surgery": "the only place where structure changes, called as surgery.apply",
    "models/tokenizers": "models are compared only under one tokenizer",
    "models/model_folder": "what is no model, for teachers and exports alike",
    "models/weights": "named tensors and digests, for checkpoints, exports and the cache",
    "losses/topk_kl": "a step that reads the teacher's cache",
    "report/terminal": "one console for whatever is printed",
    "teacher/cache": "what decides what a teacher says binds a library too",
    "teacher/given": "iskd.compress lends a model in memory",
    "blocks/base": "a library fits compact blocks by themselves",
    "blocks/identity": "stands where a plan has no layer, so that numbers stay",
    "blocks/merge": "a library merges pairs by themselves",
    "blocks/streams": "refits and a library keep the states of all windows where fits do",
    "blocks/ridge": "refits solve the equations that blocks are fitted by",
    "data/hub_rows": "a resumed run keeps the commit of its data set, whichever branch is named",
    "data/mix": "commands make one of the sources that a config describes",
    "data/overlap": "passages of tasks are as long as those of text",
    "data/sources": "that all sources are chats, at which commit; documents that are on every machine",
    "data/loader": "a step pins its batch the way the loader does",
    "evaluation/bootstrap": "importance draws windows as evaluation draws items",
    "evaluation/efficiency": "measured at the end of a run and by iskd evaluate",
    "evaluation/evaluator": "a run finds out at its start that its student can be asked",
    "evaluation/judging": "importance=task_accuracy judges the same items the same way",
    "evaluation/likelihood": "importance=task_accuracy reads many students' likelihoods in one pass",
    "evaluation/results": "names and readers of what was measured, for pages and cards",
    "evaluation/speaking": "iskd generate, iskd verify and the end of a run let models speak alike",
    "evaluation/tasks/task_items": "importance=task_accuracy draws from the same items",
    "export/loading": "a run that goes on from a student takes up its record",
    "schedules/edits": "which layers of a conversion another mixer is for, in a config",
    "schedules/mixed": "steps are made from a config, and name parts of their own",
    "teacher/load": "which model a config names, before it is loaded",
    "refits/reading": "an editor divides the text of its run once",
    "refits/walk": "a library refits blocks that no walk leads to",
    "refits/local": "a library trains every option by itself",
    "refits/output": "a library re-solves what stands behind a new mixer",
    "importance/racing": "options race by the statistics of layers",
    "importance/sweep": "what options cost is asked of students near each other",
    "importance/angular": "iskd score draws its runs of layers",
    "report/budget": "a plan by layer is shown before it is carried out",
    "report/contexts": "W&B gets the rows of the page's curves by length",
    "report/read_run": "W&B is told what the page tells",
    "report/figures/score_curves": "W&B gets the points of the page's curves",
    "report/stage_rows": "which columns of the stages a narrow terminal leaves out",
    "report/run_page": "the end of a run names its page and takes a picture",
    "report/runs_page": "iskd report says where the page goes",
    "export/card_measured": "an evaluation renews the card; no name of the face, since it brings Lightning",
    "teacher/origin": "which teacher a student had: iskd generate and iskd evaluate load it",
    "export/student": "a budget asks whether plain transformers opens a student",
    "export/hub": "what iskd push lists and sends",
    "training/state/resuming": "a resumed config is bounded by its checkpoint before a teacher is made of it",
    "training/profile/plan_ahead": "a plan where the run itself cannot be made",
    "training/facts": "what layers were selected by is known before a run",
}

# A file holds one idea, in at most LINES lines; a longer one says here why it is one all the same.
LONG = {
    "data/module": "what Lightning asks of data, and what a run asks beside it",
    "evaluation/efficiency": "one measurement: warm-up, turns and medians mean something only together",
    "evaluation/harness": "all that knows lm_eval's shapes, behind draw and score",
    "evaluation/results": "what two files of measurements hold, field after field, and one reader for each",
    "evaluation/tasks/task_items": "one table of file formats, a few lines for each task",
    "commands/values/config": "from a command line to values as meant, step after step",
    "export/card": "one page, section after section",
    "importance/racing": "one race, its statistics beside it",
    "importance/sweep": "one sweep; its cache must know all that a trunk depends on",
    "mixers/base": "one contract, from projections to the state in the cache",
    "refits/output": "the closed form of attention and MLP, one after the other or in parallel",
    "report/runs_page": "one page, section after section",
    "teacher/load": "one way from what a config names to a teacher in memory",
    "training/stages": "one loop, to be read from top to bottom",
    "training/step/module": "one step, and what Lightning asks of whoever makes it",
    "training/editing": "one edit: structure, fits, refits, optimizer, and which text each of them reads",
}

# Names of faces that only others take: code beside written students, whoever trusts a package, a mixer of one's own.
FOR_USERS = {("plan", "allow"), ("mixers", "Attention")}
OUTSIDE = ("tests", "benchmarks", "experiments")

# Where a library may be imported: rooms or files.
LIBRARIES = {
    "hydra": {"commands", "commands/build", "commands/values"},
    "omegaconf": {"commands", "commands/build", "commands/values"},
    "lightning": {
        "data/module",
        "training/callback",
        "training/facts",
        "training/finish",
        "training/metrics/loggers",
        "training/metrics/metrics_file",
        "training/parts",
        "training/progress_bar",
        "training/runner",
        "training/step/module",
        "training/strategies",
    },
}
# Names inside transformers' models. A part's own attribute of such a name (self.q_proj) is its own business.
FOREIGN = {"self_attn", "q_proj", "k_proj", "v_proj", "o_proj", "c_attn", "input_layernorm", "embed_tokens", "wte"}
FOREIGN_PATHS = {("model", "layers"), ("transformer", "h"), ("model", "norm"), ("transformer", "ln_f")}
# Folders of one machine; spelt so that this file does not contain what it forbids.
MACHINE_PATH = re.compile(r"(?<![\w.~$}{)*/-])/(?:work|tmp|root|home|Users|mnt|scratch|data|var)" + r"/\w")
IN_AN_IMAGE = ("/" + "home/user", "/" + "var/lib/apt/lists")
"""Folders of the container, which are the same on every machine."""
TEXT = {".py", ".yaml", ".yml", ".toml", ".md", ".cfg", ".sh", ".txt", ".lock", ".json", ".ipynb", ""}

FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
"""By name: `plan/edits`, `blocks/slim`, `plan/__init__`."""


def room_of(file: str) -> str:
    """The room a file lies in; a name of its own for a file in no room."""
    folder = file.rpartition("/")[0]
    return folder if folder in ROOMS else TOP if not folder else f"no room: {folder}"


def floor(room: str) -> int:
    return len(ROOMS) if room == TOP else ROOMS.index(room)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def dotted_imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every imported dotted name with its line: at the top, inside functions, and for type checkers alone."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: write the import from iskd, not relative"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


@cache
def iskd_imports(file: str) -> list[tuple[str, str, int]]:
    """Imported files of iskd, the name taken from them ("" = the module) and the line; a face is `room/__init__`."""
    found = []
    for dotted, line in dotted_imports(FILES[file]):
        names = dotted.split(".")
        if names[0] != "iskd":
            continue
        for end in range(len(names), 0, -1):
            name = "/".join(names[1:end])
            other = name if name in FILES else f"{name}/__init__" if f"{name}/__init__" in FILES else "__init__"
            if other in FILES and (other != "__init__" or end == 1):
                found.append((other, ".".join(names[end:]), line))
                break
    return found


def at(file: str | Path, line: int) -> str:
    path = FILES[file] if isinstance(file, str) else file
    return f"{path.relative_to(ROOT)}:{line}"


def house(room: str) -> str:
    """A room with its sub-rooms: training of training/step."""
    return room.split("/")[0]


# ---- the layout ------------------------------------------------------------------------------------------------------


def test_every_file_lies_in_a_room() -> None:
    lost = [file for file in FILES if room_of(file).startswith("no room")]
    assert not lost, f"in no room of ROOMS: {lost}"
    assert {room_of(file) for file in FILES} == {*ROOMS, TOP}
    assert {file for file in FILES if room_of(file) == TOP} == {"__init__", "__main__"}


def test_rooms_are_few_and_small() -> None:
    entries = [entry.name for entry in PACKAGE.iterdir() if entry.name != "__pycache__"]
    assert len(entries) <= AT_THE_TOP, sorted(entries)
    sizes = {room: sum(room_of(file) == room for file in FILES) for room in ROOMS}
    assert {room: size for room, size in sizes.items() if size > IN_A_ROOM} == {}


def test_tests_lie_in_the_rooms_they_are_about() -> None:
    folders = {path.parent.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    assert folders <= {*ROOMS, "project"}


def first_line(room: str) -> str:
    return (ast.get_docstring(tree(FILES[f"{room}/__init__"])) or "").split("\n")[0]


def test_the_readme_draws_the_rooms() -> None:
    files = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Files\n")[2].partition("\n## ")[0]
    drawn = re.findall(r"^ {6}(\w+)/ +(.+)$", files, re.MULTILINE)
    assert drawn == [(room, first_line(room)) for room in ROOMS if "/" not in room]


def test_contributing_lists_the_rooms() -> None:
    listed = re.findall(r"^\| `([\w/]+)` \| (.+) \|$", contributing("Rooms"), re.MULTILINE)
    assert listed == [(room, first_line(room)) for room in ROOMS]


def contributing(title: str) -> str:
    """A section of CONTRIBUTING.md."""
    return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_contributing_says_where_parts_live() -> None:
    """A part of each kind is where the table of `Adding a part` would put it."""
    row = re.compile(r"^\| \w+ \| .*`(iskd/\S+\.py)` \| `conf/(\w+)/mine\.yaml` \|", re.MULTILINE)
    homes = {group: path for path, group in row.findall(contributing("Adding a part"))}
    assert set(homes) == {"importance", "mixer", "block", "refit", "loss", "schedule", "edit", "model"}
    target = re.compile(r"_target_: (iskd\.[\w.]+)\.\w+")
    for group, home in homes.items():
        text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "conf" / group).glob("*.yaml"))
        files = {name.replace(".", "/") + ".py" for name in target.findall(text)}
        if group == "edit":
            assert files == {home}
        elif home.endswith("/mine.py"):
            assert {file.rpartition("/")[0] for file in files} == {home.rpartition("/")[0]}


def test_the_package_is_ascii() -> None:
    assert not [file for file, path in FILES.items() if not path.read_text(encoding="utf-8").isascii()]


def test_a_long_file_says_why_it_is_one_idea() -> None:
    long = {file for file, path in FILES.items() if len(path.read_text(encoding="utf-8").splitlines()) > LINES}
    assert long == set(LONG), (
        f"above {LINES} lines without a reason in LONG: {sorted(long - set(LONG))}; "
        f"reasons that nothing needs: {sorted(set(LONG) - long)}"
    )


# ---- the arrows ------------------------------------------------------------------------------------------------------


def test_imports_point_one_way() -> None:
    wrong = [
        f"{at(file, line)} imports {other}: {room_of(other)} is no room that {room_of(file)} may import"
        for file in FILES
        for other, _, line in iskd_imports(file)
        if floor(room_of(other)) > floor(room_of(file))
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_have_no_cycle() -> None:
    graph = {file: sorted({other for other, _, _ in iskd_imports(file)} - {file}) for file in FILES}
    finished: set[str] = set()

    def visit(file: str, trail: tuple[str, ...]) -> None:
        assert file not in trail, "import cycle: " + " -> ".join((*trail[trail.index(file) :], file))
        if file not in finished:
            for other in graph[file]:
                visit(other, (*trail, file))
            finished.add(file)

    for file in graph:
        visit(file, ())


def parts() -> set[str]:
    """Files that the configuration names, except base.py; all others of a shelf are what its parts share."""
    mention = re.compile(rf"\biskd\.((?:{'|'.join(SHELVES)})\.\w+)\.\w+")
    named = {name for path in (ROOT / "conf").rglob("*.yaml") for name in mention.findall(path.read_text("utf-8"))}
    return {name.replace(".", "/") for name in named if not name.endswith((".base", ".edits"))}


def test_parts_of_one_kind_do_not_import_each_other() -> None:
    configured = parts()
    wrong = [
        f"{at(file, line)}: move what {file} and {other} share into {house(file)}/base.py"
        for file in FILES
        for other, _, line in iskd_imports(file)
        if house(other) == house(file) and other in configured and not file.endswith("/__init__")
    ]
    assert not wrong, "\n".join(wrong)


# ---- faces -----------------------------------------------------------------------------------------------------------


def face(room: str) -> list[str]:
    return list(getattr(importlib.import_module("iskd." + room.replace("/", ".")), "__all__", []))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_a_face(room: str) -> None:
    """Three to ten names that hide no file, and a paragraph that says truly what the room imports."""
    docstring = ast.get_docstring(tree(FILES[f"{room}/__init__"])) or ""
    if room == "commands":  # a command pays for its own imports only; its face is the command line
        assert not face(room)
    else:
        assert 3 <= len(face(room)) <= 10, face(room)
        hidden = [name for name in face(room) if f"{room}/{name}" in FILES]
        assert not hidden, f"names of files in {room}: {hidden}"
        said = re.search(r"^Imports: ([^.]*(?:\.\w[^.]*)*)\.$", docstring, re.MULTILINE)
        assert said, f"{room} does not say what it imports"
        told = {name.replace(".", "/") for name in re.split(r",\s+", said[1])} - {"nothing of iskd"}
        real = {room_of(other) for file in FILES if room_of(file) == room for other, _, _ in iskd_imports(file)}
        assert told == real - {room, TOP}


def test_somebody_takes_every_name_of_a_face() -> None:
    """Another room, a test, a benchmark or an experiment; `FOR_USERS` lists what only code outside does."""
    # a face that is imported as a module gives all of its names
    taken = {
        (other, name) for file in FILES for other, name, _ in iskd_imports(file) if room_of(file) != room_of(other)
    }
    outside = {name for folder in OUTSIDE for path in (ROOT / folder).rglob("*.py") for name, _ in dotted_imports(path)}
    idle = {
        (room, name)
        for room in ROOMS
        for name in face(room)
        if not {(f"{room}/__init__", name), (f"{room}/__init__", "")} & taken
        and f"iskd.{room.replace('/', '.')}.{name}" not in outside
    }
    assert idle == FOR_USERS


def test_other_rooms_come_in_by_the_face() -> None:
    """A name of a face is taken from the face; beyond it only the files of `OPEN` are entered."""
    faces = {(room, name) for room in ROOMS for name in face(room)}
    wrong, opened = [], set()
    for file in FILES:
        for other, name, line in iskd_imports(file):
            room = room_of(other)
            if room == TOP or house(room) == house(room_of(file)) or other.endswith("__init__"):
                continue
            if (room, name) in faces and room_of(file) != TOP:
                wrong.append(f"{at(file, line)}: take {name} from iskd.{room.replace('/', '.')}")
            elif other not in OPEN and room_of(file) != TOP:
                wrong.append(f"{at(file, line)}: {other} is private to {room}; add its use to the face, or to OPEN")
            opened.add(other)
    assert not wrong, "\n".join(wrong)
    assert not set(OPEN) - opened, "open without need"


# ---- libraries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_a_library_is_known_only_where_it_belongs(library: str) -> None:
    wrong = [
        f"{at(file, line)} imports {dotted}"
        for file in FILES
        for dotted, line in dotted_imports(FILES[file])
        if dotted.split(".")[0].removeprefix("pytorch_") == library and not {file, room_of(file)} & LIBRARIES[library]
    ]
    assert not wrong, "\n".join(wrong)


def test_plan_knows_no_torch() -> None:
    assert not [
        at(file, line)
        for file in FILES
        if room_of(file) == "plan"
        for dotted, line in dotted_imports(FILES[file])
        if dotted.split(".")[0] == "torch"
    ]


def test_only_models_knows_the_attribute_paths_of_transformers() -> None:
    wrong = []
    for file, path in FILES.items():
        for node in ast.walk(tree(path)) if room_of(file) != "models" else ():
            if not isinstance(node, ast.Attribute) or (isinstance(node.value, ast.Name) and node.value.id == "self"):
                continue
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else None
            if node.attr in FOREIGN or (owner, node.attr) in FOREIGN_PATHS:
                wrong.append(f"{at(file, node.lineno)}: .{node.attr} belongs into the room models")
    assert not wrong, "\n".join(wrong)


def tracked_files() -> list[Path]:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_no_file_names_a_folder_of_one_machine() -> None:
    wrong = []
    for path in tracked_files():
        if path.suffix in TEXT and path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            known = IN_AN_IMAGE if path.name in ("Dockerfile", "test_image.py") else ()
            wrong += [
                at(path, number)
                for number, line in enumerate(lines, 1)
                if MACHINE_PATH.search(re.sub("|".join(known), "", line) if known else line)
            ]
    assert not wrong, "absolute paths in: " + ", ".join(wrong)
