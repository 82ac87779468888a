"""Laws of the one reader: types are strict, nothing is guessed, errors name the place, the value and the rule."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from iskd.system.reading import Count, Number, between, must_be, one_of, read_as


@dataclass(frozen=True)
class Leaf:
    size: Annotated[int, between(1, 9)]
    kind: Literal["leaf"] = "leaf"


@dataclass(frozen=True)
class Bud:
    kind: Literal["bud"] = "bud"


@dataclass(frozen=True)
class Tree:
    name: Annotated[str, Field(max_length=5)]
    age: Count = 0
    height: Number = 0.0
    rate: Annotated[float, must_be("a share", lambda value: value in (0, 1))] = 1.0
    colour: Annotated[str, one_of(("red", "green"))] = "red"
    alive: bool = True
    parts: tuple[Annotated[Leaf | Bud, Field(discriminator="kind")], ...] = ()
    notes: list[str] = field(default_factory=list)
    heights: dict[int, Number] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name == "axe":
            raise ValueError("an axe is no tree")


def test_values_come_as_their_types_and_floats_exactly() -> None:
    found = read_as(Tree, {"name": "oak", "parts": [{"kind": "leaf", "size": 3}], "heights": {"2": 0.1}}, "it")
    assert found == Tree("oak", parts=(Leaf(3),), heights={2: 0.1})
    for value in (1 / 3, 5e-324, 1.7976931348623157e308, -0.0, math.inf, 2**62 / 3):
        assert json.dumps(read_as(Tree, {"name": "oak", "height": value}, "it").height) == json.dumps(value)
    assert math.isnan(read_as(Tree, {"name": "oak", "height": math.nan}, "it").height)
    kept = read_as(Tree, {"name": "oak", "rate": 1}, "it").rate
    assert isinstance(kept, int), "what must_be takes stays as it stands"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"it must be an object, got \[\]"),
        (None, "it must be an object, got None"),
        ({}, "it: key 'name' is missing"),
        ({"name": "oak", "size": 1, "age": "x"}, "it: unknown key 'size'; known are name, age"),
        ({"name": "oaktree"}, "it: name must be a string of at most 5 characters, got 'oaktree'"),
        ({"name": 3}, "it: name must be a string, got 3"),
        ({"name": "\ud800"}, "it must be plain JSON: .*surrogates not allowed"),
        ({"name": {1}}, "it must be plain JSON: .*set is not JSON"),
        ({"name": "axe"}, "it: an axe is no tree"),
        *[({"name": "oak", "age": bad}, "it: age must be an integer, got") for bad in (True, 1.0, "1", None, [], {})],
        *[({"name": "oak", "age": bad}, "it: age must be between 0 and 9223") for bad in (-1, 2**63, 10**4000)],
        *[({"name": "oak", "height": bad}, "it: height must be a number") for bad in (True, "1", None, 10**400)],
        ({"name": "oak", "rate": 0.5}, "it: rate must be a share, got 0.5"),
        ({"name": "oak", "colour": "blue"}, r"it: colour must be one of \('red', 'green'\), got 'blue'"),
        *[({"name": "oak", "alive": bad}, "it: alive must be true or false") for bad in (0, 1, "true", None)],
        ({"name": "oak", "parts": {}}, "it: parts must be a list, got {}"),
        ({"name": "oak", "parts": [3]}, r"it: parts\[0\] must be an object, got 3"),
        ({"name": "oak", "parts": [{}]}, r"it: parts\[0\]: unknown kind None"),
        (
            {"name": "oak", "parts": [{"kind": "root"}]},
            r"it: parts\[0\]: unknown kind 'root'; known are \['bud', 'leaf'\]",
        ),
        ({"name": "oak", "parts": [{"kind": "bud", "x": 1}]}, r"it: parts\[0\]: bud: unknown key 'x'"),
        ({"name": "oak", "parts": [{"kind": "leaf", "size": 10}]}, "leaf: size must be between 1 and 9, got 10"),
        ({"name": "oak", "notes": [1]}, r"it: notes\[0\] must be a string, got 1"),
        ({"name": "oak", "heights": {"x": 1.0}}, "it: heights: x: .* must be an integer"),
    ],
)
def test_anything_else_is_refused_with_place_value_and_rule(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_as(Tree, data, "it")
    assert len(str(error.value)) < 400


def test_unknown_keys_may_be_ignored_and_keys_of_a_config_are_told_with_a_dot() -> None:
    assert read_as(Bud, {"later": 1}, "it", others=True) == Bud()
    with pytest.raises(ValueError, match=r"schedule\.leaf\.size must be an integer, got 'x'"):
        read_as(Leaf, {"size": "x"}, "schedule.leaf", joint=".")


def test_an_error_is_short_for_a_long_value_and_a_long_key() -> None:
    for data in (
        {"name": "x" * 10**6},
        {"name": "oak", "y" * 10**6: 1},
        {"name": "oak", "heights": {"z" * 10**6: "a"}},
    ):
        with pytest.raises(ValueError, match="it: ") as error:
            read_as(Tree, data, "it")
        assert len(str(error.value)) < 400
