import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """The matrices are small: on a busy machine thread barriers would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
