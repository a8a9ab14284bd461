"""Writes qcore/blocks/iq_grids.safetensors: the grids of ggml's IQ1, IQ2 and IQ3 types as int8 [entries, 4 or 8].

The numbers are read from gguf-py's own tables. Run from the repository's root: python tools/make_iq_grids.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import quants
from safetensors.numpy import save_file

TARGET = Path(__file__).parent.parent / "qcore" / "blocks" / "iq_grids.safetensors"
GRIDS = {
    "iq1_s": quants.IQ1_S,
    "iq2_xxs": quants.IQ2_XXS,
    "iq2_xs": quants.IQ2_XS,
    "iq2_s": quants.IQ2_S,
    "iq3_xxs": quants.IQ3_XXS,
    "iq3_s": quants.IQ3_S,
}


def main() -> None:
    tables = {}
    for name, source in GRIDS.items():
        source.init_grid()
        tables[name] = source.grid.reshape(source.grid_shape).astype(np.int8)
    save_file(tables, TARGET)


if __name__ == "__main__":
    main()
