"""Precision: fewer bits in the networks' products and nowhere else."""

import pytest
import torch
from torch import nn

from pvae.errors import UserError
from pvae.runtime.precision import PRECISIONS, matmul_precision
from tests.training.test_svi_engines import trained

CPU = torch.device("cpu")


def test_layers_multiply_bfloat16_and_give_float32():
    x, layer = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)), nn.Linear(50, 20)
    exact = nn.functional.linear(
        x.bfloat16().double(), layer.weight.bfloat16().double(), layer.bias.bfloat16().double()
    )
    with matmul_precision("bf16", CPU):
        found = layer(x)
    assert found.dtype == torch.float32
    # The result is rounded to 8 bits of mantissa, half a unit up or down.
    torch.testing.assert_close(found.double(), exact.detach(), rtol=2**-8, atol=1e-6, check_dtype=False)
    assert not found.equal(layer(x))


def test_gradients_are_float32_and_go_through_the_same_products():
    x, layer = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)), nn.Linear(50, 20)
    with matmul_precision("bf16", CPU):
        layer(x).sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    expected = x.bfloat16().float().sum(0).expand(20, -1)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=2**-8, atol=0.05)


def test_all_other_operations_keep_their_bits():
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    plain = x @ x, x.exp(), torch.distributions.Normal(x, 1.0).log_prob(x + 1)
    with matmul_precision("bf16", CPU):
        assert all(
            a.equal(b)
            for a, b in zip(plain, (x @ x, x.exp(), torch.distributions.Normal(x, 1.0).log_prob(x + 1)), strict=True)
        )


def test_a_fit_takes_it_by_any_engine_and_leaves_it():
    exact, plain = trained("pyro")
    report, low = trained("pyro", precision="bf16")
    assert all(a.equal(b) for a, b in zip(trained("traced", precision="bf16")[1], low, strict=True))
    assert not any(a.equal(b) for a, b in zip(plain, low, strict=True))
    for row, like in zip(report.history, exact.history, strict=True):
        assert row["objective"] == pytest.approx(like["objective"], rel=0.01)
    assert all(a.equal(b) for a, b in zip(trained("pyro")[1], plain, strict=True))


def test_unknown_and_unavailable_precisions_are_refused():
    with pytest.raises(UserError, match="unknown precision 'bf61'; did you mean 'bf16'"):
        trained("pyro", precision="bf61")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="precision=tf32 needs CUDA, but the device is cpu; use float32 or bf16"):
            trained("pyro", precision="tf32")
    assert PRECISIONS[0] == "float32"
