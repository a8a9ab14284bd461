"""A small model's decoding on a GPU, dense and quantized: python benchmarks/gpu_model.py [SCHEME ...]

SmolLM2-135M's shape with random weights, one text, a static cache, every step a replay of one CUDA graph; the median of ten times twenty steps.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from gpu import here, kernels_of, packed

from qcore.scheme import Scheme

SCHEMES = ("W4A16-g64-sym", "W8A16-channel-sym", "W8A8-fp8-dyn")
LENGTH, STEPS, TURNS = 256, 20, 10


def model() -> torch.nn.Module:
    """Huggingface's SmolLM2-135M, in bfloat16, of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        max_position_embeddings=8192, rope_theta=100000.0, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    made: torch.nn.Module = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    return made


def quantize(network: torch.nn.Module, scheme: Scheme) -> str:
    """Puts the selected kernel's layers, of random weights, in the places of dense ones. The kernels' names."""
    device, names = here(), set()
    for block in network.model.layers:  # type: ignore[union-attr]
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    rows, columns = child.weight.shape
                    kernel = kernels_of(scheme, (rows, columns), device)[0]
                    setattr(parent, name, packed(kernel, scheme, rows, columns))
                    names.add(kernel.name)
    return ", ".join(sorted(names))


def step_of(network: torch.nn.Module) -> Callable[[], None]:
    """Decodes the token behind LENGTH / 2 others, again and again."""
    from transformers import StaticCache

    cache = StaticCache(config=network.config, max_cache_len=LENGTH)
    token = torch.ones(1, 1, dtype=torch.int64, device="cuda")
    place = torch.tensor([LENGTH // 2], device="cuda")

    def step() -> None:
        network(token, past_key_values=cache, cache_position=place, position_ids=place[None], use_cache=True)

    return step


def seconds(step: Callable[[], None]) -> float:
    """Of a step, as a replay of its graph."""
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(TURNS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(STEPS):
            graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / STEPS)
    return statistics.median(times)


@torch.inference_mode()
def main(schemes: list[str]) -> None:
    print("| scheme | kernel | tokens a second | times dense |\n|---|---|---|---|")
    dense = seconds(step_of(model()))
    print(f"| bfloat16 | cuBLAS | {1 / dense:.0f} | 1 |", flush=True)
    for text in schemes:
        network = model()
        names = quantize(network, Scheme.parse(text))
        own = seconds(step_of(network))
        print(f"| {text} | {names} | {1 / own:.0f} | {dense / own:.2f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(SCHEMES))
