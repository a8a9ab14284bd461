"""A process with a Ray cluster of its own, of two workers, for test_ray.py: `python ray_driver.py FOLDER`.

It quantizes the models whose requests lie in FOLDER, with one worker killed half-way, and tries what tasks do that go wrong. Functions of this file are sent to workers by value.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import torch

from qcore.calibration import block
from qcore.calibration.engine import engine_of
from qcore.calibration.run import quantize
from qcore.refusal import Refusal, Refused

FOLDER = Path(sys.argv[1])
KILLED = FOLDER / "killed"
watched = block.watched


def dying(shared: Any, states: Any) -> Iterator[Any]:
    """As `watched`, but once its process dies, in the second block with some of its windows read."""

    def some() -> Iterator[torch.Tensor]:
        for number, part in enumerate(states):
            if number == 3 and any(FOLDER.glob("out-0.work/block-00000.safetensors")) and not KILLED.exists():
                KILLED.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield part

    return watched(shared, some())


def odd(limit: int, number: int) -> Iterator[int]:
    if number == limit:
        raise Refused(Refusal("bad-content", "bad-file", "x", "a reason", "a fact", "a fix", tensor="t"))
    yield number
    if number % 2 == 0:
        yield torch.get_num_threads()


def said(limit: int, **facts: str) -> dict[str, Any]:
    """Why something is refused."""
    try:
        with engine_of("ray") as engine:
            engine._facts.update(facts)  # type: ignore[attr-defined]
            list(engine.map(odd, range(8), limit))
    except Refused as error:
        return error.refusal.to_dict()
    return {}


def main() -> None:
    torch.set_num_threads(1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    found: dict[str, Any] = {}
    with engine_of("ray") as engine:
        found["order"] = list(engine.map(odd, range(7), 9))
    assert ray.is_initialized()  # it was before
    found["refused"], found["versions"] = said(5), said(9, torch="0.1")
    torch.set_num_threads(3)
    found["threads"] = said(9)
    torch.set_num_threads(1)
    block.watched = dying  # type: ignore[assignment]
    for number, request in enumerate(json.loads((FOLDER / "requests.json").read_text())):
        quantize(**request, out=FOLDER / f"out-{number}", engine="ray")
    (FOLDER / "found.json").write_text(json.dumps(found))
    ray.shutdown()


if __name__ == "__main__":
    main()
