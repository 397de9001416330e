"""docs/walkthrough.md: its examples reproduce, and its tables agree with the library and with formulas by hand.

``python tests/test_walkthrough.py`` runs the page and draws its figure.
"""

import doctest
import math
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import rc_context
from oracles import LinearGaussian

from pvae.inference.importance import LogWeights
from pvae.reporting.style import COLOURS, SMALL, STYLE, subplots

PAGE = Path(__file__).parents[1] / "docs" / "walkthrough.md"
PICTURE = PAGE.parent / "images" / "walkthrough.png"
KINDS = ("reparametrized", "score", "baseline")
# Half of a table's last decimal, and rounding errors.
HALF = 0.5e-4 + 1e-9


def run(text):
    """Run the examples of a text as a doctest: the values of their names, outputs that differ, and the number tried."""
    before, said = torch.get_default_dtype(), []
    examples = doctest.DocTestParser().get_doctest(text, {}, PAGE.name, str(PAGE), 0)
    try:
        result = doctest.DocTestRunner(verbose=False).run(examples, out=said.append, clear_globs=False)
    finally:
        torch.set_default_dtype(before)
        torch.set_printoptions(profile="default")
    return SimpleNamespace(names=examples.globs, said="".join(said), failed=result.failed, tried=result.attempted)


@cache
def text():
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page():
    return run(text())


def tables(text):
    """Return the tables of numbers in the order of the page, each [rows, columns] without the counting columns."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    lines = [[line.strip("|\n").split("|") for line in block.splitlines()] for block in blocks]
    counted = [(rows[0].index(" $d$ ") + 1 if " $d$ " in rows[0] else 1, rows[2:]) for rows in lines]
    return [np.array([[float(c) for c in row[n:]] for row in rows]) for n, rows in counted if rows[0][0] == " 1 "]


def forward(w, x, epsilon):
    """Compute everything from the rows to the ELBO, by hand."""
    hidden = np.maximum(x @ w["W1"].T + w["b1"], 0)
    q_params = hidden @ w["W2"].T + w["b2"]
    mean, log_sigma = q_params[:, :2], q_params[:, 2:]
    sigma = np.exp(log_sigma)
    z = mean + sigma * epsilon
    code = np.maximum(z @ w["V1"].T + w["c1"], 0)
    y = code @ w["V2"].T + w["c2"]
    half = ((y - x) ** 2).sum(1) / 2
    log_lik, kl = -half - 2 * np.log(2 * np.pi), (mean**2 + sigma**2 - 1 - 2 * log_sigma).sum(1) / 2
    latent = {"mean": mean, "log_sigma": log_sigma, "sigma": sigma, "epsilon": epsilon, "z": z}
    terms = {"half": half, "log_lik": log_lik, "kl": kl, "elbo": log_lik - kl}
    return SimpleNamespace(x=x, hidden=hidden, q_params=q_params, **latent, code=code, y=y, **terms)


def backward(w, f):
    """Compute the rows' gradients by hand, and those of the mean ELBO with respect to the weights."""
    by_code = (f.x - f.y) @ w["V2"] * (f.code > 0)
    by_z = by_code @ w["V1"]
    by_mean = by_z - f.mean
    by_sigma = by_z * f.epsilon + 1 / f.sigma - f.sigma
    by_q_params = np.hstack([by_mean, f.sigma * by_sigma])
    by_hidden = by_q_params @ w["W2"] * (f.hidden > 0)
    layers = {"W1 b1": (by_hidden, f.x), "W2 b2": (by_q_params, f.hidden), "V1 c1": (by_code, f.z)}
    of_weights = {}
    for names, (out, into) in (layers | {"V2 c2": (f.x - f.y, f.code)}).items():
        weight, bias = names.split()
        of_weights |= {weight: out.T @ into / len(f.x), bias: out.mean(0)}
    return SimpleNamespace(
        by_z=by_z, by_mean=by_mean, by_sigma=by_sigma, by_q_params=by_q_params, of_weights=of_weights
    )


def written_weights():
    """Return the weights that the page prints, by letter."""
    found = re.findall(r"tensor\((\[.*\])\),\s+# (\w)_(\d)$", text(), re.MULTILINE)
    return {letter + digit: np.array(eval(value)) for value, letter, digit in found}


