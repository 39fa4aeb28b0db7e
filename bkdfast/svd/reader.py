"""Reading tensors of one safetensors file into memory of their own, whole or by rows.

`safetensors` maps the file: its tensors come into memory page by page, while a kernel computes on them. A thread can
then read nothing ahead, and what is mapped counts as resident for as long as the tensor lives. Here the bytes are read
when they are asked for, into a buffer that is gone with the tensor. That a file is complete, and its header sound, is
`open_file`'s business.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bkdfast.errors import CheckpointError

_CHUNK = 64 << 20  # bytes of one read
_MAPPED = 1 << 20  # bytes from which on a buffer is mapped
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


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype (None where torch has none), shape, and where its bytes are."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class TensorFile:
    """A safetensors file, by its header; opened for each read, so that thousands of shards need no open files.

    Attributes:
        path: the file.
        entries: what is in it, by name.
        stamp: 32 bytes that change with the file's size or times: where they are the same, so are its contents.

    Raises:
        CheckpointError: it cannot be read, or its header is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb", buffering=0) as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                stat = os.fstat(file.fileno())
                self._state = stat.st_size, stat.st_mtime_ns
            start = 8 + length
            self.entries = {
                name: Entry(
                    DTYPES.get(told["dtype"]),
                    tuple(told["shape"]),
                    start + told["data_offsets"][0],
                    told["data_offsets"][1] - told["data_offsets"][0],
                )
                for name, told in header.items()
                if name != "__metadata__"
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
            raise CheckpointError(f"{path} cannot be read as a safetensors file: {error}; save it again") from error
        self.stamp = hashlib.sha256(repr((*self._state, stat.st_ctime_ns)).encode()).digest()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` of a tensor (of its first dimension), or all of it.

        Raises:
            CheckpointError: torch has no such dtype, the file was changed or cut since it was opened, or it cannot be
                read.
        """
        entry = self.entries[name]
        if entry.dtype is None:
            raise CheckpointError(f"{name} of {self.path} has a dtype that torch lacks; convert it first")
        shape, offset = entry.shape, entry.offset
        if (start, stop) != (0, None):
            stop = shape[0] if stop is None else min(stop, shape[0])
            shape = (stop - start, *shape[1:])
            offset += start * math.prod(shape[1:]) * entry.dtype.itemsize
        buffer = _buffer(math.prod(shape) * entry.dtype.itemsize)
        self._fill(name, buffer.numpy().data, offset)
        return buffer.view(entry.dtype).reshape(shape)

    def _fill(self, name: str, view: memoryview, offset: int) -> None:
        try:
            with open(self.path, "rb", buffering=0) as file:
                stat = os.fstat(file.fileno())
                state = stat.st_size, stat.st_mtime_ns  # a new link or mode, which also counts as a change, is none
                file.seek(offset)
                done = 0
                while done < len(view) and state == self._state:
                    count = file.readinto(view[done : done + _CHUNK])
                    if not count:
                        break
                    done += count
        except OSError as error:
            raise CheckpointError(f"cannot read {name} from {self.path}: {error.strerror or error}") from error
        if state != self._state or done < len(view):
            raise CheckpointError(f"{self.path} was changed while it was being read (at {name}); run again")


def _buffer(size: int) -> Tensor:
    """Bytes that go back to the system with the tensor: the heap keeps what it is given in pieces of this size."""
    if size < _MAPPED or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
