"""What every test starts from: one thread, no network, fixed seeds, no compiled graph of another test."""

import logging
import os
import random
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
logging.getLogger("torch").propagate = False  # thousands of trace records below every failure
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
settings.register_profile(
    "bkdfast",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("bkdfast")


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads():
    yield
    torch.set_num_threads(1)


@pytest.fixture
def fresh_dynamo():
    """Compiled graphs of other tests neither serve nor count against the recompile limit."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def pytest_report_header() -> str:
    from bkdfast.ops._library import EXTENSION

    compiled = EXTENSION.path.name if EXTENSION.path else f"not loaded ({EXTENSION.reason})"
    return f"bkdfast: compiled library {compiled}; torch {torch.__version__}, Python {sys.version.split()[0]}"