@pytest.fixture(scope="module")
def by_hand():
    """The tables computed without the library."""
    w = written_weights()
    x = np.array([[1.0, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]])
    epsilon = np.array([[0.5, -1.0], [-0.5, 0.2], [1.0, 0.5]])
    f = forward(w, x, epsilon)
    g = backward(w, f)
    after = forward({name: value + 0.1 * g.of_weights[name] for name, value in w.items()}, x, epsilon)
    sampled = ((epsilon**2 - f.z**2) / 2 + f.log_sigma).sum(1)
    chance = 1 / (1 + np.exp(-f.y))
    log_chance = (x * np.log(chance) + (1 - x) * np.log(1 - chance)).sum(1)
    by_dimension = [-f.mean, g.by_mean, g.by_z * epsilon, 1 / f.sigma - f.sigma, g.by_sigma, f.sigma * g.by_sigma]
    log_var = 2 * f.log_sigma
    wrong = f.mean + log_var * epsilon
    expected = [
        np.hstack([f.hidden, f.q_params]),
        np.hstack([f.sigma, epsilon, f.z]),
        np.hstack([f.sigma, abs(log_var), wrong]),
        np.hstack([f.code, f.y]),
        np.column_stack([f.half, f.log_lik, f.kl, f.elbo, sampled]),
        np.column_stack([chance, log_chance]),
        np.hstack([x - f.y, g.by_z]),
        np.column_stack([part.ravel() for part in by_dimension]),
        np.column_stack([f.log_lik, f.kl, f.elbo, after.log_lik, after.kl, after.elbo]),
    ]
    return SimpleNamespace(tables=expected, weights=w, before=f, after=after, gradients=g)


def by_library(names):
    """The tables computed by the page's examples."""
    n = SimpleNamespace(**{k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in names.items()})
    by_sigma = n.by_log_sigma / n.sigma
    kinds = [-n.mean, n.by_mean, n.by_z * n.epsilon, 1 / n.sigma - n.sigma, by_sigma, n.by_log_sigma]
    after = [n.after.log_lik, -n.after.log_prior, n.after.log_w]
    rows = [
        [n.hidden, n.q_params],
        [n.sigma, n.epsilon, n.z],
        [n.sigma, n.log_var.abs(), n.wrong],
        [n.code, n.y],
        [n.half, n.log_lik, n.kl, n.elbo, n.sampled],
        [n.y.sigmoid(), n.bernoulli],
        [n.by_y, n.by_z],
        [torch.stack(kinds, -1).flatten(0, 1)],
        [n.log_lik, n.kl, n.elbo, *after],
    ]
    return [torch.cat([part.detach().reshape(len(t[-1].squeeze(0)), -1) for part in t], 1).numpy() for t in rows]


def test_examples_give_what_is_shown(page):
    assert page.failed == 0, page.said
    assert page.tried > 60


def test_an_example_with_another_output_is_noticed():
    beginning = text().partition("## Standard deviation")[0]
    assert run(beginning).failed == 0
    assert run(beginning.replace("-0.6500", "-0.6501")).failed == 1


@pytest.mark.parametrize("source", ["library", "hand"])
def test_every_number_of_the_tables(page, by_hand, source):
    written = tables(text())
    found = by_hand.tables if source == "hand" else by_library(page.names)
    assert len(written) == len(found) == 9
    for table, values in zip(written, found, strict=True):
        assert table.shape == values.shape
        assert abs(table - values).max() < HALF


def test_a_wrong_last_decimal_is_noticed(by_hand):
    for table, values in zip(tables(text()), by_hand.tables, strict=True):
        for place in np.ndindex(table.shape):
            other = table.copy()
            other[place] += 1e-4
            assert abs(other - values).max() > HALF


def test_numbers_in_sentences(by_hand):
    first = [by_hand.gradients.by_z[0, 0], by_hand.before.mean[0, 0], by_hand.gradients.by_mean[0, 0]]
    assert "= {:.4f} - {:.1f} = {:.4f}$".format(*first) in text()
    assert f"$2 \\log 2 \\pi = {2 * math.log(2 * math.pi):.4f}$" in text()


def test_gradients_by_hand_are_those_of_differences(by_hand):
    w, f, step = by_hand.weights, by_hand.before, 1e-6
    for name, gradient in by_hand.gradients.of_weights.items():
        for place in np.ndindex(gradient.shape):
            ends = []
            for sign in (1, -1):
                moved = w[name].copy()
                moved[place] += sign * step
                ends.append(forward({**w, name: moved}, f.x, f.epsilon).elbo.mean())
            assert abs((ends[0] - ends[1]) / (2 * step) - gradient[place]) < 1e-8


