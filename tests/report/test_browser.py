"""The pages of one run and of many in a real browser: on a phone and on a desk, light and dark, without a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from iskd.plan import StageResult
from iskd.report.run_page import write_report
from iskd.report.runs_page import write_runs_report
from tests.run_folders import EFFICIENCY, EVALUATION, stage, write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH to open the pages with"
)
# the sandbox cannot start as root, which containers often are; the rest keeps a browser from calling home
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
)
PHONE, DESK = 360, 1280
LAYERS = 30
EXAMPLE = Path(__file__).parents[2] / "docs" / "example-report" / "report.html"
# Runs in a page around the page under test, whose own width is that of its frame.
MEASURE = """
onload = () => { document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument, view = frame.contentWindow, out = [];
  for (const folded of page.querySelectorAll("details")) folded.open = true;
  const width = page.documentElement.clientWidth;
  const name = e => e.tagName + "." + (e.getAttribute("class") || "") + " " + e.textContent.slice(0, 40);
  for (const e of page.body.querySelectorAll("*")) {
    const box = e.getBoundingClientRect(), drawing = e.parentElement.closest("svg");
    if (e.parentElement.closest(".scroll, pre") || !box.width) continue;
    if (drawing && e.tagName !== "text") continue;
    const around = drawing ? drawing.getBoundingClientRect() : {left: 0, right: width, top: -1e9, bottom: 1e9};
    if (box.left < around.left - 1 || box.right > around.right + 1 || box.top < around.top - 1
        || box.bottom > around.bottom + 1) out.push(name(e));
  }
  const clash = [];
  for (const drawing of page.querySelectorAll("svg")) {
    const texts = [...drawing.querySelectorAll("text")].map(e => [e.getBoundingClientRect(), e.textContent]);
    for (const [i, [a, one]] of texts.entries()) for (const [b, other] of texts.slice(i + 1)) {
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      if (across > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3) clash.push(one + " | " + other);
    }
  }
  return {width: view.innerWidth, scroll: page.documentElement.scrollWidth, out, clash,
          loaded: view.performance.getEntriesByType("resource").map(e => e.name),
          tables: page.querySelectorAll(".scroll").length, figures: page.querySelectorAll("svg").length,
          height: page.documentElement.scrollHeight};
})); };
"""


LONG_WORD = "a_word_without_a_break" * 8
OPTIONS = ("keep", "remove", "a_mixer_with_a_long_name_of_its_own")
AMOUNTS = {"params": 4e6, "cache_bytes": 3e6, "prefill_seconds": 0.2}
#: What sections of the page of one run are made of, each with words that are as long as they may be.
SECTIONS: dict[str, Any] = {
    "plan": [
        {"stage": f"stage {i} {LONG_WORD}", "tokens": 1000, "params": 4e6, "train_seconds": 12345.6} for i in range(11)
    ],
    "samples": [
        {"prompt": f"{i} Once upon", "teacher": LONG_WORD, "student": "a time " * 40, "same": 2, "tokens": 40}
        for i in range(3)
    ],
    "budget": {
        "teacher": "ab",
        "choice": [OPTIONS[i % 3] for i in range(LAYERS)],
        "options": {"remove": {"edit": "remove"}, OPTIONS[2]: {"edit": "convert", "mixer": "gla"}},
        "asked": {"params": 0.5},
        "limits": AMOUNTS,
        "teacher_costs": AMOUNTS,
        "costs": AMOUNTS,
        "measured": AMOUNTS,
        "predicted_kl": 0.5,
        "measured_kl": 0.4,
        "found": LONG_WORD,
        "scores": [dict.fromkeys(OPTIONS[1:], 0.1 * i) for i in range(LAYERS)],
        "tried": [{"choice": list(OPTIONS), "predicted": 0.5 + i, "measured": 0.4 + i} for i in range(4)],
        "front": [[0.1 * i, 1 / (i + 1)] for i in range(1, 10)],
    },
    "efficiency": EFFICIENCY,
    "evaluation": {
        **EVALUATION,
        "quantized": [
            {"kind": "float32", "bytes": 16e6, "perplexity": 21.4, "tokens_per_s": 123.4},
            {"kind": "int4", "why": f"not here: {LONG_WORD}"},
        ],
    },
}


def removals(last: float, *, undone: int = 0, asked: bool = False) -> list[StageResult]:
    """Ten layers removed one by one, scored anew before each removal; `undone` is rolled back.

    Tasks are `asked` after every stage.
    """
    told = {"evaluation": EVALUATION} if asked else {}
    stages = [stage(0, scores=None, **told)]
    for i in range(1, 11):
        left = [layer for layer in range(LAYERS) if layer >= i or layer == undone]
        changes: dict[str, Any] = {
            "name": f"remove {i} and say much more than fits",
            "edits": [{"op": "remove", "layer": i}],
            "scores": {str(layer): float((7 * layer + i) % 30 + 1) for layer in left},
            "retention": 1 - (1 - last) * i / 10,
            "params": 4_000_000 - 150_000 * i,
            "events": ["an event with a_very_long_word_" + "x" * 60] if i == 2 else [],
            "status": "rolled_back" if i == undone else "kept",
            **told,
        }
        stages.append(stage(i, **changes))
    return stages


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The page of one run and the page of many, with long words everywhere, and the page that the docs show."""
    folder = tmp_path_factory.mktemp("runs")
    files = {"efficiency": EFFICIENCY, "evaluation": EVALUATION}
    for i in range(6):
        config = f"seed: {i % 2}\nschedule:\n  lr: {i // 2}\ndata:\n  path: a_{'long_' * 12}{i // 2}.txt\n"
        stages = removals(0.9 - 0.05 * i, undone=3 if i == 4 else 0, asked=i == 0)
        given = SECTIONS if i == 0 else files if i < 3 else {}
        name = f"run-{i}-" + "and_a_name_without_a_break" * (i == 5)
        write_run(folder / name, stages, config=config, finished=i != 3, files=given, layers=LAYERS)
    one = write_report(folder / "run-0-")
    many = write_runs_report([folder, folder / "nothing"], folder / "runs.html")
    return [path.read_text(encoding="utf-8") for path in (one, many, EXAMPLE)]


