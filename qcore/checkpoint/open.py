"""open_checkpoint: what is this path, which method reads it, and what is in it. Reads configs and headers only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qcore.checkpoint.contents import check_layer
from qcore.checkpoint.gguf import GgufSource
from qcore.checkpoint.in_flight import UNTOUCHED, InFlight, chain_of, made, prepared
from qcore.checkpoint.json_file import read_json
from qcore.checkpoint.kv_scales import KvScales, spelled
from qcore.checkpoint.safetensors import SafetensorsSource
from qcore.checkpoint.source import TensorInfo, TensorSource
from qcore.discovery import registry
from qcore.method import PLAIN_FLOATS, CheckpointFiles, Method, ModulePlan, stated_method
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from qcore.tensor import LayerTensors, QuantizedTensor

T = TypeVar("T")
_COMPUTED = ("float32", "bfloat16", "float16")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Checkpoint:
    """An opened checkpoint. Nothing but configs and tensor headers has been read until a weight is asked for."""

    def __init__(self, files: CheckpointFiles, method: Method, in_flight: InFlight | None = None) -> None:
        self.files = files
        self._method = method
        self._in_flight = in_flight
        self.path = files.path

    def quantized(self, how: str, ignore: Sequence[str] = UNTOUCHED) -> Checkpoint:
        """The same checkpoint with its unquantized linear layers quantized while they are read, one at a time.

        how: `bitsandbytes:nf4`, a scheme (`W4A16-g128-sym`), or an algorithm's name and a scheme (`rtn:FP8_DYNAMIC`).
        ignore: parts of the names of modules that stay as they are, or `re:` and an expression for the beginnings of such names; embeddings always do. Raises Refused (bad-argument,
        bad-scheme, scheme-unsupported).
        """
        asked = InFlight.parse(how, ignore)
        return prepared(self, chain_of(asked.algorithm)).overlaid(asked)

    def overlaid(self, how: InFlight) -> Checkpoint:
        """The same checkpoint with the layers that this makes."""
        return Checkpoint(self.files, self._method, how)

    def with_files(self, files: CheckpointFiles) -> Checkpoint:
        """The same checkpoint with these beneath it, of the same format."""
        return Checkpoint(files, self._method, self._in_flight)

    @property
    def method(self) -> str:
        """The method's name: `gptq`, `gguf`, ..."""
        return self._method.name

    @cached_property
    def format_version(self) -> str:
        """The variant or version that the checkpoint states; empty if none."""
        return self._method.format_version(self.files)

    @cached_property
    def layers(self) -> dict[str, ModulePlan]:
        """Every linear layer and embedding: scheme, reason and shape."""
        plan = self._method.plan(self.files)
        return plan if self._in_flight is None else self._in_flight.applied(plan)

    @cached_property
    def plan(self) -> dict[str, Scheme | None]:
        """Every linear layer's and embedding's scheme; None where it is not quantized."""
        return {module: entry.scheme for module, entry in self.layers.items()}

    @cached_property
    def kv_cache(self) -> TensorScheme | None:
        """The scheme that the checkpoint declares for the kv cache, or None."""
        asked = None if self._in_flight is None else self._in_flight.kv_cache
        return self._method.kv_cache(self.files) if asked is None else asked

    @cached_property
    def kv_scales(self) -> dict[str, KvScales]:
        """The kv cache's calibrated scales, by attention module."""
        if self._in_flight is not None and self._in_flight.kv_cache is not None:
            return self._in_flight.kv_scales()
        return self._method.kv_scales(self.files)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The transformers config as a dict, without its quantization part."""
        return self._method.model_config(self.files)

    @cached_property
    def own_dtype(self) -> str:
        """The dtype to compute in that the checkpoint was made for, as torch names it: its config's, or else the one
        that holds the values of all its unquantized tensors."""
        stated = self.config.get("dtype") or self.config.get("torch_dtype")
        if isinstance(stated, str):
            name = {"float64": "float32"}.get(bare := stated.removeprefix("torch."), bare)
            if name not in _COMPUTED:
                raise bad_file("bad-field", "the config's data type is not one to compute in",
                               file=self.files.folder / "config.json", field="dtype", found=stated, expected=" or ".join(_COMPUTED))  # fmt: skip
            return name
        narrow = {"F16": "float16", "BF16": "bfloat16"}
        stored = {info.dtype for info in self.parameters.values()}
        # Neither of the two narrow types holds the other's values.
        return narrow[stored.pop()] if len(stored) == 1 and stored <= narrow.keys() else "float32"

    @cached_property
    def parameters(self) -> dict[str, TensorInfo]:
        """The tensors outside quantized modules, by transformers' parameter name."""
        return self._method.parameters(self.files, self.layers)

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(info.nbytes for info in self.files.source.tensors.values())

    @cached_property
    def loaded_bytes(self) -> int:
        """`size_bytes`, with codes in place of the weights that are quantized while they are read."""
        saved = 0
        for module, entry in self.layers.items():
            if entry.algorithm and entry.scheme is not None:
                stored = self.stored[f"{module}.weight"].nbytes
                saved += stored - entry.shape[0] * entry.shape[1] * entry.scheme.weight.bits // 8
        return self.size_bytes - saved

    @cached_property
    def stored(self) -> dict[str, TensorInfo]:
        """`parameters`, and what is quantized while it is read."""
        plan = {m: replace(entry, scheme=None) if entry.algorithm else entry for m, entry in self.layers.items()}
        return self._method.parameters(self.files, plan)

    def layer(self, module: str) -> LayerTensors:
        """All parts of a quantized module. Raises Refused; KeyError where the module is not quantized."""
        if self.plan.get(module) is None:
            raise KeyError(f"{module} is not a quantized module of {self.path}")
        entry, bias = self.layers[module], f"{module}.bias"
        if entry.algorithm:
            name = f"{module}.weight"
            given = self._parameter(bias) if bias in self.stored else None
            read = partial(self._method.read_parameter, self.files, name)
            if self._in_flight is None:  # the checkpoint asks for it itself
                return made(entry, read(), given, self.stored[name])
            return self._in_flight.layer(module, entry, read, given, self.stored[name])
        layer = self._decoded(module, lambda: self._method.decode(self.files, module))
        return check_layer(layer, file=self.path, module=module)

    def weight(self, module: str) -> QuantizedTensor:
        """The quantized weight in the canonical layout."""
        return self.layer(module).weight

    def parameter(self, name: str) -> torch.Tensor:
        """One tensor of `parameters`, in the dtype of the file."""
        return self._decoded(name, lambda: self._parameter(name))

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The same, some rows of it at a time: 4 MiB, or a single row."""
        changed = None if self._in_flight is None else self._in_flight.parameter(name)
        found = self._method.read_pieces(self.files, name) if changed is None else iter([changed])
        while (piece := self._decoded(name, lambda: next(found, None))) is not None:
            yield piece

    def dequantize(self, module: str) -> torch.Tensor:
        """float32 [out_features, in_features], exactly what the format defines; plain weights are widened."""
        import torch

        if module not in self.layers:
            raise KeyError(f"{self.path} has no linear layer or embedding {module}")
        if self.plan[module] is None:
            return self.parameter(f"{module}.weight").to(torch.float32)
        return self.weight(module).dequantize()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer, with its chat template if it has one."""
        return self._method.load_tokenizer(self.files)

    def _parameter(self, name: str) -> torch.Tensor:
        changed = None if self._in_flight is None else self._in_flight.parameter(name)
        return self._method.read_parameter(self.files, name) if changed is None else changed

    def _decoded(self, name: str, decode: Callable[[], T]) -> T:
        """Shapes that headers cannot tell are checked when the parts are put together."""
        try:
            return decode()
        except ValueError as error:
            raise bad_file("bad-shape", "its parts do not fit together", file=self.path, tensor=name,
                           field="shape", found=str(error)) from error  # fmt: skip


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a safetensors folder, a GGUF file, or a folder that holds one of them.

    Raises Refused: path-not-found, not-a-checkpoint, unsafe-container, unknown-method, and all that a damaged header or
    config gives.
    """
    try:
        files = _find(Path(path))
    except OSError as error:  # a name that is too long, a folder that may not be listed
        raise Refused(
            Refusal("path-not-found", "bad-file", str(path), "the path cannot be read", str(error),
                    "Check the spelling, and that you may read it.", str(path))
        ) from error  # fmt: skip
    methods = registry().methods
    if files.quantization is None:
        files = _with_side_file(files, methods)
    for method in methods:
        if method.recognizes(files):
            checkpoint = Checkpoint(files, method)
            _check_parts(
                checkpoint, method
            )  # plans too: headers that contradict the config are refused here, not later
            return checkpoint
    found = stated_method(files.quantization) or "none"
    known = sorted({name for method in methods for name in (method.quant_methods or (method.name,))})
    raise Refused(
        Refusal(
            "unknown-method", "notimpl", str(files.path), "no installed method reads this quantization format",
            f"found quant_method {found!r}, expected one of {', '.join(known)}",
            "Install the plugin that reads it, or quantize the model to one of these formats.",
            str(files.quantization_file), field="quantization_config.quant_method",
        )
    )  # fmt: skip


def _check_parts(checkpoint: Checkpoint, method: Method) -> None:
    """A part that the method does not know might change the numbers: it is refused rather than ignored."""
    layers = checkpoint.layers
    for name, info in checkpoint.files.source.tensors.items():
        module, _, part = name.rpartition(".")
        if spelled(name):
            continue  # a kv cache's
        if method.parts and part not in method.parts and module in layers and layers[module].scheme is not None:
            raise bad_file("unexpected-tensor", f"{method.name} has no such part of a layer", file=info.file, tensor=name,
                           field="name", found=part, expected=", ".join(sorted(method.parts)),
                           fix="Check which tool wrote the checkpoint; its variant of the format is not read yet.")  # fmt: skip
    for name, info in checkpoint.parameters.items():
        if len(info.shape) == 3 and info.dtype not in PLAIN_FLOATS and not spelled(name):
            raise Refused(
                Refusal("unknown-variant", "notimpl", str(checkpoint.path),
                        f"{method.name} is not read where it stacks experts in one tensor",
                        f"found {info.dtype} {list(info.shape)}", "Export the model with its experts one by one.",
                        str(info.file), tensor=name, field="shape")
            )  # fmt: skip


def _find(path: Path) -> CheckpointFiles:
    """What lies at the path, with its configs parsed."""
    if not path.exists():
        fix = "Check the spelling. Models are not downloaded: name a folder or a .gguf file on this machine."
        raise Refused(Refusal("path-not-found", "bad-file", str(path), "there is nothing at this path", fix=fix))
    folder = path if path.is_dir() else path.parent
    config_file = folder / "config.json"
    container = _container(path)
    source: TensorSource
    if container.suffix == ".gguf" or (not container.is_dir() and container.suffix != ".safetensors"):
        source = GgufSource.open(container)
        return CheckpointFiles(path, source, {}, None, container, folder)
    if not config_file.is_file():
        raise Refused(
            Refusal("not-a-checkpoint", "bad-file", str(path), "a safetensors checkpoint needs its config.json",
                    f"found no {config_file.name} in {folder}", "Copy the model's config.json beside its weights.",
                    str(config_file))
        )  # fmt: skip
    config = read_json(config_file)
    source = SafetensorsSource.open(container)
    return CheckpointFiles(path, source, config, _quantization(config, config_file), config_file, folder)


def _container(path: Path) -> Path:
    """The file or folder to hand to a reader."""
    if not path.is_dir():
        if path.suffix in _PICKLES:
            raise _pickled(path)
        return path
    ggufs = sorted(path.glob("*.gguf"))
    weights = any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json"))
    if weights and ((path / "config.json").is_file() or not ggufs):
        return path
    first_shards = [file for file in ggufs if "-of-" not in file.stem or "-00001-of-" in file.stem]
    if len(first_shards) == 1:
        return first_shards[0]
    if first_shards:
        raise Refused(
            Refusal("ambiguous-checkpoint", "usage", str(path), "the folder holds several GGUF files",
                    f"found {', '.join(file.name for file in first_shards[:8])}", "Name the one you mean.")
        )  # fmt: skip
    for file in sorted(path.iterdir()):
        if file.suffix in _PICKLES:
            raise _pickled(file)
    raise Refused(
        Refusal("not-a-checkpoint", "bad-file", str(path), "the folder holds no weights",
                f"found {_listing(path)}, expected *.safetensors or *.gguf",
                "Name the folder that holds config.json and the weights, or a .gguf file.")
    )  # fmt: skip


def _pickled(file: Path) -> Refused:
    fix = "Convert it to safetensors with the tool that wrote it (save_pretrained(safe_serialization=True))."
    config = file.parent / "config.json"
    stated = stated_method(_quantization(read_json(config), config)) if config.is_file() else ""
    for method in registry().methods:
        if stated in method.quant_methods and method.pickles:
            fix = method.pickles
    return Refused(Refusal("unsafe-container", "bad-file", str(file), "pickled weights run code when they are read, so "
                           "they are never opened", f"found {file.name}", fix, str(file)))  # fmt: skip


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "an empty folder"


def _quantization(config: Mapping[str, Any], file: Path) -> Mapping[str, Any] | None:
    """The quantization config, wherever config.json has it."""
    nested = config.get("text_config")
    places = [config, nested] if isinstance(nested, Mapping) else [config]
    for place in places:
        for key in ("quantization_config", "compression_config"):
            found = place.get(key)
            if isinstance(found, Mapping):
                return {"quant_method": "compressed-tensors", **found} if key == "compression_config" else found
            if found is not None:
                raise bad_file("bad-field", "the quantization config is not an object", file=file, field=key,
                               found=found, expected="an object")  # fmt: skip
    return None


def _with_side_file(files: CheckpointFiles, methods: list[Method]) -> CheckpointFiles:
    """Older tools write the quantization config beside config.json; the file's name tells the method where the file does not."""
    if isinstance(files.source, GgufSource):
        return files
    for method in methods:
        for name in method.side_files:
            side_file = files.folder / name
            if side_file.is_file():
                config = read_json(side_file)
                found = replace(files, quantization=config, quantization_file=side_file)
                if any(other.recognizes(found) for other in methods):
                    return found
                return replace(found, quantization={"quant_method": method.quant_methods[0], **config})
    return files
