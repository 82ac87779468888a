"""The report's sections about where a run comes from, and about what its models say."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from iskd.evaluation.speaking import Sample
from iskd.report import html


def made_by(environment: Any) -> str:
    """Command lines, commit, versions and kind of host in a few lines; empty where the run does not tell."""
    known = environment if isinstance(environment, dict) and "commands" in environment else {}
    commands = known.get("commands")
    lines = [line for line in commands if isinstance(line, str)] if isinstance(commands, list) else []
    versions = known.get("versions")
    told = versions.items() if isinstance(versions, dict) else ()
    facts = [
        f"commit {known['commit']}" if known.get("commit") else "",
        ", ".join(f"{name} {version}" for name, version in told if version is not None),
        str(known.get("host") or ""),
        ", ".join(str(known[key]) for key in ("device", "precision") if known.get(key) is not None),
        f"{known['processes']} processes" if known.get("processes", 1) != 1 else "",
    ]
    shown = "; ".join(fact for fact in facts if fact)
    body = html.preformatted("\n".join(lines) if lines else None)
    return html.section("How it was made", body + (f'<p class="hint">{escape(shown)}</p>' if shown else ""))


def words_section(samples: Sequence[Sample]) -> str:
    """Both models' continuations of the same prompts, side by side; empty without any."""
    rows = [[sample.prompt, sample.teacher, sample.student, f"{sample.same} of {sample.tokens}"] for sample in samples]
    table = html.table("What both models say", ("prompt", "teacher", "student", "tokens alike"), rows, kind="words")
    hint = "Each takes its most likely token. tokens alike: how far they agree before they part."
    return html.section("In their own words", f'{table}<p class="hint">{hint}</p>' if table else "")