def browse(folder: Path, body: str, *flags: str) -> tuple[str, list[str]]:
    """Open a page in the browser; its output, and the lines of the page's console."""
    file = folder / "around.html"
    file.write_text(f'<!DOCTYPE html><meta charset="utf-8"><title></title>{body}', encoding="utf-8")
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def frame(page: str, width: int, height: int = 900) -> str:
    return f'<iframe style="border:0" width="{width}" height="{height}" srcdoc="{escape(page)}"></iframe>'


def test_nothing_sticks_out_and_nothing_is_loaded(pages: list[str], tmp_path: Path) -> None:
    for heading in ("Budget", "Weights in fewer bits", "Promised and measured", "In their own words"):
        assert f">{heading}</h2>" in pages[0]
    assert "cannot be shown" not in pages[0]
    frames = "".join(frame(page, width) for page in pages for width in (PHONE, DESK))
    dom, console = browse(tmp_path, f"{frames}<script>{MEASURE}</script>", "--dump-dom")
    title = re.search("<title>(.*?)</title>", dom, flags=re.DOTALL)
    assert title is not None
    found = json.loads(unescape(title.group(1)))
    assert [page["width"] for page in found] == [PHONE, DESK] * 3
    for page in found:
        assert page["out"] == []
        assert page["clash"] == [], "words of a figure lie on each other"
        assert page["scroll"] <= page["width"], "the page itself never scrolls sideways"
        assert page["loaded"] == []
        assert page["height"] > 900
    assert [page["figures"] for page in found] == [14, 14, 5, 5, 9, 9]
    assert all(page["tables"] >= 2 for page in found)
    assert console == []


def test_pages_show_something_in_light_and_dark(pages: list[str], tmp_path: Path) -> None:
    asked = "@media (prefers-color-scheme:dark)"
    assert all(asked in page for page in pages)
    versions = [page.replace(asked, f"@media {query}") for query in ("not all", "all") for page in pages]
    frames = "".join(frame(page, PHONE, 1500) for page in versions)
    png = tmp_path / "shot.png"
    size = f"--window-size={len(versions) * PHONE},1500"
    style = "<style>body{margin:0;display:flex}</style>"
    _, console = browse(tmp_path, style + frames, f"--screenshot={png}", size, "--force-device-scale-factor=1")
    image = Image.open(png).convert("RGB")
    assert image.size == (len(versions) * PHONE, 1500)
    for i, dark in enumerate([False] * len(pages) + [True] * len(pages)):
        shot = image.crop((i * PHONE, 0, (i + 1) * PHONE, 1500))
        colours = sorted(shot.getcolors(1 << 24), reverse=True)
        share, ground = colours[0]
        assert (max(ground) < 60) if dark else (min(ground) > 240)
        assert 0.3 < share / (PHONE * 1500) < 0.97, "a page with text and figures on it, not a blank one"
        assert len(colours) > 50
    assert console == []
