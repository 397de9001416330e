"""Networks beyond the laws of test_components: matched pairs, what a picture's row means, how options are read."""

import math

import pytest
import torch
from torch import nn

from pvae.errors import UserError
from pvae.generative import networks
from pvae.generative.networks import MLP, Conv, ResidualMLP, Standardize

LATENT, PARAMETERS = 2, 3  # D, and P parameters of each value

SHAPES = [(1, 1), (1, 7), (3, 5), (8, 8), (28, 28), (9, 6, 3), (2, 1, 4), (5, 4, 1)]


@pytest.fixture(autouse=True)
def seeded(double):
    torch.manual_seed(0)


def widths(network):
    return [(layer.in_features, layer.out_features) for layer in network.modules() if isinstance(layer, nn.Linear)]


def test_a_decoder_mirrors_its_encoder():
    encoder, decoder = MLP(9, 2, hidden=(7, 5, 3)), MLP(2, 9, hidden=(7, 5, 3), decodes=True)
    assert [pair[::-1] for pair in widths(decoder)[::-1]] == widths(encoder)
    assert widths(encoder) == [(9, 7), (7, 5), (5, 3), (3, 2)]


@pytest.mark.parametrize("hidden", [(), (7,), (7, 5)], ids=str)
def test_a_convolutional_decoder_mirrors_its_encoder(hidden):
    encoder = Conv(80, LATENT, shape=(8, 10), channels=(3, 4), hidden=hidden)
    decoder = Conv(LATENT, 80, shape=(8, 10), channels=(3, 4), hidden=hidden, decodes=True)
    assert [pair[::-1] for pair in widths(decoder)[::-1]] == widths(encoder)
    assert widths(encoder)[0][0] == 4 * 2 * 3


def test_gated_layer_is_the_stated_formula():
    network = MLP(4, 5, hidden=[3], activation="GLU")
    (first, _, last), x = network.layers, torch.randn(6, 4)
    linear, gate = first(x)[:, :3], first(x)[:, 3:]
    torch.testing.assert_close(network(x), last(linear / (1 + (-gate).exp())))


@pytest.mark.parametrize("activation", networks.ACTIVATIONS)
@pytest.mark.parametrize("build", [MLP, ResidualMLP, lambda *args, **kw: Conv(*args, shape=(2, 3), **kw)])
def test_every_activation_goes_with_every_network(build, activation):
    assert build(6, 4, activation=activation)(torch.randn(5, 6)).shape == (5, 4)


def test_residual_blocks_start_as_the_identity():
    network, x = ResidualMLP(4, 5, width=6, blocks=8), torch.randn(7, 4)
    assert len(network.blocks) == 8
    torch.testing.assert_close(network(x), network.last(network.first(x)))


def test_residual_block_is_the_stated_formula():
    network, x = ResidualMLP(4, 5, width=6, blocks=1, activation="Tanh"), torch.randn(7, 4)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    norm, inner, _, outer = network.blocks[0]
    h = network.first(x)
    expected = network.last(h + outer(inner(norm(h)).tanh()))
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels", [(4,), (4, 3), (2, 3, 4, 5)], ids=str)
def test_a_picture_of_any_size_is_read_and_written(shape, channels):
    columns = math.prod(shape)
    encoder = Conv(columns, 2 * LATENT, shape=shape, channels=channels, hidden=[6])
    decoder = Conv(LATENT, PARAMETERS * columns, shape=shape, channels=channels, hidden=[6], decodes=True)
    assert encoder(torch.randn(4, 2, columns)).shape == (4, 2, 2 * LATENT)
    assert decoder(torch.randn(4, 2, LATENT)).shape == (4, 2, PARAMETERS * columns)
    assert encoder(torch.randn(0, columns)).shape == (0, 2 * LATENT)


@pytest.mark.parametrize("decodes", [False, True])
def test_a_signal_keeps_its_size_through_the_convolutions(decodes):
    # Under PyTorch's own weights 0.04 of it is left, and the latent collapses.
    inputs, outputs = (8, 256) if decodes else (256, 16)
    network = Conv(inputs, outputs, shape=(16, 16), channels=(32, 64, 64), decodes=decodes)
    assert 0.2 < network(torch.randn(500, inputs)).std() < 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoder_maps_have_the_sizes_of_its_encoder(shape):
    columns = math.prod(shape)
    encoder = Conv(columns, LATENT, shape=shape, channels=(2, 3, 4))
    decoder = Conv(LATENT, columns, shape=shape, channels=(2, 3, 4), decodes=True)
    read = sizes(encoder, nn.Conv2d, torch.randn(1, columns))
    written = sizes(decoder, nn.ConvTranspose2d, torch.randn(1, LATENT))
    assert [(after, before) for before, after in written[::-1]] == read
    assert written[-1][1][1:] == (*shape[:2],)


def sizes(network, kind, rows):
    """(C, H, W) before and after every convolution."""
    found = []
    for layer in network.modules():
        if isinstance(layer, kind):
            layer.register_forward_hook(lambda _, inputs, made: found.append((inputs[0].shape[1:], made.shape[1:])))
    network(rows)
    return found


