"""explain: what would run each layer of a checkpoint, and why not the other kernels. Reads configs and headers only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qcore.checkpoint.open import Checkpoint, open_checkpoint
from qcore.discovery import registry
from qcore.kernel import Op
from qcore.method import ModulePlan, is_embedding, is_expert
from qcore.model.devices import compute_dtype, find_device
from qcore.platform import Device, known_platform
from qcore.refusal import Refusal
from qcore.scheme import Scheme
from qcore.select import LayerRequest, Selection, exact_activations, select
from qcore.support.matrix import proofs

HEAD = "lm_head"
"""transformers' name of a causal language model's output layer."""


@dataclass(frozen=True)
class LayerExplanation:
    """One layer; selection is None where it is not quantized and runs as torch's own layer. evidence: what proves that
    the chosen kernel is right for the scheme on the platform: a grade of qcore.support.evidence, or `declared`."""

    module: str
    scheme: Scheme | None
    reason: str
    selection: Selection | None
    evidence: str | None = None


@dataclass(frozen=True)
class Explanation:
    """runs: every layer has a kernel. refusal: why not, where that is one reason for all layers."""

    path: str
    platform: str
    device: str | None
    dtype: str
    layers: tuple[LayerExplanation, ...]
    refusal: Refusal | None

    @property
    def runs(self) -> bool:
        return self.refusal is None and all(layer.selection is None or layer.selection.kernel for layer in self.layers)


def explain(
    path: str | Path | Checkpoint,
    platform: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    activations: str = "exact",
) -> Explanation:
    """What runs each layer on a platform, or on a device of this host (the default: the one that `run` would take).

    platform: an identifier such as `hopper`; it need not be here. dtype: of activations, as for `run` (see
    `compute_dtype`). Raises Refused (unknown-platform, no-device, and all that opening the checkpoint gives).
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    found = _device(known_platform(platform, registry().platforms) if platform else None, device)
    where = platform or (found.platform if found else "")
    computed = compute_dtype(dtype, found or registry().platforms.get(where), checkpoint)
    exact = exact_activations(activations)
    kernels, proved = registry().kernels, proofs(registry())
    layers = []
    for module, op, entry in _modules(checkpoint):
        selection = evidence = None
        if entry.scheme is not None:
            stated = entry.computes if op == "linear" and dtype == "checkpoint" else ""
            request = LayerRequest(op, entry.scheme, entry.matrix, stated or computed, exact, expert=is_expert(module))
            selection = select(request, where, kernels, found)
        if selection and selection.kernel:
            evidence = proved.get((where, selection.kernel.name, str(entry.scheme)), "declared")
        layers.append(LayerExplanation(module, entry.scheme, entry.reason, selection, evidence))
    refusal = registry().absent(where)
    return Explanation(str(checkpoint.path), where, found.id if found else None, computed, tuple(layers), refusal)


def _device(platform: str | None, device: str | None) -> Device | None:
    """The device to explain for; for a platform without a device here, None."""
    if platform is None or device is not None:
        return find_device(device or "auto")
    return next((found for found in registry().devices() if found.platform == platform), None)


def _modules(checkpoint: Checkpoint) -> Iterator[tuple[str, Op, ModulePlan]]:
    """Every layer that `run` makes; an output layer without weights of its own runs on the embedding's."""
    tied = None
    for module, entry in checkpoint.layers.items():
        embedding = is_embedding(module)
        yield module, "embedding" if embedding else "linear", entry
        tied = entry if embedding else tied
    if tied is not None and HEAD not in checkpoint.layers:
        yield HEAD, "linear", ModulePlan(tied.scheme, "tied to the embedding", tied.shape)
