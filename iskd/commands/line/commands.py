"""The commands: what each does, what it mainly takes, examples. What keys mean is said in conf/ alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        what: a line about it.
        more: what else a new user should know.
        examples: command lines, each with what it does behind a `#`.
        groups: config groups to choose from; of commands that read Hydra's overrides.
        keys: keys of the config that people set first.
        chosen: what this command takes of a group where nothing is said, other than conf/config.yaml; "" = nothing.
    """

    what: str
    more: str
    examples: tuple[str, ...]
    groups: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    chosen: Mapping[str, str] = field(default_factory=dict)

    @property
    def composes(self) -> bool:
        """Whether it reads Hydra's overrides; the others read folders."""
        return bool(self.groups)


_MODEL = ("model", "data", "trainer")

COMMANDS: Mapping[str, Command] = {
    "train": Command(
        "compress a model while it trains: edit, heal, measure, export",
        "A run writes everything into its own folder below runs/: config, metrics, checkpoints, the student (model/) "
        "and a page about it all.",
        (
            "iskd train  # SmolLM2: four blocks replaced one by one, healed, exported",
            "iskd train experiment=ild model=OWNER/NAME data=text data.path=FILE",
            "iskd train plan_only=true  # stages, sizes and time, nothing else",
            "iskd train resume=RUN_DIR  # go on after a stop",
            "iskd train -m schedule.count=2,4,6 block=slim,linear  # a sweep",
        ),
        (
            *("model", "data", "edit", "block", "mixer", "importance", "schedule", "refit", "loss", "optim"),
            *("trainer", "run", "logger", "eval", "budget", "experiment", "debug"),
        ),
        (
            *("schedule.count", "schedule.target_layers", "schedule.tokens", "schedule.lr", "schedule.floor"),
            *("data.path", "data.seq_len", "data.batch_size", "trainer.devices", "trainer.precision"),
            *("seed", "export.dtype", "plan_only", "resume", "cache_dir"),
        ),
    ),
    "score": Command(
        "score the layers of a model by an importance, without training it",
        "A table, and scores.csv, rows.csv and scores.png in a folder below runs/.",
        ("iskd score model=DIR importance=block_influence", "iskd score model=OWNER/NAME data=text data.path=FILE"),
        (*_MODEL, "importance"),
        ("run.score_tokens", "data.path", "data.seq_len", "seed"),
    ),
    "search": Command(
        "find out what every layer of a model becomes within a budget, for many budgets, without training",
        "Options are fitted layer by layer and kept in a library, scored and priced once, and chosen by a solver. A "
        "table, front.csv and a plan file for every budget in a folder below runs/; iskd train experiment=budget "
        "budget.plan=FILE carries one out.",
        (
            "iskd search model=DIR budget.params=[0.9,0.8,0.7]  # shares of the blocks",
            "iskd search model=DIR budget.decode_ms=[80%,60%] budget.context=4096",
            "iskd search model=DIR budget.params=0.8 budget.native=true budget.use=[remove,merge]",
        ),
        (*_MODEL, "budget"),
        (
            *("budget.params", "budget.bytes", "budget.cache_bytes", "budget.prefill_ms", "budget.decode_ms"),
            *("budget.context", "budget.native", "budget.use", "budget.fit_tokens", "budget.score_tokens"),
            *("budget.library", "data.path", "data.seq_len", "seed"),
        ),
        {"budget": "default"},
    ),
    "evaluate": Command(
        "measure a student (or any model) on tasks and text, beside its teacher on the same items",
        "model= is needed: the folder of a run, of an export or of any model, or OWNER/NAME. What is found also goes "
        "into the student's run, whose report and model card are written anew.",
        (
            "iskd evaluate model=RUN_DIR",
            "iskd evaluate model=RUN_DIR eval=full  # all tasks, all items",
            "iskd evaluate model=RUN_DIR eval.tasks=[] eval.text=FILE eval.efficiency_seconds=60",
            "iskd evaluate model=DIR reference=OTHER_DIR",
        ),
        ("model", "eval", "trainer"),
        (
            *("reference", "eval.tasks", "eval.limit", "eval.text", "eval.tokens", "eval.data_dir"),
            *("eval.efficiency_seconds", "data.bos"),
        ),
        {"model": "", "eval": "quick"},
    ),
    "profile": Command(
        "tell where the time of a training step goes, by span and by operator",
        "Takes the keys of iskd train; a table, and the same as JSON in a folder below runs/.",
        ("iskd profile experiment=ild", "iskd profile profile.operators=false run.compile=true"),
        (*_MODEL, "edit", "block", "mixer", "schedule", "loss", "experiment"),
        ("profile.steps", "profile.edits", "profile.operators", "data.batch_size", "data.seq_len"),
    ),
    "report": Command(
        "write the page of one run again, or one over several",
        "It lies in the folder of the run, or above those of all, with csv files of the same numbers beside it.",
        ("iskd report RUN_DIR", "iskd report runs/*  # one page over all", "iskd report SWEEP_DIR"),
    ),
    "curve": Command(
        "draw quality against depth of several runs in one picture",
        "And writes the numbers into a csv beside it.",
        ("iskd curve OUT.png RUN_DIR OTHER_DIR", "iskd curve OUT.png ILD=RUN_DIR ShortGPT=OTHER_DIR"),
    ),
    "verify": Command(
        "reopen exported students in a clean process and say whether they are what they were",
        "Exit code 0: all passed; 1: one failed; 2: one is no student.",
        ("iskd verify RUN_DIR", "iskd verify DIR --reference OTHER_DIR --no-timing"),
    ),
    "generate": Command(
        "let teacher and student continue the same prompt, side by side",
        "With how fast each is, and how many tokens they agree on.",
        ("iskd generate RUN_DIR 'Once upon a time'", "iskd generate DIR --teacher OWNER/NAME --tokens 128"),
    ),
    "push": Command(
        "put an exported student on the Hugging Face Hub",
        "--dry-run lists what would go up, checks it, and sends nothing.",
        ("iskd push RUN_DIR OWNER/NAME --dry-run", "iskd push DIR OWNER/NAME --private"),
    ),
    "completion": Command(
        "print what makes a shell complete iskd's commands, groups, choices and keys",
        "",
        ('eval "$(iskd completion bash)"  # in ~/.bashrc; zsh and fish likewise',),
    ),
}
