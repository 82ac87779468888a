"""Weights on disk and as digests: what is not whole is named, and digests that users' files hold stay what they are."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from iskd.models.weights import check_whole, model_sha256, parameters_sha256


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 50, -1])
def test_a_cut_file_is_named_with_its_bytes(kept: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100), "b": torch.ones(3)}, file)
    check_whole(file)
    content = file.read_bytes()
    file.write_bytes(content[:kept])
    with pytest.raises(
        ValueError, match=rf"model\.safetensors cannot be read: .*{len(content[:kept])} bytes"
    ) as caught:
        check_whole(file)
    if kept < 0:
        assert f"its header describes {len(content)}" in str(caught.value)


def _file(header: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 200,
        _file(b"[]"),
        _file(b"{" * 40_000),
        _file(b'{"a": 1}'),
        _file(json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 10**20]}}).encode()),
        _file(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, null]}}'),
        _file(json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()) + bytes(9),
    ],
)
def test_what_is_no_safetensors_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"it has {len(content):,} bytes and is no safetensors file \("):
        check_whole(tmp_path / "model.safetensors")


def test_digests_in_files_of_users_stay_what_they_are() -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).view(2, 3))
        model.bias.copy_(torch.tensor([0.5, -1]))
    model.register_parameter("scale", nn.Parameter(torch.tensor(2.0, dtype=torch.bfloat16)))
    known = "86629a11dffce17fa1a9beeef8debd782a967c00d04583a9843ca7cf79e5c562"
    assert parameters_sha256(model) == known, "environment.json of runs, of a teacher in memory or with random weights"
    values = {"b": 1, "a": [True, None], "_name_or_path": "elsewhere", "transformers_version": "any"}
    cast(Any, model).config = SimpleNamespace(to_dict=lambda: values)
    assert model_sha256(cast(Any, model)) == "78b5ca53c7c2f2ebfd001cbcb6edc510d4236069431e36dff73a957b0d399dfd", (
        "meta.json of teacher caches"
    )
