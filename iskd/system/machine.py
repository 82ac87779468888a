"""The machine: its description beside every measurement, its clock, and the peak memory of a piece of work."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from iskd.system import allocator

_STATM = Path("/proc/self/statm")
_CPUINFO = Path("/proc/cpuinfo")
# variables and files by which an environment is known
_HOSTS = {
    "SLURM job": ("SLURM_JOB_ID",),
    "Kubernetes": ("KUBERNETES_SERVICE_HOST",),
    "Colab": ("COLAB_RELEASE_TAG",),
    "Kaggle": ("KAGGLE_KERNEL_RUN_TYPE",),
    "container": ("/.dockerenv", "/run/.containerenv"),
}


def describe(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine and the versions, as plain JSON values; names neither host nor user.

    Args:
        device: where the measurement ran.
    """
    device, on_gpu = torch.device(device), torch.device(device).type == "cuda"
    return {
        **({"device": torch.cuda.get_device_name(device)} if on_gpu else {}),
        "cpu" if on_gpu else "device": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "allocator": allocator.state(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "note": f"times hold for this {'GPU' if on_gpu else 'machine'} only; compare ratios taken side by side",
    }


def host_kind() -> str:
    """What kind of machine this is, without its name: system, processor, memory, GPUs, and what started the process."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = [
        f"{platform.system()} {platform.machine()}",
        cpu_name(),
        f"{usable_cores()} cores",
        f"{_memory() / 1e9:.0f} GB" if _memory() else "",
        f"{gpus} x {torch.cuda.get_device_name()}" if gpus else "no GPU",
        *(name for name, marks in _HOSTS.items() if any(map(_there, marks))),
    ]
    return ", ".join(filter(None, known))


def called(device: torch.device | str) -> str:
    """What a person knows the device by: the GPU and its memory, or the processor and its cores."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"{cpu_name()}, {usable_cores()} cores"
    return f"{torch.cuda.get_device_name(device)}, {capacity(device) / 1e9:.0f} GB"


def capacity(device: torch.device) -> int:
    """Bytes of memory that a device has; 0 where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return _memory()


def _there(mark: str) -> bool:
    return Path(mark).exists() if mark.startswith("/") else mark in os.environ


def _memory() -> int:
    """Bytes of the machine, 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def cpu_name() -> str:
    """The processor's name as the system tells it, else its architecture."""
    lines = _CPUINFO.read_text(errors="replace").splitlines() if _CPUINFO.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (named or [platform.processor() or platform.machine()])[0]


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class PeakMemory:
    """The highest use of memory while the context lasts, in bytes.

    On CUDA it is what torch's allocator handed out, exactly. On a CPU it is the resident memory of the process, and
    sampled: what lives shorter than `interval` is missed. Pages that the C library keeps from earlier work are handed
    back at the start, because work that goes into them would show no rise. Where the system has no /proc, the
    process's high-water mark is all there is, and work below it shows no rise either.

    Args:
        device: where the work runs.
        interval: seconds between samples.

    Attributes:
        start, peak: use at the start, and the highest since.
    """

    def __init__(self, device: torch.device, interval: float = 0.005) -> None:
        self.device, self.interval = device, interval
        self.start = self.peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def rise(self) -> int:
        """What the work took on top of what was there."""
        return max(0, self.peak - self.start)

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = self.peak = torch.cuda.memory_allocated(self.device)
            return self
        hand_back()
        self.start = self.peak = resident()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak = torch.cuda.max_memory_allocated(self.device)
            return
        self._over.set()
        self._thread.join()
        self.peak = max(self.peak, resident())

    def _watch(self) -> None:
        while not self._over.wait(self.interval):
            self.peak = max(self.peak, resident())


def resident() -> int:
    """Bytes of this process in memory now; without /proc, the most there ever were."""
    if _STATM.is_file():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def hand_back() -> None:
    """Ask glibc to give free pages back to the system; nothing with another C library."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def clock(device: torch.device) -> float:
    """Seconds, after the device has finished what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
