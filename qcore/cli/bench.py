"""qcore bench: measurements of this host: loading, whole models, and single linear layers."""

from __future__ import annotations

import json as json_
import subprocess
import sys
from typing import Annotated, Any

import typer

from qcore.cli import options
from qcore.cli.output import note, print_json, print_table
from qcore.refusal import Refusal, Refused

app = typer.Typer(help="Measure this host.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    pass


@app.command("load")
def load(
    path: options.Path, device: options.Device = "auto", dtype: options.Dtype = "checkpoint", json: options.Json = False
) -> None:
    """Load a checkpoint in a fresh process and report time and peak memory.

    Example: qcore bench load ./model
    """
    options.checked_dtype(dtype)
    command = [sys.executable, "-m", "qcore.cli.load_probe", path, device, dtype]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    try:
        answer = json_.loads(done.stdout)
    except ValueError as error:
        raise RuntimeError(f"the loading process ended with status {done.returncode}") from error
    if "refusal" in answer:
        raise Refused(Refusal(**answer["refusal"]))
    if json:
        print_json(answer)
    else:
        print_table(("measure", "value"), answer.items())


@app.command("model")
def model(
    path: options.Path,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens that are taken at once.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens that are taken one by one.")] = 64,
    texts: Annotated[int, typer.Option(help="Texts that are read at once, each with as many tokens.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads; default torch's.")] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Beside llama.cpp and transformers, where they are installed.")
    ] = False,
    dtype: options.Dtype = "auto",
    activations: options.Activations = "exact",
    rounds: Annotated[int, typer.Option(help="Turns that each contender takes, each in a process of its own.")] = 3,
    json: options.Json = False,
) -> None:
    """Time a whole model: loading, a prompt, and steps from token to token.

    Example: qcore bench model ./model.gguf --peers --activations int8
    """
    from qcore.bench.model import measure
    from qcore.bench.model_probe import Task
    from qcore.select import exact_activations

    options.checked_dtype(dtype)
    exact_activations(activations)
    for name, value, least in (
        ("--prompt-tokens", prompt_tokens, 1),
        ("--new-tokens", new_tokens, 2),
        ("--texts", texts, 1),
        ("--threads", threads or 1, 1),
        ("--rounds", rounds, 1),
    ):
        if value < least:
            raise _bad(name, f"found {value}, expected at least {least}", "Use a greater number.")
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    task = Task(path, threads, prompt_tokens, new_tokens, dtype, activations, texts)
    rows = measure(task, peers, rounds, note)
    if json:
        asked = {"threads": threads, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "texts": texts}
        print_json(asked | {"rows": rows})
        return
    headings = ("", "load s", "peak MiB", "prefill tok/s", "decode tok/s", "by")
    keys = ("name", "load_s", "peak_rss_mib", "prefill_tokens_per_s", "decode_tokens_per_s", "by")
    print_table(
        headings,
        [[row.get(key, "-") for key in keys] if "by" in row else [row["name"], *"----", row["failed"]] for row in rows],
    )


@app.command("linear")
def linear(
    scheme: Annotated[list[str] | None, typer.Option(help="Schemes; default W4A16-g128-sym.")] = None,
    m: Annotated[list[int] | None, typer.Option("--m", help="Rows of activations; default 1, 16 and 512.")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="Weights, output x input channels; default 4096x4096.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; default torch's.")] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Beside every other kernel and tool that is installed.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Activations: bfloat16, float16 or float32.")] = "bfloat16",
    activations: options.Activations = "exact",
    cold: Annotated[int, typer.Option(help="MiB of weights that calls go round, so that no cache holds them.")] = 640,
    rounds: Annotated[int, typer.Option(help="Turns that each contender takes.")] = 5,
    plot: Annotated[str | None, typer.Option(help="Draw the host's roofline with every point, as a PNG.")] = None,
    json: options.Json = False,
) -> None:
    """Time linear layers on this host, contenders taking turns.

    Example: qcore bench linear --scheme W4A16-g128-sym --scheme W8A8-int8-dyn --m 1 --m 512 --peers
    """
    import torch

    from qcore.bench.linear import Question, limits, measure
    from qcore.model.devices import find_device
    from qcore.scheme import Scheme
    from qcore.select import exact_activations

    exact = exact_activations(activations)
    if dtype not in ("bfloat16", "float16", "float32"):
        raise _bad("--dtype", f"found {dtype}", "Use bfloat16, float16 or float32.")
    batches = tuple(m or (1, 16, 512))
    for name, value in (("--m", min(batches)), ("--cold", cold), ("--rounds", rounds), ("--threads", threads or 1)):
        if value < 1:
            raise _bad(name, f"found {value}, expected at least 1", "Use a positive number.")
    device = find_device("cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    question = Question(
        tuple(map(Scheme.parse, scheme or ["W4A16-g128-sym"])), batches, tuple(map(_shape, shape or ["4096x4096"])),
        getattr(torch, dtype), exact, peers, cold << 20, rounds,
    )  # fmt: skip
    answer: dict[str, Any] = {"limits": limits(device), "threads": torch.get_num_threads(), "rows": []}
    for row in measure(question, device):
        answer["rows"].append(row)
        note(f"{row['scheme']}, {row['m']} x [{row['n']}, {row['k']}]: {row['kernel']} {row['seconds'] * 1e3:.3f} ms")
    if plot is not None:
        from qcore.bench.plot import draw

        draw(answer, plot)
    if json:
        print_json(answer)
        return
    print_table(("limit", "reached by torch's operators"), answer["limits"].items())
    headings = ("scheme", "m", "n x k", "kernel", "ms", "GB/s", "10^12/s", "x bf16", "error")
    lines = []
    for row in answer["rows"]:
        place = (row["scheme"], row["m"], f"{row['n']}x{row['k']}")
        lines.append((*place, row["kernel"], f"{row['seconds'] * 1e3:.3f}", f"{row['gbps']:.1f}", f"{row['tops']:.3f}",
                      f"{row['vs_bf16']:.2f}", f"{row['relative_error']:.1e}"))  # fmt: skip
        for name, peer in row["peers"].items():
            ratio = row["seconds"] * row["vs_bf16"] / peer["seconds"]
            lines.append((*place, f"- {name}", f"{peer['seconds'] * 1e3:.3f}", "", "", f"{ratio:.2f}",
                          f"{peer['relative_error']:.1e}"))  # fmt: skip
    print_table(headings, lines)


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise _bad("--shape", f"found {text!r}, expected NxK", "Example: 4096x4096.")
    return int(rows), int(columns)


def _bad(option: str, fact: str, fix: str) -> Refused:
    return Refused(Refusal("bad-argument", "usage", option, "this is no value for it", fact, fix))
