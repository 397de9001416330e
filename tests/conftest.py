"""One thread, no display, and double precision for the tests that ask for it."""

import os

import pytest
import torch

os.environ["MPLBACKEND"] = "Agg"
torch.set_num_threads(1)


@pytest.fixture
def double():
    """Run the test with float64 as PyTorch's default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
