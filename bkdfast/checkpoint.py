"""Models and tokenizers from local folders: no network, no pickles, no progress bars, and errors of one line."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bkdfast.errors import CheckpointError, InvalidArgumentError
from bkdfast.svd.source import open_source


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the bars that transformers shows for every file, and its remarks on configs that no reader can act on."""
    import transformers

    log = transformers.utils.logging
    shown, level = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if shown:
            log.enable_progress_bar()


def load_model(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> torch.nn.Module:
    """Load a causal language model in eval mode from a folder of safetensors files.

    Raises:
        CheckpointError: a file is missing or damaged, transformers cannot build the model, or the files lack some of
            its weights (transformers would make them up).
    """
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    open_source(folder)  # says what is wrong with the files better, and refuses pickles before they are loaded
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json, which says what model it is; add it")
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # whatever transformers raises is the same to the user
        raise CheckpointError(f"transformers cannot load the model in {folder}: {one_line(error)}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the model's weights, among them {missing[0]}; is it a whole "
            f"{type(model).__name__}?"
        )
    return model.eval().to(device)


def load_tokenizer(folder: str | Path) -> Any:
    """Load a model's tokenizer.

    Raises:
        CheckpointError: there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise CheckpointError(f"transformers cannot load the tokenizer in {folder}: {one_line(error)}") from error
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):  # what transformers makes of a folder without one
        raise CheckpointError(f"{folder} has no tokenizer; copy the tokenizer files of its base model there")
    return tokenizer


def usable_device(device: str | torch.device) -> torch.device:
    """The device, once a tensor has been made on it.

    Raises:
        InvalidArgumentError: there is no such device here.
    """
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InvalidArgumentError(f"device {str(device)!r} cannot be used here: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An error's message on one line, shortened; its name where it has none."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__
