"""The numbers of a page as csv files beside it. What lies there under such a name and is not ours stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from iskd.plan import StageResult
from iskd.plan.metric_names import QUALITY
from iskd.plan.run_files import STAGES_TABLE_FILE
from iskd.report import html
from iskd.system import write_whole
from iskd.system.tables import write_csv

_PAGE_MARK = " - iskd report</title>"
_FIELDS = (
    *("name", "status", "params", "block_params", *QUALITY, "tokens", "seconds", "train_tokens_per_s", "tokens_per_s"),
)


def write_page(path: Path, text: str) -> Path:
    """Write a page of ours. Raises ValueError where another file has that name."""
    if _is_file(path) and _PAGE_MARK not in _begin(path):
        raise ValueError(f"{path} is no page of iskd's and is not overwritten: move it, or choose another folder")
    return write_whole(path, text)


def write_table(path: Path, rows: Sequence[Sequence[object]]) -> bool:
    """Write a csv of ours, known by its first two heads; False, and nothing is written, where another file is there."""
    if _is_file(path) and not _begin(path).startswith(f"{rows[0][0]},{rows[0][1]},"):
        return False
    write_csv(path, rows)
    return True


def _is_file(path: Path) -> bool:
    """Whether a file lies there; what else has the name (a link, a folder) is left to whoever writes."""
    return path.is_file() and not path.is_symlink()


def _begin(path: Path) -> str:
    """The first bytes of a file."""
    with open(path, "rb") as file:
        return file.read(1 << 16).decode("utf-8", errors="replace")


def write_stage_table(run_dir: Path, stages: Sequence[StageResult]) -> bool:
    """Every stage with what was measured before and after healing, and the bounds of 95 %; as `write_table`."""
    bounds = [f"{key}_{end}" for key in QUALITY for end in ("before", "low95", "high95")]
    rows: list[list[object]] = [["iskd_stage", *_FIELDS, *bounds]]
    for stage in stages:
        before, known = stage.before or {}, stage.intervals or {}
        told = [value for key in QUALITY for value in (before.get(key), *known.get(key, (None, None)))]
        rows.append([stage.index, *(getattr(stage, name) for name in _FIELDS), *told])
    return write_table(run_dir / STAGES_TABLE_FILE, rows)


def links(folder: Path, files: Iterable[tuple[str, str]]) -> str:
    """Those of the files that lie in the folder of the page, as links, each with what it holds."""
    listed = "".join(
        f'<li><a href="{quote(name)}">{escape(name)}</a> {escape(what)}</li>'
        for name, what in files
        if (folder / name).is_file()
    )
    return html.section("Raw data", f'<ul class="events">{listed}</ul>' if listed else "")
