"""Artifacts: safetensors files with JSON metadata in the header. Written whole or not at all, checked on reading.

The header key `bkdfast` holds `{"kind", "format", "sha256", "metadata"}`; `sha256` covers the metadata and every
tensor's name, dtype, shape and bytes, so that a flipped bit anywhere is found.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bkdfast._version import __version__
from bkdfast.errors import CheckpointError
from bkdfast.svd.files import open_file

_KEY = "bkdfast"
_FORMAT = 1


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {"bkdfast": __version__, "torch": torch.__version__}


def write_artifact(
    path: str | os.PathLike[str], kind: str, tensors: dict[str, Tensor], metadata: dict[str, Any]
) -> None:
    """Write `tensors` and `metadata` (JSON values) to `path`: a temporary file beside it, then one rename.

    Raises:
        CheckpointError: the folder of `path` does not exist.
        OSError: it cannot be written; `path` is then as it was before.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise CheckpointError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = _digest(kind, tensors, metadata)
    header = {"kind": kind, "format": _FORMAT, "sha256": digest, "metadata": metadata}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        save_file(tensors, temporary, metadata={_KEY: json.dumps(header)})
        os.chmod(temporary, 0o644)  # safetensors makes files that only their owner can read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_artifact(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and metadata that `write_artifact` wrote.

    Raises:
        CheckpointError: the file is missing, truncated, changed since it was written, of another kind, or of a newer
            format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    with open_file(path) as handle:
        header = _header(path, (handle.metadata() or {}).get(_KEY), kind)
        try:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (safe_open is no mapping)
        except SafetensorError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    if _digest(kind, tensors, header["metadata"]) != header["sha256"]:
        raise CheckpointError(
            f"{path} was changed or damaged after it was written (its checksum does not fit); make it again"
        )
    return tensors, header["metadata"]


def _header(path: Path, text: str | None, kind: str) -> dict[str, Any]:
    if text is None:
        raise CheckpointError(f"{path} is a safetensors file, but not one that bkdfast wrote")
    try:
        header = json.loads(text)
        found, version, _, _ = header["kind"], header["format"], header["sha256"], header["metadata"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} has a damaged header: {error}") from error
    if found != kind:
        raise CheckpointError(f"{path} holds a {found}, not a {kind}")
    if version != _FORMAT:
        raise CheckpointError(f"{path} has format {version}; this version of bkdfast reads format {_FORMAT}")
    return header


def _digest(kind: str, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    digest = hashlib.sha256(f"{kind}\n{json.dumps(metadata, sort_keys=True)}".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel() > 0:
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
