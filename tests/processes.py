"""Commands of this repository as processes of their own, which can be killed; the imports are paid for once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import pytest

ROOT = Path(__file__).parent.parent

# Imports everything once; each command is then a fork of it that runs the package as ``python -m`` would.
_SERVER = """
import importlib, json, os, resource, runpy, sys, traceback
import datasets, torch

known = set()

def know(package):
    if package not in known:
        known.add(package)
        importlib.import_module(package if "." in package else package + ".cli")

def run(request):
    os.setpgid(0, 0)
    os.environ.update(request["env"])
    os.chdir(request["folder"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if request["memory"] is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (request["memory"],) * 2)
    if request["largest_file"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
    sys.argv = [request["package"], *request["args"]]
    code = 0
    try:
        runpy.run_module(request["package"], run_name="__main__", alter_sys=True)
    except SystemExit as exit_:
        code = exit_.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)

print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "poll" in request:
        pid, status = os.waitpid(request["poll"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
    else:
        know(request["package"])
        if (pid := os.fork()) == 0:
            run(request)
        print(pid, flush=True)
"""


class Process:
    """A running command; ``output`` is what it has printed so far, on both streams."""

    def __init__(self, ask: Callable[[dict], object], pid: int, log: Path) -> None:
        self._ask, self.pid, self._log = ask, pid, log
        self._code: int | None = None

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def memory(self, kind: Literal["VmData", "VmHWM"]) -> int:
        """Bytes of data that it has now, or that were resident at most; 0 where it is no more."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return 0
        return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(kind))

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self._code is None:
            self._code = self._ask({"poll": self.pid})
        return self._code

    def send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, until: Callable[[], bool] = lambda: False, seconds: float = 120) -> int | None:
        """Wait for the end, or until something holds; returns the exit code, None where it still runs."""
        end = time.monotonic() + seconds
        while self.poll() is None and not until():
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"still running after {seconds} s: {self.output[-2000:]}")
            time.sleep(0.005)
        return self._code


class Commands:
    """Starts commands in processes forked off one that has imported the packages."""

    def __init__(self) -> None:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}  # its own
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        environment["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # its own maps a gigabyte at the start
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._server.stdout.readline().strip() == "ready"
        self._count = 0

    def _ask(self, request: dict) -> object:
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(
        self,
        *args: str,
        package: str = "lm",
        env: Mapping[str, str] | None = None,
        largest_file: int | None = None,
        memory: int | None = None,
        folder: Path | None = None,
    ) -> Process:
        """``python -m package args`` in ``folder`` or the working directory, with files and data (``ulimit -d``) of so
        many bytes at most."""
        folder = folder or Path.cwd()
        self._count += 1
        log = folder / f"output-{self._count}.log"
        own = {name: os.environ[name] for name in ("TINYLAB_CACHE", "HF_DATASETS_CACHE") if name in os.environ}
        request = {"package": package, "args": list(args), "env": own | dict(env or {}), "folder": str(folder)}
        request |= {"log": str(log), "largest_file": largest_file, "memory": memory}
        return Process(self._ask, self._ask(request), log)

    def run(self, *args: str, **options) -> Process:
        """As `start`, to the end, which must be a good one."""
        process = self.start(*args, **options)
        assert process.wait() == 0, process.output
        return process

    def together(self, environments: Sequence[Mapping[str, str]], *args: str, **options) -> list[Process]:
        """The same command once for each environment, at the same time, to the end."""
        processes = [self.start(*args, env=env, **options) for env in environments]
        for process in processes:
            process.wait()
        return processes

    def close(self) -> None:
        self._server.kill()
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()


def fork_commands(commands: Commands, monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    """Let every ``python -m PACKAGE …`` that the code under test starts be a fork of the process of `commands`."""
    popen = subprocess.Popen

    def start(command: Sequence[str], *args: object, **given: object) -> object:
        if command[0] != sys.executable:  # such as git
            return popen(command, *args, **given)
        return commands.start(*command[3:], package=command[2], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
