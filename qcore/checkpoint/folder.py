"""Several checkpoints side by side in one folder."""

from __future__ import annotations

from pathlib import Path

_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")


def checkpoints_in(path: str | Path) -> list[Path]:
    """The checkpoints that a folder holds, by name: its folders with a config.json or weights, and its GGUF files, of which a split one counts once.
    Empty where the folder is a checkpoint itself, or holds none. Nothing is opened, so that a damaged one is among them."""
    folder = Path(path)
    try:
        entries = (
            sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".")) if folder.is_dir() else []
        )
        folders = [entry for entry in entries if entry.is_dir() and _is_checkpoint(entry)]
    except OSError:
        return []  # whoever opens it says why
    if any(entry.suffix == ".safetensors" or entry.name == "config.json" for entry in entries):
        return []
    files = [entry for entry in entries if entry.suffix == ".gguf" and entry.is_file()]
    firsts = [file for file in files if "-of-" not in file.stem or "-00001-of-" in file.stem]
    return sorted([*folders, *firsts]) if folders or len(firsts) > 1 else []


def _is_checkpoint(folder: Path) -> bool:
    return any(entry.name == "config.json" or entry.suffix in _WEIGHTS for entry in folder.iterdir())