def test_the_step_by_hand(page, by_hand):
    for (name, gradient), weight in zip(by_hand.gradients.of_weights.items(), page.names["weights"], strict=True):
        assert abs(by_hand.weights[name] + 0.1 * gradient - weight.detach().numpy()).max() < 1e-12
    predicted = 0.1 * sum((g**2).sum() for g in by_hand.gradients.of_weights.values())
    gain = (by_hand.after.elbo - by_hand.before.elbo).mean()
    by_kl = (by_hand.before.kl - by_hand.after.kl).mean()
    assert f"gain {gain:.4f}, from the KL {by_kl:.4f}; first-order prediction {predicted:.4f}" in text()


def test_the_elbo_of_many_draws_is_that_of_quadrature(by_hand):
    nodes, masses = np.polynomial.hermite_e.hermegauss(300)
    masses = masses / masses.sum()
    said = [tuple(map(float, pair)) for pair in re.findall(r"^    (-\d\.\d{3}) ± (0\.\d{3})$", text(), re.MULTILINE)]
    assert len(said) == 2
    stepped = {n: v + 0.1 * by_hand.gradients.of_weights[n] for n, v in by_hand.weights.items()}
    for weights, (mean, error) in zip((by_hand.weights, stepped), said, strict=True):
        exact = 0.0
        for node, mass in zip(nodes, masses, strict=True):
            for row in by_hand.before.x:
                epsilon = np.column_stack([np.full(300, node), nodes])
                exact += mass * (masses @ forward(weights, row[None].repeat(300, 0), epsilon).elbo) / 3
        assert abs(mean - exact) < 4 * error + 0.001


def test_means_are_the_closed_forms(page):
    for mean, error in page.names["means"].values():
        assert (abs(mean - torch.tensor([1.0, -1.0])) < 4.5 * error).all()


def test_variances_are_the_closed_forms(page):
    found = page.names["by_dimensions"] | page.names["by_draws"]
    assert len(found) == 27
    for key, (value, error) in found.items():
        assert abs(value - page.names["exact"](*key)) < 4.5 * error


