"""Graphs give the function's own values, of the present state and random stream, to the bit; or they are refused."""

import numpy as np
import pytest
import torch
from torch import nn

from pvae.runtime.torch_state import seeded
from pvae.runtime.tracing import AutoTraced, TracedFunction, TraceError, trace_function


def noisy(network):
    """Loss and gradients of a network with noise in its middle."""

    def function(x):
        loss = (network(x + torch.randn_like(x)) ** 2).sum()
        return (loss.detach(), *torch.autograd.grad(loss, list(network.parameters())))

    return function


def network():
    with seeded(0):
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def same(found, expected):
    return all(one.equal(other) for one, other in zip(found, expected, strict=True))


def test_replays_are_the_function_to_the_bit_while_parameters_move():
    net, x = network(), torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    function, torch_stream = noisy(net), torch.get_rng_state()
    traced = TracedFunction(function, net)
    for step in range(4):
        with seeded(step):
            found, after = traced(x + step), torch.rand(1)
        with seeded(step):
            expected = function(x + step)
            assert same(found, expected)
            assert torch.rand(1).equal(after)
        with torch.no_grad():
            for parameter, gradient in zip(net.parameters(), expected[1:], strict=True):
                parameter -= 0.1 * gradient
    assert torch_stream.equal(torch.get_rng_state())
    assert traced.compile_cost.seconds > traced.compile_cost.saved > 0


def test_other_shapes_and_strides_are_traced_too():
    function = lambda x: (x.view(-1).cumsum(0) if x.is_contiguous() else x.flatten() * 2,)  # noqa: E731
    traced, x = TracedFunction(function), torch.arange(6.0).view(2, 3)
    for inputs in (x, x.mT, x[:, :2], x, x.mT.contiguous()):
        assert traced(inputs)[0].equal(function(inputs)[0])


def test_tracing_restores_buffers_and_the_random_stream():
    norm = nn.BatchNorm1d(3)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    with seeded(3):
        graph = trace_function(lambda x: (norm(x) + torch.randn(3),), [*norm.parameters(), *norm.buffers()], [x])
        assert norm.running_mean.equal(torch.zeros(3))
        assert norm.num_batches_tracked == 0
        drawn = torch.rand(1)
    with seeded(3):
        assert torch.rand(1).equal(drawn)
    with torch.no_grad():
        graph(*norm.parameters(), *norm.buffers(), x)
    assert torch.allclose(norm.running_mean, 0.1 * x.mean(0))


def test_masks_give_shapes_and_values_do_not():
    mask = torch.tensor([True, False, True])
    assert trace_function(lambda x: (x[:, mask.nonzero().squeeze(1)],), [], [torch.ones(2, 3)])(torch.eye(3))[
        0
    ].shape == (3, 2)
    with pytest.raises(TraceError, match="depends on values"):
        trace_function(lambda x: (x[x > 0],), [], [torch.ones(2)])
    with pytest.raises(TraceError, match="value out of a tracing tensor"):
        trace_function(lambda x: (x if x.sum() > 0 else -x,), [], [torch.ones(2)])


def test_shapes_that_take_turns_are_each_validated_on_their_own():
    repeated = AutoTraced(lambda x: (x.view(len(x) // 2, 2).sum(0),), after=1)
    for k in range(12):
        x = torch.arange(4.0 + 2 * (k % 2)) + k
        assert repeated(x)[0].equal(x.view(-1, 2).sum(0))
    assert [replay.graph is not None for replay in repeated.replays.values()] == [True, True]


def test_values_that_leave_for_numpy_are_noticed():
    for out in (lambda x: x.numpy().sum(), lambda x: x.tolist()[0], lambda x: np.asarray(x).sum()):
        with pytest.raises(TraceError, match="reads a tensor's values"):
            trace_function(lambda x, out=out: (x * float(out(x)),), [], [torch.ones(2)])


@pytest.mark.parametrize("breaks", [False, True])
def test_a_repeated_function_is_traced_only_if_it_can_be(breaks):
    calls = []

    def function(x):
        calls.append(1)
        return (x * (2.0 if not breaks or x.sum() > 0 else 3.0),)

    repeated = AutoTraced(function, after=2)
    for k in range(10):
        assert repeated(torch.full((2,), float(k)))[0].equal(torch.full((2,), 2.0 * k))
    assert (len(calls) < 10) is not breaks


def test_a_graph_that_gives_other_values_is_not_used():
    state = {"calls": 0}

    def changing(x):
        state["calls"] += 1
        return (x * state["calls"],)

    repeated = AutoTraced(changing, after=2)
    assert AutoTraced(lambda x: (x,), after=0)(torch.ones(1))[0] == 1
    found = [repeated(torch.ones(1))[0].item() for _ in range(6)]
    assert found == sorted(set(found))


def test_a_repeated_function_is_compiled_when_that_would_have_paid(monkeypatch):
    asked = []
    monkeypatch.setattr("pvae.runtime.tracing.compile_graph", lambda graph, inputs: asked.append(len(calls)) or graph)
    monkeypatch.setattr("pvae.runtime.tracing.COMPILING", 1e-5)
    monkeypatch.setattr("pvae.runtime.tracing.COMPILING_EACH", 0.0)
    calls = []
    repeated = AutoTraced(lambda x: (2 * x + torch.rand(2),), after=3)
    with seeded(0):
        found = []
        for k in range(12):
            calls.append(k)
            found.append(repeated(torch.full((2,), float(k)))[0])
    with seeded(0):
        assert all(one.equal(2 * torch.full((2,), float(k)) + torch.rand(2)) for k, one in enumerate(found))
    # Traced at 4, validated at 5; compiling at 10 microseconds pays after one more call of three operations, 7 each.
    assert asked == [6]


@pytest.mark.slow
def test_compiled_graphs_round_differently_and_draw_alike():
    net, x = network().double(), torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).double()
    traced = TracedFunction(noisy(net), net, compile=True)
    for step in range(3):
        with seeded(step):
            found = traced(x + step)
        with seeded(step):
            for one, other in zip(found, noisy(net)(x + step), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
