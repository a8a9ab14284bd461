"""Checkpoints of every format with configs and tensors changed at random: each is read, or refused by name."""

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qcore
import test_auto_round
import test_awq
import test_bitsandbytes
import test_deepspeedfp
import test_fp8
import test_gptq
import test_inc
import test_modelopt
import test_quark

EXAMPLES = 2000
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 7, 1 << 40, -(1 << 70), 0.5, float("nan"), float("inf"), "", "4", "gemm", "re:(", "re:.*",
    "\u0000", [], ["lm_head"], [1], {}, {"bits": 4}, {"": {"": None}},
)  # fmt: skip

MAKERS: dict[str, Callable[[Path], Path]] = {
    "gptq": lambda folder: test_gptq.checkpoint(folder, desc_act=True)[0],
    "awq": lambda folder: test_awq.checkpoint(folder)[0],
    "auto-round": lambda folder: test_auto_round.checkpoint(
        folder, {test_auto_round.UP: test_auto_round.layer(test_auto_round.UP, 4, 32, "auto_round", sym=False)[0]},
        packing_format="auto_round", extra_config={".*up.*": {"bits": 4}}
    ),
    "bitsandbytes": lambda folder: test_bitsandbytes.checkpoint(folder, test_bitsandbytes.four_bits(nested=True)[0]),
    "bitsandbytes-int8": lambda folder: test_bitsandbytes.checkpoint(folder, test_bitsandbytes.int8()[0]),
    "modelopt-fp8": lambda folder: test_modelopt.checkpoint(folder, test_modelopt.made("FP8")[0], "FP8"),
    "modelopt-awq": lambda folder: test_modelopt.checkpoint(folder, test_modelopt.made("W4A16_AWQ")[0], "W4A16_AWQ"),
    "modelopt-nvfp4": lambda folder: test_modelopt.checkpoint(folder, test_modelopt.made("NVFP4")[0], "NVFP4"),
    "quark": lambda folder: test_quark.checkpoint(
        folder, test_quark.made("uint4", "per_group")[0], test_quark.spec("uint4", "per_group", group_size=32)
    ),
    "fp8": lambda folder: test_fp8.checkpoint(folder, test_fp8.made("block")[0], weight_block_size=[32, 48]),
    "deepspeedfp": test_deepspeedfp.checkpoint,
    "inc-saved": test_inc.saved,
    "inc-measured": lambda folder: test_inc.measured(folder, stated=True),
    "quark-fp8": lambda folder: test_quark.checkpoint(
        folder, {**test_quark.made("fp8_e4m3", "per_tensor")[0], "input_scale": torch.tensor(0.1)},
        test_quark.spec("fp8_e4m3"), test_quark.spec("fp8_e4m3"),
    ),
}  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def change_config(config: dict[str, Any], chance: random.Random) -> None:
    """One value of the quantization config is replaced, removed, or added."""
    quantization = config["quantization_config"]
    *way, last = chance.choice([place for place in places(quantization) if place != ("quant_method",)])
    parent = quantization
    for step in way:
        parent = parent[step]
    if chance.random() < 0.2:
        del parent[last]
    else:
        parent[last] = copy.deepcopy(chance.choice(ODD))


def change_tensors(tensors: dict[str, torch.Tensor], chance: random.Random) -> None:
    """One part of the quantized layer is cut, widened, turned, retyped, filled, renamed or lost."""
    dense = {"input_layernorm", "post_attention_layernorm", "norm", "embed_tokens", "lm_head"}
    names = [
        name
        for name in tensors
        if name.split(".")[-2] not in dense and not (tensors[name].dtype == torch.float32 and tensors[name].dim() == 2)
    ]
    name = chance.choice(names)
    tensor = tensors.pop(name)
    way = chance.randrange(8)
    if way == 0:
        return
    if way == 1 and tensor.dim():
        tensor = tensor[: chance.randrange(tensor.shape[0] + 1)]
    elif way == 2 and tensor.dim():
        tensor = (
            torch.cat([tensor.view(torch.uint8), tensor.view(torch.uint8)]).view(tensor.dtype)
            if tensor.dim()
            else tensor
        )
    elif way == 3 and tensor.dim() == 2:
        tensor = tensor.view(torch.uint8).view(tensor.dtype).t()
    elif way == 4:
        tensor = tensor.to(torch.float32) if tensor.dtype != torch.float32 else tensor.to(torch.int32)
    elif way == 5:
        tensor = torch.full(tensor.shape, 255, dtype=torch.uint8) if chance.random() < 0.5 else tensor.unsqueeze(0)
    elif way == 6:
        flat = tensor.contiguous().reshape(-1).view(torch.uint8).clone()
        flat[chance.randrange(max(1, flat.numel()))] = 0xFF
        tensor = flat.view(tensor.dtype).reshape(tensor.shape)
    else:
        name += chance.choice(["", "x", ".absmax", ".g_idx"])
    tensors[name] = tensor.contiguous()


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_changed_checkpoints_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    whole = MAKERS[kind](tmp_path / "whole")
    config, tensors = json.loads((whole / "config.json").read_text()), load_file(whole / "model.safetensors")
    refused = 0
    folder = Path(shutil.copytree(whole, tmp_path / "changed"))
    for seed in range(EXAMPLES):
        chance = random.Random(seed)
        changed, parts = copy.deepcopy(config), dict(tensors)
        if chance.random() < 0.5:
            change_config(changed, chance)
        else:
            change_tensors(parts, chance)
        (folder / "config.json").write_text(json.dumps(changed))
        save_file(parts, folder / "model.safetensors")
        try:
            opened = qcore.open_checkpoint(folder)
            for module, scheme in opened.plan.items():
                if scheme is not None:
                    weight = opened.layer(module).weight
                    assert weight.dequantize().shape == opened.layers[module].shape
        except qcore.Refused as error:
            refused += 1
            assert error.refusal.reason and error.refusal.fix
        except Exception as error:
            pytest.fail(f"{kind}, seed {seed}: {type(error).__name__}: {error}")
    assert EXAMPLES // 4 < refused < EXAMPLES, "changes must matter, and not all of them"