def test_encoder_sees_rows_as_pictures_with_channels_last():
    height, width, depth = 5, 4, 3
    network, picture = Conv(60, 2, shape=(5, 4, 3), channels=[6]), torch.randn(height, width, depth)
    convolution, *rest = [*network.maps, *network.layers]
    padded = torch.zeros(height + 2, width + 2, depth)
    padded[1:-1, 1:-1] = picture
    maps = torch.empty(1, 6, 3, 2)
    for h in range(3):
        for w in range(2):
            patch = padded[2 * h : 2 * h + 3, 2 * w : 2 * w + 3]
            maps[0, :, h, w] = torch.einsum("ijc,ocij->o", patch, convolution.weight) + convolution.bias
    torch.testing.assert_close(network(picture.flatten()), nn.Sequential(*rest)(maps)[0])


def test_columns_after_the_picture_join_at_the_dense_layers():
    network, row = Conv(6 + 3, 2, shape=(2, 3), channels=[4], hidden=[5], labels=3), torch.randn(9)
    joined = torch.cat([network.maps(row[:6].view(1, 1, 2, 3)), row[None, 6:]], 1)
    torch.testing.assert_close(network(row), network.layers(joined)[0])
    changed = row.clone()
    changed[-1] += 1
    assert not torch.allclose(network(row), network(changed))


def test_decoder_writes_parameters_then_rows_then_columns_then_channels():
    # The last layer's map m belongs to parameter m // C and channel m % C; here it is m everywhere.
    decoder = Conv(LATENT, 2 * 4 * 6 * 3, shape=(4, 6, 3), decodes=True)
    nn.init.zeros_(decoder.layers[-2].weight)
    decoder.layers[-2].bias.data = torch.arange(6.0)
    eta = decoder(torch.randn(5, LATENT)).view(5, 2, 4, 6, 3)
    assert eta.equal((3 * torch.arange(2.0)[:, None, None, None] + torch.arange(3.0)).expand_as(eta))


@pytest.mark.parametrize(("h", "w"), [(0, 0), (1, 2), (2, 0), (2, 2)])
def test_a_values_parameters_depend_on_nearby_features_only(h, w):
    # Two doublings: the feature at i reaches the pixels within 3 of 4 i.
    shape, channels = (9, 11, 2), (3, 4)
    decoder = Conv(LATENT, PARAMETERS * 9 * 11 * 2, shape=shape, channels=channels, activation="Softplus", decodes=True)
    dense, tail = decoder.layers[:5], decoder.layers[5:]
    features = dense(torch.randn(1, LATENT)).detach()
    assert features.shape == (1, 4, 3, 3)
    moved = features.clone()
    moved[:, :, h, w] += 1
    decoder.layers = nn.Sequential(nn.Unflatten(1, features.shape[1:]), *tail)
    before, after = (decoder(maps.flatten()).view(PARAMETERS, *shape) for maps in (features, moved))
    near = (torch.arange(9)[:, None] - 4 * h).abs().le(3) & (torch.arange(11) - 4 * w).abs().le(3)
    assert (before != after).equal(near[..., None].expand(PARAMETERS, *shape))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Conv(63, 4, shape=(8, 8)), "shape [8, 8] holds 64 values, but the row has 63"),
        (lambda: Conv(4, 100, shape=(8, 8), decodes=True), "holds 64 values, but the row has 100"),
        (lambda: Conv(128, 4, shape=(8, 8)), "the row has 128"),
        (lambda: Conv(64, 4, shape=(64,)), "an image has H, W or H, W, C"),
        (lambda: Conv(64, 4, shape=(8, 0)), "shape is (8, 0), but it must be at least 1"),
        (lambda: Conv(64, 4, shape=(8, 8), channels=()), "channels is empty"),
        (lambda: Conv(64, 4, shape=(8, 8), channels=(4, 0)), "channels is (4, 0)"),
        (lambda: Conv(64, 4, shape=(8, 8), hidden=(4, 0)), "hidden is (4, 0)"),
        (lambda: Conv(64, 4, shape=(8, 8), activation="relu"), "Conv: unknown activation 'relu'; did you mean 'ReLU'?"),
        (lambda: MLP(4, 4, hidden=(3, 0)), "MLP: hidden is (3, 0), but it must be at least 1"),
        (lambda: ResidualMLP(4, 4, blocks=0), "blocks is 0"),
        (lambda: ResidualMLP(4, 4, width=1), "width is 1, but it must be at least 2"),
        (lambda: ResidualMLP(4, 4, activation="glu"), "did you mean 'GLU'?"),
    ],
)
def test_bad_option_is_named(build, words):
    with pytest.raises(UserError) as error:
        build()
    assert words in str(error.value)


def test_standardized_rows_are_in_standard_units_and_an_odd_value_does_not_swamp_them():
    rows = torch.randn(500, 3) * torch.tensor([2.0, 300.0, 0.0]) + torch.tensor([-5.0, 1e3, 7.0])
    seen = Standardize(nn.Identity(), rows)(rows)
    torch.testing.assert_close(seen.mean(0), torch.zeros(3), atol=1e-9, rtol=0)
    assert seen.std(0, correction=0)[1].item() == pytest.approx(1)
    assert seen[:, 2].eq(0).all()
    odd = torch.tensor([[-5.0, 1e3, 8.0]])
    assert Standardize(nn.Identity(), rows)(odd)[0, 2] < 0.1  # a column that never varied
