"""Makes a model of any size with random weights, to measure with: a safetensors folder in bfloat16, with another model's tokenizer.

    python tools/make_model.py OUT --tokenizer tests/golden/base --hidden 2048 --layers 16 --heads 32 --kv-heads 8 --inner 8192

About a thousand million parameters of a llama as above; three: --hidden 3072 --layers 28 --heads 24 --kv-heads 8 --inner 8192. Other kinds are
named as transformers names them, with what else their configs hold: in the shape of gemma 3 270M

    --type gemma3_text --hidden 640 --layers 18 --heads 4 --kv-heads 1 --inner 2048 --set head_dim=256 --set vocab_size=262144

and a mixture of 64 experts, 8 of them chosen

    --type qwen3_moe --hidden 1024 --layers 12 --heads 16 --kv-heads 4 --inner 2048 --set num_experts=64 --set num_experts_per_tok=8 --set norm_topk_prob=true

Then, for instance, `qcore quantize OUT --scheme Q4_K_M --out model.gguf` and `qcore bench model model.gguf --peers`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a model's folder")
    parser.add_argument("--type", default="llama", help="model_type of the config")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=JSON", help="of the config")
    for name, value in (("hidden", 2048), ("layers", 16), ("heads", 32), ("kv-heads", 8), ("inner", 8192), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    torch.manual_seed(given.seed)
    torch.set_default_dtype(torch.bfloat16)
    fields = {
        "vocab_size": len(tokenizer), "hidden_size": given.hidden, "num_hidden_layers": given.layers, "num_attention_heads": given.heads,
        "num_key_value_heads": given.kv_heads, "intermediate_size": given.inner, "tie_word_embeddings": True, "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None,
    } | {name: json.loads(value) for name, _, value in (field.partition("=") for field in given.set)}  # fmt: skip
    AutoModelForCausalLM.from_config(AutoConfig.for_model(given.type, **fields)).save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()
