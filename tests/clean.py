"""Clean processes for exports that are opened again, forked from one that has imported torch and transformers alone.

A new interpreter takes seconds to get as far, and every export and verification asks for one or two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# It reads requests, a line of JSON each, and answers with exit codes. The process of a request has its arguments,
# environment, modules' places and working directory as `python -c` gives them.
_SERVER = """
import json, os, sys, traceback
import torch
from transformers import AutoModelForCausalLM
import transformers.generation.utils, transformers.models.llama.modeling_llama
assert "iskd" not in sys.modules
torch.set_num_threads(1)
places = list(sys.path)
for line in sys.stdin:
    request = json.loads(line)
    if not (process := os.fork()):
        code = 1
        try:
            for number in (1, 2):
                os.dup2(os.open(request["said"], os.O_WRONLY | os.O_APPEND), number)
            os.environ.clear()
            os.environ.update(request["env"])
            os.chdir(request["cwd"])
            theirs = os.environ.get("PYTHONPATH", "").split(os.pathsep)
            sys.path[:] = ["", *filter(None, theirs), *places[1:]]
            sys.argv[:] = ["-c", *request["arguments"]]
            exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else error.code is not None
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


class Server:
    """Starts when it is first asked; `subprocess.run` of Python code, as `iskd.export.probe` calls it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def run(self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str], **rest: Any) -> Any:
        """Exit code and what was said; code beside weights gets an interpreter of its own, as it reads `env` early."""
        python, flag, code, file = command
        assert (python, flag) == (sys.executable, "-c")
        if json.loads(Path(file).read_text())["bundle"]:
            return subprocess.run(command, cwd=cwd, env=env, **rest)
        if self._process is None:
            own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            own |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVER], cwd=self._folder, env=own, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        said = self._folder / "said.txt"
        said.write_text("")
        request = {"code": code, "arguments": [file], "cwd": str(cwd), "env": dict(env), "said": str(said)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the server of clean processes died"
        return SimpleNamespace(returncode=int(answer), stderr=said.read_text())

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.communicate()

    def stand_in(self, setattr_: Callable[[Any, str, Any], Any]) -> None:
        """Let exports be opened again here."""
        from iskd.export import probe

        setattr_(probe, "subprocess", SimpleNamespace(run=self.run, TimeoutExpired=subprocess.TimeoutExpired))
