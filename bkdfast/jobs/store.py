"""`Store`: a folder that keeps the finished units of a run, so that a killed one goes on where it stopped.

    manifest.json               what the numbers depend on, e.g. of `bkdfast.sweep.provenance`
    unit-00017.safetensors      tensors of one unit, with a hash of them and of the manifest in its metadata
    lock                        held by the kernel's file lock while a run goes on

A unit's file appears by one rename after its bytes are on disk, so that a process killed at any point leaves whole
files and at most one temporary one. A file that is damaged all the same (a crash of the machine, a copy cut short)
is told by its hash, counts as not done and is computed again. Several processes, on several machines, may write at
the same time: nothing is ever appended or changed in place, and of a unit that two of them compute the first file
stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from bkdfast.errors import InvalidArgumentError, StoreError
from bkdfast.jobs.hashing import hash_tensors

INFORMATIVE = ("versions", "machine", "command")
"""Keys of a manifest that may differ when it goes on; other versions or devices only give a warning."""

_UNIT = re.compile(r"unit-(\d{5,})\.safetensors")
_MANIFEST = "manifest.json"
_MISSING = "nothing"
_MEANING = {
    "kind": "another kind of run",
    "base": "another base model",
    "tuned": "another tuned model",
    "settings": "other settings",
    "weights": "other weights",
    "config": "a model of another configuration",
    "state": "another state of the model (autocast, adapters, hooks)",
    "spec": "another spec",
    "data": "other prompts",
    "edit": "another edit",
    "metrics": "other metrics",
    "dtype": "another dtype",
    "seed": "another seed",
    "units": "another division of the work",
}


class Store:
    """Finished units of one run in a folder; made by `Store.open`.

    Attributes:
        path: the folder.
        manifest: the manifest of the folder.
        key: hash of what identifies the run; every unit's file carries it.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        identity = {name: value for name, value in manifest.items() if name not in INFORMATIVE}
        self.key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
        self._checked: dict[int, tuple[tuple[int, int, int], bool]] = {}

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        manifest: Mapping[str, Any],
        *,
        resume: bool = True,
        adopt: Sequence[str] = (),
    ) -> Store:
        """Open the store in a folder, or make one.

        Args:
            path: the folder; made if it is not there, with the folders above it.
            manifest: what the numbers will depend on, JSON-able.
            resume: go on with a store that is there already; False: refuse one that has finished units.
            adopt: keys of the manifest whose stored values are taken over, e.g. a division of the work that was
                chosen by the memory then free; read them off `store.manifest`.

        Raises:
            InvalidArgumentError: the folder holds something else, or the results of another run; the message names
                the first thing that differs.
            StoreError: the folder cannot be made, read or written.

        Warns:
            UserWarning: the store was made by other versions or on other devices.
        """
        folder = Path(os.path.abspath(path))
        new = json.loads(json.dumps(manifest))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept = [name for name in os.listdir(folder) if not name.endswith(".tmp") and name != "lock"]
        except OSError as error:
            raise StoreError(f"{folder} cannot hold results: {_reason(error)}; pass another out=") from error
        if _MANIFEST not in kept and kept:
            raise InvalidArgumentError(
                f"{folder} is not a result store: it has no {_MANIFEST}, but {len(kept)} other files, among them "
                f"{min(kept)}; pass an empty or a new folder as out="
            )
        # Also where the manifest is there already: a folder that cannot be written shows now, not after the first unit.
        with _failures(folder, "write to", "nothing was computed yet"):
            write_whole(folder / _MANIFEST, json.dumps(new, indent=1).encode(), keep=True)
        old = _read_manifest(folder)
        new |= {name: old[name] for name in adopt if name in old}
        _refuse_others(folder, old, new)
        store = cls(folder, old)
        if not resume and (finished := store.done()):
            raise InvalidArgumentError(
                f"{folder} has {len(finished)} finished units of this run already; resume it, pass another out=, or "
                "delete the folder to start over"
            )
        return store

    def done(self) -> set[int]:
        """The finished units: those whose files are there and whole.

        Warns:
            UserWarning: a damaged file, once.
        """
        found = set()
        with _failures(self.path, "read", "finished units are kept"):
            entries = [(match, entry) for entry in os.scandir(self.path) if (match := _UNIT.fullmatch(entry.name))]
            for match, entry in entries:
                unit, stat = int(match[1]), entry.stat()
                seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
                if self._checked.get(unit, (None,))[0] != seen:
                    try:
                        self._read(unit)
                        self._checked[unit] = (seen, True)
                    except _DamagedError as error:
                        self._checked[unit] = (seen, False)
                        warnings.warn(f"{entry.path} {error}; the unit is computed again", stacklevel=2)
                    except OSError:  # replaced by another process just now
                        continue
                if self._checked[unit][1]:
                    found.add(unit)
        return found

    def put(self, unit: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store a finished unit, whole or not at all.

        Raises:
            StoreError: it cannot be written (disk full, folder gone); all that was stored before is kept.
        """
        # Copies: safetensors refuses tensors that share memory.
        plain = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        told = {"store": self.key, "unit": str(unit), "hash": hash_tensors(plain)}
        with _failures(self.path, f"write unit {unit} to", "finished units are kept; mend that and run again"):
            # Two processes that compute the same unit must not differ in a bit, on whatever devices: the first one's
            # file stays, unless it is damaged.
            write_whole(self._file(unit), save(plain, metadata=told), keep=True)
            try:
                self._read(unit)
            except _DamagedError:
                write_whole(self._file(unit), save(plain, metadata=told))

    def get(self, unit: int) -> dict[str, torch.Tensor]:
        """The tensors of a finished unit.

        Raises:
            StoreError: the unit is not there, or its file is damaged.
        """
        try:
            return self._read(unit)
        except (_DamagedError, OSError) as error:
            reason = _reason(error) if isinstance(error, OSError) else error
            raise StoreError(f"unit {unit} cannot be read from {self.path}: its file {reason}; run again") from error

    @contextlib.contextmanager
    def lock(self, *, shared: bool = False) -> Iterator[None]:
        """Keep other runs off this store; the kernel lets go of the lock when the process ends, however it ends.

        Args:
            shared: let in others that share the lock: the ranks of one run.

        The lock saves work, not the results: two runs that run on one store all the same (on a file system without
        locks, or two of many ranks) only compute units twice.

        Raises:
            StoreError: another run holds the lock.
        """
        import fcntl

        with _failures(self.path, "lock", "finished units are kept"):
            file = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            alone = False
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                alone = not shared
                holder = f"process {os.getpid()} on {platform.node()}".encode()
                os.pwrite(file, holder.ljust(200), 0)
            except BlockingIOError as error:
                raise StoreError(
                    f"{self.path} is in use by another run ({os.pread(file, 200, 0).decode().strip()}); wait for it, "
                    f"or pass another out={_launcher_hint()}"
                ) from error
            except OSError:  # a file system without locks, or a full one
                pass
            if alone:
                for leftover in self.path.glob(".*.tmp"):  # of killed processes
                    leftover.unlink(missing_ok=True)
            yield
        finally:
            os.close(file)

    def _file(self, unit: int) -> Path:
        return self.path / f"unit-{unit:05d}.safetensors"

    def _read(self, unit: int) -> dict[str, torch.Tensor]:
        data = self._file(unit).read_bytes()
        try:
            told = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            tensors = load(data)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise _DamagedError(f"is damaged ({len(data)} bytes: {error})") from error
        if told.get("store") != self.key or told.get("unit") != str(unit):
            raise _DamagedError("belongs to another run or unit")
        if told.get("hash") != hash_tensors(tensors):
            raise _DamagedError("is damaged (its contents do not fit its hash)")
        return tensors


class _DamagedError(Exception):
    """A unit's file is not what was written."""


def write_whole(path: Path, data: bytes, *, keep: bool = False) -> None:
    """Write a file so that it is there whole or not at all, also after a crash of the machine.

    Args:
        path: the file.
        data: its contents.
        keep: leave a file that is there already; of several processes the first one wins.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        _write(temporary, data)
        if not keep:
            os.replace(temporary, path)
        elif not path.exists():
            try:
                os.link(temporary, path)
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _failures(path: Path, action: str, kept: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot {action} {path}: {_reason(error)}; {kept}") from error


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / _MANIFEST).read_bytes()))
    except OSError as error:
        raise StoreError(f"cannot read {folder / _MANIFEST}: {_reason(error)}; pass another out=") from error
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(
            f"{folder / _MANIFEST} is not a manifest ({error}); pass another out=, or delete the folder to start over"
        ) from error


def _refuse_others(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise on the first difference that matters, warn of those that may."""
    for name in dict.fromkeys([*new, *old]):
        difference = _difference(old.get(name, _MISSING), new.get(name, _MISSING), name)
        if difference is None:
            continue
        where, was, now = difference
        if name not in INFORMATIVE:
            raise InvalidArgumentError(
                f"{folder} has the results of {_MEANING.get(name, f'another {name}')}: {where} was {_show(was)} and is "
                f"{_show(now)} now; pass another out=, or delete the folder to start over"
            )
        if name == "versions" or where.startswith(("machine.devices", "machine.gpus")):
            warnings.warn(
                f"{folder} was begun with {where} {_show(was)}, and goes on with {_show(now)}: results of its units "
                "may differ by rounding",
                stacklevel=3,
            )


def _difference(old: Any, new: Any, where: str) -> tuple[str, Any, Any] | None:
    """The first place where two manifests differ, and what they say there."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*new, *old]):
            if found := _difference(old.get(name, _MISSING), new.get(name, _MISSING), f"{where}.{name}"):
                return found
        return None
    return None if old == new else (where, old, new)


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _launcher_hint() -> str:
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ""
    return "; for the ranks of one run, call join() (from bkdfast.jobs.units import join) before it"
