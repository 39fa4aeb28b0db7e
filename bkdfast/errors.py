"""Every exception `bkdfast` raises on purpose.

All derive from `BkdfastError`, so `except bkdfast.BkdfastError` catches them; each also derives from the built-in
class a Python reader expects (`ValueError`, `TypeError`, `RuntimeError`). A message says what was wrong, what was
found, and what to do.
"""

from __future__ import annotations

from typing import Any


class BkdfastError(Exception):
    """Base class of all errors raised by `bkdfast`."""


class InvalidArgumentError(BkdfastError, ValueError):
    """An argument has a value, shape or range that cannot be used."""


class InvalidTypeError(BkdfastError, TypeError):
    """An argument has the wrong Python type or tensor dtype."""


class UnsupportedModelError(BkdfastError, ValueError):
    """The model's architecture is not known, or is refused by name until it is done right."""


class ModelStateError(BkdfastError, RuntimeError):
    """The model is in a state in which the request would give wrong results (train mode, compiled but not prepared)."""


class CheckpointError(BkdfastError, ValueError):
    """A checkpoint folder or file is missing, malformed, or does not fit its counterpart."""


class NonFiniteError(BkdfastError, ValueError):
    """NaN or infinity where a number was needed; the message names the tensor."""


class BackendError(BkdfastError, RuntimeError):
    """The requested backend cannot serve this op here; the message says why."""


class VerificationError(BkdfastError, AssertionError):
    """A re-check found a result that differs from the plain computation by more than rounding."""


class StoreError(BkdfastError, RuntimeError):
    """A folder of results cannot be read, written or shared; the message says which finished work is kept."""


class MissingDependencyError(BkdfastError, ImportError):
    """An optional dependency is not installed; the message says how to install it."""


def optional(module: str, what: str, extra: str) -> Any:
    """A module of the extra `bkdfast[extra]`, which `what` needs.

    Raises:
        MissingDependencyError: it cannot be imported.
    """
    try:
        return __import__(module)
    except ImportError as error:
        raise MissingDependencyError(
            f'{what} needs {module}, which cannot be imported ({error}); pip install "bkdfast[{extra}]"'
        ) from error
