"""qcore run: answers a prompt."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from qcore.checkpoint.kv_scales import checked_choice
from qcore.cli import options
from qcore.cli.output import note, peak_rss_mib, print_json, progress_bar
from qcore.select import exact_activations


def run(
    path: options.Path,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to say to the model; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where the answer is cut off.")] = 256,
    device: options.Device = "auto",
    kernel: Annotated[str | None, typer.Option(help="Run every layer that takes it with this kernel.")] = None,
    activations: options.Activations = "exact",
    quantize: options.Quantize = None,
    kv_cache: options.KvCache = "auto",
    dtype: options.Dtype = "auto",
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Makes sampling repeatable.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt; use no chat template.")] = False,
    json: options.Json = False,
) -> None:
    """Answer a prompt, streaming the text.

    Example: qcore run SmolLM2-135M-Instruct.Q4_1.gguf -p "Why is the sky blue?"
    """
    options.checked_dtype(dtype)
    exact_activations(activations)
    checked_choice(kv_cache, "--kv-cache")
    text = sys.stdin.read() if prompt == "-" else prompt
    options.checked_prompt(text)

    from qcore.checkpoint.open import open_checkpoint
    from qcore.model.devices import find_device, wanted_dtype

    checkpoint = open_checkpoint(path)
    if quantize is not None:
        checkpoint = checkpoint.quantized(quantize)
    target = find_device(device)

    from qcore.model.generate import Timing, encode, generate
    from qcore.model.kv_cache import kv_cache_of
    from qcore.model.load import kernel_counts, load_model

    began = time.perf_counter()
    with progress_bar("loading") as progress:
        wanted = wanted_dtype(dtype, target, checkpoint)
        model = load_model(
            checkpoint, target, wanted, kernel=kernel, activations=activations, kv_cache=kv_cache, progress=progress
        )
        tokenizer = checkpoint.load_tokenizer()
    load_s = time.perf_counter() - began
    timing = Timing()
    tokens = encode(tokenizer, text, chat=not raw)
    pieces = []
    for piece in generate(
        model, tokenizer, tokens, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, timing=timing
    ):
        pieces.append(piece)
        if not json:
            print(piece, end="", flush=True)
    kernels = kernel_counts(model)
    cached = kv_cache_of(model)
    computed = str(model.dtype).removeprefix("torch.")
    if json:
        print_json(
            {
                "text": "".join(pieces),
                "prompt_tokens": timing.prompt_tokens,
                "new_tokens": timing.new_tokens,
                "prefill_tokens_per_s": round(timing.prefill_tokens_per_s, 2),
                "decode_tokens_per_s": round(timing.decode_tokens_per_s, 2),
                "load_s": round(load_s, 3),
                "peak_rss_mib": peak_rss_mib(),
                "kernels": kernels,
                "decoder": timing.decoder or None,
                "dtype": computed,
                "kv_cache": str(cached) if cached else None,
                "device": target.id,
            }
        )
        return
    print(flush=True)
    named = ", ".join(f"{name} x {count}" for name, count in kernels.items()) or "none: the model is not quantized"
    note(
        f"\n{timing.decode_tokens_per_s:.1f} tokens/s ({timing.new_tokens} new; prompt of {timing.prompt_tokens} at "
        f"{timing.prefill_tokens_per_s:.0f} tokens/s), loaded in {load_s:.1f} s, peak memory {peak_rss_mib():.0f} MiB\n"
        f"{target.name}, {computed} activations, {f'{cached} kv cache, ' if cached else ''}kernels: {named}"
        f"{f'; steps by {timing.decoder}' if timing.decoder else ''}"
    )
