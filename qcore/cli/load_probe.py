"""The process that `qcore bench load` starts: loads one model and prints what it took as JSON.

python -m qcore.cli.load_probe PATH DEVICE DTYPE
"""

from __future__ import annotations

import sys
import time
from typing import Any

from qcore.cli.output import mebibytes, memory_mib, peak_rss_mib, print_json
from qcore.refusal import Refused


def measure(path: str, device: str, dtype: str) -> dict[str, Any]:
    """load_s: reading, decoding and prepacking, without importing libraries. peak_rss_mib: VmHWM of this process.
    baseline_rss_mib: resident memory with all libraries imported, before a weight is read. limit_mib: what loading may
    peak at, quantized size + 1.1 x the largest tensor + 150 MiB; above_baseline_mib is held against it."""
    from qcore.checkpoint.open import open_checkpoint
    from qcore.model.devices import find_device, wanted_dtype

    checkpoint = open_checkpoint(path)
    target = find_device(device)

    from qcore.checkpoint.architecture import model_class
    from qcore.model.load import load_model

    model_class(checkpoint)
    baseline = memory_mib("VmRSS")
    began = time.perf_counter()
    load_model(checkpoint, target, wanted_dtype(dtype, target, checkpoint))
    seconds = time.perf_counter() - began
    peak = peak_rss_mib()
    largest = max(info.nbytes for info in checkpoint.files.source.tensors.values())
    return {
        "load_s": round(seconds, 3),
        "peak_rss_mib": peak,
        "quantized_mib": mebibytes(checkpoint.size_bytes),
        "largest_tensor_mib": mebibytes(largest),
        "baseline_rss_mib": baseline,
        "above_baseline_mib": round(peak - baseline, 1),
        "limit_mib": mebibytes(checkpoint.size_bytes + 1.1 * largest + 150 * 2**20),
    }


if __name__ == "__main__":
    try:
        print_json(measure(*sys.argv[1:4]))
    except Refused as error:
        print_json({"refusal": error.refusal.to_dict()})
