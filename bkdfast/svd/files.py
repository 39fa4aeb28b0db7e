"""Which safetensors file of a checkpoint folder holds each tensor. Pickles are refused: loading one runs code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bkdfast.errors import CheckpointError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def open_file(file: Path) -> Any:
    """`safe_open` with an error that names the file; its header and length are checked, its tensors not yet read."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a complete safetensors file: {error}; download or save it again"
        ) from error


def tensor_files(path: Path) -> dict[str, Path]:
    """Which file holds each tensor of a checkpoint folder, or of one safetensors file.

    Raises:
        CheckpointError: nothing usable is there; the message says what was found instead.
    """
    if path.is_file() and path.suffix == ".safetensors":
        return _listed([path])
    if not path.is_dir():
        hint = "pass a local folder; fetch one with huggingface_hub.snapshot_download(...)"
        raise CheckpointError(f"there is no folder {path}: {hint}")
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} holds a PEFT adapter, not a model; delta_svd and delta_directions take one as the tuned "
            "side, next to its base; elsewhere use the merged model (merge_and_unload)"
        )
    indices = sorted(path.glob("*.safetensors.index.json"))
    preferred = path / "model.safetensors.index.json"
    if preferred in indices or len(indices) == 1:
        return _indexed(path, preferred if preferred in indices else indices[0])
    if indices:
        raise CheckpointError(f"{path} has several indices, {[i.name for i in indices]}; leave one")
    if (path / "model.safetensors").is_file():
        return _listed([path / "model.safetensors"])
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
        raise CheckpointError(f"{path} has no *.safetensors file" + (_pickle_hint(pickles) if pickles else ""))
    return _listed(files)


def _pickle_hint(pickles: list[str]) -> str:
    return (
        f", only pickles ({', '.join(pickles[:3])}), which are not read because loading one runs code; if you trust "
        "it, convert it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
    )


def _listed(files: list[Path]) -> dict[str, Path]:
    owner: dict[str, Path] = {}
    for file in files:
        with open_file(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                if name in owner:
                    raise CheckpointError(
                        f"{name} is in both {owner[name].name} and {file.name}, and there is no index"
                    )
                owner[name] = file
    return owner


def _indexed(path: Path, index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        owner = {str(name): path / str(file) for name, file in weight_map.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a valid index: {type(error).__name__} {error}") from error
    if missing := sorted({file.name for file in owner.values() if not file.is_file()}):
        raise CheckpointError(f"{index.name} of {path} names shards that are not there: {', '.join(missing)}")
    return owner
