"""Folders and files that commands write."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from bkdfast.errors import InvalidArgumentError


@contextlib.contextmanager
def folder(out: Path) -> Iterator[None]:
    """Make the folder, or fail before hours of work; a new one that stays empty is removed."""
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgumentError(f"cannot write to {out}: {error}") from None
    if not os.access(out, os.W_OK):
        raise InvalidArgumentError(f"{out} is not a folder that can be written to; choose another --out")
    try:
        yield
    finally:
        if new:
            with contextlib.suppress(OSError):  # not empty
                out.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
