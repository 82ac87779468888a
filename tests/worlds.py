"""Several processes of one run on one machine, forked from a server that has the imports done: a world costs seconds.

The processes find the environment that torchrun or SLURM would give them.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.unrendered import leave_unrendered

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.runs", "tests.factories", "transformers.models.llama.modeling_llama"])


class World:
    """Processes 0 .. size-1 that call `program(rank, *args)`; what they print goes to `folder/rank0.log` and so on."""

    def __init__(self, size: int, program: Callable[..., None], args: Sequence[Any], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank{rank}.log" for rank in range(size)]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.processes: list[BaseProcess] = [
            _CONTEXT.Process(target=_enter, args=(rank, size, port, log, program, args))  # type: ignore[attr-defined]
            for rank, log in enumerate(self.logs)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit codes of all, -9 for what was killed; fails when somebody is still there after `seconds`."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in late:
            self.processes[rank].kill()
            self.processes[rank].join()
        assert not late, f"ranks {late} were still running after {seconds} s\n{self.said()}"
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.close()
        return [code for code in codes if code is not None]

    def said(self) -> str:
        """The last lines of every process."""
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in self.logs if log.is_file())


class Command:
    """`iskd WORDS` in `cwd`, in a process that has its imports done; what it prints goes to `log`.

    Args:
        variables: set in its environment, beside those of this process when the server was started.
    """

    def __init__(self, words: Sequence[str], cwd: Path, log: Path, variables: Mapping[str, str]) -> None:
        self.log = log
        self._process: BaseProcess = _CONTEXT.Process(target=_command, args=(words, cwd, log, variables))  # type: ignore[attr-defined]
        self._process.start()

    def running(self) -> bool:
        """Whether it is there still."""
        return self._process.is_alive()

    def send(self, number: int) -> None:
        """Send it a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def end(self, seconds: float = 200) -> tuple[int, str]:
        """Exit code, -9 for what was killed, and output; fails when it is still there after `seconds`."""
        self._process.join(seconds)
        code = self._process.exitcode
        assert code is not None, f"still running after {seconds} s:\n{self.log.read_text()[-3000:]}"
        self._process.close()
        return code, self.log.read_text()


def run_world(size: int, program: Callable[..., None], *args: Any, folder: Path, seconds: float = 120) -> None:
    """Run `program` on `size` processes; all of them must succeed."""
    world = World(size, program, args, folder)
    codes = world.wait(seconds)
    assert codes == [0] * size, f"exit codes {codes}\n{world.said()}"


def _write_to(log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 (as long as the process)


def _command(words: Sequence[str], cwd: Path, log: Path, variables: Mapping[str, str]) -> None:
    import torch

    _write_to(log)
    torch.set_num_threads(1)
    os.chdir(cwd)
    os.environ.update(variables)
    leave_unrendered()
    sys.argv = [str(Path(__file__).parents[1] / "train.py")]  # what Lightning starts once more for other ranks

    from iskd.__main__ import main

    main(words)


def _enter(rank: int, size: int, port: int, log: Path, program: Callable[..., None], args: Sequence[Any]) -> None:
    import torch

    _write_to(log)
    faulthandler.enable()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    leave_unrendered()
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(size), NODE_RANK="0", LOCAL_RANK=str(rank)
    )
    try:
        program(rank, *args)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
