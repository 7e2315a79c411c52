"""Each library in a process of its own, which times single calls when asked.

So the threads of one do not disturb the calls of another, and a library that is not
there or dies does not end the run. Requests and replies are lines of JSON; what
libraries print goes to a log.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from typing import IO, Any

from benchmarks import contenders
from benchmarks.cases import Case
from benchmarks.contenders import Contender, Prepared
from benchmarks.shapes import Shape

ROOT = pathlib.Path(__file__).resolve().parents[1]


class WorkerError(RuntimeError):
    """A request failed in a worker's process."""


class Worker:
    """A contender in another process. A context manager; `close` ends the process."""

    def __init__(
        self,
        family: str,
        *,
        threads: int | None = None,
        environment: dict[str, str] | None = None,
    ):
        self.family = family
        # Closed by `close`, as it lives as long as the process.
        self._log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", "benchmarks.worker", family]
        if threads:
            command += ["--threads", str(threads)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
        )
        self._read()

    def ask(self, operation: str, **arguments: Any) -> Any:
        """Waits for the answer to one request; see `_Server`.

        Raises:
          WorkerError: the request failed, or the process has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(
                json.dumps({"operation": operation, "arguments": arguments}) + "\n"
            )
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # _read says why
        return self._read()

    def load(self, shape: Shape) -> None:
        """Makes the weights of a shape; forgets the cases of the last one."""
        self.ask("load", shape=vars(shape))

    def prepare(self, case: Case) -> None:
        """Compiles a case."""
        self.ask("prepare", case=case.to_json())

    def run(self, case: Case, calls: int) -> list[float]:
        """Seconds of consecutive calls."""
        return self.ask("run", case=case.to_json(), calls=calls)

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            raise WorkerError(
                f"the {self.family} process ended with code {code}:\n"
                f"{self._log.read()[-2000:]}"
            )
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.family}: {reply['error']}")
        return reply["result"]


def installed(family: str) -> bool:
    """Whether this environment has the family's library."""
    return family != "torch" or importlib.util.find_spec("torch") is not None


class _Server:
    """The requests, one method each; arguments and results are plain JSON values."""

    def __init__(self, contender: Contender):
        self._contender = contender
        self._cases: dict[Case, tuple[Prepared, Iterator[Any]]] = {}

    def load(self, shape: dict[str, Any]) -> None:
        self._cases.clear()
        self._contender.load(Shape(**shape))

    def prepare(self, case: dict[str, Any]) -> None:
        key = Case.from_json(case)
        if key not in self._cases:
            prepared = self._contender.prepare(key)
            self._cases[key] = prepared, itertools.cycle(prepared.calls)

    def unload(self) -> None:
        """Drops the weights and the cases."""
        self._cases.clear()
        self._contender.close()

    def forget(self) -> None:
        """Drops the prepared cases, and keeps the weights."""
        self._cases.clear()

    def run(self, case: dict[str, Any], calls: int) -> list[float]:
        _, cycle = self._cases[Case.from_json(case)]
        seconds = []
        for _ in range(calls):
            call = next(cycle)
            start = time.perf_counter()
            result = call()
            seconds.append(time.perf_counter() - start)
            del result  # as a training loop does: the next call may reuse the memory
        return seconds

    def memory(self, case: dict[str, Any], calls: int) -> dict[str, int]:
        """Peak resident memory of some calls above what is resident before the first.

        To be asked before any other call of the size, so that what the library
        allocates on the first call and keeps counts too.
        """
        prepared, cycle = self._cases[Case.from_json(case)]
        ctypes.CDLL(None).malloc_trim(0)
        before = _status_bytes("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets VmHWM, proc(5)
        peaks = []
        results = 0
        for _ in range(calls):
            result = next(cycle)()
            results = prepared.result_bytes(result)
            del result
            peaks.append(_status_bytes("VmHWM") - before)
        return {"first": peaks[0], "peak": peaks[-1], "results": results}

    def __getattr__(self, name: str) -> Any:
        # What only ktjax has: peaks, hold, facts, profile, workspace_bytes.
        return getattr(self._contender, name)


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _serve(family: str, threads: int | None) -> None:
    # Replies have the pipe for themselves; prints of libraries join the log.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(**fields: Any) -> None:
        replies.write(json.dumps(fields) + "\n")
        replies.flush()

    contender = contenders.create(family, threads)
    server = _Server(contender)
    reply(result=None)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            result = getattr(server, request["operation"])(**request["arguments"])
        except Exception as error:
            traceback.print_exc()
            reply(error=f"{type(error).__name__}: {error}")
        else:
            reply(result=result)
    server.unload()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    _serve(arguments.family, arguments.threads)
