"""Metrics of lm-evaluation-harness: of all items, of the tasks of a group, of each way of reading an answer."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from lm_eval.api import metrics as theirs
from rich.console import Console

from iskd.evaluation.judging import TaskResult
from iskd.evaluation.results import Evaluation
from iskd.evaluation.scores import Scored, compare
from iskd.evaluation.tasks.aggregates import Aggregate
from iskd.evaluation.tasks.harness_metrics import check_metric, values_of
from iskd.report.tables import evaluation_table
from iskd.system import number


def logged(leaf: str, values: Mapping[str, Sequence[Any]], way: str = "none") -> dict[str, list[dict[str, Any]]]:
    """What the harness logs of a task's items, of whose metrics each contributes one of the values."""
    rows = zip(*values.values(), strict=True)
    return {leaf: [{"filter": way, "metrics": list(values), **dict(zip(values, row, strict=True))} for row in rows]}


def task_of(aggregation: Mapping[str, Any], ways: Sequence[str] = ()) -> Any:
    config = SimpleNamespace(filter_list=[{"name": way} for way in ways] or None)
    return SimpleNamespace(aggregation=lambda: aggregation, higher_is_better=dict, config=config)


def test_metrics_of_all_items_are_the_harness_s_own() -> None:
    """MCC, F1, perplexities and BLEU are no means over items, in scores, retention and intervals."""
    draw_ = random.Random(0)
    gold = [draw_.random() < 0.6 for _ in range(80)]
    good = [value if draw_.random() < 0.9 else not value for value in gold]
    poor = [value if draw_.random() < 0.7 else not value for value in gold]
    nats = [(-draw_.random() * 30, draw_.randrange(1, 9)) for _ in gold]
    words = [" ".join(draw_.choices(["the", "cat", "sat", "on", "a", "mat", "it"], k=7)) for _ in gold]
    texts = [(text, text.replace("cat", "dog")) for text in words]
    functions = {
        **{"mcc": theirs.matthews_corrcoef, "f1": theirs.f1_score, "word_perplexity": theirs.weighted_perplexity},
        **{"bleu": theirs.bleu, "bits_per_byte": theirs.bits_per_byte, "perplexity": theirs.perplexity},
    }

    def contributed(guesses: Sequence[bool]) -> dict[str, list[Any]]:
        pairs = list(zip(map(int, gold), map(int, guesses), strict=True))
        alike = {"word_perplexity": nats, "bits_per_byte": nats, "perplexity": [nat for nat, _ in nats]}
        return {"mcc": pairs, "f1": pairs, "bleu": texts, **alike}

    tasks = {"leaf": task_of(functions)}
    ids = tuple(map(str, range(len(gold))))
    scored = []
    for guesses in (poor, good):
        columns = contributed(guesses)
        found = values_of("cola", logged("leaf", columns), tasks, None)
        assert (found.main, found.values) == ("mcc", {})
        result = TaskResult(ids, found.values, found.wholes)
        for metric, told in columns.items():
            expected = functions[metric](told) / (100 if metric == "bleu" else 1)
            assert result.mean(metric) == pytest.approx(expected), metric
        scored.append(Scored("choice", "mcc", 0, result))
    (score,), _, mean = compare({"cola": scored[0]}, {"cola": scored[1]}, resamples=60, seed=0)
    mcc = [theirs.matthews_corrcoef(contributed(guesses)["mcc"]) for guesses in (poor, good)]
    assert score.retention is not None
    assert score.difference is not None
    assert (score.student, score.teacher) == (pytest.approx(mcc[0]), pytest.approx(mcc[1]))
    assert score.retention.value == pytest.approx(mcc[0] / mcc[1])
    assert score.retention.low < score.retention.value < score.retention.high
    assert score.difference.value == pytest.approx(mcc[0] - mcc[1])
    assert score.difference.low < score.difference.value < score.difference.high
    assert 0.02 < score.student_error < 0.2
    assert mean == score.retention
    (nats,), _, _ = compare(
        *({"text": Scored("generation", "perplexity", 0, one.result, higher=False)} for one in scored),
        resamples=5,
        seed=0,
    )
    shown = Console(width=140, file=io.StringIO())
    shown.print(evaluation_table(Evaluation((score, nats), {}, None, None, {}, {})))
    rows = shown.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert f"{100 * mcc[0]:.1f}" in next(row for row in rows if "cola" in row)
    assert number(nats.student) in next(row for row in rows if "perplexity" in row)
    assert math.isnan(Aggregate([(1, 1)], ["x"], {"x": lambda told: math.log(0)}).whole()), "of no resample"


def test_tasks_of_a_group_are_aggregated_each_by_itself() -> None:
    first, second = [(1, 1), (0, 0), (1, 0), (0, 0)], [(1, 1), (0, 1)]
    tasks = {leaf: task_of({"f1": theirs.f1_score}) for leaf in "ab"}
    found = values_of("group", logged("a", {"f1": first}) | logged("b", {"f1": second}), tasks, None)
    expected = (4 * theirs.f1_score(first) + 2 * theirs.f1_score(second)) / 6
    assert found.wholes["f1"].whole() == pytest.approx(expected)


def test_each_way_of_reading_an_answer_can_be_compared() -> None:
    """`metric,filter`, as the harness writes it."""
    ways = {"strict-match": [1.0, 0.0, 0.0], "flexible-extract": [1.0, 1.0, 0.0]}
    told = [row for way, values in ways.items() for row in logged("gsm8k", {"exact_match": values}, way)["gsm8k"]]
    tasks = {"gsm8k": task_of({"exact_match": theirs.mean}, list(ways))}
    for asked, value in ((None, 1 / 3), ("exact_match,flexible-extract", 2 / 3), ("exact_match,strict-match", 1 / 3)):
        check_metric("gsm8k", asked, tasks)
        found = values_of("gsm8k", {"gsm8k": told}, tasks, asked)
        assert found.main == asked or (asked is None and found.main == "exact_match")
        assert float(found.values[found.main].mean()) == pytest.approx(value)
        assert set(found.values) == {"exact_match", *(f"exact_match,{way}" for way in ways)}
    with pytest.raises(
        ValueError, match=r'set eval.metrics.gsm8k to exact_match or "exact_match,strict-match" or "exact'
    ):
        check_metric("gsm8k", "exact_match,flexible", tasks)
