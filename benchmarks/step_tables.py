"""The rows of `benchmarks.step` as markdown: ways side by side, what the run was, and where our step's time goes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.common import spread

WARM_UP = 2  # steps that no figure counts
# of the project's plan: ours is faster by at least, and has at most so much of this way's memory
GOALS = {"padded": (12.0, None), "plain": (1.3, 0.65), "trl": (1.3, 0.65), "modelopt": (1.3, 0.65), "liger": (1.2, 1.0)}
SHARES = {"cpu": 35, "cuda": 45}  # per cent of the matrix peak
LOADER_GOAL = 1  # per cent of the step, at most
Row = dict[str, Any]


def rate(row: Row) -> float:
    """Tokens that are no padding, per second of the timed steps."""
    return sum(row["tokens"][WARM_UP:]) / sum(row["seconds"][WARM_UP:])


def step_seconds(row: Row) -> float:
    """Mean of the timed steps."""
    return statistics.fmean(row["seconds"][WARM_UP:])


def finished(rows: Sequence[Row], way: str) -> dict[int, Row]:
    """By repeat."""
    return {row["repeat"]: row for row in rows if row["way"] == way and "error" not in row}


def step_table(rows: Sequence[Row], ways: Sequence[str], positions: int, device: str) -> Iterator[str]:
    """A line per way: medians over the repeats, ratios and shares within a repeat.

    Args:
        rows: what was measured.
        ways: in the order of the table.
        positions: tokens of a step, padding included.
        device: cpu or cuda; seconds are shown of a GPU only.
    """
    on_gpu = device == "cuda"
    heads = ["way", "no padding %", "ours is faster by", "goal", "peak GiB", "ours / this", "goal"]
    heads += ["share of the peak %", "KL at step 1", "loss at the last step", *(["tokens/s"] if on_gpu else [])]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    ours, peaks = finished(rows, "ours"), finished(rows, "peak")
    work = next((row["flops"] for row in rows if row["way"] == "flops" and "error" not in row), None)
    for way in ways:
        own = finished(rows, way)
        if not own:
            reasons = [row["error"] for row in rows if row["way"] == way]
            yield f"| {way} | not measured: {(reasons or ['not run'])[-1].replace('|', '/')} |" + " |" * (
                len(heads) - 2
            )
            continue
        both = sorted(own.keys() & ours.keys())
        faster, gib = "-", statistics.median(row["peak_bytes"] for row in own.values()) / 2**30
        memory, (speed_goal, memory_goal) = "-", GOALS.get(way, (None, None))
        if both and way != "ours":
            faster = spread([rate(ours[n]) for n in both], [rate(own[n]) for n in both])
            memory = spread([ours[n]["peak_bytes"] for n in both], [own[n]["peak_bytes"] for n in both])
        measured = sorted(own.keys() & peaks.keys())
        share = "-"
        if work and measured:
            share = spread(
                [100 * work / step_seconds(own[n]) for n in measured],
                [peaks[n]["flops_per_s"] for n in measured],
                digits=1,
            )
        one = next(iter(own.values()))
        useful = 100 * statistics.fmean(one["tokens"]) / positions
        last = "other loss" if way == "padded" else f"{one['losses'][-1]:.5f}"
        cells = [
            way,
            f"{useful:.0f}",
            faster,
            _bound(speed_goal, ">="),
            f"{gib:.2f}",
            memory,
            _bound(memory_goal, "<="),
        ]
        cells += [share, f"{one['first_kl']:.5f}" + (" (other text)" if way == "padded" else ""), last]
        cells += [f"{statistics.median(map(rate, own.values())):.0f}"] if on_gpu else []
        yield "| " + " | ".join(cells) + " |"


def _bound(value: float | None, sign: str) -> str:
    return "-" if value is None else f"{sign} {value:g}"


def notes(rows: Sequence[Row], ways: Sequence[str], device: str) -> Iterator[str]:
    """What the table rests on: the peak, the step's work, equal batches, the loader's share, what failed."""
    peaks = list(finished(rows, "peak").values())
    if peaks:
        values = ", ".join(f"{row['flops_per_s'] / 1e12:.3g}" for row in peaks)
        yield (
            f"- matrix peak of each repeat: {values} TFLOP/s ({peaks[0]['dtype']} matmul); goal for ours: "
            f"{SHARES[device]} % of it"
        )
    for row in rows:
        if row["way"] == "flops" and "error" not in row:
            yield f"- FLOPs of a step, on every position, the same for all ways: {row['flops'] / 1e12:.4g} TFLOP"
    seen = {tuple(row["batches"]) for way in ways if way != "padded" for row in finished(rows, way).values()}
    yield f"- batches of all ways but padded: {'the same, in the same order' if len(seen) == 1 else 'DIFFERENT'}"
    ours = finished(rows, "ours").values()
    if ours:
        shares = [100 * statistics.fmean(row["gaps"][WARM_UP - 1 :]) / step_seconds(row) for row in ours]
        listed = ", ".join(f"{share:.2f}" for share in shares)
        yield (
            "- ours: between the end of a step and the start of the next (data loader and the Trainer's own work) "
            f"pass {listed} % of a step; goal: under {LOADER_GOAL} %"
        )
    for row in rows:
        if "error" in row:
            yield f"- {row['way']}, repeat {row['repeat'] + 1}, failed: {row['error']}"


def profile_tables(profile: Row) -> Iterator[str]:
    """Where our step's time goes, by span and by kind of operator; shares, for seconds hold for one machine only."""
    whole, peak = sum(profile["seconds"].values()), profile["peak_flops"]
    yield "| span of our step | % of the step | % of the peak while it runs |\n|---|---|---|"
    for name, seconds in profile["seconds"].items():
        work = profile["flops"].get(name)
        share = "-" if not work or not seconds else f"{100 * work / seconds / peak:.1f}"
        yield f"| {name} | {100 * seconds / whole:.1f} | {share} |"
    total = sum(profile["operators"].values())
    if total:
        yield "\n| operators of one step | % |\n|---|---|"
        for kind, seconds in profile["operators"].items():
            yield f"| {kind} | {100 * seconds / total:.1f} |"
