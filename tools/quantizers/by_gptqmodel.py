"""Quantizes with GPTQModel, and runs what it saved with its torch kernel: python tools/quantizers/by_gptqmodel.py CASE MODEL TOKENS OUT"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

REQUIRES = "gptqmodel==7.7.0 transformers==5.23.0 torch==2.13.0"
CASES = (
    "4 bits by 64",
    "4 bits by 64, desc_act, asymmetric",
    "4 bits by 64, gptq_v2",
    "3 bits by 64",
    "8 bits by channel",
    "AWQ 4 bits by 64, gemm",
)
FEW = 2
"""Windows that AWQ is calibrated with, whose search is made for GPUs."""


def main(case: str, model: Path, tokens: Path, out: Path) -> None:
    import gptqmodel
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization import FORMAT, METHOD
    from perplexity import calibration, perplexity, tell

    awq = case.startswith("AWQ")
    wanted = QuantizeConfig(
        bits=int(case.removeprefix("AWQ ")[0]),
        group_size=-1 if "channel" in case else 64,
        desc_act="desc_act" in case,
        act_group_aware=False if "channel" in case else None,  # it orders groups, of which there have to be some
        sym="asymmetric" not in case and not awq,
        method=METHOD.AWQ if awq else METHOD.GPTQ,
        format=FORMAT.GEMM if awq else FORMAT.GPTQ_V2 if "v2" in case else FORMAT.GPTQ,
        device="cpu",
    )
    made = GPTQModel.load(str(model), wanted)
    rows = [
        {"input_ids": window, "attention_mask": [1] * len(window)}
        for window in calibration(tokens)[: FEW if awq else None]
    ]
    made.quantize(rows, batch_size=1)
    made.save(str(out))
    backend = BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH
    again = GPTQModel.load(str(out), backend=backend, device="cpu", dtype=torch.float16)  # float32 is refused at load
    tell(f"gptqmodel {gptqmodel.__version__}", perplexity(again.model.float(), tokens))


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
