"""What a sweep's numbers came from: hashes of weights, data, edit and metrics, versions, machine.

`manifest` puts it all into one JSON-able dict. It identifies a result store (`bkdfast.jobs.store`) and is saved with
a result. Hashes are the first 32 hex digits of SHA-256 and do not depend on device, batch or process.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bkdfast.hf.prepare import Hook
from bkdfast.hf.spec import device_of
from bkdfast.jobs.hashing import hash_tensors, hash_text

WHOLE = 4 << 30
"""Models of at most this many bytes are hashed whole (seconds); of larger ones a sum and a sample."""

_DEEP = 6  # levels of objects inside objects; deeper ones are known by their type
_LONG = 400  # characters of JSON above which a list is stored as a hash
_SETTINGS: dict[tuple[type, str], str] = {}  # of the last config: to find what differs, transformers makes another
_UNTOLD = ("_name_or_path", "transformers_version")  # of a config: where it lay and who wrote it, not what it says


def manifest(
    model: torch.nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    edit: Any,
    metrics: Sequence[Any],
    *,
    units: Any,
    dtype: torch.dtype,
    seed: int = 0,
    whole: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Everything that a sweep's numbers depend on, and where they were made.

    Args:
        model: the model that is swept.
        batches: the tokenised prompts.
        edit: the edit.
        metrics: the metrics, each with its `name`.
        units: how the work is divided, JSON-able.
        dtype: dtype of the computation.
        seed: of the sweep.
        whole: see `weights_hash`.
        **options: other arguments that change the numbers (site, heads, positions).

    Returns:
        A JSON-able dict; `bkdfast.jobs.store.INFORMATIVE` lists the keys that do not identify it.
    """
    return {
        "weights": weights_hash(model, WHOLE if whole is None else whole),
        "config": config(model),
        "state": state(model),
        "data": data_hash(batches),
        "edit": fingerprint(edit),
        "metrics": {metric.name: fingerprint(metric) for metric in metrics},
        **{name: fingerprint(value) for name, value in options.items()},
        "dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
        "units": units,
        "versions": versions(),
        "machine": machine(model),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def state(model: torch.nn.Module) -> dict[str, Any]:
    """What changes a model's numbers beside weights and config: autocast, adapters that are on or off, hooks."""
    device = device_of(model).type
    found: dict[str, Any] = {"autocast": None, "adapters": {}, "hooks": []}
    if torch.is_autocast_enabled(device):
        found["autocast"] = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
    for path, module in model.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "scaling"):  # a layer of PEFT's
            on = (
                [] if module.disable_adapters else [[name, module.scaling.get(name)] for name in module.active_adapters]
            )
            found["adapters"][path] = fingerprint([on, list(module.merged_adapters)])
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if not isinstance(hook, Hook):
                found["hooks"].append([path, fingerprint(hook)])
    return {name: fingerprint(value) for name, value in found.items()}


def weights_hash(model: torch.nn.Module, whole: int = WHOLE) -> dict[str, Any]:
    """Hash of a model's parameters and persistent buffers, one tensor in host memory at a time.

    Args:
        model: any module. Buffers outside its state dict (tables of rotary embeddings) are left out: some change while
            the model runs.
        whole: models of more bytes than this are hashed by the sum of each tensor's bits, as 64-bit integers, and a
            fixed sample of `SAMPLE` elements, which takes one read on the model's own device.

    Returns:
        `hash`, `how` (`"all"` or `"sampled"`), `tensors`, `bytes`, and, if there are any, `unhashed`: tensors without
        data here (offloaded to the meta device).
    """
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                tensors[name] = buffer
    plain = {name: part for whole_name, tensor in tensors.items() for name, part in _plain(whole_name, tensor)}
    size = sum(tensor.nbytes for tensor in plain.values())
    here = {name: tensor for name, tensor in plain.items() if not tensor.is_meta}
    how = "all" if size <= whole else "sampled"
    found = {"hash": hash_tensors(here, sampled=how == "sampled"), "how": how, "tensors": len(plain), "bytes": size}
    return found if len(here) == len(plain) else {**found, "unhashed": len(plain) - len(here)}


def data_hash(batches: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, Any]:
    """Hash of tokenised batches; the same prompts in other batches are padded differently, so that it differs."""
    hashes = [(hash_tensors(batch), len(batch["input_ids"])) for batch in batches]
    return {
        "hash": hash_text("".join(found for found, _ in hashes)),
        "batches": len(hashes),
        "samples": sum(rows for _, rows in hashes),
    }


