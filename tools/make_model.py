"""Makes a llama of any size with random weights, to measure with: a safetensors folder in bfloat16, with another model's tokenizer.

    python tools/make_model.py OUT --tokenizer tests/golden/base --hidden 2048 --layers 16 --heads 32 --kv-heads 8 --inner 8192

About a thousand million parameters as above; three: --hidden 3072 --layers 28 --heads 24 --kv-heads 8 --inner 8192. Then, for instance,
`qcore quantize OUT --scheme Q4_K_M --out model.gguf` and `qcore bench model model.gguf --peers`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a model's folder")
    for name, value in (("hidden", 2048), ("layers", 16), ("heads", 32), ("kv-heads", 8), ("inner", 8192), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    torch.manual_seed(given.seed)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=given.hidden, num_hidden_layers=given.layers, num_attention_heads=given.heads,
        num_key_value_heads=given.kv_heads, intermediate_size=given.inner, tie_word_embeddings=True, max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()
