"""Timing whole models: contenders take turns, each turn in a process of its own, so that no runtime's threads wait beside another's."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from qcore.bench.model_probe import Task
from qcore.refusal import Refusal, Refused

MEDIANS = ("load_s", "peak_rss_mib", "baseline_rss_mib", "prefill_tokens_per_s", "decode_tokens_per_s")


def contenders(path: str, peers: bool) -> list[str]:
    """qcore, and other tools that are installed and read the file."""
    found = ["qcore"]
    if peers and path.endswith(".gguf") and importlib.util.find_spec("llama_cpp"):
        found.append("llama.cpp")
    if peers:
        found.append("transformers")
    return found


def measure(task: Task, peers: bool, rounds: int, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each contender, the medians of its turns; `failed` says why a peer has none. Raises Refused where qcore refuses."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders(task.path, peers)}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name in [name for name in turns if name not in failed]:
            answer = _turn(name, task)
            if "refusal" in answer:
                raise Refused(Refusal(**answer["refusal"]))
            if "failed" in answer:
                if name == "qcore":
                    raise RuntimeError(f"the process of qcore ended: {answer['failed']}")
                failed[name] = answer["failed"]
                continue
            turns[name].append(answer)
            progress(
                f"{name}: prefill {answer['prefill_tokens_per_s']}, decode {answer['decode_tokens_per_s']} tokens/s"
            )
    return [_row(name, answers, failed.get(name)) for name, answers in turns.items()]


def _turn(name: str, task: Task) -> dict[str, Any]:
    command = [sys.executable, "-m", "qcore.bench.model_probe", name, json.dumps(asdict(task))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.strip().splitlines()
        return {"failed": lines[-1] if lines else f"status {done.returncode}"}
    return answer


def _row(name: str, answers: list[dict[str, Any]], failed: str | None) -> dict[str, Any]:
    if failed is not None or not answers:
        return {"name": name, "failed": failed}
    medians = {key: sorted(answer[key] for answer in answers)[len(answers) // 2] for key in MEDIANS}
    return {"name": name, "by": answers[-1]["by"], **medians}
