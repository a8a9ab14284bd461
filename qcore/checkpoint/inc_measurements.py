"""Intel Neural Compressor's measurement and scale files: for each layer, one number an input, and one for its weight.

    <dump_stats_path>_hooks_<observer>[_<rank>_<world>].json                  largest magnitudes
    <dump_stats_path>_hooks_<observer>_<SCALE_METHOD>[_<rank>_<world>].json   the scales that came of them
    {"Nodes": {layer: {"inputs": [[[x]]], "params": {"weight": [[x]]}, ...}}, ...}

The .npz beside each .json holds the same numbers as a pickled Python object, so it is never opened. Of several ranks the
largest numbers are taken. Read from neural_compressor 3.10, torch/algorithms/fp8_quant/_core/common.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qcore.checkpoint.json_file import read_json
from qcore.refusal import Refusal, Refused, bad_file

_LARGEST = 1e38
"""No value of a bfloat16 model is larger."""
_LONGEST_NAME = 255
"""Characters of the path, which is relative."""
_CACHE = re.compile(r"(.{1,1000}?)(?:\.attn)?(?:\.impl)?\.([kv])_cache")
_RANK = r"(_\d+_\d+)?"
_FIX = 'Write it as JSON where it was made: python -c "import json, numpy, sys; json.dump(numpy.load(sys.argv[1], allow_pickle=True)[\'arr_0\'].item(), open(sys.argv[2], \'w\'), default=lambda a: a.tolist())" FILE.npz FILE.json'  # fmt: skip


@dataclass(frozen=True)
class Node:
    """One layer. input: of its first input, None where it was not measured. weight: one number, or one a channel."""

    input: float | None
    weight: tuple[float, ...]

    def merged(self, other: Node) -> Node:
        """The larger of both, number by number."""
        if len(self.weight) != len(other.weight):
            return Node(_larger(self.input, other.input), self.weight or other.weight)
        return Node(_larger(self.input, other.input), tuple(map(max, self.weight, other.weight)))


def read_nodes(folder: Path, stem: str, suffix: str) -> dict[str, Node] | None:
    """The layers of all files `<stem>_<suffix>[_rank_world].json` in the checkpoint's folder or where `stem` leads inside
    of it; None where there is none. Raises Refused (unsafe-container where there is only an .npz, bad-field, bad-content,
    and what JSON gives)."""
    way = PurePosixPath(stem)
    places = [folder / way.parent, folder] if _inside(folder, way) else [folder]
    name = re.compile(rf"{re.escape(way.name)}_{re.escape(suffix)}{_RANK}\.(json|npz)")
    for place in places:
        found = sorted(file for file in place.iterdir() if name.fullmatch(file.name)) if place.is_dir() else []
        files = [file for file in found if file.suffix == ".json"]
        if found and not files:
            raise Refused(Refusal("unsafe-container", "bad-file", str(found[0]), "its numbers are a pickled object, which "
                                  "runs code when it is read, so it is never opened", f"found {found[0].name} and no .json",
                                  _FIX, str(found[0])))  # fmt: skip
        if files:
            nodes: dict[str, Node] = {}
            for file in files:
                for layer, node in _nodes(file):
                    nodes[layer] = nodes[layer].merged(node) if layer in nodes else node
            return nodes
    return None


def caches(nodes: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Of the layers that are kv caches, the attention module and whose cache it is: k or v. vLLM has them in <attention>.attn.impl."""
    found = {name: _CACHE.fullmatch(name) for name in nodes}
    return {name: (match[1], match[2]) for name, match in found.items() if match}


def _inside(folder: Path, way: PurePosixPath) -> bool:
    """Whether the way leads to a place in the folder, links included."""
    if way.is_absolute() or ".." in way.parts or len(str(way)) > _LONGEST_NAME:
        return False
    try:
        return (folder / way.parent).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a link to itself, a zero byte
        return False


def _nodes(file: Path) -> Iterator[tuple[str, Node]]:
    nodes = read_json(file).get("Nodes")
    if not isinstance(nodes, Mapping):
        raise bad_file("bad-field", "a measurement file has its layers in Nodes", file=file, field="Nodes", found=nodes,
                       expected="an object")  # fmt: skip
    for layer, parts in nodes.items():
        if not isinstance(parts, Mapping):
            raise bad_file("bad-field", "a layer's measurements are an object", file=file, field=f"Nodes.{layer}",
                           found=parts, expected="an object")  # fmt: skip
        where = f"Nodes.{layer}"
        inputs = parts.get("inputs", parts.get("input")) or []
        first = _numbers(inputs[:1] if isinstance(inputs, list) else inputs, file, f"{where}.inputs")
        params = parts.get("params")
        weight = params.get("weight", []) if isinstance(params, Mapping) else []
        if isinstance(weight, Mapping):  # by output channel, and by input channel, which are ones
            if any(number != 1 for number in _numbers(weight.get("1", []), file, f"{where}.params.weight.1")):
                raise bad_file("bad-field", "scales by input channel are not read", file=file, field=f"{where}.params.weight",
                               found="other numbers", expected="ones", fix="Choose another scale_method.")  # fmt: skip
            weight = weight.get("0", [])
        yield layer, Node(max(first, default=None), tuple(_numbers(weight, file, f"{where}.params.weight")))


def _numbers(value: Any, file: Path, field: str) -> list[float]:
    """The finite, non-negative numbers of nested lists."""
    waiting, found = [value], []
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += reversed(item)
        elif isinstance(item, int | float) and not isinstance(item, bool) and 0 <= item < _LARGEST:
            found.append(float(item))
        else:
            raise bad_file("bad-content", "a measurement is no finite, non-negative number", file=file, field=field,
                           found=item, expected="numbers from 0 on")  # fmt: skip
    return found


def _larger(one: float | None, other: float | None) -> float | None:
    return max((x for x in (one, other) if x is not None), default=None)
