"""qcore plugins: every plugin that is installed, and what became of it; `qcore plugins new` begins another one."""

from __future__ import annotations

import pathlib
import re
import shutil
import string
import tempfile
from typing import Annotated

import typer

from qcore.cli import options
from qcore.cli.output import print_json, print_table, writing
from qcore.platform import PLATFORM_PLUGINS
from qcore.refusal import Refusal, Refused

_TEMPLATE = pathlib.Path(__file__).parents[1] / "template"

app = typer.Typer(
    help="List the installed plugins, what they bring, and why any of them was refused.",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(epilog="Example: qcore plugins --json")
def plugins_command(context: typer.Context, json: options.Json = False) -> None:
    """List the installed plugins, what they bring, and why any of them was refused.

    Example: qcore plugins --json
    """
    if context.invoked_subcommand is not None:
        return
    from qcore.inventory import devices, plugins

    devices()  # a plugin that fails when it is asked for its devices is broken too
    found = plugins()
    if json:
        print_json(
            [
                {
                    "name": plugin.name,
                    "distribution": plugin.distribution,
                    "version": plugin.version,
                    "api": list(plugin.api) if plugin.api else None,
                    "status": plugin.status,
                    "platforms": [platform.id for platform in plugin.platforms],
                    "kernels": [kernel.name for kernel in plugin.kernels],
                    "methods": [method.name for method in plugin.methods],
                    "algorithms": [algorithm.name for algorithm in plugin.algorithms],
                    "decoders": [decoder.name for decoder in plugin.decoders],
                    "evidence": str(plugin.evidence) if plugin.evidence else None,
                    "refusal": plugin.refusal.to_dict() if plugin.refusal else None,
                }
                for plugin in found
            ]
        )
        return
    print_table(
        ("plugin", "distribution", "status", "platforms", "kernels", "formats"),
        (
            (
                plugin.name,
                f"{plugin.distribution} {plugin.version}",
                plugin.status,
                ", ".join(platform.id for platform in plugin.platforms) or "-",
                len(plugin.kernels),
                ", ".join(method.name for method in plugin.methods) or "-",
            )
            for plugin in found
        ),
    )
    for plugin in found:
        if plugin.refusal:
            print(f"\n{plugin.refusal}")


@app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="The plugin's name, such as acme: lower-case letters, digits and _.")],
    title: Annotated[str | None, typer.Option(help="The hardware's name for people; default: the plugin's.")] = None,
    out: Annotated[pathlib.Path, typer.Option(help="The folder to make the package's folder in.")] = pathlib.Path(),
) -> None:
    """Begin a vendor's package: a platform, device detection, a kernel, and the conformance suite that it passes.

    Example: qcore plugins new acme --title "Acme NPU"
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{1,30}", name) or name in {
        *PLATFORM_PLUGINS,
        *PLATFORM_PLUGINS.values(),
        "core",
    }:
        raise Refused(Refusal("bad-argument", "usage", name, "a plugin cannot have this name", f"found {name!r}",
                              "Take a name of its own, of lower-case letters, digits and _, such as acme."))  # fmt: skip
    target = out / f"qcore-{name.replace('_', '-')}"
    if target.exists() or not out.is_dir():
        reason = "it exists already" if target.exists() else "the folder to make it in does not exist"
        raise Refused(Refusal("bad-argument", "usage", str(target), reason, fix="Name another folder with --out."))
    words = {"name": name, "module": f"qcore_{name}", "upper": name.upper(), "title": _plain(title or name)}
    with writing(target), tempfile.TemporaryDirectory(dir=out) as scratch:
        made = pathlib.Path(scratch) / target.name
        _fill(_TEMPLATE, made, words)
        shutil.move(made, target)
    print(f"{target}: a package that passes the conformance suite. Next:\n")
    print(f"    pip install -e {target}\n    pytest {target}\n    qcore matrix --platform {name}")
    print("\nThen put your driver into devices.py and your kernels into kernels/; docs/plugins.md tells the rest.")


def _fill(source: pathlib.Path, target: pathlib.Path, words: dict[str, str]) -> None:
    """Copies the template: `$word` is replaced in the texts, and `package` in the folder's name."""
    target.mkdir()
    for entry in source.iterdir():
        name = words["module"] if entry.name == "package" else entry.name.removesuffix(".tmpl")
        if entry.is_dir():
            if name != "__pycache__":
                _fill(entry, target / name, words)
        elif entry.name.endswith(".tmpl"):
            (target / name).write_text(string.Template(entry.read_text()).substitute(words), encoding="utf-8")


def _plain(title: str) -> str:
    """A title that can stand in Python and TOML strings."""
    if not re.fullmatch(r"[\w .,()+/-]{1,60}", title):
        raise Refused(Refusal("bad-argument", "usage", "--title", "the title cannot stand in source code",
                              f"found {title!r}", "Use letters, digits, spaces and .,()+/- only."))  # fmt: skip
    return title
