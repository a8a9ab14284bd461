"""The `qcore` command. Heavy libraries are imported by the command that needs them, when it runs."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any

import typer

from qcore.cli import bench, convert, doctor, evaluate, explain, inspect, matrix, plugins, quantize, run, verify
from qcore.cli.output import DONE, FAULT, INTERRUPTED, USAGE, exit_status, note, print_refusal
from qcore.refusal import Refused

# The base of all of typer's complaints about a command line; newer versions bundle the click that it comes from.
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="qcore",
    help="Which quantization runs here, how well, and why not the others - and then runs it.",
    epilog="Exit codes: 0 done, 1 a fault of qcore's, 2 wrong usage, 3 refused, 4 a bad checkpoint or input file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    # a default that is a bool needs no pydantic, which typer would import for `qcore COMMAND --help` (0.1 s)
    context_settings={
        "help_option_names": ["-h", "--help"],
        "default_map": {"help": False, "bench": {"help": False}, "plugins": {"help": False}},
    },
)
app.command("matrix")(matrix.matrix_command)
app.command("run")(run.run)
app.command("inspect")(inspect.inspect)
app.command("convert")(convert.convert_command)
app.command("explain")(explain.explain_command)
app.command("eval")(evaluate.evaluate_command)
app.command("verify")(verify.verify_command)
app.command("quantize")(quantize.quantize_command)
app.add_typer(plugins.app, name="plugins")
app.command("doctor")(doctor.doctor)
app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        from qcore import __version__

        print(f"qcore {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point: runs a command and turns what it raises into an exit code and a readable message."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is for those who call it themselves
    try:
        code = app(standalone_mode=False)
        _exit(code if isinstance(code, int) else DONE)
    except Refused as error:
        print_refusal(error.refusal, as_json="--json" in sys.argv)
        _exit(exit_status(error.refusal))
    except typer.Exit as stop:
        _exit(stop.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        note("interrupted")
        _exit(INTERRUPTED)
    except _UsageError as error:
        error.show()
        _exit(USAGE)
    except BrokenPipeError:  # the reader of our output has gone; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit(DONE)
    except Exception as error:
        note(f"This is a fault of qcore's: {type(error).__name__}: {error}")
        if os.environ.get("QCORE_TRACEBACK"):
            traceback.print_exc()
        else:
            note("Run it again with QCORE_TRACEBACK=1 and report what it prints.")
        _exit(FAULT)


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.exit(code)
