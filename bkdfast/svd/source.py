"""One view of a model's weights, whether they are in memory (`nn.Module`) or in a folder of safetensors files.

A folder is read lazily, one tensor at a time; the whole model is never loaded. Pickled checkpoints are refused: loading
them runs code.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bkdfast.errors import CheckpointError, InvalidTypeError
from bkdfast.svd.files import open_file, tensor_files

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


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

    def canonical(self, name: str) -> str:
        """The first name of the same storage: two tied names have one canonical name."""

    def get(self, name: str) -> Tensor:
        """The tensor itself, detached."""


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

    def canonical(self, name: str) -> str:
        """The first name of the same parameter."""
        return self._canonical[name]

    def get(self, name: str) -> Tensor:
        """The tensor itself, detached.

        Raises:
            CheckpointError: the tensor is on the meta device, i.e. it was never loaded or is offloaded.
        """
        tensor = self._tensors[name].detach()
        if tensor.is_meta:
            raise CheckpointError(
                f"{self.label}: {name} is on the meta device and has no values; load the weights first"
            )
        return tensor


class FolderSource:
    """The tensors of a folder of `*.safetensors` files (one file, or shards with an index), or of one such file.

    Raises:
        CheckpointError: the folder is missing or has no safetensors, the index names a missing shard, or a file is
            corrupt or truncated.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.label = str(self.path)
        self._files = tensor_files(self.path)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype | None] = {}
        for file in sorted(set(self._files.values())):
            self._read_header(file)
        self.names = tuple(sorted(self._files))

    def _read_header(self, file: Path) -> None:
        with open_file(file) as handle:
            stored = set(handle.keys())
            for name in [name for name, owner in self._files.items() if owner == file]:
                if name not in stored:
                    raise CheckpointError(
                        f"the index of {self.label} says that {name} is in {file.name}, but it is not there"
                    )
                view = handle.get_slice(name)
                self._shapes[name] = tuple(view.get_shape())
                self._dtypes[name] = DTYPES.get(view.get_dtype())

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
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype | None:
        """Dtype of a tensor, from the file's header."""
        return self._dtypes[name]

    def canonical(self, name: str) -> str:
        """The name itself: safetensors stores a tied tensor once."""
        return name

    def get(self, name: str) -> Tensor:
        """Read one tensor."""
        file = self._files[name]
        with open_file(file) as handle:
            try:
                return handle.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"cannot read {name} from {file}: {error}") from error


def open_source(weights: nn.Module | str | os.PathLike[str] | WeightSource) -> WeightSource:
    """A `WeightSource` over a module, a folder of safetensors files, or one such file.

    Raises:
        CheckpointError: as `FolderSource`; also a LoRA adapter, which is no model by itself.
        InvalidTypeError: the argument is neither a module nor a path.
    """
    source: WeightSource
    if isinstance(weights, nn.Module):
        source = ModuleSource(weights)
    elif isinstance(weights, str | os.PathLike):
        source = FolderSource(weights)
    elif hasattr(weights, "canonical"):
        source = weights
    else:
        raise InvalidTypeError(f"expected an nn.Module or the path of a folder, found {type(weights).__name__}")
    if any(".lora_A." in name or ".lora_embedding_A" in name for name in source.names):
        raise CheckpointError(
            f"{source.label} holds a LoRA adapter, not a plain model; delta_svd and delta_directions take one as "
            "the tuned side, next to its base; elsewhere use the merged model (merge_and_unload)"
        )
    return source
