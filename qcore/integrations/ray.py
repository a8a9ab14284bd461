"""Parts of a calibrated run's work as Ray tasks: `qcore quantize --engine ray`.

The cluster is the one that RAY_ADDRESS names, or the last that was started on this machine, or else one that is started here and stopped at the end. Ray moves Python objects between
processes of its cluster, so all of them must trust each other; its security is Ray's own.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

import torch
import transformers

import qcore
from qcore.calibration.precision import multiplies_bfloat16
from qcore.refusal import Refusal, Refused

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Found = TypeVar("Found")

_PLACE = "--engine ray"
_RETRIES = 3
"""Of a task whose process or machine is gone."""


class RayEngine:
    """Connected from `with` to its end, to the cluster that the process is connected to already if it is. Raises Refused (missing-package), and engine-failed when it is entered."""

    def __init__(self) -> None:
        try:
            import ray
        except ImportError as error:
            raise Refused(Refusal("missing-package", "missing-dep", _PLACE, "tasks are run by Ray", str(error),
                                  "pip install 'qcore[ray]'")) from error  # fmt: skip
        self._ray: Any = ray
        self._facts, self._own = _facts(), False

    def __enter__(self) -> RayEngine:
        self._own = not self._ray.is_initialized()
        if self._own:
            self._start(os.environ.get("RAY_ADDRESS", ""))
        if not self._at_a_time():
            most = max(self._cpus(), default=0)
            self._stop()
            raise _failed("no machine of the cluster has as many CPUs as a task needs", f"found {most}, expected {self._threads}",
                          f"Let fewer threads do a task: OMP_NUM_THREADS={max(most, 1)}.")  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def map(
        self, function: Callable[[Shared, Item], Iterable[Found]], items: Iterable[Item], shared: Shared
    ) -> Iterator[Found]:
        """As `Engine` has it. Beside the tasks that run, as many wait, or have results that wait."""
        task = self._ray.remote(_task).options(name=function.__name__, num_cpus=self._threads, max_retries=_RETRIES)
        common = self._ray.put((function, shared))
        most = 2 * max(self._at_a_time(), 1)
        sent: deque[Any] = deque()
        try:
            for item in items:
                sent.append(task.remote(common, item, self._facts))
                if len(sent) >= most:
                    yield from self._found(sent.popleft())
            while sent:
                yield from self._found(sent.popleft())
        finally:
            for left in sent:
                self._ray.cancel(left)

    @property
    def _threads(self) -> int:
        threads: int = self._facts["threads"]
        return threads

    def _start(self, address: str) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told of the run
        try:
            host, _, port = address.rpartition(":")
            if host and port.isdigit() and "/" not in address:
                socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()  # Ray tries for minutes
            self._ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, OverflowError, RuntimeError, ValueError, self._ray.exceptions.RayError) as error:
            raise _failed("the cluster cannot be reached", f"found {address or 'no RAY_ADDRESS'}: {error}",
                          "Check RAY_ADDRESS, and that the cluster runs the same versions of Ray and Python.") from error  # fmt: skip

    def _cpus(self) -> list[int]:
        """Of each machine of the cluster."""
        return [int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes() if node["Alive"]]

    def _at_a_time(self) -> int:
        """Tasks that the cluster has CPUs for."""
        return sum(cpus // self._threads for cpus in self._cpus())

    def _found(self, sent: Any) -> list[Any]:
        try:
            found: list[Any] | Refusal = self._ray.get(sent)
        except self._ray.exceptions.RayTaskError as error:
            if "ModuleNotFoundError" not in str(error):
                raise
            raise _failed("a machine of the cluster lacks a package", str(error).strip().splitlines()[-1],
                          "Install there what is installed here.") from error  # fmt: skip
        except self._ray.exceptions.RayError as error:
            raise _failed("Ray gives a task up", str(error),
                          "Look at its logs: processes may have had too little memory.") from error  # fmt: skip
        if isinstance(found, Refusal):
            raise Refused(found)
        return found

    def _stop(self) -> None:
        if self._own:
            self._ray.shutdown()


def _task(
    common: tuple[Callable[[Any, Any], Iterable[Any]], Any], item: Any, facts: dict[str, Any]
) -> list[Any] | Refusal:
    """In a process of the cluster. A refusal is a result, so that it comes back as it is."""
    torch.set_num_threads(facts["threads"])
    if (found := _facts()) != facts:
        apart = [key for key in facts if found[key] != facts[key]]
        return _failed("a machine of the cluster would compute other numbers than this one",
                       ", ".join(f"found {key} {found[key]}, expected {facts[key]}" for key in apart),
                       "Let the cluster be of machines of one kind with the same packages.").refusal  # fmt: skip
    function, shared = common
    with torch.no_grad():
        try:
            return list(function(shared, item))
        except Refused as error:
            return error.refusal


def _facts() -> dict[str, Any]:
    """What numbers depend on."""
    return {
        "qcore": qcore.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": multiplies_bfloat16(),
        "threads": torch.get_num_threads(),
    }


def _failed(reason: str, fact: str, fix: str) -> Refused:
    return Refused(Refusal("engine-failed", "usage", _PLACE, reason, fact, fix))