def config(model: torch.nn.Module) -> dict[str, Any]:
    """A transformers model's settings that differ from their defaults; of any other module its type."""
    found: Any = getattr(model, "config", None)
    if not hasattr(found, "to_json_string"):
        return {"type": type(model).__qualname__}
    told = json.loads(_settings(found))
    return {"type": type(model).__qualname__, **{name: told[name] for name in told if name not in _UNTOLD}}


def _settings(found: Any) -> str:
    """Only what differs from the defaults: a newer transformers adds settings, which are no other model."""
    key = type(found), repr(vars(found))
    if key not in _SETTINGS:
        _SETTINGS.clear()
        _SETTINGS[key] = found.to_json_string(use_diff=True)
    return _SETTINGS[key]


def fingerprint(value: Any, deep: int = _DEEP) -> Any:
    """A JSON-able stand-in for an edit, a metric or any argument: equal for equal values, also in another process.

    Tensors and long lists become hashes, models the hash of their weights, functions that of their bytecode and of
    what they close over, other objects their type and attributes.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # NaN is unequal to itself
    if isinstance(value, torch.Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype), "hash": hash_tensors({"": value})}
    if isinstance(value, torch.nn.Module):
        return {"type": type(value).__qualname__, **weights_hash(value)}
    if isinstance(value, (torch.dtype, torch.device, slice, range, Path, type)):
        return str(value)
    if hasattr(value, "__array__"):
        return fingerprint(torch.as_tensor(value.__array__()))
    if deep == 0:
        return {"type": type(value).__qualname__}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [fingerprint(item, deep - 1) for item in value]
        if isinstance(value, (set, frozenset)):
            items.sort(key=json.dumps)
        return _short(items, _LONG)
    if isinstance(value, Mapping):
        return _short({str(key): fingerprint(item, deep - 1) for key, item in value.items()}, 10 * _LONG)
    if inspect.isroutine(value):
        return _function(value, deep)
    if isinstance(value, functools.partial):
        return {"function": fingerprint([value.func, value.args, value.keywords], deep)}
    names = [*getattr(value, "__dict__", {}), *getattr(type(value), "__slots__", ())]
    told = {name: getattr(value, name, None) for name in names}
    return {"type": type(value).__qualname__, **fingerprint(told, deep - 1)}


def versions() -> dict[str, str]:
    """Versions of what computes."""
    import transformers

    from bkdfast._version import __version__

    return {
        "bkdfast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def machine(model: torch.nn.Module) -> dict[str, Any]:
    """The devices that a model is on, and the machine; not its name."""
    devices = sorted(map(str, {tensor.device for tensor in model.parameters()}))
    found: dict[str, Any] = {
        "devices": devices,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if any(device.startswith("cuda") for device in devices):
        found["gpus"] = [torch.cuda.get_device_name(device) for device in devices if device.startswith("cuda")]
    return found


def _plain(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The ordinary tensors that a tensor subclass (quantised weights) is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [(name, tensor)]
    inner, _ = tensor.__tensor_flatten__()
    return [found for part in inner for found in _plain(f"{name}.{part}", getattr(tensor, part))]


def _function(function: Any, deep: int) -> dict[str, Any]:
    """Its bytecode (Python's version is part of that), defaults, what it closes over; not the globals that it reads."""
    inner = getattr(function, "__func__", function)
    cells = []
    for cell in getattr(inner, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # not yet filled
            cells.append(cell.cell_contents)
    used = {
        "defaults": [getattr(inner, "__defaults__", None), getattr(inner, "__kwdefaults__", None)],
        "closure": cells,
        "self": function.__self__ if inspect.ismethod(function) else None,
    }
    return {
        "function": getattr(inner, "__qualname__", type(inner).__qualname__),
        "code": hash_text(_code(getattr(inner, "__code__", None))),
        **{name: fingerprint(values, deep - 1) for name, values in used.items()},
    }


def _code(code: Any) -> str:
    if not inspect.iscode(code):
        return f"{type(code).__name__} {sorted(map(repr, code)) if isinstance(code, frozenset) else code!r}"
    return f"{code.co_code.hex()} {code.co_names} {[_code(constant) for constant in code.co_consts]}"


def _short(value: Any, limit: int) -> Any:
    text = json.dumps(value, sort_keys=True)
    return value if len(text) <= limit else {"length": len(value), "hash": hash_text(text)}


@functools.cache
def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
