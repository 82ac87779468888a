"""Device and precision are decided in one place: the same words mean the same in training, scores and measurements."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from lightning.fabric.connector import _PRECISION_INPUT_STR, _PRECISION_INPUT_STR_ALIAS

from iskd.system import precision


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU that has bf16, as far as choices are concerned."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)


def autocast_dtype(settings: dict[str, object]) -> tuple[str, torch.dtype | None]:
    """Kind of device, and what autocast makes of float32 there; None = no autocast."""
    device, forward_context = precision.place({"accelerator": "cpu", "precision": "auto", **settings})
    with forward_context():
        on = torch.is_autocast_enabled(device.type)
        return device.type, torch.get_autocast_dtype(device.type) if on else None


def test_a_cpu_computes_in_what_it_is_fast_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for fast, expected in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(precision, "fast_bf16", lambda fast=fast: fast)
        for accelerator in ("auto", "cpu"):
            assert autocast_dtype({"accelerator": accelerator, "precision": "auto"}) == ("cpu", expected)
    assert autocast_dtype({"precision": "bf16-mixed"}) == ("cpu", torch.bfloat16)
    assert autocast_dtype({}) == autocast_dtype({"precision": 32}) == ("cpu", None)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_is_taken_unless_the_cpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "fast_bf16", lambda: False)
    for accelerator in ("auto", "gpu"):
        device, forward_context = precision.place({"accelerator": accelerator, "precision": "auto"})
        assert device.type == "cuda"
        assert forward_context is not precision.nullcontext
    assert autocast_dtype({"accelerator": "cpu", "precision": "auto"}) == ("cpu", None)
    assert precision.device_of("auto").type == "cuda"
    assert precision.device_of("cpu").type == "cpu"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("environment", "gpus", "expected"),
    [
        ({}, 4, "cuda"),
        ({"LOCAL_RANK": "0"}, 4, "cuda"),
        ({"LOCAL_RANK": "3", "RANK": "7"}, 4, "cuda:3"),
        ({"SLURM_LOCALID": "2", "SLURM_PROCID": "6"}, 4, "cuda:2"),
        ({"LOCAL_RANK": "2"}, 1, "cuda:0"),
    ],
)
def test_processes_that_share_a_machine_have_a_gpu_each(
    environment: dict[str, str], gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for accelerator in ("auto", "gpu", "cuda"):
        found, _ = precision.place({"accelerator": accelerator, "precision": "auto"})
        assert found == torch.device(expected)
    found, _ = precision.place({"accelerator": "cpu", "precision": "auto"})
    assert found == torch.device("cpu")


def test_what_is_no_device_or_no_precision_of_a_single_pass_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer.precision=16-mixed: fp16 overflows"):
        precision.place({"accelerator": "cpu", "precision": "16-mixed"})
    with pytest.raises(ValueError, match="fp16 overflows"):
        precision.place({"accelerator": "cpu", "precision": 16})
    with pytest.raises(ValueError, match=r"trainer\.accelerator=quantum: choose auto, cpu"):
        precision.place({"accelerator": "quantum", "precision": "auto"})


@pytest.mark.parametrize("name", ["gpu", "cuda", "mps", "tpu"])
def test_a_device_that_is_not_here_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By every command: nobody is told numbers of a CPU who asked for a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"trainer.accelerator={name}: there is none on this machine"):
        precision.place({"accelerator": name, "precision": "auto"})
    for device in ("cuda", "cuda:7", "mps", "meta", "xpu"):
        if not precision.is_here(torch.device(device)):  # on a machine that has it nothing is refused
            with pytest.raises(ValueError, match=f"device={device} is not on this machine: choose auto or one of cpu"):
                precision.device_of(device)
    for name in {str(name) for name in (*get_args(_PRECISION_INPUT_STR), *get_args(_PRECISION_INPUT_STR_ALIAS))}:
        if name in ("bf16-mixed", "bf16", "32-true", "32"):
            assert precision.precision(name, "cpu") == {"bf16": "bf16-mixed", "32": "32-true"}.get(name, name)
            continue
        with pytest.raises(ValueError, match=rf"trainer\.precision={name}: .* bf16-mixed or 32-true"):
            precision.precision(name, "cpu")
    with pytest.raises(ValueError, match="device=gpu is no device: choose auto, cpu or cuda"):
        precision.device_of("gpu")


def test_a_finished_model_is_measured_as_it_will_be_served() -> None:
    assert precision.serving_dtype(torch.device("cpu")) is None
    assert precision.serving_dtype(torch.device("cuda")) == torch.bfloat16