def variances(vae, x, q_params, K):
    r"""Variances [D] of the estimates by mu for correlated posteriors, each kind's.

    With S = diag(sigma), c = L (m - mu), u = S c and M = I - S L S, log w is a constant and u' e + e' M e / 2; the
    reparametrized gradient is c - L S e. Normal moments give E[(log w - ELBO)^2 e_i^2]; the baseline of the other draws
    makes the estimate the sample covariance of log w and the score.
    """
    mu, sigma = q_params[: len(q_params) // 2].double(), q_params[len(q_params) // 2 :].double().exp()
    L = vae.precision
    u = sigma * (L @ (vae.mean(x[None])[0] - mu))
    M = torch.eye(len(mu)).double() - sigma[:, None] * L * sigma
    elbo, spread = vae.elbo(q_params[None], x[None])[0], (u**2).sum() + (M**2).sum() / 2
    second = spread + 2 * u**2 + 2 * (M @ M).diag()
    covariance = second - (K - 2) / (K - 1) * u**2 + spread / (K - 1)
    score = second - u**2 + elbo**2 + 2 * elbo * M.diag()
    path = ((L * sigma) ** 2).sum(1)
    return dict(zip(KINDS, (path / K, score / sigma**2 / K, covariance / sigma**2 / K), strict=True))


@pytest.mark.parametrize(("D", "K"), [(1, 2), (1, 16), (16, 2), (256, 16)])
def test_the_pages_closed_forms_are_those_of_any_linear_gaussian(page, double, D, K):
    vae = LinearGaussian(D, D, scale=1.0)
    vae.decoder.weight.copy_(torch.eye(D))
    vae.decoder.bias.zero_()
    general = variances(vae, torch.ones(D), torch.zeros(2 * D), K)
    for how in KINDS:
        assert torch.allclose(general[how], torch.tensor(page.names["exact"](D, K, how)))


@pytest.mark.parametrize("how", KINDS)
def test_correlated_posteriors_too(page, double, how):
    vae, K, repeats = LinearGaussian(3, 5), 4, 20_000
    x, q_params = vae.sample(1)[0], torch.tensor([0.3, -0.2, 0.1, -0.4, -0.8, -0.2])
    torch.manual_seed(1)
    found = page.names["gradients"](vae, x.expand(repeats, -1), q_params.expand(repeats, -1), K, how)
    leaf = q_params.clone().requires_grad_()
    (exact,) = torch.autograd.grad(vae.elbo(leaf[None], x[None]).sum(), leaf)
    assert (abs(found.mean(0) - exact) < 4.5 * found.std(0) / repeats**0.5).all()
    squared = ((found - exact) ** 2)[:, :3]
    assert (abs(squared.mean(0) - variances(vae, x, q_params, K)[how]) < 4.5 * squared.std(0) / repeats**0.5).all()


def test_a_baseline_that_knows_the_draw_is_noticed(page, double, monkeypatch):
    """The mean of all draws, the own one too, shrinks the gradient by (K - 1) / K."""
    K = 4
    own = {"baseline": lambda w: (w.log_w - w.log_w.mean(0)).detach() * w.log_q}
    monkeypatch.setitem(page.names, "surrogates", own)
    torch.manual_seed(2)
    found = page.names["repeated"](4, K, "baseline", 20_000)[:, :4].mean(1)
    error = found.std() / 20_000**0.5
    assert abs(found.mean() - (K - 1) / K) < 4.5 * error < abs(found.mean() - 1)


def test_the_baseline_of_others_is_a_sample_covariance(page, double):
    torch.manual_seed(3)
    log_w, score = torch.randn(2, 5, 7)
    w = LogWeights(log_w + score, torch.zeros(5, 7), score)
    covariance = ((log_w - log_w.mean(0)) * (score - score.mean(0))).sum(0) / 4
    assert torch.allclose(page.names["surrogates"]["baseline"](w).mean(0), covariance)


def test_noise_of_a_steep_wave_by_quadrature():
    nodes, masses = np.polynomial.hermite_e.hermegauss(200)
    masses = masses / masses.sum()
    for values, said in ((10 * np.cos(10 * nodes), 50.0), (nodes * np.sin(10 * nodes), 0.5)):
        assert masses @ values**2 - (masses @ values) ** 2 == pytest.approx(said, rel=1e-3)
    assert re.search(r"^    50\.0 and 0\.50$", text(), re.MULTILINE)


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", re.sub(r"^    .*", "", text(), flags=re.MULTILINE))
    assert len(targets) >= 2
    assert all((PAGE.parent / target).exists() for target in targets)


def test_the_picture_can_be_drawn_again(page, tmp_path):
    assert PICTURE.is_file()
    draw(page.names, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


LABELS = {"score": "score function", "baseline": "score function, baseline", "reparametrized": "reparametrization"}


def draw(names, path):
    """Measured variances over dimensions and over draws, and the formulas as lines."""
    with rc_context(STYLE):
        figure, axes = subplots(2, width=8.6, height=3.4)
        curves(axes[0], names, "by_dimensions", 0, [(D, 16) for D in np.geomspace(1, 256)])
        curves(axes[1], names, "by_draws", 1, [(16, K) for K in np.geomspace(2, 128)])
        axes[0].set(xlabel="latent dimensions D", title="16 draws")
        axes[1].set(xlabel="draws K", title="16 latent dimensions")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, **SMALL)
        figure.savefig(path, dpi=160)


def curves(axis, names, measured, which, line):
    """One panel: a line and marks for each estimate, over D (which is 0) or K (1)."""
    for (how, label), colour, mark in zip(LABELS.items(), COLOURS[1::-1] + COLOURS[2:3], "sDo", strict=True):
        points = {key[which]: value for key, value in names[measured].items() if key[2] == how}
        values, errors = zip(*points.values(), strict=True)
        bars = [2 * error for error in errors]
        axis.errorbar(list(points), values, bars, fmt=mark, ms=4.5, color=colour, capsize=2.5, label=label)
        axis.plot([pair[which] for pair in line], [names["exact"](*pair, how) for pair in line], color=colour, lw=1)
    ticks = list(points)
    axis.set(xscale="log", yscale="log", ylabel="variance of ∂ELBO / ∂μ / nats²")
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()


if __name__ == "__main__":
    found = run(text())
    print(found.said, end="")
    draw(found.names, PICTURE)
