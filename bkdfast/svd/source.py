"""One view of a model's weights, whether they are in memory (`nn.Module`) or in a folder of safetensors files.

A folder is read lazily, one tensor at a time; the whole model is never loaded. Pickled checkpoints are refused: loading
them runs code.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bkdfast.errors import CheckpointError, InvalidTypeError
from bkdfast.svd.files import open_file, resolve, tensor_files
from bkdfast.svd.reader import TensorFile

_CODES = (torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("weight_scale", "weight_scale_inv", "scales", "qzeros", "SCB", "weight.absmax", "weight.quant_map")


class WeightSource(Protocol):
    """The weights of one model.

    Attributes:
        label: what error messages call it: the folder, or the module's class.
        names: every tensor's name, tied ones under each of their names.
        config: the HuggingFace config, or None where there is none.
    """

    label: str
    names: tuple[str, ...]

    @property
    def config(self) -> Any:
        """The HuggingFace config, or None where there is none."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def dtype(self, name: str) -> torch.dtype | None:
        """Dtype of a tensor, without reading it; None where torch has no such dtype."""

    def nbytes(self, name: str) -> int:
        """Size of a tensor in bytes, without reading it."""

    def stamp(self, name: str) -> bytes:
        """What changes with the file that holds a tensor; empty where there is no file."""

    def quantised(self) -> str:
        """How the weights are quantised, in words; empty where they are not."""

    def canonical(self, name: str) -> str:
        """The first name of the same storage: two tied names have one canonical name."""

    def get(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor itself, detached, or rows `start` to `stop` of its first dimension."""


class ModuleSource:
    """The parameters and persistent buffers of an `nn.Module`, where they are (no copy)."""

    def __init__(self, model: nn.Module) -> None:
        model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper prefixes every name
        self.model = model
        self.label = type(model).__name__
        state = model.state_dict(keep_vars=True)
        self._tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        self.names = tuple(self._tensors)
        first: dict[int, str] = {}
        self._canonical = {name: first.setdefault(id(value), name) for name, value in self._tensors.items()}

    @property
    def config(self) -> Any:
        """The module's own `config`, or None."""
        return getattr(self.model, "config", None)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype | None:
        """Dtype of a tensor."""
        return self._tensors[name].dtype

    def nbytes(self, name: str) -> int:
        """Size of a tensor in bytes."""
        return self._tensors[name].nbytes

    def stamp(self, name: str) -> bytes:
        """Nothing: weights in memory may change without a trace."""
        return b""

    def quantised(self) -> str:
        """How the weights are quantised, in words; empty where they are not."""
        return _method(getattr(self.config, "quantization_config", None)) or _scaled(self)

    def canonical(self, name: str) -> str:
        """The first name of the same parameter."""
        return self._canonical[name]

    def get(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor itself, detached, or rows of it; no copy.

        Raises:
            CheckpointError: the tensor is on the meta device, i.e. it was never loaded or is offloaded.
        """
        tensor = self._tensors[name].detach()
        if tensor.is_meta:
            raise CheckpointError(
                f"{self.label}: {name} is on the meta device and has no values; load the weights first"
            )
        return tensor if (start, stop) == (0, None) else tensor[start:stop]


class FolderSource:
    """The tensors of a folder of `*.safetensors` files (one file, or shards with an index), or of one such file.

    Raises:
        CheckpointError: the folder is missing or has no safetensors, the index names a missing shard, or a file is
            corrupt or truncated.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.label = str(self.path)
        owners = tensor_files(self.path)
        files: dict[Path, TensorFile] = {}
        for file in sorted(set(owners.values())):
            with open_file(file):  # complete, with a sound header
                files[file] = TensorFile(file)
        for name, file in owners.items():
            if name not in files[file].entries:
                raise CheckpointError(
                    f"the index of {self.label} says that {name} is in {file.name}, but it is not there"
                )
        self._files = {name: files[file] for name, file in owners.items()}
        self.names = tuple(sorted(self._files))

    @property
    def config(self) -> Any:
        """`AutoConfig` of the folder's `config.json` (nothing is downloaded), or None where there is no such file.

        Raises:
            CheckpointError: `config.json` is there but transformers cannot read it.
        """
        folder = self.path if self.path.is_dir() else self.path.parent
        if not (folder / "config.json").is_file():
            return None
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"transformers cannot read {folder / 'config.json'}: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return self._files[name].entries[name].shape

    def dtype(self, name: str) -> torch.dtype | None:
        """Dtype of a tensor, from the file's header."""
        return self._files[name].entries[name].dtype

    def nbytes(self, name: str) -> int:
        """Size of a tensor in bytes, from the file's header."""
        return self._files[name].entries[name].nbytes

    def stamp(self, name: str) -> bytes:
        """32 bytes that change with the size or times of the file that holds a tensor."""
        return self._files[name].stamp

    def quantised(self) -> str:
        """How the weights are quantised, in words: by `config.json`, or by scales beside integer or float8 weights."""
        folder = self.path if self.path.is_dir() else self.path.parent
        try:
            told = json.loads((folder / "config.json").read_bytes())
        except (OSError, ValueError):
            told = {}
        return _method(told.get("quantization_config") if isinstance(told, dict) else None) or _scaled(self)

    def canonical(self, name: str) -> str:
        """The name itself: safetensors stores a tied tensor once."""
        return name

    def get(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read one tensor, or rows of it, into memory of its own."""
        return self._files[name].read(name, start, stop)


def open_source(weights: nn.Module | str | os.PathLike[str] | WeightSource) -> WeightSource:
    """A `WeightSource` over a module, a folder of safetensors files, one such file, or a model of the local hub cache.

    Nothing is downloaded: `org/name` or `org/name@revision` is looked up among what huggingface_hub has fetched before.

    Raises:
        CheckpointError: as `FolderSource`; also a LoRA adapter, which is no model by itself.
        InvalidTypeError: the argument is neither a module nor a path.
    """
    source: WeightSource
    if isinstance(weights, nn.Module):
        source = ModuleSource(weights)
    elif isinstance(weights, str | os.PathLike):
        source = FolderSource(resolve(weights))
    elif hasattr(weights, "canonical"):
        source = weights
    else:
        raise InvalidTypeError(f"expected an nn.Module or the path of a folder, found {type(weights).__name__}")
    if any(".lora_A." in name or ".lora_embedding_A" in name for name in source.names):
        raise CheckpointError(
            f"{source.label} holds a LoRA adapter, not a plain model; delta_svd and delta_directions take one as the "
            "tuned side, next to its base; elsewhere use the merged model (merge_and_unload)"
        )
    return source


def _method(config: Any) -> str:
    if not config:
        return ""
    told = config if isinstance(config, dict) else vars(config)
    method = told.get("quant_method", "unknown method")
    return f"quantization_config of config.json: {getattr(method, 'value', method)}"


def _scaled(source: WeightSource) -> str:
    """A matrix of codes whose scales lie beside it."""
    names = set(source.names)
    for name in source.names:
        stem, _, kind = name.rpartition(".")
        if kind in ("weight", "qweight") and source.dtype(name) in _CODES:
            for scale in _SCALES:
                if f"{stem}.{scale}" in names:
                    return f"{name} is {str(source.dtype(name)).removeprefix('torch.')}, with scales in {stem}.{scale}"
        if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in names:
            return f"{name} with scales beside it"
    return ""
