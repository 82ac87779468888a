"""A table is read within limits and line by line, and holds no formula when it is written."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest

from iskd.system.tables import read_csv, write_csv


def test_rows_come_back(tmp_path: Path) -> None:
    rows = [["name", "value"], ['a "quoted", name', "1.5"], ["two\nlines", ""]]
    with write_csv(tmp_path / "rows.csv", rows).open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == rows
    found = read_csv(write_csv(tmp_path / "rows.csv", rows[:2]))
    assert ([found.columns, *found.rows], found.skipped) == (rows[:2], 0)


@pytest.mark.parametrize("text", ["=1+1", "+x", "-x", "@SUM(A1)", "\tx", "\rx", " =x", "-1+2", '=HYPERLINK("a")'])
def test_no_cell_is_a_formula(text: str, tmp_path: Path) -> None:
    with write_csv(tmp_path / "rows.csv", [[text, -1.5, "-1.5", "+2", "a=b", None]]).open(newline="") as file:
        assert list(csv.reader(file)) == [["'" + text, "-1.5", "-1.5", "+2", "a=b", ""]]


def test_a_line_that_is_no_row_is_left_out(tmp_path: Path) -> None:
    lines = ["a,b\r\n", "1,2\n", "\n", "1\n", "1,2,3\n", '"1,2\n', f"1,{'9' * 131_073}\n", "\0,2\n", '"x,y",4\n', "5,6"]
    file = tmp_path / "rows.csv"
    file.write_bytes("".join(lines).encode() + b"\xff")
    found = read_csv(file)
    assert (found.columns, found.rows, found.skipped) == (["a", "b"], [["1", "2"], ["x,y", "4"]], 6)


def test_a_table_is_read_fast_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    start = time.perf_counter()
    for text, told in ((",".join(map(str, range(5_000))) + "\n", "more than 1000 columns"), ("a,a\n", "one name")):
        file.write_text(text * 100)
        with pytest.raises(ValueError, match=told):
            read_csv(file)
    file.write_text("a,b\n" + "\n" * 200_000 + '"' * 2_000_000)
    assert read_csv(file).rows == []
    file.write_text("")
    assert read_csv(file).columns == []
    assert time.perf_counter() - start < 5
