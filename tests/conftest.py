"""One thread, no display; double precision and the command line for the tests that ask for them."""

import os
import shlex
from typing import NamedTuple

import pytest
import torch

os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
torch.set_num_threads(1)


@pytest.fixture
def double():
    """Run the test with float64 as PyTorch's default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Done(NamedTuple):
    """What a command gave."""

    status: int
    out: str
    err: str


@pytest.fixture
def pvae(capsys):
    """A function from a command line to what it gave, run in this process."""
    from pvae.cli.app import main

    def run(line):
        capsys.readouterr()
        return Done(main(shlex.split(line)), *capsys.readouterr())

    return run
