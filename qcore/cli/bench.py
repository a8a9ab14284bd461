"""qcore bench: measurements of this host. `load` is the first of them."""

from __future__ import annotations

import json as json_
import subprocess
import sys

import typer

from qcore.cli import options
from qcore.cli.output import print_json, print_table
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
